"""The eager tiles: the same result for every tiling, in the memory of a tile."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from amclr.objectives import VIEWS, build
from amclr.objectives import step as step_module
from amclr.objectives.backends import torch_tiles
from tests.objectives.helpers import (
    GLOBAL,
    draw_views,
    peak_bytes,
    tensors,
)

WALKS = {
    "whole": {},
    "kept tiles": {"TILE_ROWS": 16, "TILE_COLUMNS": 7},
    "recomputed tiles": {"TILE_ROWS": 16, "TILE_COLUMNS": 7, "KEPT_BYTES": 0},
    "rows of tiles": {"TILE_ROWS": 9, "KEPT_BYTES": 0},
    "both exponentials": {"LEAST_SUM": math.inf, "PLAIN_EXPONENT": 0.0},
    "both exponentials, in tiles": {"LEAST_SUM": math.inf, "PLAIN_EXPONENT": 0.0, "TILE_ROWS": 16, "TILE_COLUMNS": 7},
    "guarded factors": {"PLAIN_EXPONENT": 0.0, "LARGEST_FACTOR": -math.inf},
}


@pytest.mark.parametrize("name", [*GLOBAL, "clip"])
@pytest.mark.parametrize("tau", [0.01, 0.25])
@pytest.mark.parametrize("matches", ["none", "ids", "groups"])
def test_how_a_block_is_walked_changes_nothing(
    name: str, tau: float, matches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formed at once or in tiles, kept or not, with one exponential or two: the same loss, gradients and tables."""
    ids = torch.arange(40) // (2 if matches == "ids" else 1)
    groups = {"image": ids // 3, "text": ids % 11 - 2, "text_aug": 17 - ids % 13} if matches == "groups" else None
    found = {}
    for walk, settings_ in WALKS.items():
        with monkeypatch.context() as patch:
            for key, value in settings_.items():
                patch.setattr(torch_tiles, key, value)
            patch.setattr(step_module, "SMALL", 0 if "tiles" in walk else 1 << 30)
            objective = build(name, 40, temperature=tau).double()
            objective.diagnose = walk == "rows of tiles"
            for step in range(2):
                t = tensors(draw_views(step, batch=40, dim=7))
                loss, _ = objective(t, ids, groups)
                loss.backward()
            grads = {k: v.grad for k, v in t.items() if v.grad is not None}
            found[walk] = loss.detach(), grads, objective.state_dict()
    for walk, values in found.items():
        torch.testing.assert_close(values, found["whole"], rtol=1e-10, atol=1e-12, msg=lambda m, w=walk: f"{w}: {m}")


@pytest.mark.parametrize(("name", "tau"), [("amclr", 0.05), ("amclr", 0.01), ("ixamclr", 0.05), ("clip", 0.05)])
def test_memory_is_that_of_a_tile(name: str, tau: float) -> None:
    """No B x B tensor is formed: what torch allocates at once stays far below one."""
    batch, dim = 6000, 16
    views = {v: F.normalize(torch.randn(batch, dim), dim=-1).requires_grad_() for v in VIEWS}
    objective = build(name, batch, temperature=tau)
    peak = peak_bytes(lambda: objective(views, torch.arange(batch))[0].backward())
    assert 0 < peak < batch * batch * 4 / 8, peak


def test_one_exponential_serves_a_trained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positives far above all negatives, at a temperature where they must not set the scale of the exponents."""
    monkeypatch.setattr(torch_tiles.Grid, "_exact_sums", lambda *_: pytest.fail("done the long way"))
    base = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    views = {v: F.normalize(base + 0.2 * torch.randn(64, 256), dim=-1) for v in VIEWS}
    loss, metrics = build("xamclr", 64, temperature=0.01)(views, torch.arange(64))
    assert float(metrics["positive"]) > 0.9 and bool(torch.isfinite(loss))
