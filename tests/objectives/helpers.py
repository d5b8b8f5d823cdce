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


def check_tables(objective: Any, sums: oracle.Global, tolerance: float) -> None:
    for column_of, attribute, values in (
        ("log_u", "log_u", {k: math.log(v) for k, v in sums.u.items()}),
        ("tau", "tau", sums.temperature),
        ("velocity", "tau_velocity", sums.velocity),
    ):
        for (table, sample), value in values.items():
            of = table if isinstance(table, str) else oracle.side(table[0])  # type: ignore[index]
            column = 0
            if not isinstance(table, str):
                own = [(t.anchor, t.candidate) for t in objective.terms if oracle.side(t.anchor) == of]
                column = own.index(table)
            found = float(objective.get_submodule(f"{attribute}_{of}").values[sample, column])
            assert found == pytest.approx(value, rel=tolerance, abs=tolerance), (column_of, table, sample)
    for of in ("image", "text"):
        seen = {s for (t, s) in sums.u if (t if isinstance(t, str) else oracle.side(t[0])) == of}  # type: ignore[index]
        table = objective.get_submodule(f"log_u_{of}").values
        assert set(torch.nonzero(torch.isfinite(table).any(1)).flatten().tolist()) == seen


def oracle_for(name: str, **kw: Any) -> oracle.Global:
    individual = METHODS[name].temperature == "individual"
    return oracle.Global(oracle.TERMS[GLOBAL[name]], individual=individual, **kw)


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
