"""Groups: which rows are positives of each other besides those that share an id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from amclr.objectives import METHODS, VIEWS, build, positives
from tests.objectives import oracle
from tests.objectives.helpers import (
    GLOBAL,
    check_gradients,
    check_tables,
    draw_views,
    good,
    oracle_for,
    tensors,
)


@st.composite
def grouped(draw: Any) -> tuple[list[tuple[oracle.Views, list[int], list[int], dict[str, list[int]]]], float]:
    """Three batches with ids that may repeat, and groups of some of the views; below 0 is none."""
    batch = draw(st.integers(2, 7))
    numbers = lambda low, high: st.lists(st.integers(low, high), min_size=batch, max_size=batch)  # noqa: E731
    names = draw(st.lists(st.sampled_from(VIEWS), unique=True, min_size=1))
    found = []
    for _ in range(3):
        images = draw(st.permutations(range(9)))[:batch] if draw(st.booleans()) else draw(numbers(0, 8))
        texts = images if draw(st.booleans()) else draw(numbers(0, 8))
        groups = {name: draw(numbers(-2, 5)) for name in names}
        found.append((draw_views(draw(st.integers(0, 2**30)), batch), list(images), list(texts), groups))
    return found, draw(st.sampled_from([0.0625, 0.25]))


@pytest.mark.parametrize("name", GLOBAL)
@given(grouped())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_groups_are_positives_and_keep_their_estimates(name: str, given_steps: Any) -> None:
    """Value, gradients and tables are those of the loops; no groups, or groups of unused views, change nothing."""
    batches_, tau = given_steps
    objective = build(name, 9, temperature=tau, gamma=0.6, rho=0.4, validate=False).double()
    loops = oracle_for(name, oracle.PerTermEstimator(0.6), tau=tau, rho=0.4)
    for views, images, texts, groups in batches_:
        t = tensors(views)
        used = {v: g for v, g in groups.items() if v in objective.required_views}
        loss, _ = objective(
            t,
            {"image": torch.tensor(images), "text": torch.tensor(texts)},
            {v: torch.tensor(g) for v, g in groups.items()},
        )
        loss.backward()
        expected, gradient, _ = loops.step(views, images, texts, used)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-9, abs=1e-11)
        check_gradients(t, gradient, 1e-9)
    check_tables(objective, loops, 1e-9)


MIXED = {"image": [7, 1, -1, 7, -1, 2], "text": [3, -1, 4, -1, 5, 5], "text_aug": [-1, 3, -1, 4, -1, -1]}
"""Groups within a view, across the text views, and none."""


@pytest.mark.parametrize(
    ("name", "pairs", "function"),
    [
        ("clip", "all", lambda v, p: oracle.clip(v, 0.15, p, oracle.CROSS)),
        ("cyclip", None, lambda v, p: oracle.cyclip(v, 0.15, p)),
        ("siglip", None, lambda v, p: oracle.siglip(v, 0.15, -10.0, p)),
        ("simclr", None, lambda v, p: oracle.simclr(v, 0.15, p)),
    ],
)
def test_groups_in_minibatch_objectives(name: str, pairs: Any, function: Any) -> None:
    views, ids = draw_views(4, dim=3), [0, 1, 2, 3, 4, 5]
    objective = build(name, 6, temperature=0.15, pairs=pairs).double()
    used = {v: g for v, g in MIXED.items() if v in objective.required_views}
    matches = oracle.positive_pairs(ids, ids, used)
    t = tensors(views)
    loss, _ = objective(t, torch.tensor(ids), {v: torch.tensor(g) for v, g in MIXED.items()})
    loss.backward()
    assert float(loss.detach()) == pytest.approx(function(views, matches), rel=1e-7)
    check_gradients(t, oracle.numeric_gradient(lambda v: function(v, matches), views), 1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_group_has_nothing_to_contrast(name: str) -> None:
    """As where all rows are one sample: refused, or, unchecked, without a gradient of the contrast."""
    views, ids = good()
    group = {"image": torch.full((6,), 3)}
    with pytest.raises(ValueError, match="no row of the batch has a negative: all share an id or a group"):
        build(name, 6)(views, ids, group)
    alike, copies = (build(name, 6, validate=False, cyclic_weight=0) for _ in range(2))
    a, b = tensors(draw_views(0), torch.float32), tensors(draw_views(0), torch.float32)
    losses = alike(a, ids, group)[0], copies(b, ids * 0)[0]
    assert float(losses[0].detach()) == float(losses[1].detach())
    for loss, t in zip(losses, (a, b), strict=True):
        loss.backward()
        if name != "siglip":  # whose matched pair has a loss of its own
            assert all(v.grad is None or not v.grad.any() for v in t.values())


@pytest.mark.parametrize("name", METHODS)
def test_groups_without_a_match_change_no_bit(name: str) -> None:
    views, ids = good()
    plain, grouped_ = build(name, 6), build(name, 6)
    nothing = {"image": torch.full((6,), -1), "text": torch.arange(6) - 2, "text_aug": torch.arange(6) + 10}
    for _ in range(2):
        assert float(plain(views, ids)[0].detach()) == float(grouped_(views, ids, nothing)[0].detach())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in grouped_.state_dict().items())


@pytest.mark.parametrize("groups", [(), ("image",), ("image", "text")])
@pytest.mark.parametrize("ids_on", ["cpu", "cuda"])
@pytest.mark.parametrize("queue", [0, 9])
def test_labels_may_be_on_the_cpu(groups: tuple[str, ...], ids_on: str, queue: int, monkeypatch: Any) -> None:
    """Beside views on a GPU, seen by tensors without values, which no GPU is needed for."""
    monkeypatch.setattr(positives, "_may_repeat", lambda labels: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = build("amclr", 30, queue=queue, backend="eager", validate=False, storage="device").to("cuda")
        for _ in range(2):
            views = {v: torch.empty(4, 3, device="cuda", requires_grad=True) for v in VIEWS}
            ids = torch.empty(4, dtype=torch.int64, device=ids_on)
            loss, _ = objective(views, ids, {v: torch.empty(4, dtype=torch.int64) for v in groups})
            assert loss.device.type == "cuda"
