"""Operations on batches are torchvision's, image by image; and a function of each image alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from amclr.data.images.edits import KEEP, NOISE, OPERATIONS, Edits

BILINEAR = InterpolationMode.BILINEAR


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Smooth, noisy, flat, grey and two-valued images, 40 x 40."""
    torch.manual_seed(0)
    smooth = F.interpolate(torch.rand(6, 3, 5, 5), (40, 40), mode="bilinear") * 300 - 20
    noisy = torch.randint(0, 256, (6, 3, 40, 40))
    grey = torch.randint(0, 256, (1, 1, 40, 40)).expand(-1, 3, -1, -1)
    two = torch.where(torch.rand(1, 3, 40, 40) > 0.5, 30, 220)
    return torch.cat([smooth, noisy, torch.full((1, 3, 40, 40), 77), grey, two]).clamp(0, 255).byte()


def affine(p: Tensor, shear: list[float] = [0, 0], translate: list[int] = [0, 0], **rest: object) -> Tensor:  # noqa: B006
    return V.affine(p, 0, translate, 1, shear, interpolation=BILINEAR, **rest)


def degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


ORACLES: dict[str, tuple[Callable[[Tensor, float], Tensor], float, float]] = {
    "brightness": (V.adjust_brightness, 0.3, 1.7),
    "contrast": (V.adjust_contrast, 0.3, 1.7),
    "saturation": (V.adjust_saturation, 0.0, 1.7),
    "hue": (V.adjust_hue, -0.5, 0.5),
    "grey": (lambda p, a: V.rgb_to_grayscale(p, 3), 0, 1),
    "sharpness": (V.adjust_sharpness, 0, 2.5),
    "blur": (lambda p, a: V.gaussian_blur(p, [5, 5], [a, a]), 0.1, 2),
    "posterize": (lambda p, a: V.posterize(p, int(a)), 1, 8),
    "solarize": (V.solarize, 0, 255),
    "autocontrast": (lambda p, a: V.autocontrast(p), 0, 1),
    "equalize": (lambda p, a: V.equalize(p), 0, 1),
    "shear_x": (lambda p, a: affine(p, [degrees(a), 0], center=[0, 0]), -0.3, 0.3),
    "shear_y": (lambda p, a: affine(p, [0, degrees(a)], center=[0, 0]), -0.3, 0.3),
    "translate_x": (lambda p, a: affine(p, translate=[int(a), 0]), -18, 18),
    "translate_y": (lambda p, a: affine(p, translate=[0, int(a)]), -18, 18),
    "rotate": (lambda p, a: V.rotate(p, a, interpolation=BILINEAR), -30, 30),
}


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "noise"])
def test_operations_are_torchvisions_with_an_amount_each(name: str, images: Tensor) -> None:
    oracle, low, high = ORACLES[name]
    amounts = np.random.default_rng(1).uniform(low, high, len(images)).astype(np.float32)
    before = images.clone()
    made = OPERATIONS[name](images, torch.from_numpy(amounts))
    assert made.dtype == torch.uint8 and torch.equal(images, before)
    wanted = torch.stack([oracle(p, float(a)) for p, a in zip(images, amounts, strict=True)])
    difference = (made.int() - wanted.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.01
    if name not in ("posterize", "grey"):
        assert (made != images).float().mean() > 0.05, "the amounts changed next to nothing"


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n != "noise"])
def test_a_view_of_odd_sides_and_any_memory_layout_does_too(name: str) -> None:
    oracle, low, high = ORACLES[name]
    torch.manual_seed(2)
    image = torch.randint(0, 256, (3, 41, 55), dtype=torch.uint8)
    amount = low + 0.8 * (high - low)
    for x in (image[None], image[None].contiguous(memory_format=torch.channels_last)):
        made = OPERATIONS[name](x, torch.tensor([amount], dtype=torch.float32))[0]
        assert (made.int() - oracle(image, amount).int()).abs().max() <= 1


def test_noise_is_normal_and_follows_from_the_seed() -> None:
    grey = torch.full((3, 3, 150, 150), 128, dtype=torch.uint8)
    seeds = torch.tensor([5, 2**62 + 7, 5])
    drawn = OPERATIONS["noise"](grey, seeds)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1:2], OPERATIONS["noise"](grey[1:2], seeds[1:2]))
    values = drawn[:2].double() - 128
    assert values.mean().abs() < 0.3 and abs(float(values.std()) / NOISE - 1) < 0.01
    assert abs(float((values**4).mean() / values.var() ** 2) - 3) < 0.1  # a normal distribution's kurtosis
    one, other = values.flatten(1)
    for pair in ((one, other), (one[1:], one[:-1]), (one[150:], one[:-150]), (one[22500:], one[:-22500])):
        assert np.corrcoef(*pair)[0, 1] == pytest.approx(0, abs=0.02)
    assert OPERATIONS["noise"](torch.zeros(1, 3, 7, 9, dtype=torch.uint8), seeds[:1]).shape == (1, 3, 7, 9)


def test_edits_are_made_in_order_to_each_image_alone(images: Tensor) -> None:
    draw = np.random.default_rng(3)
    names = np.array([KEEP, *OPERATIONS])
    edits = Edits.none(len(images), 3, draw.integers(0, 2**63, len(images)))
    edits.operations[:] = draw.choice(names, edits.operations.shape)
    edits.amounts[:] = draw.uniform(0.5, 1.5, edits.amounts.shape)
    together = edits(images.clone())
    for k in range(len(images)):
        alone = images[k : k + 1].clone()
        for name, amount in zip(edits.operations[k], edits.amounts[k], strict=True):
            if name != KEEP:
                number = torch.from_numpy(edits.seeds[k : k + 1]) if name == "noise" else torch.tensor([amount])
                alone = OPERATIONS[name](alone, number)
        # Sums over an image may be rounded another way beside others.
        assert (together[k].int() - alone[0].int()).abs().max() <= 1
        assert torch.equal(edits[k : k + 1](images[k : k + 1].clone())[0], together[k])


def test_joined_edits_keep_their_names(images: Tensor) -> None:
    none, some = Edits.none(2), Edits.none(1, 2)
    some.operations[0], some.amounts[0] = ["autocontrast", "posterize"], [0, 3]
    joined = Edits.joined([none, some])
    assert joined.operations.tolist() == [[KEEP, KEEP], [KEEP, KEEP], ["autocontrast", "posterize"]]
    made = joined(images[:3].clone())
    assert torch.equal(made[:2], images[:2]) and torch.equal(made[2], some(images[2:3].clone())[0])
