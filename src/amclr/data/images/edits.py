"""Operations on batches of uint8 images, with an individual amount for each image, on the CPU or a GPU.

Each operation takes images (R, 3, H, W) uint8 and amounts (R,) float32, and returns uint8 images, so the value
range is always kept. Except for `noise`, they equal torchvision's functional operations, including the rounding,
which only take one amount for a whole batch.
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
    """Multiply each value by the amount."""
    return _cut(images.float().mul_(_column(amount)))


def contrast(images: Tensor, amount: Tensor) -> Tensor:
    """Multiply each value's distance from the image's mean grey by the amount."""
    x = images.float()
    # A sum of integers does not depend on the order or the number of threads.
    mean = _grey(x).int().sum((2, 3), keepdim=True) / x[0, 0].numel()
    return _cut(x.mul_(_column(amount)).add_(mean * (1 - _column(amount))))


def saturation(images: Tensor, amount: Tensor) -> Tensor:
    """Multiply each value's distance from the pixel's grey by the amount; 0 gives a grey image."""
    x = images.float()
    grey = _grey(x).floor_()
    return _cut(x.mul_(_column(amount)).add_(grey.mul_(1 - _column(amount))))


def hue(images: Tensor, amount: Tensor) -> Tensor:
    """Rotate hues by the amount, a share of the colour circle in [-0.5, 0.5]."""
    x = images.float()
    red, green, blue = x.unbind(1)
    top, low = x.amax(1), x.amin(1)
    chroma = top - low
    safe = chroma.clamp(min=1)
    # The colour circle in sixths, 0 at red; if two channels are both largest, either formula gives the same.
    sixths = torch.where(
        top == red,
        (green - blue) / safe,
        torch.where(top == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths += 6 * amount.view(-1, 1, 1)
    # Red, green and blue of a hue, each from its distance on the circle, without a case for each sixth.
    away = [(sixths + n).remainder_(6) for n in (5, 3, 1)]
    turned = [top - chroma * torch.minimum(k, 4 - k).clamp_(0, 1) for k in away]
    return _cut(torch.stack(turned, 1).mul_(255.999 / 255))


def grey(images: Tensor, amount: Tensor) -> Tensor:
    """Convert to grey; the amount is ignored."""
    return _cut(_grey(images.float())).expand_as(images)


def sharpness(images: Tensor, amount: Tensor) -> Tensor:
    """Multiply each value's distance from its 3 x 3 neighbourhood by the amount; above 1 sharpens. Borders stay."""
    x = images.float()
    inner = x[..., 1:-1, 1:-1]
    columns = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    around = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    smooth = around.add_(inner, alpha=4).div_(13).round_()
    inner += (smooth - inner).mul_(1 - _column(amount))
    return _cut(x)


def blur(images: Tensor, amount: Tensor) -> Tensor:
    """Gaussian blur with the amount as sigma, in pixels; the kernel size is a tenth of the side, and odd."""
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
        for k in range(reach):  # the kernel is symmetric: each pair of offsets shares its weight
            pair = padded.narrow(along, k, side) + padded.narrow(along, 2 * reach - k, side)
            x.addcmul_(pair, _column(weights[:, k]))
    return _cut(x.round_())


def posterize(images: Tensor, amount: Tensor) -> Tensor:
    """Keep as many leading bits of each value as the amount says, and zero the others."""
    return images & (256 - 2 ** (8 - amount.int())).byte().view(-1, 1, 1, 1)


def solarize(images: Tensor, amount: Tensor) -> Tensor:
    """Invert values that are at least the amount."""
    return torch.where(images >= _column(amount), 255 - images, images)


def autocontrast(images: Tensor, amount: Tensor) -> Tensor:
    """Stretch each channel to the whole range; the amount is ignored."""
    low, top = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    flat = top == low
    low = torch.where(flat, 0.0, low)
    scale = torch.where(flat, 1.0, 255 / (top - low).clamp(min=1))
    return _cut(images.float().sub_(low).mul_(scale))


def equalize(images: Tensor, amount: Tensor) -> Tensor:
    """Equalise the histogram of each channel; the amount is ignored."""
    values = images.flatten(2).long()
    count = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    below = count.cumsum(2) - count
    step = below.where(count > 0, 0).amax(2, keepdim=True) // 255  # all values but the largest that occurs
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table).byte()
    return table.gather(2, values).view_as(images)


def shear_x(images: Tensor, amount: Tensor) -> Tensor:
    """Shear horizontally: move each row left by the amount times its index."""
    return _moved(images, lambda x, y, h, w: (x + amount.view(-1, 1, 1) * (y + h / 2), y))


def shear_y(images: Tensor, amount: Tensor) -> Tensor:
    """Shear vertically: move each column up by the amount times its index."""
    return _moved(images, lambda x, y, h, w: (x, y + amount.view(-1, 1, 1) * (x + w / 2)))


def translate_x(images: Tensor, amount: Tensor) -> Tensor:
    """Move images right by the amount in pixels, truncated."""
    return _moved(images, lambda x, y, h, w: (x - amount.trunc().view(-1, 1, 1), y))


def translate_y(images: Tensor, amount: Tensor) -> Tensor:
    """Move images down by the amount in pixels, truncated."""
    return _moved(images, lambda x, y, h, w: (x, y - amount.trunc().view(-1, 1, 1)))


def rotate(images: Tensor, amount: Tensor) -> Tensor:
    """Rotate images about their centre by the amount, in degrees, counterclockwise."""
    angle = (amount * (math.pi / 180)).view(-1, 1, 1)
    sin, cos = angle.sin(), angle.cos()
    return _moved(images, lambda x, y, h, w: (cos * x - sin * y, sin * x + cos * y))


def noise(images: Tensor, seeds: Tensor) -> Tensor:
    """Add Gaussian noise of `NOISE` grey levels, a function of each image's seed (R,) int64 on any device."""
    count = images[0].numel()
    place = torch.arange((count + 1) // 2, device=images.device, dtype=torch.int32)
    low, high = seeds.to(torch.int32)[:, None], (seeds >> 32).to(torch.int32)[:, None]
    # A hash of 32 bits for every two values: each gets one of 2^16 levels of equal probability.
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
"""The name of the identity."""


@dataclass(frozen=True)
class Edits:
    """Operations that are still to be applied to a batch of images, one after the other.

    operations: (B, L) names from `OPERATIONS` or `KEEP`. amounts: (B, L) float32. seeds: (B,) int64, for noise.
    They stay in CPU memory even if the images are on a GPU, so that nothing waits for it.
    """

    operations: np.ndarray
    amounts: np.ndarray
    seeds: np.ndarray

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice | np.ndarray) -> Edits:
        """The edits of a subset of the images."""
        return Edits(self.operations[rows], self.amounts[rows], self.seeds[rows])

    @classmethod
    def none(cls, count: int, length: int = 0, seeds: np.ndarray | None = None) -> Edits:
        """`length` steps for `count` images that change nothing."""
        amounts = np.zeros((count, length), dtype=np.float32)
        operations = np.full((count, length), KEEP, dtype=f"<U{max(map(len, OPERATIONS))}")
        return cls(operations, amounts, np.zeros(count, dtype=np.int64) if seeds is None else seeds)

    @classmethod
    def joined(cls, parts: Sequence[Edits]) -> Edits:
        """The edits of several batches, concatenated."""
        length = max(p.operations.shape[1] for p in parts)
        padded = [cls.none(len(p), length, p.seeds) for p in parts]
        for part, target in zip(parts, padded, strict=True):
            target.operations[:, : part.operations.shape[1]] = part.operations
            target.amounts[:, : part.amounts.shape[1]] = part.amounts
        return cls(*(np.concatenate([getattr(p, f.name) for p in padded]) for f in fields(cls)))

    def __call__(self, images: Tensor) -> Tensor:
        """Apply the edits to images (B, 3, S, S) uint8, in place, on their device."""
        # Intermediate results of a few images fit a CPU's cache; a GPU is faster with all images at once.
        at_once = max(1, 2**19 // max(1, images[0].numel())) if images.device.type == "cpu" else len(self)
        for k in range(self.operations.shape[1]):
            names = self.operations[:, k]
            for name in sorted(set(names) - {KEEP}):
                chosen = np.flatnonzero(names == name)
                numbers = self.seeds if name == "noise" else self.amounts[:, k]
                for start in range(0, len(chosen), at_once):
                    rows = chosen[start : start + at_once]
                    index = torch.from_numpy(rows).to(images.device, non_blocking=True)
                    arguments = torch.from_numpy(numbers[rows]).to(images.device, non_blocking=True)
                    edited = OPERATIONS[name](images.index_select(0, index), arguments)
                    if images.device.type == "cpu":
                        images.numpy()[rows] = edited.numpy()  # copies whole images; torch would copy byte by byte
                    else:
                        images.index_copy_(0, index, edited)
        return images


def _column(amount: Tensor) -> Tensor:
    return amount.view(-1, 1, 1, 1)


def _cut(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).short().byte()  # torch takes three times as long on a CPU without `short`


def _grey(x: Tensor) -> Tensor:
    """(R, 3, H, W) float32 -> (R, 1, H, W)."""
    red, green, blue = x.split(1, 1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


Source = Callable[[Tensor, Tensor, int, int], tuple[Tensor, Tensor]]


def _moved(images: Tensor, source: Source) -> Tensor:
    """Sample each pixel at `source` of it, bilinearly, black outside; x and y are in pixels from the centre."""
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
