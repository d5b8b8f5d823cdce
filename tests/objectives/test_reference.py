"""The fast path against the definition in plain autograd, over steps that update the estimates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from amclr.objectives import METHODS, VIEWS, LossConfig, build
from amclr.objectives.reference import Estimates, reference_loss

SAMPLES = 9
SETTINGS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "learnable temperature": {"temperature_mode": "learnable", "rho": 1.5},
    "weights": {"image_weight": 0.3, "text_weight": 0.7},
    "all pairs": {"pairs": "all"},
}


def draw(step: int) -> tuple[dict[str, Tensor], Tensor]:
    """Views and ids of a step; every sample is drawn again and again, in other batches."""
    random = torch.Generator().manual_seed(step)
    rows = {v: torch.randn(6, 5, generator=random, dtype=torch.float64) for v in VIEWS}
    return {v: normalize(x, dim=-1) for v, x in rows.items()}, torch.randperm(SAMPLES, generator=random)[:6]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.temperature != "individual"])
def test_objectives_equal_their_definition(name: str, settings: str) -> None:
    """Loss, gradients of views, temperature and bias, and estimates, over five steps."""
    method, overrides = METHODS[name], {**SETTINGS[settings], "gamma": 0.3, "temperature": 0.2, "cyclic_weight": 0.0}
    if method.pairs == "none" and "pairs" in overrides:
        pytest.skip("no pairs")
    objective = build(name, SAMPLES, **overrides).double()
    terms = method.terms(LossConfig(**overrides))
    estimates: Estimates = {}
    for step in range(5):
        views, ids = draw(step)
        fast, plain = ({v: x.clone().requires_grad_() for v, x in views.items()} for _ in range(2))
        loss, _ = objective(fast, ids)
        objective.zero_grad()
        loss.backward()
        learned = objective.settings.temperature_mode == "learnable"
        log_tau = (
            objective.log_temperature.detach().clone() if learned else torch.tensor(0.2, dtype=torch.float64).log()
        )
        log_tau.requires_grad_()
        bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
        expected = reference_loss(
            method.contrast, terms, plain, ids, log_tau.exp(), u=estimates, gamma=0.3,
            rho=objective.settings.rho if learned and method.contrast == "global" else 0.0, bias=bias,
        )  # fmt: skip
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        for view, x in fast.items():
            if view in objective.required_views:
                torch.testing.assert_close(x.grad, plain[view].grad, rtol=1e-7, atol=1e-9)
        if learned:
            torch.testing.assert_close(objective.log_temperature.grad, log_tau.grad, rtol=1e-7, atol=1e-9)
        if method.contrast == "sigmoid":
            torch.testing.assert_close(objective.bias.grad, bias.grad, rtol=1e-7, atol=1e-9)
    tables = objective.parts.tables
    for (term, sample), u in estimates.items():
        of = term.anchor.removesuffix("_aug")
        held = objective.tables[f"log_u_{of}"].values[sample, tables.columns[of].index(term)]
        torch.testing.assert_close(held.exp(), u, rtol=1e-8, atol=1e-12)
