"""The table of methods: their terms, weights and views."""

from __future__ import annotations

import pytest
import torch

import amclr
from amclr.objectives import METHODS, VIEWS, build
from tests.objectives import oracle
from tests.objectives.helpers import (
    check_gradients,
    draw_views,
    tensors,
)


def test_public_names() -> None:
    assert set(METHODS) == {
        "simclr", "clip", "cyclip", "siglip", "sogclr", "isogclr", "amclr", "xamclr", "xamclr-image", "xamclr-text",
        "iamclr", "ixamclr",
    }  # fmt: skip
    assert amclr.objectives.build("xamclr", num_samples=9, temperature=0.01, gamma=0.8).required_views == (
        "image", "text", "text_aug", "image_aug",
    )  # fmt: skip
    assert "8 terms" in repr(build("amclr", 6)) and "penalties at 0.1" in repr(build("amclr", 6, cyclic_weight=0.1))


def test_terms_and_their_weights() -> None:
    counts = {
        "sogclr": 2, "isogclr": 2, "amclr": 8, "iamclr": 8, "xamclr": 12, "ixamclr": 12, "xamclr-image": 10, "xamclr-text": 10,
        "clip": 2, "simclr": 2,
    }  # fmt: skip
    for name, count in counts.items():
        assert len(build(name, 5).terms) == count
    views, ids = draw_views(1), [0, 1, 2, 3, 4, 5]
    objective = build("xamclr", 6, temperature=0.3, weights={"image": 0.25, "text": 2.0, "cross": 0.5}).double()
    weights = dict.fromkeys(oracle.TERMS["xamclr"], 0.5)
    weights |= {("image", "image_aug"): 0.25, ("image_aug", "image"): 0.25}
    weights |= {("text", "text_aug"): 2.0, ("text_aug", "text"): 2.0}
    loops = oracle.GlobalContrastive(
        oracle.TERMS["xamclr"], oracle.PerTermEstimator(0.8), oracle.FixedTemperature(0.3), weights=weights
    )
    expected, gradient, _ = loops.step(views, ids, ids)
    t = tensors(views)
    loss, _ = objective(t, torch.tensor(ids))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-11)
    check_gradients(t, gradient, 1e-11)
    assert build("xamclr", 6, weights={"image": 0, "text": 0}).required_views == build("amclr", 6).required_views
    assert len(build("xamclr", 6, weights={"image": 0, "text": 0}).terms) == 8
    assert build("xamclr", 6, weights={"text": 0}).terms == build("xamclr-image", 6).terms
    assert build("xamclr", 6, weights={"image": 0}).terms == build("xamclr-text", 6).terms


def test_pairs_give_a_baseline_the_views_of_amclr() -> None:
    views = {k: torch.tensor(v) for k, v in draw_views(0).items()}
    ids = torch.arange(6)
    whole, borrowed = (
        build("amclr", 6, temperature=0.2).double(),
        build("sogclr", 6, temperature=0.2, pairs="all").double(),
    )
    assert float(whole(views, ids)[0]) == float(borrowed(views, ids)[0])
    aligned = build("sogclr", 6, temperature=0.2, pairs="aligned").double()
    single = build("sogclr", 6, temperature=0.2).double()
    second = {"image": views["image_aug"], "text": views["text_aug"]}
    expected = float(single(views, ids)[0]) + float(build("sogclr", 6, temperature=0.2).double()(second, ids)[0])
    assert float(aligned(views, ids)[0]) == pytest.approx(expected, rel=1e-12)
    assert single.required_views == ("image", "text") and aligned.required_views == VIEWS[::2] + VIEWS[1::2]
