"""Operations on a batch of uint8 images, with an amount for each image of its own: on the CPU or a GPU alike.

Each takes images (R, 3, H, W) uint8 and amounts (R,) float32, and gives uint8 images again, so that
the value range is kept whatever is done. Apart from `noise` they are torchvision's functional operations
(its rounding included), which take one amount for a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NOISE = 0.08 * 255
"""Standard deviation of `noise`, in grey levels."""

LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in a grey image (ITU-R BT.601)."""


def brightness(images: Tensor, amount: Tensor) -> Tensor:
    """Each value times the amount."""
    return _cut(images.float().mul_(_column(amount)))


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Each value's distance from the image's mean grey times the amount."""
    x = images.float()
    # A sum of whole numbers is the same whatever the order and the number of threads.
    mean = _grey(x).int().sum((2, 3), keepdim=True) / x[0, 0].numel()
    return _cut(x.mul_(_column(amount)).add_(mean * (1 - _column(amount))))


def saturation(images: Tensor, amount: Tensor) -> Tensor:
    """Each value's distance from the pixel's grey times the amount; 0 is a grey image."""
    x = images.float()
    grey = _grey(x).floor_()
    return _cut(x.mul_(_column(amount)).add_(grey.mul_(1 - _column(amount))))


def hue(images: Tensor, amount: Tensor) -> Tensor:
    """Colours turned by the amount, a share of the colour circle in [-0.5, 0.5]."""
    x = images.float()
    red, green, blue = x.unbind(1)
    top, low = x.amax(1), x.amin(1)
    chroma = top - low
    safe = chroma.clamp(min=1)
    # The colour circle in sixths, 0 at red; where two channels are the largest either formula gives the same.
    sixths = torch.where(
        top == red,
        (green - blue) / safe,
        torch.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths += 6 * amount.view(-1, 1, 1)
    # Red, green and blue of a hue, each from its own distance on the circle: no case for each sixth of it.
    away = [(sixths + n).remainder_(6) for n in (5, 3, 1)]
    turned = [top - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in away]
    return _cut(torch.stack(turned, 1).mul_(255.999 / 255))


def grey(images: Tensor, amount: Tensor) -> Tensor:
    """Grey images; the amount has no meaning."""
    return _cut(_grey(images.float())).expand_as(images)


def sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """Each value's distance from its 3 x 3 neighbourhood times the amount; above 1 sharpens, the rim stays."""
    x = images.float()
    inner = x[..., 1:-1, 1:-1]
    columns = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    around = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    smooth = around.add_(inner, alpha=4).div_(13).round_()
    inner += (smooth - inner).mul_(1 - _column(amount))
    return _cut(x)


def blur(images: Tensor, amount: Tensor) -> Tensor:
    """Gaussian blur, the amount its sigma in pixels; the kernel is a tenth of the side wide, and odd."""
    reach = max(3, int(0.1 * min(images.shape[2:])) // 2 * 2 + 1) // 2
    place = torch.arange(-reach, reach + 1, device=images.device)
    weights = torch.exp(-0.5 * (place / amount[:, None]) ** 2)
    weights /= weights.sum(1, keepdim=True)
    x = images.float()
    for direction in ((reach, reach, 0, 0), (0, 0, reach, reach)):
        padded = F.pad(x, direction, mode="reflect")
        along = 3 if direction[0] else 2
        side = x.shape[along]
        x = padded.narrow(along, reach, side) * _column(weights[:, reach])
        for k in range(reach):  # the kernel is even: each pair of places shares its weight
            pair = padded.narrow(along, k, side) + padded.narrow(along, 2 * reach - k, side)
            x.addcmul_(pair, _column(weights[:, k]))
    return _cut(x.round_())


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """The amount's number of leading bits of each value; the others are 0."""
    return images & (256 - 2 ** (8 - amount.int())).byte().view(-1, 1, 1, 1)


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Values from the amount on inverted."""
    return torch.where(images >= _column(amount), 255 - images, images)


def autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    """Each channel stretched to the whole range; the amount has no meaning."""
    low, top = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    flat = top == low
    low = torch.where(flat, 0.0, low)
    scale = torch.where(flat, 1.0, 255 / (top - low).clamp(min=1))
    return _cut(images.float().sub_(low).mul_(scale))


def equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Each channel's values spread so that they are about equally frequent; the amount has no meaning."""
    values = images.flatten(2).long()
    count = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    below = count.cumsum(2) - count
    step = below.where(count > 0, 0).amax(2, keepdim=True) // 255  # all but those of the largest value there is
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table).byte()
    return table.gather(2, values).view_as(images)


def shear_x(images: Tensor, amount: Tensor) -> Tensor:
    """Rows moved left by the amount times their number."""
    return _moved(images, lambda x, y, h, w: (x + amount.view(-1, 1, 1) * (y + h / 2), y))


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """Columns moved up by the amount times their number."""
    return _moved(images, lambda x, y, h, w: (x, y + amount.view(-1, 1, 1) * (x + w / 2)))


def translate_x(images: Tensor, amount: Tensor) -> Tensor:
    """Images moved right by the whole pixels of the amount."""
    return _moved(images, lambda x, y, h, w: (x - amount.trunc().view(-1, 1, 1), y))


def translate_y(images: Tensor, amount: Tensor) -> Tensor:
    """Images moved down by the whole pixels of the amount."""
    return _moved(images, lambda x, y, h, w: (x, y - amount.trunc().view(-1, 1, 1)))


def rotate(images: Tensor, amount: Tensor) -> Tensor:
    """Images turned about their centre by the amount, in degrees, against the clock."""
    angle = (amount * (math.pi / 180)).view(-1, 1, 1)
    sin, cos = angle.sin(), angle.cos()
    return _moved(images, lambda x, y, h, w: (cos * x - sin * y, sin * x + cos * y))


def noise(images: Tensor, seeds: Tensor) -> Tensor:
    """Gaussian noise of `NOISE` grey levels, a function of each image's seed (R,) int64 on any device."""
    count = images[0].numel()
    place = torch.arange((count + 1) // 2, device=images.device, dtype=torch.int32)
    low, high = seeds.to(torch.int32)[:, None], (seeds >> 32).to(torch.int32)[:, None]
    # A hash of 32 bits for every two values: 2^16 levels, evenly spread in probability, for each.
    bits = _hash(_hash(place + low).bitwise_xor_(high)).view(torch.int16)[:, :count]
    normal = bits.float().add_(0.5).div_(2**15).erfinv_()
    return _cut(normal.view(images.shape).mul_(NOISE * math.sqrt(2)).add_(images.float()).round_())


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        brightness, contrast, saturation, hue, grey, sharpness, blur, posterize, solarize, autocontrast, equalize,
        shear_x, shear_y, translate_x, translate_y, rotate, noise,
    )
}  # fmt: skip
"""Every operation by name."""

KEEP = "keep"
"""The name of no operation at all."""


@dataclass(frozen=True)
class Edits:
    """What is still to be done to a batch of images, one operation after the other.

    operations: (B, L) names from `OPERATIONS` or `KEEP`. amounts: (B, L) float32. seeds: (B,) int64,
    for noise. They stay in memory wherever the images are, so that nothing waits for a GPU.
    """

    operations: np.ndarray
    amounts: np.ndarray
    seeds: np.ndarray

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice | np.ndarray) -> Edits:
        """The edits of some of the images."""
        return Edits(self.operations[rows], self.amounts[rows], self.seeds[rows])

    @classmethod
    def none(cls, count: int, length: int = 0, seeds: np.ndarray | None = None) -> Edits:
        """`length` steps for `count` images in which nothing is done."""
        amounts = np.zeros((count, length), dtype=np.float32)
        operations = np.full((count, length), KEEP, dtype=f"<U{max(map(len, OPERATIONS))}")
        return cls(operations, amounts, np.zeros(count, dtype=np.int64) if seeds is None else seeds)

    @classmethod
    def joined(cls, parts: Sequence[Edits]) -> Edits:
        """The edits of several batches one after the other."""
        length = max(p.operations.shape[1] for p in parts)
        padded = [cls.none(len(p), length, p.seeds) for p in parts]
        for part, into in zip(parts, padded, strict=True):
            into.operations[:, : part.operations.shape[1]] = part.operations
            into.amounts[:, : part.amounts.shape[1]] = part.amounts
        return cls(*(np.concatenate([getattr(p, f.name) for p in padded]) for f in fields(cls)))

    def __call__(self, images: Tensor) -> Tensor:
        """Carry the edits out: (B, 3, S, S) uint8 -> the same, in place, on the images' device."""
        # What one operation makes of a few images stays in a CPU's cache; a GPU wants them all at once.
        at_once = max(1, 2**19 // max(1, images[0].numel())) if images.device.type == "cpu" else len(self)
        for k in range(self.operations.shape[1]):
            names = self.operations[:, k]
            for name in sorted(set(names) - {KEEP}):
                chosen = np.flatnonzero(names == name)
                numbers = self.seeds if name == "noise" else self.amounts[:, k]
                for start in range(0, len(chosen), at_once):
                    rows = chosen[start : start + at_once]
                    index = torch.from_numpy(rows).to(images.device, non_blocking=True)
                    given = torch.from_numpy(numbers[rows]).to(images.device, non_blocking=True)
                    made = OPERATIONS[name](images.index_select(0, index), given)
                    if images.device.type == "cpu":
                        images.numpy()[rows] = made.numpy()  # a copy of whole images; torch's goes byte by byte
                    else:
                        images.index_copy_(0, index, made)
        return images


def _column(amount: Tensor) -> Tensor:
    return amount.view(-1, 1, 1, 1)


def _cut(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).short().byte()  # straight to bytes, torch takes three times as long on a CPU


def _grey(x: Tensor) -> Tensor:
    """(R, 3, H, W) float32 -> (R, 1, H, W)."""
    red, green, blue = x.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


Source = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def _moved(images: Tensor, source: Source) -> Tensor:
    """Each pixel from where `source` says, bilinear, black from outside; x and y count from the centre in pixels."""
    count, _, height, width = images.shape
    y = torch.arange(height, device=images.device).view(1, -1, 1) - (height - 1) / 2
    x = torch.arange(width, device=images.device).view(1, 1, -1) - (width - 1) / 2
    from_x, from_y = source(x, y, height, width)
    shape = (count, height, width)
    grid = torch.stack([(from_x / (width / 2)).expand(shape), (from_y / (height / 2)).expand(shape)], dim=3)
    return _cut(F.grid_sample(images.float(), grid, padding_mode="zeros", align_corners=False).round_())


def _hash(z: Tensor) -> Tensor:
    """A hash of int32 values, in place: lowbias32 (C. Wellons 2018, "Prospecting for hash functions")."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        z.bitwise_xor_((z >> shift).bitwise_and_(2 ** (32 - shift) - 1)).mul_(factor)
    return z.bitwise_xor_((z >> 16).bitwise_and_(0xFFFF))
