"""The queue of former batches against the loops of the oracle, and its state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amclr.objectives import VIEWS, build
from amclr.objectives import queue as queue_module
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
@pytest.mark.parametrize(("size", "gamma", "tile"), [(4, 1.0, 1 << 20), (9, 0.6, 20), (100, 0.6, 1 << 20)])
def test_a_queue_equals_the_loops(
    name: str, size: int, gamma: float, tile: int, dtype: torch.dtype, tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Value, gradients and tables over six steps; samples meet themselves and their groups in the queue."""
    monkeypatch.setattr(queue_module, "TILE", tile)
    objective = build(name, 10, temperature=0.25, gamma=gamma, rho=1.3, temperature_lr=0.01, queue=size).to(dtype)
    loops = oracle_for(name, oracle.PerTermEstimator(gamma), tau=0.25, rho=1.3, eta=0.01, queue=size)
    draw = np.random.default_rng(0)
    for step in range(6):
        views = draw_views(step)
        images = draw.choice(10, 6, replace=step % 2 == 1)
        texts = np.where(draw.random(6) < 0.3, images[::-1], images)
        groups = {v: draw.integers(-1, 9, 6) for v in ("image", "text", "text_aug")}
        groups = {v: g for v, g in groups.items() if v in objective.required_views}
        t = tensors(views, dtype)
        ids = {"image": torch.from_numpy(images), "text": torch.from_numpy(texts)}
        loss, metrics = objective(t, ids, {v: torch.from_numpy(g) for v, g in groups.items()})
        loss.backward()
        expected, gradient, _ = loops.step(
            views, images.tolist(), texts.tolist(), {v: g.tolist() for v, g in groups.items()}
        )
        assert float(loss.detach()) == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert not any(m.requires_grad for m in metrics.values())
        check_gradients(t, gradient, tolerance)
    check_tables(objective, loops, tolerance)
    assert len(objective.queue) == min(size, 36)  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [1 << 20, 20])
def test_a_queue_with_a_learned_temperature(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "TILE", tile)
    objective = build("amclr", 30, temperature=0.2, temperature_mode="learnable", rho=0.9, queue=12).double()
    loops = oracle.GlobalContrastive(
        oracle.TERMS["amclr"], oracle.PerTermEstimator(0.8), oracle.FixedTemperature(0.2), rho=0.9, queue=12
    )
    for step in range(4):
        views, ids = draw_views(step), list(range(6 * step, 6 * step + 6))
        t = tensors(views)
        objective.zero_grad()
        loss, _ = objective(t, torch.tensor(ids))
        loss.backward()
        expected, gradient, slope = loops.step(views, ids, ids)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-7)
        check_gradients(t, gradient, 1e-6)
        assert float(objective.log_temperature.grad) == pytest.approx(0.2 * slope, rel=1e-6)


@pytest.mark.parametrize("name", ["clip", "cyclip"])
def test_cross_entropies_with_a_queue(name: str) -> None:
    """Against autograd on the softmax over batch and queue, in which an anchor's positive is constant to the queue."""
    objective = build(name, 30, temperature=0.2, queue=8).double()
    former = [draw_views(10), draw_views(11)]
    for k, views in enumerate(former):
        objective(tensors(views), torch.arange(6 * k, 6 * k + 6))
    queued = {v: torch.tensor(np.concatenate([f[v] for f in former])[-8:]) for v in VIEWS}
    t, other = tensors(draw_views(3)), tensors(draw_views(3))
    objective.zero_grad()
    loss, _ = objective(t, torch.arange(20, 26))
    loss.backward()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    parts = []
    for a, c in (("image", "text"), ("text", "image")):
        s = other[a] @ other[c].T / tau
        # The positive cancels in value and in every gradient but its own.
        further = other[a] @ queued[c].T / tau
        own = (other[a] * other[c]).sum(1, keepdim=True) / tau
        fixed = (other[a] * other[c].detach()).sum(1, keepdim=True) / tau
        logits = torch.cat([s - own, further - fixed], 1)
        parts.append(logits.logsumexp(1).mean())
    expected = sum(parts) / 2
    if name == "cyclip":
        i, x = other["image"], other["text"]
        cross = i @ x.T
        expected = expected + 0.25 * ((i @ i.T - x @ x.T).square().sum() / 6 + (cross - cross.T).square().sum() / 6)
    expected.backward()  # type: ignore[union-attr]
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)  # type: ignore[union-attr]
    for v in ("image", "text"):
        torch.testing.assert_close(t[v].grad, other[v].grad, rtol=1e-6, atol=1e-9)
    assert float(objective.log_temperature.grad) == pytest.approx(0.2 * float(tau.grad), rel=1e-6)


def test_a_queue_in_evaluation_and_with_nan() -> None:
    """It stands still in evaluation; embeddings that are not finite are nobody's negatives; another width is refused."""
    objective = build("amclr", 30, temperature=0.2, queue=10, validate=False)
    objective(tensors(draw_views(0), torch.float32), torch.arange(6))
    objective.eval()
    objective(tensors(draw_views(1), torch.float32), torch.arange(6, 12))
    objective.train()
    assert objective.queue.ids[0].tolist() == [*range(6)]
    bad = {k: v.detach().clone() for k, v in tensors(draw_views(1), torch.float32).items()}
    bad["text_aug"][2] = math.nan
    assert bool(objective(bad, torch.arange(6, 12))[0].isnan())
    assert objective.queue.ids[0].tolist() == [2, 3, 4, 5, 6, 7, -1, 9, 10, 11]
    with_gap = build("amclr", 30, temperature=0.2, queue=10)
    with_gap.load_state_dict(objective.state_dict())
    views = tensors(draw_views(2), torch.float32)
    loss, _ = with_gap(views, torch.arange(20, 26))
    loss.backward()
    assert bool(torch.isfinite(loss)) and all(bool(torch.isfinite(v.grad).all()) for v in views.values())  # type: ignore[union-attr]
    wider = tensors(draw_views(2, dim=7), torch.float32)
    with pytest.raises(ValueError, match="views have 7 dimensions, and those of the batches before had 5"):
        with_gap(wider, torch.arange(6))
    with_gap.queue.clear()
    with_gap(wider, torch.arange(6))
    assert with_gap.queue.rows.shape == (4, 6, 7)


def test_the_state_of_a_queue() -> None:
    """A shorter queue takes up the newest; one of other views is refused; an emptied one holds no memory."""
    long = build("clip", 30, temperature=0.2, pairs="all", queue=20)
    for k in range(3):
        long(tensors(draw_views(k), torch.float32), torch.arange(6 * k, 6 * k + 6))
    short = build("clip", 30, temperature=0.2, pairs="all", queue=4)
    short.load_state_dict(long.state_dict())
    assert short.queue.ids[0].tolist() == [14, 15, 16, 17] and len(long.queue) == 18  # type: ignore[arg-type]
    assert torch.equal(short.queue.rows, long.queue.rows[:, -4:])  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match="size mismatch for queue.rows"):
        build("clip", 30, temperature=0.2, queue=20).load_state_dict(long.state_dict())
    long.queue.clear()  # type: ignore[union-attr]
    assert all(x.untyped_storage().nbytes() == 0 for x in long.queue.state)  # type: ignore[union-attr]
