"""Losses and gradients of every contrast against the loops of the oracle, and against other libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from amclr.objectives import build
from amclr.objectives.contrasts import cyclic_penalty
from tests.objectives import oracle
from tests.objectives.helpers import (
    DTYPES,
    GLOBAL,
    check_gradients,
    check_tables,
    close,
    draw_views,
    oracle_for,
    tensors,
)


@DTYPES
@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize(("tau", "gamma"), [(0.125, 0.8), (0.25, 0.3), (0.0625, 1.0)])
def test_global_objectives_equal_the_loops(
    name: str, tau: float, gamma: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Value, gradients and estimators over five steps with samples seen again."""
    objective = build(name, 10, temperature=tau, gamma=gamma, rho=1.3, temperature_lr=0.01).to(dtype)
    loops = oracle_for(name, oracle.PerTermEstimator(gamma), tau=tau, rho=1.3, eta=0.01)
    draw = np.random.default_rng(0)
    for step in range(5):
        views = draw_views(step)
        ids = draw.choice(10, 6, replace=False)
        t = tensors(views, dtype)
        loss, metrics = objective(t, torch.from_numpy(ids))
        loss.backward()
        expected, gradient, _ = loops.step(views, ids.tolist(), ids.tolist())
        assert float(loss.detach()) == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert not any(m.requires_grad for m in metrics.values())
        check_gradients(t, gradient, tolerance)
    check_tables(objective, loops, tolerance)


def test_learnable_temperature_of_a_global_objective() -> None:
    views, ids = draw_views(3), list(range(6))
    objective = build("amclr", 6, temperature=0.2, temperature_mode="learnable", rho=0.9).double()
    loss, _ = objective(tensors(views), torch.tensor(ids))
    loss.backward()
    loops = oracle.GlobalContrastive(
        oracle.TERMS["amclr"], oracle.PerTermEstimator(0.8), oracle.FixedTemperature(0.2), rho=0.9
    )
    expected, _, slope = loops.step(views, ids, ids)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-7)
    # The parameter is log tau, so the chain rule gives a factor tau.
    assert float(objective.log_temperature.grad) == pytest.approx(0.2 * slope, rel=1e-6)


@DTYPES
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 2]])
@pytest.mark.parametrize(
    ("name", "pairs", "function"),
    [
        ("clip", None, lambda v, p: oracle.clip(v, 0.15, p, [("image", "text")])),
        ("clip", "aligned", lambda v, p: oracle.clip(v, 0.15, p, [("image", "text"), ("image_aug", "text_aug")])),
        ("clip", "all", lambda v, p: oracle.clip(v, 0.15, p, oracle.CROSS)),
        ("cyclip", None, lambda v, p: oracle.cyclip(v, 0.15, p)),
        ("siglip", None, lambda v, p: oracle.siglip(v, 0.15, -10.0, p)),
    ],
)
def test_minibatch_objectives_equal_the_loops(
    name: str, pairs: Any, function: Any, ids: list[int], dtype: torch.dtype, tolerance: float
) -> None:
    views = draw_views(4, batch=5, dim=3)
    t = tensors(views, dtype)
    loss, _ = build(name, 5, temperature=0.15, pairs=pairs).to(dtype)(t, torch.tensor(ids))
    loss.backward()
    positives = np.equal.outer(ids, ids)
    expected = function(views, positives)
    assert float(loss.detach()) == pytest.approx(expected, rel=max(tolerance, 1e-7))
    check_gradients(t, oracle.numeric_gradient(lambda v: function(v, positives), views), max(tolerance, 1e-7))


@DTYPES
def test_simclr_equals_nt_xent(dtype: torch.dtype, tolerance: float) -> None:
    views = draw_views(5, batch=5, dim=3, names=("image", "image_aug"))
    t = tensors(views, dtype)
    loss, _ = build("simclr", 5, temperature=0.2).to(dtype)(t, torch.arange(5))
    loss.backward()
    function = lambda v: oracle.simclr(v, 0.2, np.eye(5, dtype=bool))  # noqa: E731
    assert float(loss.detach()) == pytest.approx(function(views), rel=tolerance)
    check_gradients(t, oracle.numeric_gradient(function, views), max(tolerance, 1e-7))


def test_baselines_equal_open_clip() -> None:
    """CLIP and SigLIP as open_clip computes them, with gradients, and the logit scale's too."""
    open_clip = pytest.importorskip("open_clip.loss")
    for name, theirs in (("clip", open_clip.ClipLoss()), ("siglip", open_clip.SigLipLoss())):
        mine, other = tensors(draw_views(6)), tensors(draw_views(6))
        objective = build(name, 6, temperature=0.1).double()
        objective.log_temperature.data.fill_(math.log(0.1))  # exactly, where it was float32
        loss, _ = objective(mine, torch.arange(6))
        scale = torch.tensor(math.log(10.0), dtype=torch.float64, requires_grad=True)
        bias = {"logit_bias": torch.tensor(-10.0, dtype=torch.float64)} if name == "siglip" else {}
        expected = theirs(other["image"], other["text"], logit_scale=scale.exp(), **bias)
        loss.backward()
        expected.backward()
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
        for view in ("image", "text"):
            close(mine[view].grad, other[view].grad, 1e-6, view)
        assert float(objective.log_temperature.grad) == pytest.approx(-float(scale.grad), rel=1e-6)  # type: ignore[arg-type]


def test_clip_equals_cross_entropy() -> None:
    views = {k: torch.tensor(v) for k, v in draw_views(7).items()}
    logits = views["image"] @ views["text"].T / 0.07
    expected = (F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))) / 2
    found, _ = build("clip", 6, temperature=0.07, temperature_mode="fixed").double()(views, torch.arange(6))
    assert float(found) == pytest.approx(float(expected), rel=1e-7)


def test_clip_is_the_cross_entropy() -> None:
    views = tensors(draw_views(3, batch=7))
    loss, _ = build("clip", 7, temperature=0.08).double()(views, torch.arange(7))
    logits = views["image"] @ views["text"].T / torch.tensor(math.log(0.08)).double().exp()
    target = torch.arange(7)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    found = torch.autograd.grad(loss, [views["image"], views["text"]])
    wanted = torch.autograd.grad(expected, [views["image"], views["text"]])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("batch", [6, 9, 30])
@pytest.mark.parametrize("name", ["sogclr", "amclr", "clip"])
def test_cyclic_penalties_come_on_top(name: str, batch: int) -> None:
    """The mean over the pairs of both penalties, by loops, whatever the method and the form that the batch is done in."""
    views, ids = draw_views(3, batch=batch, dim=4), torch.arange(batch)
    losses = [build(name, batch, temperature=0.2, cyclic_weight=w).double()(tensors(views), ids)[0] for w in (0.0, 0.3)]
    pairs = [p for p in oracle.CROSS if {*p} <= {*build(name, batch).required_views}]
    expected = sum(sum(oracle.cyclic(views[i], views[t])) for i, t in pairs) / len(pairs)
    assert float((losses[1] - losses[0]).detach()) == pytest.approx(0.3 * expected, rel=1e-6)


@pytest.mark.parametrize(("batch", "width"), [(64, 256), (600, 32)])
def test_the_gradient_of_cyclic_penalties_is_that_of_their_definition(batch: int, width: int) -> None:
    """In float32, of views that are nearly aligned, against float64 autograd of the two differences."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(batch, width, generator=draw, dtype=torch.float64)
    text = image + 0.1 * torch.randn(batch, width, generator=draw, dtype=torch.float64)
    exact, ours = (
        [F.normalize(v, dim=1).to(dtype).requires_grad_() for v in (image, text)]
        for dtype in (torch.float64, torch.float32)
    )
    x, y = exact
    inside, cross = x @ x.T - y @ y.T, x @ y.T - y @ x.T
    expected = (inside.square().sum() + cross.square().sum()) / batch
    value = cyclic_penalty(*ours)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()  # type: ignore[no-untyped-call]
    value.backward()  # type: ignore[no-untyped-call]
    for a, b in zip(ours, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        assert float((a.grad - b.grad).norm() / b.grad.norm()) < 1e-5
