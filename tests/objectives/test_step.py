"""Properties of a step that hold for any input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from amclr.objectives import METHODS, VIEWS, build
from tests.objectives import oracle
from tests.objectives.helpers import (
    close,
    draw_views,
    oracle_for,
    tensors,
)


def test_the_order_of_the_rows_does_not_matter() -> None:
    ids = torch.tensor([0, 1, 0, 2, 3, 1])
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    first, second = (build("xamclr", 5, temperature=0.1).double() for _ in range(2))
    views = {k: torch.tensor(v) for k, v in draw_views(0).items()}
    a, _ = first(views, ids)
    b, _ = second({k: v[order] for k, v in views.items()}, ids[order])
    assert float(a) == pytest.approx(float(b), rel=1e-12)
    torch.testing.assert_close(first.get_submodule("log_u_image").values, second.get_submodule("log_u_image").values)


@st.composite
def batches(draw: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, float, float]:
    batch, dim = draw(st.integers(2, 12)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    extreme = draw(st.sampled_from(["random", "identical", "opposite", "aligned"]))
    views = {}
    for name in VIEWS:
        rows = F.normalize(torch.randn(batch, dim, generator=generator), dim=-1)
        if extreme == "identical":
            rows = rows[:1].expand(batch, dim).clone()
        views[name] = rows
    if extreme == "opposite":
        views["text"] = -views["image"]
        views["text_aug"] = -views["image_aug"]
    if extreme == "aligned":
        views = dict.fromkeys(VIEWS, views["image"])
    ids = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch)))
    leaves = {k: v.to(dtype).requires_grad_() for k, v in views.items()}
    return leaves, ids, draw(st.sampled_from([0.005, 0.01, 0.07, 1.0])), draw(st.sampled_from([0.01, 0.5, 0.8, 1.0]))


@pytest.mark.parametrize("name", METHODS)
@given(batches())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_nothing_is_ever_nan_or_infinite(name: str, given_batch: Any) -> None:
    leaves, ids, tau, gamma = given_batch
    objective = build(name, 10, temperature=tau, gamma=gamma, validate=False)
    for v in leaves.values():
        v.grad = None
    for _ in range(2):
        loss, metrics = objective(leaves, ids)
        loss.backward()
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss))
    assert all(bool(torch.isfinite(m)) for m in metrics.values())
    assert all(v.grad is None or bool(torch.isfinite(v.grad).all()) for v in leaves.values())
    for key, value in objective.state_dict().items():
        assert not bool(torch.isnan(value).any()) and not bool((value == math.inf).any()), key


@given(batches())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_weights_sum_to_at_most_one_over_gamma(given_batch: Any) -> None:
    """An anchor's weights sum to g / u: for each sample, over its rows, at most 1 / gamma."""
    leaves, ids, tau, gamma = given_batch
    objective = build("sogclr", 10, temperature=tau, gamma=gamma, validate=False)
    first, second = (leaves[v].detach() for v in ("image", "text"))
    objective({"image": second, "text": first}, ids)  # a past that differs
    objective({"image": first, "text": second}, ids)
    s = first.double() @ second.double().T
    for sample in set(ids.tolist()):
        logs = []
        for i in torch.nonzero(ids == sample).flatten().tolist():
            d = ((s[i] - s[i, i]) / tau)[ids != sample]
            if len(d):
                logs.append(float(d.logsumexp(0)) - math.log(len(d)))
        if logs:
            log_g = float(torch.tensor(logs, dtype=torch.float64).logsumexp(0)) - math.log(len(logs))
            log_u = float(objective.get_submodule("log_u_image").values[sample, 0])
            assert log_g - log_u <= -math.log(gamma) + 1e-3


@st.composite
def steps(draw: Any) -> tuple[list[tuple[oracle.Views, list[int], list[int]]], float, float]:
    """Three batches of float32 unit rows, near to each other or not, with ids of images and texts that may repeat."""
    batch, dim = draw(st.integers(2, 8)), draw(st.integers(2, 40))
    closeness = draw(st.sampled_from([0.0, 1.0, 3.0]))
    found = []
    for _ in range(3):
        rows = np.random.default_rng(draw(st.integers(0, 2**30)))
        base = rows.normal(size=(batch, dim))
        noisy = {v: torch.tensor(closeness * base + rows.normal(size=(batch, dim)), dtype=torch.float32) for v in VIEWS}
        views = {v: F.normalize(x, dim=-1).double().numpy() for v, x in noisy.items()}
        images = draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
        texts = images if draw(st.booleans()) else draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
        found.append((views, images, texts))
    return found, draw(st.sampled_from([0.005, 0.01, 0.03, 0.1, 1.0])), draw(st.sampled_from([0.05, 0.5, 0.8, 1.0]))


@pytest.mark.parametrize("name", ["sogclr", "amclr", "xamclr"])
@given(steps())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_float32_gradients_are_those_of_float64_loops(name: str, given_steps: Any) -> None:
    """Within 1e-5 of the oracle's, in the norm, at temperatures from 0.005 to 1, with duplicates and a past.

    An exponent is a difference of two similarities over tau. Rounding those to float32 alone moves a
    weight by up to 2^-23 / tau, which is more than 1e-5 below tau = 0.012 and shows in the tiny batches
    here, where one weight can be all there is; at B = 128 it averages out (docs/method.md).
    """
    batches_, tau, gamma = given_steps
    objective = build(name, 10, temperature=tau, gamma=gamma, validate=False)
    loops = oracle_for(name, oracle.PerTermEstimator(gamma), tau=tau)
    for views, images, texts in batches_:
        t = tensors(views, torch.float32)
        loss, _ = objective(t, {"image": torch.tensor(images), "text": torch.tensor(texts)})
        loss.backward()
        expected, gradient, _ = loops.step(views, images, texts)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for view, rows in t.items():
            if rows.grad is not None:
                size = np.linalg.norm(gradient[view])
                error = np.linalg.norm(rows.grad.double().numpy() - gradient[view])
                # Where everything cancels, what is left is compared with what it was made of.
                assert error <= max(1e-5, 2**-23 / tau) * max(size, 1e-3), (view, error, size)


@pytest.mark.parametrize("name", ["sogclr", "amclr", "xamclr"])
def test_gamma_one_is_the_minibatch_gradient(name: str) -> None:
    """Then every term is tau log of the batch's own mean, whatever came before; by autograd on that."""
    objective = build(name, 6, temperature=0.1, gamma=1.0).double()
    ids = torch.arange(6)
    objective({k: torch.tensor(v) for k, v in draw_views(8).items()}, ids)
    mine, other = tensors(draw_views(9)), tensors(draw_views(9))
    objective(mine, ids)[0].backward()
    off = ~torch.eye(6, dtype=torch.bool)
    total = torch.zeros((), dtype=torch.float64)
    for a, c in oracle.TERMS[name]:
        d = other[a] @ other[c].T - (other[a] * other[c]).sum(1, keepdim=True)
        total = total + 0.1 * (d / 0.1).exp()[off].view(6, 5).mean(1).log().mean()
    total.backward()
    for view in mine:
        if other[view].grad is not None:
            close(mine[view].grad, other[view].grad, 1e-10, view)


def test_two_losses_before_one_backward_and_twice_through_one() -> None:
    ids = torch.arange(40)
    first, second = (tensors(draw_views(s, batch=40), torch.float32) for s in (0, 1))
    both = build("amclr", 40, temperature=0.1)
    (both(first, ids)[0] + 2 * both(second, ids)[0]).backward()
    each = build("amclr", 40, temperature=0.1)
    again = [tensors(draw_views(s, batch=40), torch.float32) for s in (0, 1)]
    each(again[0], ids)[0].backward()
    loss, _ = each(again[1], ids)
    loss.backward(retain_graph=True)
    loss.backward()
    for mine, expected in zip((first, second), again, strict=True):
        torch.testing.assert_close({k: v.grad for k, v in mine.items()}, {k: v.grad for k, v in expected.items()})


def test_metrics_stay_when_the_loss_is_changed_in_place() -> None:
    loss, metrics = build("sogclr", 6)(tensors(draw_views(0), torch.float32), torch.arange(6))
    before = float(metrics["loss"])
    with torch.no_grad():
        loss.mul_(2)
    assert float(metrics["loss"]) == float(metrics["loss_cross"]) == before
