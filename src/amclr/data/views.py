"""Views of pictures: renderings, each a pure function of (seed, epoch, sample, view).

They work on uint8 pictures before normalisation, so the value range is kept whatever they do.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from amclr.randomness import Key, torch_seeded

BICUBIC = v2.InterpolationMode.BICUBIC


class Noise(nn.Module):
    """Gaussian noise on a uint8 picture; the result is uint8 again, cut off at 0 and 255."""

    def __init__(self, sigma: float = 0.08) -> None:
        super().__init__()
        self.sigma = sigma * 255

    def forward(self, picture: Tensor) -> Tensor:
        """picture: (3, H, W) uint8."""
        return (picture.float() + self.sigma * torch.randn(picture.shape)).round_().clamp_(0, 255).byte()


class CentreCut(nn.Module):
    """The central share of a picture in each direction."""

    def __init__(self, share: float = 0.9) -> None:
        super().__init__()
        self.share = share

    def forward(self, picture: Tensor) -> Tensor:
        """picture: (3, H, W) uint8."""
        height, width = picture.shape[-2:]
        return v2.functional.center_crop(
            picture, [max(1, round(height * self.share)), max(1, round(width * self.share))]
        )


def _whole(size: int) -> list[nn.Module]:
    return [v2.Resize(size, BICUBIC, antialias=True), v2.CenterCrop(size)]


@lru_cache
def policy(name: str, size: int, flip: bool = True) -> nn.Module:
    """The image view policy `name` as one transform: uint8 (3, H, W) -> uint8 (3, size, size).

    none: resize and centre crop (also used for evaluation). weak: mild crop and flip. paper: the
    first view of arXiv 2412.07979 (crop 0.5-1, flip, RandAugment 2 ops of magnitude 7). single:
    its second view, one operation drawn from blur, flip, noise, brightness, contrast, sharpen and
    0.9 centre crop. strong: SimCLR's (arXiv 2002.05709, appendix A).
    """
    mirror: list[nn.Module] = [v2.RandomHorizontalFlip()] if flip else []

    def crop(low: float) -> nn.Module:
        return v2.RandomResizedCrop(size, scale=(low, 1.0), ratio=(0.8, 1.25), interpolation=BICUBIC, antialias=True)

    kernel = max(3, int(0.1 * size) // 2 * 2 + 1)
    if name == "none":
        steps = _whole(size)
    elif name == "weak":
        steps = [crop(0.6), *mirror]
    elif name == "paper":
        steps = [
            crop(0.5),
            *mirror,
            v2.RandAugment(num_ops=2, magnitude=7, interpolation=v2.InterpolationMode.BILINEAR),
        ]
    elif name == "single":
        operations: list[nn.Module] = [
            v2.GaussianBlur(kernel, (0.5, 2.0)),
            Noise(),
            v2.ColorJitter(brightness=(0.6, 1.4)),
            v2.ColorJitter(contrast=(0.6, 1.4)),
            v2.RandomAdjustSharpness(2.0, p=1.0),
            CentreCut(0.9),
        ]
        if flip:
            operations.append(v2.RandomHorizontalFlip(p=1.0))
        steps = [v2.RandomChoice(operations), *_whole(size)]
    elif name == "strong":
        steps = [
            crop(0.2),
            *mirror,
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.5),
        ]
    else:
        raise ValueError(f"unknown view policy '{name}': choose from none, weak, paper, single, strong")
    return v2.Compose(steps)


def image_view(transform: nn.Module, picture: Tensor, *key: Key) -> Tensor:
    """Apply a policy to a picture with its draws seeded by `key`."""
    with torch_seeded(*key):
        out: Tensor = transform(picture)
    return out
