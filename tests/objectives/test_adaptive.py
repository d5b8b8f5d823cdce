"""The adaptive gamma against the loops of the oracle, and in small worlds that stay or change."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amclr.objectives import build
from amclr.objectives.adaptive import log_noise
from amclr.objectives.positives import Positives
from tests.objectives import oracle
from tests.objectives.helpers import (
    DTYPES,
    GLOBAL,
    check_gradients,
    check_tables,
    draw_views,
    oracle_for,
    tensors,
)


@DTYPES
@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("queue", [0, 7])
def test_adaptive_gamma_equals_the_loops(name: str, queue: int, dtype: torch.dtype, tolerance: float) -> None:
    """Value, gradients, estimators and statistics over eight steps, with samples seen again and some left out."""
    objective = build(
        name, 10, temperature=0.25, gamma=0.2, gamma_schedule="adaptive", rho=1.3, temperature_lr=0.01, queue=queue
    ).to(dtype)  # fmt: skip
    estimator = oracle.AdaptiveGamma(0.2)
    loops = oracle_for(name, estimator, tau=0.25, rho=1.3, eta=0.01, queue=queue)
    draw = np.random.default_rng(0)
    gammas = []
    for step in range(8):
        views = draw_views(step % 3)
        ids = draw.choice(10, 6, replace=False)
        # In the third step the first row has no negative.
        groups = {"image": [3, 3, 3, -1, -1, -1], "text": [2, -1, -1, 2, 2, 2]} if step == 2 else {}
        t = tensors(views, dtype)
        loss, metrics = objective(t, torch.from_numpy(ids), {v: torch.tensor(g) for v, g in groups.items()})
        loss.backward()
        expected, gradient, _ = loops.step(views, ids.tolist(), ids.tolist(), groups)
        assert float(loss.detach()) == pytest.approx(expected, rel=10 * tolerance, abs=tolerance)
        check_gradients(t, gradient, 10 * tolerance)
        gammas.append(float(metrics["gamma"]))
    check_tables(objective, loops, 10 * tolerance)
    terms = [(t.anchor, t.candidate) for t in objective.terms]
    assert {*estimator.statistics} == {*terms}
    for what in ("drift", "innovation", "noise", "steps"):
        for term, actual in zip(terms, getattr(objective.adaptive, what).tolist(), strict=True):
            expected = getattr(estimator.statistics[term], what)
            assert actual == pytest.approx(expected, rel=100 * tolerance, abs=100 * tolerance), (what, term)
    assert gammas[0] == 1, "nothing has been seen a second time"
    assert 0.2 <= min(gammas) < 1


def drawn(n: int, seed: int, spread: float, dim: int = 16) -> torch.Tensor:
    """Embeddings (n, dim) around one direction: unit rows whose similarities are alike, but for the spread."""
    made = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(torch.eye(dim, dtype=torch.float64)[0] + spread * made, dim=-1)


def estimates_after(world: str, gamma: float, schedule: str, batch: int = 16) -> tuple[float, float]:
    """Spread (standard deviation over anchors) of log u about the exact value, and the last gamma.

    world: `still`, the embeddings stay as they are; `redrawn`, every sample is another at each visit; `growing`, all
    similarities grow alike with the epochs.
    """
    n, epochs = 192, 10
    objective = build("sogclr", n, temperature=0.1, gamma=gamma, gamma_schedule=schedule)
    order = np.random.default_rng(0)
    found = 1.0
    for epoch in range(epochs):
        version, spread = (epoch if world == "redrawn" else 0), 0.3 + (0.05 * epoch if world == "growing" else 0)
        image, text = drawn(n, 2 * version, spread), drawn(n, 2 * version + 1, spread)
        for rows in np.split(order.permutation(n), n // batch):
            _, metrics = objective({"image": image[rows], "text": text[rows]}, torch.from_numpy(rows))
            found = float(metrics.get("gamma", gamma))
    errors = objective.estimator_error({"image": image, "text": text}, torch.arange(n), torch.arange(n))
    return math.sqrt(max(errors["rms"] ** 2 - errors["bias"] ** 2, 0)), found


def test_adaptive_gamma_remembers_what_lasts_and_forgets_what_does_not() -> None:
    """Where all is new at each visit it is near no memory, where something lasts much better, unlike any constant."""
    found = {
        world: {g: estimates_after(world, g, "adaptive" if g < 0.1 else "constant") for g in (0.02, 0.2, 0.8, 1.0)}
        for world in ("still", "growing", "redrawn")
    }
    spread = {world: {g: errors for g, (errors, _) in each.items()} for world, each in found.items()}
    assert found["still"][0.02][1] < found["growing"][0.02][1] < found["redrawn"][0.02][1], "gamma, of each world"
    assert spread["still"][0.02] < 0.75 * min(spread["still"][0.8], spread["still"][1.0])
    assert spread["growing"][0.02] < 0.9 * min(spread["growing"][0.8], spread["growing"][1.0])
    assert spread["redrawn"][0.02] < 0.6 * min(spread["redrawn"][0.2], spread["redrawn"][0.8])
    assert spread["redrawn"][0.02] < 1.25 * spread["redrawn"][1.0]


@pytest.mark.parametrize("tau", [0.5, 0.1])
def test_noise_is_the_variance_of_a_batch_s_log_mean(tau: float) -> None:
    """By drawing: how the log of a mean over 63 negatives varies with which they are."""
    image, text = drawn(5_000, 1, 0.3), drawn(5_000, 2, 0.3)
    draw = np.random.default_rng(0)
    s = image[:256] @ text.T / tau
    varied = torch.stack([s[:, draw.choice(5_000, 63, replace=False)].logsumexp(1) for _ in range(300)]).var(0).mean()
    said = []
    for _ in range(100):
        rows = draw.choice(5_000, 64, replace=False)
        said.append(log_noise([image[rows], text[rows]], [0], [1], tau, Positives(64, None, True)))
    assert float(torch.stack(said).mean()) == pytest.approx(float(varied), rel=0.1)
