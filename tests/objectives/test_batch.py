"""Arguments of a step that are refused, by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from amclr.objectives import METHODS, build
from tests.objectives.helpers import (
    good,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, i: (v.pop("text_aug"), i)[1], "'amclr' needs the view text_aug; got image, image_aug, text"),
        (lambda v, i: v.update(text=v["text"][:5]) or i, r"view 'text' has shape \(5, 5\), view 'image' has \(6, 5\)"),
        (
            lambda v, i: v.update(image_aug=v["image_aug"][0]) or i,
            r"view 'image_aug' must be a floating-point \(B, D\)",
        ),
        (lambda v, i: v.update(text=v["text"].long()) or i, r"view 'text' must be a floating-point"),
        (lambda v, i: v.update(text=v["text"] * 2) or i, "rows of view 'text' are not unit length .*normalize"),
        (lambda v, i: v.update(image=v["image"] * math.nan) or i, "view 'image' holds NaN or infinite"),
        (lambda v, i: i.float(), "ids must be an int64 tensor of shape"),
        (lambda v, i: i[:4], r"ids must be an int64 tensor of shape \(6,\), got torch.int64 of shape \(4,\)"),
        (lambda v, i: i + 1, r"image ids must lie in \[0, 6\), got values from 1 to 6"),
        (lambda v, i: i - 1, r"got values from -1 to 4"),
        (lambda v, i: v.update(text=None) or i, "view 'text' must be a floating-point .* got NoneType"),
        (lambda v, i: None, "ids must be an int64 tensor, or a dict of them by modality, got NoneType"),
        (lambda v, i: i * 0, "no row of the batch has a negative: all share an id"),
        (lambda v, i: {"image": i}, "ids must hold 'image' and 'text'"),
        (lambda v, i: {"image": i, "text": i.int()}, r"ids\['text'\] must be an int64"),
    ],
)
def test_bad_batches_are_named(change: Any, message: str) -> None:
    views, ids = good()
    ids = change(views, ids)
    with pytest.raises(ValueError, match=message):
        build("amclr", 6)(views, ids)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (torch.arange(6), "groups must be a dict of int64 tensors by view .* got torch.int64 of shape"),
        ({"photo": torch.arange(6)}, r"by view \(image, image_aug, text, text_aug\), got \['photo'\]"),
        ({"text": torch.arange(5)}, r"groups\['text'\] must be an int64 tensor of shape \(6,\), got .* \(5,\)"),
        ({"image": torch.arange(6).float()}, r"groups\['image'\] must be an int64 tensor of shape"),
    ],
)
def test_bad_groups_are_named(groups: Any, message: str) -> None:
    views, ids = good()
    with pytest.raises(ValueError, match=message):
        build("clip", 6)(views, ids, groups)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_sample_is_refused(name: str) -> None:
    views, ids = good()
    with pytest.raises(ValueError, match="no row of the batch has a negative"):
        build(name, 6)(views, ids * 0)


def test_a_batch_of_one_is_refused() -> None:
    views, _ = good()
    with pytest.raises(ValueError, match="a batch of 1 has no negatives"):
        build("clip", 6)({k: v[:1] for k, v in views.items()}, torch.tensor([0]))


def test_value_checks_can_be_switched_off() -> None:
    views, ids = good()
    loss, _ = build("clip", 6, validate=False)({k: 2 * v for k, v in views.items()}, ids)
    assert bool(torch.isfinite(loss))
