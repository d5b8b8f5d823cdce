"""Inputs that the tests of objectives share, and comparisons with the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from amclr.objectives import METHODS, VIEWS
from tests.objectives import oracle

GLOBAL = {
    "sogclr": "sogclr",
    "isogclr": "sogclr",
    "amclr": "amclr",
    "xamclr": "xamclr",
    "iamclr": "amclr",
    "ixamclr": "xamclr",
    "xamclr-image": "xamclr-image",
    "xamclr-text": "xamclr-text",
}


DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])


def draw_views(seed: int, batch: int = 6, dim: int = 5, names: tuple[str, ...] = VIEWS) -> oracle.Views:
    draw = np.random.default_rng(seed)
    rows = {name: draw.normal(size=(batch, dim)) for name in names}
    return {name: r / np.linalg.norm(r, axis=1, keepdims=True) for name, r in rows.items()}


def tensors(views: oracle.Views, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(rows, dtype=dtype, requires_grad=True) for name, rows in views.items()}


def close(found: Any, expected: Any, tolerance: float, what: str = "") -> None:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    error = np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def check_gradients(t: dict[str, torch.Tensor], expected: oracle.Views, tolerance: float) -> None:
    for name, rows in t.items():
        if np.any(expected.get(name, 0)):
            assert rows.grad is not None, name
            close(rows.grad, expected[name], tolerance, f"gradient of {name}")
        else:
            assert rows.grad is None or not rows.grad.any(), name


def check_tables(objective: Any, loops: oracle.GlobalContrastive, tolerance: float) -> None:
    """The estimates, and individual temperatures with their velocities; the estimates of unseen samples are not set."""
    expected: dict[str, dict[Any, float]] = {"log_u": {k: math.log(u) for k, u in loops.estimator.u.items()}}
    if isinstance(loops.temperature, oracle.IndividualTemperatures):
        expected |= {"tau": loops.temperature.tau, "tau_velocity": loops.temperature.velocity}
    for name, values in expected.items():
        for (key, sample), value in values.items():
            of, column = table_and_column(objective, key)
            actual = float(objective.get_submodule(f"{name}_{of}").values[sample, column])
            assert actual == pytest.approx(value, rel=tolerance, abs=tolerance), (name, key, sample)
    for of in ("image", "text"):
        seen = {sample for (key, sample) in loops.estimator.u if table_and_column(objective, key)[0] == of}
        table = objective.get_submodule(f"log_u_{of}").values
        assert set(torch.nonzero(torch.isfinite(table).any(1)).flatten().tolist()) == seen


def table_and_column(objective: Any, key: Any) -> tuple[str, int]:
    """The modality and column of a term, or of the one estimate that a modality has in the reference code."""
    if isinstance(key, str):
        return key, 0
    of = oracle.modality(key[0])
    return of, [(t.anchor, t.candidate) for t in objective.terms if oracle.modality(t.anchor) == of].index(key)


def oracle_for(
    name: str, estimator: oracle.PerTermEstimator, tau: float, rho: float = 0.0, eta: float = 1e-3, queue: int = 0
) -> oracle.GlobalContrastive:
    """The loops of a method. rho, eta: of individual temperatures."""
    terms = oracle.TERMS[GLOBAL[name]]
    if METHODS[name].temperature == "individual":
        return oracle.GlobalContrastive(terms, estimator, oracle.IndividualTemperatures(tau, eta), rho, queue)
    return oracle.GlobalContrastive(terms, estimator, oracle.FixedTemperature(tau), queue=queue)


def good() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return {k: torch.tensor(v, dtype=torch.float32) for k, v in draw_views(0).items()}, torch.arange(6)


def peak_bytes(step: Callable[[], object]) -> int:
    """The most that torch holds on the CPU at once during a step, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
