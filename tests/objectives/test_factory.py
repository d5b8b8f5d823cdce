"""`build`: settings that it takes, and those that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from amclr.objectives import METHODS, build
from tests.objectives.helpers import (
    draw_views,
    tensors,
)


@pytest.mark.parametrize("name", METHODS)
def test_settings_may_be_whole_numbers(name: str) -> None:
    kinds = {t.kind for t in build(name, 6).terms}
    cyclic = {} if METHODS[name].pairs == "none" else {"cyclic_weight": 1}
    whole = build(name, 6, temperature=1, gamma=1, rho=1, weights=dict.fromkeys(kinds, 1), **cyclic)
    cyclic = {what: float(weight) for what, weight in cyclic.items()}
    real = build(name, 6, temperature=1.0, gamma=1.0, rho=1.0, weights=dict.fromkeys(kinds, 1.0), **cyclic)
    views, ids = tensors(draw_views(0), torch.float32), torch.arange(6)
    assert float(whole(views, ids)[0].detach()) == float(real(views, ids)[0].detach())


@pytest.mark.parametrize(
    ("name", "settings_", "message"),
    [
        ("sogcl", {}, "unknown objective 'sogcl': did you mean 'sogclr'"),
        ("amclr", {"gamma": 0.0}, "gamma must be greater than 0 and at most 1, got 0"),
        ("amclr", {"temperature": -1}, "temperature must be greater than 0"),
        ("iamclr", {"temperature": 2.0}, "temperature must lie in .temperature_min, temperature_max."),
        ("amclr", {"temperature_min": 0.0}, "temperature_min must be greater than 0"),
        ("simclr", {"cyclic_weight": 0.1}, "'simclr' aligns no image-text pairs: leave out cyclic_weight=0.1"),
        (
            "amclr",
            {"gamma_schedule": "adaptive", "estimator": "reference"},
            "gamma_schedule 'adaptive' needs estimator 'per-term'",
        ),
        ("amclr", {"gamma_schedule": "linear"}, "gamma_schedule must be one of constant, cosine, adaptive"),
        ("amclr", {"estimator": "exact"}, "estimator must be one of per-term, reference"),
        ("clip", {"estimator": "reference"}, "needs a global objective, and 'clip' is a mini-batch one"),
        ("clip", {"temperature_mode": "individual"}, "'individual' needs a global objective"),
        ("simclr", {"pairs": "all"}, "'simclr' aligns no image-text pairs"),
        ("amclr", {"pairs": "none"}, "pairs must be one of first, aligned, all"),
        ("amclr", {"weights": {"intra": 1}}, "weights must be one of cross, image, text"),
        ("amclr", {"weights": {"cross": 0}}, "leave 'amclr' without a term"),
        ("amclr", {"queue": -1}, "queue must lie between 0 and 1e.06, got -1"),
        ("amclr", {"queue": 2.5}, "queue must be a whole number, 0 for none, got 2.5"),
        ("siglip", {"queue": 9}, "'siglip' has no anchors to contrast with a queue: leave out queue=9"),
        ("simclr", {"queue": 9}, "'simclr' has no anchors to contrast with a queue"),
        ("amclr", {"queue": 9, "estimator": "reference"}, "a queue needs estimator 'per-term'"),
        ("amclr", {"storage": "tape"}, "storage must be one of auto, device, host, disk"),
        ("amclr", {"matmul_dtype": "int8"}, "matmul_dtype must be one of auto, float32"),
        ("amclr", {"backend": "cuda"}, "backend must be one of auto, eager, triton"),
        ("amclr", {"weights": {"cross": math.inf}}, "cross_weight must be at least 0, got inf"),
        ("amclr", {"num_samples": 1.5}, "num_samples must be a positive int"),
        ("amclr", {"num_samples": 0}, "num_samples must be a positive int"),
        ("amclr", {"num_samples": {"image": 3}}, "num_samples must be a positive int or a dict"),
    ],
)
def test_bad_settings_are_named(name: str, settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **{"num_samples": 8, **settings_})
