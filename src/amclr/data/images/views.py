"""Views of images: augmentations, each a pure function of (seed, epoch, sample, view).

They work on uint8 images before normalisation, so the value range is always kept. A policy crops, resizes and
mirrors image by image on the CPU; the operations that follow are `Edits` of the whole batch, on the CPU or a GPU.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from amclr.config.schema import Config
from amclr.data.images.decode import resized
from amclr.data.images.edits import KEEP, Edits
from amclr.utils.errors import UserError, did_you_mean, first_line
from amclr.utils.randomness import Key, mixed, torch_seeded, uniforms


class Policy(Protocol):
    """How views of images are drawn: a function of the samples' `ids` (B,) int64 and the key alone."""

    def draw(self, images: Sequence[Tensor], ids: np.ndarray, *key: Key) -> tuple[Tensor, Edits]:
        """Views of uint8 images (3, H, W): (B, 3, S, S) uint8, and the edits that remain to be applied to them."""
        ...

    def __call__(self, images: Sequence[Tensor], ids: np.ndarray, *key: Key) -> Tensor:
        """The finished views: (B, 3, S, S) uint8."""
        ...


def policy(name: str | list[Any], size: int, flip: bool = True) -> Policy:
    """The image view policy for a name or a list of torchvision transforms; views have `size` x `size` pixels.

    none: resize and centre crop, as in evaluation. weak: mild crop and flip. paper: the first view of
    arXiv 2412.07979 (crop 0.5-1, flip, RandAugment 2 ops of magnitude 7). single: its second view,
    one operation drawn from blur, flip, noise, brightness, contrast, sharpen and 0.9 centre crop.
    strong: SimCLR's (arXiv 2002.05709, appendix A). Without `flip`, none of them mirrors an image.
    Raises UserError for an unknown name or an invalid list.
    """
    if isinstance(name, str):
        if name not in POLICIES:
            raise UserError(f"unknown view policy '{name}': choose from {', '.join(POLICIES)}, or give a list")
        return NamedPolicy(name, size, flip)
    return Transforms(name, size, flip)


def policies(config: Config) -> dict[str, Policy]:
    """The policy of each image view in the settings. Raises UserError for an invalid one."""
    views, size = config.views, config.model.image_size
    return {"image": policy(views.image, size, views.flip), "image_aug": policy(views.image_aug, size, views.flip)}


def title(name: str | list[Any]) -> str:
    """The name of a policy in figures and logs."""
    return name if isinstance(name, str) else f"{len(name)} transforms"


def whole(image: Tensor, size: int) -> Tensor:
    """An image as evaluation sees it (policy `none`): (3, H, W) -> (3, S, S) uint8, resized and centre-cropped."""
    height, width = image.shape[1:]
    shorter = min(height, width)
    height, width = size * height // shorter, size * width // shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    return resized(image, height, width)[:, top : top + size, left : left + size]


class Draws:
    """A stream of uniform random columns (B,) for a batch of samples."""

    def __init__(self, ids: np.ndarray, *key: Key) -> None:
        self._columns = iter(uniforms(ids, 40, *key).T)

    def __call__(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """The next column, uniform between two bounds."""
        return low + (high - low) * next(self._columns)

    def chance(self, probability: float) -> np.ndarray:
        """The next column, True with the given probability."""
        return self() < probability

    def index(self, count: int) -> np.ndarray:
        """The next column, one of 0 to count - 1."""
        return (self() * count).astype(np.int64)


@dataclass
class Drawn:
    """The draws of a named policy for a batch.

    boxes: (B, 4), top, left, height and width of each crop. mirrored: (B,) bool. steps: operations and amounts,
    (B,) each, in order. stretched: resize crops to the square; otherwise resize their shorter side, and crop at
    the centre.
    """

    boxes: np.ndarray
    mirrored: np.ndarray
    steps: Sequence[tuple[np.ndarray, np.ndarray]] = ()
    stretched: bool = True


def _none(draw: Draws, sides: np.ndarray, size: int, flip: bool) -> Drawn:
    return Drawn(np.hstack([np.zeros_like(sides), sides]), np.zeros(len(sides), dtype=bool), stretched=False)


def _weak(draw: Draws, sides: np.ndarray, size: int, flip: bool) -> Drawn:
    return Drawn(boxes(draw, sides, 0.6), draw.chance(0.5 * flip))


def _paper(draw: Draws, sides: np.ndarray, size: int, flip: bool) -> Drawn:
    """RandAugment (arXiv 1909.13719) with torchvision's operations: 2 of them at magnitude 7 of 30."""
    part = 7 / 30
    shift = 150 / 331 * size * part
    signed = {"shear_x": 0.3 * part, "shear_y": 0.3 * part, "translate_x": shift, "translate_y": shift,
              "rotate": 30 * part, "brightness": 0.9 * part, "saturation": 0.9 * part, "contrast": 0.9 * part,
              "sharpness": 0.9 * part}  # fmt: skip
    plain = {KEEP: 0.0, "posterize": 8 - round(4 * part), "solarize": 255 * (1 - part), "autocontrast": 0.0,
             "equalize": 0.0}  # fmt: skip
    names = np.array([*signed, *plain])
    sizes = np.array([*signed.values(), *plain.values()])
    centre = np.isin(names, ["brightness", "saturation", "contrast", "sharpness"]).astype(float)
    seen, mirrored = boxes(draw, sides, 0.5), draw.chance(0.5 * flip)
    steps = []
    for _ in range(2):
        k, sign = draw.index(len(names)), np.where(draw.chance(0.5), -1, 1)
        steps.append((names[k], centre[k] + np.where(k < len(signed), sign, 1) * sizes[k]))
    return Drawn(seen, mirrored, steps)


def _single(draw: Draws, sides: np.ndarray, size: int, flip: bool) -> Drawn:
    ranges = {"blur": (0.5, 2.0), "noise": (0.0, 0.0), "brightness": (0.6, 1.4), "contrast": (0.6, 1.4),
              "sharpness": (2.0, 2.0)}  # fmt: skip
    names = np.array([*ranges, "centre", "flip"][: 7 if flip else 6])
    low, high = np.array([*ranges.values(), (0.0, 0.0), (0.0, 0.0)]).T
    k = draw.index(len(names))
    chosen, amounts = names[k], low[k] + (high - low)[k] * draw()
    seen = np.where(chosen[:, None] == "centre", np.maximum(1, np.rint(sides * 0.9).astype(np.int64)), sides)
    box = np.hstack([np.rint((sides - seen) / 2).astype(np.int64), seen])
    edits = np.where(np.isin(chosen, list(ranges)), chosen, KEEP)
    return Drawn(box, chosen == "flip", [(edits, amounts)], stretched=False)


def _strong(draw: Draws, sides: np.ndarray, size: int, flip: bool) -> Drawn:
    seen, mirrored, jittered = boxes(draw, sides, 0.2), draw.chance(0.5 * flip), draw.chance(0.8)
    names = np.array(["brightness", "contrast", "saturation", "hue"])
    amounts = np.stack([draw(0.6, 1.4), draw(0.6, 1.4), draw(0.6, 1.4), draw(-0.1, 0.1)])
    order = np.argsort(np.stack([draw() for _ in names]), axis=0)
    steps = [(np.where(jittered, names[k], KEEP), np.take_along_axis(amounts, k[None], 0)[0]) for k in order]
    for name, share, amount in (("grey", 0.2, draw()), ("blur", 0.5, draw(0.1, 2.0))):
        steps.append((np.where(draw.chance(share), name, KEEP), amount))
    return Drawn(seen, mirrored, steps)


def boxes(draw: Draws, sides: np.ndarray, low: float, ratio: float = 1.25) -> np.ndarray:
    """Crops (B, 4) of a share of `low` to 1 of the image's area, with an aspect ratio of at most `ratio`.

    Each is the first of ten that fits, as in torchvision's RandomResizedCrop, or else the largest at the centre.
    """
    height, width = sides.T
    chosen = np.zeros((len(sides), 2), dtype=np.int64)
    for _ in range(10):
        area, shape = draw(low, 1.0) * height * width, np.exp(draw(-math.log(ratio), math.log(ratio)))
        tried = np.rint(np.sqrt(np.stack([area / shape, area * shape], axis=1))).astype(np.int64)
        fits = ((tried > 0) & (tried <= sides)).all(axis=1) & (chosen[:, 0] == 0)
        chosen[fits] = tried[fits]
    place = np.stack([draw(), draw()], axis=1)
    none = chosen[:, 0] == 0
    chosen[none] = np.minimum(sides, np.rint(sides[:, ::-1] * ratio).astype(np.int64))[none]
    corner = np.where(none[:, None], (sides - chosen) // 2, place * (sides - chosen + 1)).astype(np.int64)
    return np.hstack([corner, chosen])


POLICIES: dict[str, Callable[[Draws, np.ndarray, int, bool], Drawn]] = {
    "none": _none, "weak": _weak, "paper": _paper, "single": _single, "strong": _strong,
}  # fmt: skip
"""Every named policy: (draws, sides (B, 2), size, flip) -> its draws."""


@dataclass(frozen=True)
class NamedPolicy:
    """One of `POLICIES`."""

    name: str
    size: int
    flip: bool = True

    def draw(self, images: Sequence[Tensor], ids: np.ndarray, *key: Key) -> tuple[Tensor, Edits]:
        """See `Policy.draw`."""
        sides = np.array([p.shape[1:] for p in images], dtype=np.int64).reshape(-1, 2)
        drawn = POLICIES[self.name](Draws(ids, *key), sides, self.size, self.flip)
        # Decoded images are channels-last, which suits resizing and convolutions; edits prefer contiguous planes.
        layout = torch.contiguous_format if drawn.steps else torch.channels_last
        out = torch.empty(len(ids), 3, self.size, self.size, dtype=torch.uint8, memory_format=layout)
        for row, image, box, mirrored in zip(out, images, drawn.boxes.tolist(), drawn.mirrored.tolist(), strict=True):
            top, left, height, width = box
            seen = image[:, top : top + height, left : left + width]
            view = resized(seen, self.size, self.size) if drawn.stretched else whole(seen, self.size)
            row.copy_(view.flip(2) if mirrored else view)
        edits = Edits.none(len(ids), len(drawn.steps), mixed(ids, "noise", *key).view(np.int64))
        for k, (operations, amounts) in enumerate(drawn.steps):
            edits.operations[:, k], edits.amounts[:, k] = operations, amounts
        return out, edits

    def __call__(self, images: Sequence[Tensor], ids: np.ndarray, *key: Key) -> Tensor:
        """See `Policy`."""
        views, edits = self.draw(images, ids, *key)
        return edits(views)


ALLOWED = (
    "AugMix", "AutoAugment", "CenterCrop", "ColorJitter", "ElasticTransform", "GaussianBlur", "GaussianNoise",
    "Grayscale", "JPEG", "Pad", "RandAugment", "RandomAdjustSharpness", "RandomAffine", "RandomAutocontrast",
    "RandomChannelPermutation", "RandomCrop", "RandomEqualize", "RandomErasing", "RandomGrayscale",
    "RandomHorizontalFlip", "RandomInvert", "RandomPerspective", "RandomPhotometricDistort", "RandomPosterize",
    "RandomResize", "RandomResizedCrop", "RandomRotation", "RandomShortestSize", "RandomSolarize",
    "RandomVerticalFlip", "RandomZoomOut", "Resize", "ScaleJitter", "TrivialAugmentWide",
)  # fmt: skip
"""The transforms of torchvision.transforms.v2 that the settings may name."""

NESTED = ("RandomApply", "RandomChoice", "RandomOrder")
"""Transforms that take a list of others as `transforms`."""

MIRRORING = ("RandomHorizontalFlip", "RandomVerticalFlip")


class Transforms:
    """A policy from a list of torchvision.transforms.v2 classes, each a name or {name: {argument: value}}.

    The transforms draw from torch's global generator, which is seeded for each image and restored after it.
    Raises UserError for an unknown name or argument, and if the result is not (3, S, S) uint8.
    """

    def __init__(self, entries: list[Any], size: int, flip: bool = True) -> None:
        if not entries:
            raise UserError("image views: the list is empty: name a transform, such as {Resize: {size: [64, 64]}}")
        from torchvision.transforms import v2  # slow to import

        self.size = size
        self.transform = v2.Compose([_transform(entry, flip) for entry in entries])
        # Try the list on an image, so that an invalid one fails before the data is read.
        self([torch.zeros(3, 2 * size, 3 * size, dtype=torch.uint8)], np.zeros(1, dtype=np.int64))

    def draw(self, images: Sequence[Tensor], ids: np.ndarray, *key: Key) -> tuple[Tensor, Edits]:
        """See `Policy.draw`; no edits remain."""
        return self(images, ids, *key), Edits.none(len(ids))

    def __call__(self, images: Sequence[Tensor], ids: np.ndarray, *key: Key) -> Tensor:
        """See `Policy`."""
        return torch.stack([self._view(p, int(i), *key) for p, i in zip(images, ids, strict=True)])

    def _view(self, image: Tensor, sample: int, *key: Key) -> Tensor:
        try:
            with torch_seeded(*key, sample):
                out = self.transform(image.contiguous())
        except Exception as error:  # torchvision raises many types
            raise UserError(f"image views: {first_line(error)}") from None
        if not isinstance(out, Tensor) or out.dtype != torch.uint8 or out.shape != (3, self.size, self.size):
            result = " x ".join(map(str, out.shape)) + f" {out.dtype}".replace("torch.", "")
            raise UserError(
                f"image views: the transforms give {result}, the tower wants 3 x {self.size} x {self.size} uint8: "
                f"end with {{Resize: {{size: [{self.size}, {self.size}]}}}}, or colours of {{Grayscale: "
                "{num_output_channels: 3}}"
            )
        return out


def _transform(entry: Any, flip: bool) -> nn.Module:
    """The transform of one entry of the list."""
    from torchvision.transforms import v2

    if isinstance(entry, Mapping) and len(entry) == 1:
        name, arguments = next(iter(entry.items()))
    else:
        name, arguments = entry, None
    if not isinstance(name, str) or not isinstance(arguments, (Mapping, type(None))):
        raise UserError(f"image views: write a transform as NAME or {{NAME: {{ARGUMENT: VALUE}}}}, not {entry!r}")
    known = [n for n in (*ALLOWED, *NESTED) if hasattr(v2, n)]
    if name not in known:
        raise UserError(f"image views: unknown transform '{name}': {did_you_mean(name, known)}")
    if name in MIRRORING and not flip:
        raise UserError(
            f"image views: {name} mirrors, which views.flip forbids: leave it out, or give --views.flip true"
        )
    transform = getattr(v2, name)
    accepted = list(inspect.signature(transform).parameters)
    settings: dict[str, Any] = {}
    for argument, value in (arguments or {}).items():
        if argument not in accepted:
            raise UserError(
                f"image views: {name} has no argument '{argument}': {did_you_mean(str(argument), accepted)}"
            )
        if name in NESTED and argument == "transforms":
            if not isinstance(value, list):
                raise UserError(f"image views: the transforms of {name} must be a list, not {value!r}")
            value = [_transform(inner, flip) for inner in value]
        elif not _plain(value):
            raise UserError(f"image views: {argument} of {name} must be a number, text or a list, not {value!r}")
        settings[argument] = value
    try:
        if "interpolation" in settings:
            settings["interpolation"] = v2.InterpolationMode(settings["interpolation"])
        if name == "AutoAugment" and "policy" in settings:
            settings["policy"] = v2.AutoAugmentPolicy(settings["policy"])
        return transform(**settings)
    except Exception as error:  # torchvision raises many types
        raise UserError(f"image views: {name}: {first_line(error)}") from None


def _plain(value: Any) -> bool:
    return all(map(_plain, value)) if isinstance(value, list) else isinstance(value, bool | int | float | str | None)
