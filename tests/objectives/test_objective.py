"""The module: schedule, learned temperature, state, and the modes in which it runs."""

from __future__ import annotations

import math

import pytest
import torch

from amclr.objectives import METHODS, build
from tests.objectives.helpers import (
    draw_views,
    tensors,
)


def test_cosine_gamma() -> None:
    objective = build("sogclr", 6, gamma=0.2, gamma_schedule="cosine")
    seen = []
    for epoch in range(5):
        objective.start_epoch(epoch, 5)
        seen.append(objective.gamma)
    assert seen == pytest.approx([0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * e / 4)) for e in range(5)])
    constant = build("sogclr", 6, gamma=0.2)
    constant.start_epoch(3, 5)
    assert constant.gamma == 0.2


@pytest.mark.parametrize("name", METHODS)
def test_a_learned_temperature_moves_from_its_bounds(name: str) -> None:
    """Its gradient is finite and not zero at a bound, and where a step went beyond it, the next begins at it."""
    views, ids = tensors(draw_views(0), torch.float32), torch.arange(6)
    for tau in (0.01, 1.0):
        objective = build(
            name, 6, temperature=tau, temperature_mode="learnable", temperature_min=0.01, temperature_max=1.0
        )
        objective(views, ids)[0].backward()
        gradient = objective.log_temperature.grad
        assert gradient is not None and bool(torch.isfinite(gradient)) and float(gradient) != 0
    with torch.no_grad():
        objective.log_temperature.fill_(3.0)
    objective(views, ids)
    assert float(objective.log_temperature.detach()) == pytest.approx(0.0)


@pytest.mark.parametrize(("schedule", "queue"), [("constant", 0), ("adaptive", 0), ("adaptive", 8)])
def test_state_goes_on_where_it_was(schedule: str, queue: int) -> None:
    ids = torch.tensor([0, 3, 4, 5, 1, 2])
    whole, first, second = (
        build("iamclr", 6, temperature=0.1, gamma=0.3, gamma_schedule=schedule, queue=queue) for _ in range(3)
    )  # fmt: skip
    for step in range(3):
        views = tensors(draw_views(step), torch.float32)
        whole(views, ids)
        first(views, ids)
    second.load_state_dict(first.state_dict())
    views = tensors(draw_views(3), torch.float32)
    assert float(whole(views, ids)[0].detach()) == float(second(views, ids)[0].detach())


@pytest.mark.parametrize("name", METHODS)
def test_autocast_changes_nothing(name: str) -> None:
    views = {k: torch.tensor(v, dtype=torch.float32) for k, v in draw_views(0).items()}
    plain, _ = build(name, 6)(views, torch.arange(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = build(name, 6)(views, torch.arange(6))
    assert plain.item() == inside.item() and inside.dtype == torch.float32


def test_training_after_validation_in_inference_mode() -> None:
    """A workspace made in inference mode neither breaks a training step nor changes it."""
    validated, fresh = (build("amclr", 40, temperature=0.1) for _ in range(2))
    ids = torch.arange(40)
    validated.eval()
    with torch.inference_mode():
        validated({k: v.detach() for k, v in tensors(draw_views(0, batch=40), torch.float32).items()}, ids)
    validated.train()
    results = []
    for objective in (validated, fresh):
        views = tensors(draw_views(1, batch=40), torch.float32)
        loss, _ = objective(views, ids)
        loss.backward()
        results.append((loss.detach(), {v: x.grad for v, x in views.items()}, objective.state_dict()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
