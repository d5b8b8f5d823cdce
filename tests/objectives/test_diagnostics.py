"""Metrics and estimator errors against loops over anchors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amclr.objectives import build
from tests.objectives import oracle
from tests.objectives.helpers import (
    draw_views,
    tensors,
)


@pytest.mark.parametrize("twice", [False, True])
def test_effective_negatives_and_shares(twice: bool) -> None:
    """Against entropies and sums of weights worked out anchor by anchor."""
    objective = build("amclr", 9, temperature=0.2, gamma=0.3).double()
    ids = torch.tensor([0, 1, 2, 3, 3 if twice else 4, 5, 6])
    objective({k: torch.tensor(v) for k, v in draw_views(1, batch=7).items()}, ids)
    views = {k: torch.tensor(v) for k, v in draw_views(2, batch=7).items()}
    objective.diagnose = True
    before = {of: objective.get_submodule(f"log_u_{of}").values.clone() for of in ("image", "text")}
    _, metrics = objective(views, ids)
    effective, shares = [], []
    for k, (a, c) in enumerate(oracle.TERMS["amclr"]):
        old = before[oracle.modality(a)][:, k % 4]
        for i in range(7):
            others = [j for j in range(7) if ids[j] != ids[i]]
            e = [math.exp(float(views[a][i] @ (views[c][j] - views[c][i])) / 0.2) for j in others]
            g = sum(e) / len(e)
            u = 0.7 * math.exp(float(old[ids[i]])) + 0.3 * g
            effective.append(math.exp(-sum(x / sum(e) * math.log(x / sum(e)) for x in e)))
            shares.append(g / u)
    alive = [n for n, share in zip(effective, shares, strict=True) if share >= 0.01]
    assert 0 < len(effective) - len(alive) < 4, "the case of an anchor that is dead is here too"
    assert float(metrics["effective_negatives_cross"]) == pytest.approx(np.mean(alive), rel=1e-9)
    assert float(metrics["dead_cross"]) == pytest.approx(1 - len(alive) / len(effective), rel=1e-9)
    assert float(metrics["share_p05_cross"]) == pytest.approx(np.quantile(shares, 0.05), rel=1e-9)
    assert float(metrics["share_p95_cross"]) == pytest.approx(np.quantile(shares, 0.95), rel=1e-9)


def test_an_estimate_that_has_run_away_is_dead() -> None:
    objective = build("sogclr", 6, temperature=0.1)
    ids, views = torch.arange(6), tensors(draw_views(0), torch.float32)
    objective(views, ids)
    objective.log_u_image.values[:3] += 12
    objective.diagnose = True
    _, metrics = objective(views, ids)
    assert float(metrics["dead_cross"]) == pytest.approx(3 / 12)


def test_estimator_error_is_that_of_an_exact_pass() -> None:
    """Zero at the fixed point; else log u against the exact inner mean, worked out with loops; unseen ones apart."""
    views = {k: torch.tensor(v, dtype=torch.float32) for k, v in draw_views(4, batch=8).items()}
    ids = torch.arange(8)
    objective = build("amclr", 8, temperature=0.3, gamma=0.5)
    with pytest.raises(ValueError, match="'clip' keeps no estimates"):
        build("clip", 8).estimator_error(views, ids, ids)
    for _ in range(60):
        objective(views, ids)
    settled = objective.estimator_error(views, ids, torch.tensor([1, 5, 7]), chunk=2)
    assert abs(settled["bias"]) < 1e-5 and settled["rms"] < 1e-5 and settled["unseen"] == 0
    objective.log_u_text.values[5, 2] = -math.inf
    objective.log_u_image.values[1, 3] += 0.25
    found = objective.estimator_error(views, ids, torch.tensor([1, 5, 7]))
    assert found["bias/image_aug->text_aug"] == pytest.approx(0.25 / 3, abs=1e-5)
    assert found["rms/image_aug->text_aug"] == pytest.approx(0.25 / 3**0.5, abs=1e-5)
    assert found["unseen/text->image_aug"] == pytest.approx(1 / 3) and found["unseen"] == pytest.approx(1 / 24)
    fresh = build("amclr", 8, temperature=0.3, gamma=0.5)
    groups = {"image": torch.tensor([0, -1, 0, -1, 5, 6, 7, 8]), "text": torch.tensor([-1, 3, 2, -1, -1, 3, -1, -1])}
    fresh(views, ids, groups)
    assert (
        fresh.estimator_error(views, ids, ids, groups=groups)["rms"]
        < 1e-5
        < fresh.estimator_error(views, ids, ids)["rms"]
    )
    individual = build("isogclr", 8, temperature=0.3, gamma=1.0, temperature_lr=0.1)
    for _ in range(4):
        individual(views, ids)
    before = individual.tau_image.values.clone()
    individual.parts.temperatures.lr = (
        0.0  # so that the estimates are those of the temperatures that stand in the table
    )
    individual(views, ids)
    assert float(before.std()) > 0.001 and individual.estimator_error(views, ids, ids)["rms"] < 1e-5
