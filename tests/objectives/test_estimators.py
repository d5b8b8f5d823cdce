"""Running estimates and individual temperatures: how they are updated, and where they converge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amclr.objectives import build
from tests.objectives import oracle
from tests.objectives.helpers import (
    GLOBAL,
    check_gradients,
    check_tables,
    draw_views,
    oracle_for,
    tensors,
)


@pytest.mark.parametrize("name", GLOBAL)
def test_samples_that_stand_twice_are_positives_with_one_update(name: str) -> None:
    objective = build(name, {"image": 6, "text": 12}, temperature=0.25, rho=0.5, gamma=0.7).double()
    loops = oracle_for(name, oracle.PerTermEstimator(0.7), tau=0.25, rho=0.5)
    batches = [
        ([0, 1, 0, 2, 3, 1], [0, 2, 1, 4, 6, 2]),
        ([3, 3, 3, 1, 5, 4], [6, 7, 6, 3, 10, 3]),
        # Image 0 stands twice, once with a negative and once without: row 0 shares an id with every other.
        ([0, 0, 1], [5, 6, 5]),
    ]
    for seed, (images, texts) in enumerate(batches * 2):
        views = draw_views(seed, batch=len(images))
        t = tensors(views)
        loss, _ = objective(t, {"image": torch.tensor(images), "text": torch.tensor(texts)})
        loss.backward()
        expected, gradient, _ = loops.step(views, images, texts)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-11)
        check_gradients(t, gradient, 1e-11)
    check_tables(objective, loops, 1e-11)


def test_a_batch_of_one_sample_alone_teaches_nothing() -> None:
    objective = build("iamclr", 4, temperature=0.1, validate=False)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    t = tensors(draw_views(0), torch.float32)
    loss, _ = objective(t, torch.zeros(6, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(v.grad is None or not v.grad.any() for v in t.values())
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


@pytest.mark.parametrize("name", ["sogclr", "amclr", "xamclr"])
def test_reference_estimator(name: str) -> None:
    """One table per modality, overwritten term by term; u = g through the first epoch; eps."""
    objective = build(name, 8, temperature=0.2, gamma=0.6, estimator="reference").double()
    estimator = oracle.ReferenceEstimator(0.6)
    loops = oracle_for(name, estimator, tau=0.2)
    for epoch in range(3):
        objective.start_epoch(epoch, 3)
        estimator.first_epoch = epoch == 0
        for step in range(2):
            views = draw_views(10 * epoch + step)
            ids = np.random.default_rng(step).permutation(8)[:6]
            # In the second step the first row has no negative.
            groups = {"image": [3, 3, 3, -1, -1, -1], "text": [2, -1, -1, 2, 2, 2]} if step else {}
            t = tensors(views)
            loss, _ = objective(t, torch.from_numpy(ids), {v: torch.tensor(g) for v, g in groups.items()})
            loss.backward()
            expected, gradient, _ = loops.step(views, ids.tolist(), ids.tolist(), groups)
            assert float(loss.detach()) == pytest.approx(expected, rel=1e-10)
            check_gradients(t, gradient, 1e-10)
    check_tables(objective, loops, 1e-10)


@pytest.mark.parametrize("name", ["isogclr", "iamclr", "ixamclr"])
def test_reference_estimator_with_individual_temperatures(name: str) -> None:
    """One estimate per sample, but a temperature per sample and term."""
    objective = build(name, 8, temperature=0.2, estimator="reference")
    for step in range(3):
        objective.start_epoch(step, 3)
        loss, _ = objective(tensors(draw_views(step), torch.float32), torch.arange(6))
        loss.backward()
        assert bool(torch.isfinite(loss))
    assert objective.log_u_image.values.shape[1] == 1
    assert objective.tau_image.values.shape[1] == len(objective.terms) // 2


def test_reference_and_per_term_agree_where_they_must() -> None:
    """With gamma = 1 nothing is remembered, so whose table it is does not matter."""
    ids = torch.arange(6)
    views = {k: torch.tensor(v) for k, v in draw_views(0).items()}
    losses = []
    for estimator in ("per-term", "reference"):
        objective = build("amclr", 6, temperature=0.5, gamma=1.0, estimator=estimator).double()
        objective.start_epoch(1, 2)
        losses.append(float(objective(views, ids)[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_individual_temperatures_settle_where_the_divergence_equals_rho() -> None:
    """At an inner optimum of tau log E exp(d/tau) + tau rho, KL(w || uniform) = rho."""
    views = {k: torch.tensor(v) for k, v in draw_views(2, batch=10).items()}
    ids = torch.arange(10)
    objective = build("isogclr", 10, temperature=0.3, gamma=1.0, rho=0.4, temperature_lr=0.02,
                      temperature_min=0.01, temperature_max=10.0).double()  # fmt: skip
    for _ in range(1500):
        objective(views, ids)
    tau = objective.get_submodule("tau_image").values[:, 0]
    d = views["image"] @ views["text"].T - (views["image"] * views["text"]).sum(1, keepdim=True)
    d = d[~torch.eye(10, dtype=torch.bool)].view(10, 9)
    w = (d / tau[:, None]).softmax(1)
    divergence = (w * (w * 9).log()).sum(1)
    torch.testing.assert_close(divergence, torch.full((10,), 0.4, dtype=torch.float64), atol=1e-3, rtol=0)
    assert float(tau.std()) > 0.01, "each sample found its own"


def test_the_whole_set_as_a_batch_is_the_fixed_point() -> None:
    """Repeating the full batch, u settles at the exact inner mean."""
    views = {k: torch.tensor(v) for k, v in draw_views(11).items()}
    ids = torch.arange(6)
    objective = build("sogclr", 6, temperature=0.2, gamma=0.3).double()
    objective({k: torch.tensor(v) for k, v in draw_views(12).items()}, ids)
    for _ in range(120):
        objective(views, ids)
    d = views["image"] @ views["text"].T - (views["image"] * views["text"]).sum(1, keepdim=True)
    exact = (d / 0.2).exp()[~torch.eye(6, dtype=torch.bool)].view(6, 5).mean(1).log()
    torch.testing.assert_close(objective.get_submodule("log_u_image").values[:, 0], exact, atol=1e-12, rtol=0)


def test_evaluation_mode_leaves_the_estimators_alone() -> None:
    objective = build("ixamclr", 6, temperature=0.1)
    ids = torch.arange(6)
    views = tensors(draw_views(0), torch.float32)
    objective(views, ids)
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    objective.eval()
    first, second = (float(objective(views, ids)[0].detach()) for _ in range(2))
    assert first == second
    assert all(torch.equal(v, before[k]) for k, v in objective.state_dict().items())


def test_a_nan_embedding_spares_the_estimates() -> None:
    objective = build("ixamclr", 6, temperature=0.1, validate=False)
    objective(tensors(draw_views(0), torch.float32), torch.arange(6))
    views = {k: v.detach().clone() for k, v in tensors(draw_views(1), torch.float32).items()}
    views["image"][2] = math.nan
    loss, _ = objective(views, torch.arange(6))
    assert bool(loss.isnan()) and not any(bool(v.isnan().any()) for v in objective.state_dict().values())
