"""Image views are pure functions of their keys, and draw what their policy says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from amclr.data.images.edits import KEEP
from amclr.data.images.views import POLICIES, Draws, policy, title, whole
from amclr.utils.errors import UserError

CUSTOM = [{"RandomResizedCrop": {"size": 32, "scale": [0.5, 1.0]}}, {"ColorJitter": {"brightness": 0.4}}]


@pytest.fixture
def image() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 60, 48), dtype=np.uint8))


def views(name: Any, image: Tensor, count: int, *key: Any, size: int = 32, flip: bool = True) -> Tensor:
    return policy(name, size, flip)([image] * count, np.arange(count), *key)


def lines(p: Tensor) -> tuple[bool, bool]:
    """Whether a view is brighter left, and above."""
    side = p.shape[-1] // 2
    x = p.float()
    return bool(x[..., :side].mean() > x[..., side:].mean()), bool(x[:, :side].mean() > x[:, side:].mean())


@pytest.mark.parametrize("name", [*POLICIES, CUSTOM], ids=title)
def test_views_are_functions_of_their_key(name: Any, image: Tensor) -> None:
    drawn = policy(name, 32)
    ids = np.array([7])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = [drawn([image], ids, 0, epoch, "image")[0] for epoch in range(12)]
    assert torch.equal(before, torch.get_rng_state()), "the global generator was moved"
    torch.manual_seed(2)
    again = [drawn([image], ids, 0, epoch, "image")[0] for epoch in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(d.shape == (3, 32, 32) and d.dtype == torch.uint8 for d in first)
    different = len({d.numpy().tobytes() for d in first})
    assert different == 1 if name == "none" else different > 6


@pytest.mark.parametrize("name", [*POLICIES, CUSTOM], ids=title)
def test_a_sample_draws_the_same_whatever_stands_beside_it(name: Any) -> None:
    draw = np.random.default_rng(4)
    images = [torch.from_numpy(draw.integers(0, 256, (3, *s), dtype=np.uint8)) for s in draw.integers(20, 70, (24, 2))]
    ids = draw.integers(0, 2**63, 24)
    drawn = policy(name, 32)
    together = drawn(images, ids, 3, "image")
    order = draw.permutation(24)[:9]
    apart = drawn([images[i] for i in order], ids[order], 3, "image")
    assert torch.equal(apart, together[torch.from_numpy(order)])
    cut, edits = drawn.draw(images, ids, 3, "image")
    assert torch.equal(edits(cut), together)


@pytest.mark.parametrize("shape", [(60, 48), (48, 60), (32, 32), (20, 90), (33, 31), (200, 123)])
def test_whole_images_are_torchvisions_resize_and_centre_crop(shape: tuple[int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *shape), dtype=np.uint8))
    wanted = v2.Compose([v2.Resize(32, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32)])(image)
    for layout in (image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(whole(layout, 32), wanted)
    assert torch.equal(views("none", image, 1)[0], wanted)


def test_crops_are_distributed_as_torchvisions() -> None:
    """Area, shape and place of the boxes of `strong`, against RandomResizedCrop's own draws."""
    sides = np.tile([[300, 500]], (4000, 1))
    ours = POLICIES["strong"](Draws(np.arange(4000), 1), sides, 32, True).boxes.astype(float)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(32, scale=(0.2, 1.0), ratio=(0.8, 1.25))
    large = torch.empty(3, 300, 500, device="meta")
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in (crop.make_params([large]) for _ in range(4000))], dtype=float)  # fmt: skip
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= [300, 500]).all()
    for f in (lambda b: b[:, 2] * b[:, 3] / 150_000, lambda b: np.log(b[:, 3] / b[:, 2]), lambda b: b[:, 0] / 300, lambda b: b[:, 1] / 500):  # fmt: skip
        quantiles = np.linspace(0.05, 0.95, 7)
        np.testing.assert_allclose(np.quantile(f(ours), quantiles), np.quantile(f(theirs), quantiles), atol=0.03)


def test_named_policies_draw_their_operations_as_often_as_they_say() -> None:
    sides = np.tile([[64, 64]], (7000, 1))
    drawn = {n: POLICIES[n](Draws(np.arange(7000), n), sides, 32, True) for n in POLICIES}
    share = {
        n: {o: float((ops == o).mean()) for o in np.unique(ops)} for n, d in drawn.items() for ops, _ in d.steps[-1:]
    }
    assert share["strong"] == pytest.approx({"blur": 0.5, KEEP: 0.5}, abs=0.02)
    # RandAugment draws each of 14 operations alike; of single's seven, centre and flip are no edits.
    assert len(share["paper"]) == 14 and list(share["paper"].values()) == pytest.approx([1 / 14] * 14, abs=0.015)
    assert share["single"] == pytest.approx({**dict.fromkeys(("blur", "noise", "brightness", "contrast", "sharpness"), 1 / 7), KEEP: 2 / 7}, abs=0.02)  # fmt: skip
    assert drawn["single"].mirrored.mean() == pytest.approx(1 / 7, abs=0.02)
    cut = (drawn["single"].boxes == [3, 3, 58, 58]).all(axis=1)
    assert cut.mean() == pytest.approx(1 / 7, abs=0.02) and not (cut & drawn["single"].mirrored).any()
    for name in ("weak", "paper", "strong"):
        assert drawn[name].mirrored.mean() == pytest.approx(0.5, abs=0.02)
    jitter = drawn["strong"].steps[:4]
    for ops, _ in jitter:  # SimCLR's jitter comes in any order
        assert [(ops == o).mean() for o in ("brightness", "contrast", "saturation", "hue", KEEP)] == pytest.approx([0.2] * 5, abs=0.02)  # fmt: skip
    hue = np.concatenate([a[ops == "hue"] for ops, a in jitter])
    assert (hue.min(), hue.max()) == pytest.approx((-0.1, 0.1), abs=0.002)
    bright = np.concatenate([a[ops == "brightness"] for ops, a in jitter])
    assert (bright.min(), bright.max(), bright.mean()) == pytest.approx((0.6, 1.4, 1.0), abs=0.01)
    paper = np.concatenate([a[ops == "rotate"] for ops, a in drawn["paper"].steps])
    assert sorted(set(paper.round(6))) == [-7, 7] and abs((paper > 0).mean() - 0.5) < 0.05
    solar = v2.RandAugment(magnitude=7)._AUGMENTATION_SPACE
    for ours, theirs in (("shear_x", "ShearX"), ("translate_y", "TranslateY"), ("posterize", "Posterize")):
        amounts = np.concatenate([a[ops == ours] for ops, a in drawn["paper"].steps])
        assert np.abs(amounts).max() == pytest.approx(float(solar[theirs][0](31, 32, 32)[7]), abs=1e-4)


def test_single_draws_its_own_operation_per_sample(image: Tensor) -> None:
    plain = whole(image, 32)
    drawn = views("single", image, 60, 0, 0, "image_aug")
    mirrored = sum(torch.equal(d, plain.flip(-1)) for d in drawn)
    brighter = sum(float(d.float().mean()) > float(plain.float().mean()) + 12 for d in drawn)
    blurred = sum(
        float(d.float().diff(dim=-1).abs().mean()) < 0.7 * float(plain.float().diff(dim=-1).abs().mean()) for d in drawn
    )
    assert min(mirrored, brighter, blurred) >= 2


def test_without_flips_left_stays_left() -> None:
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    image[:, :, :12] = 255
    for name in POLICIES:
        drawn = POLICIES[name](Draws(np.arange(500), name), np.tile([[40, 40]], (500, 1)), 32, False)
        assert not drawn.mirrored.any()
        if name == "paper":  # RandAugment may rotate and shift, and never mirrors
            continue
        for view in views(name, image, 40, 0, flip=False).float():
            assert view[:, :, :12].mean() >= view[:, :, -12:].mean()


def test_a_list_of_transforms_is_torchvisions(image: Tensor) -> None:
    nested = [
        {"RandomChoice": {"transforms": ["RandomHorizontalFlip", {"RandomApply": {"transforms": [{"GaussianBlur": {"kernel_size": 3}}], "p": 0.5}}]}},
        {"Resize": {"size": [32, 32], "interpolation": "bicubic"}},
    ]  # fmt: skip
    drawn = views(nested, image, 40)
    assert len({d.numpy().tobytes() for d in drawn}) > 2
    assert torch.equal(
        views([{"Resize": {"size": [32, 32], "interpolation": "bicubic"}}], image, 1)[0],
        v2.Resize([32, 32], v2.InterpolationMode.BICUBIC)(image),
    )
    assert title(nested) == "2 transforms"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "the list is empty"),
        (["RandomFlip"], r"unknown transform 'RandomFlip': did you mean 'Random\w+'\?"),
        (["Lambda"], "unknown transform 'Lambda'"),
        (["os.system"], "unknown transform 'os.system'"),
        ([{"Resize": {"sise": 32}}], r"Resize has no argument 'sise': did you mean 'size'\?"),
        ([{"Resize": 32}], r"write a transform as NAME or \{NAME: \{ARGUMENT: VALUE\}\}, not \{'Resize': 32\}"),
        ([{"Resize": {"size": [32, 32]}, "Pad": {"padding": 2}}], "write a transform as NAME"),
        ([{"Resize": {"size": {"a": 1}}}], "size of Resize must be a number, text or a list"),
        ([{"Resize": {"size": [32, 32], "interpolation": "cubic"}}], "Resize: 'cubic' is not a valid"),
        ([{"ColorJitter": {"hue": 3}}], "ColorJitter: hue"),
        ([{"RandomApply": {"transforms": ["Lambda"]}}], "unknown transform 'Lambda'"),
        (["RandomInvert"], r"give 3 x 64 x 96 uint8, the tower wants 3 x 32 x 32 uint8: end with \{Resize: \{size: \[32"),
        ([{"Resize": {"size": [32, 32]}}, "Grayscale"], r"give 1 x 32 x 32 uint8.*num_output_channels: 3"),
        ([{"CenterCrop": {"size": "wide"}}], "image views: "),
    ],
)  # fmt: skip
def test_a_list_that_will_not_do_says_why_in_a_line(entries: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        policy(entries, 32)
    assert "\n" not in str(caught.value)


def test_a_list_may_not_mirror_where_views_may_not() -> None:
    with pytest.raises(UserError, match="RandomHorizontalFlip mirrors, which views.flip forbids"):
        policy([{"RandomApply": {"transforms": ["RandomHorizontalFlip"]}}, *CUSTOM], 32, flip=False)
    with pytest.raises(UserError, match="unknown view policy 'week': choose from none, weak"):
        policy("week", 32)
