"""The workspace: tiles that belong to one thread and one objective."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import torch

from amclr.objectives import build
from tests.objectives.helpers import (
    draw_views,
    tensors,
)


def test_copies_and_files_hold_no_tiles() -> None:
    objective, ids = build("amclr", 300, temperature=0.1), torch.arange(300)
    objective(tensors(draw_views(0, batch=300), torch.float32), ids)
    assert objective.parts.workspace.held and not copy.deepcopy(objective).parts.workspace.held
    assert len(pickle.dumps(objective)) < 100_000


def test_threads_do_not_share_tiles() -> None:
    objective, ids = build("amclr", 64, temperature=0.1).eval(), torch.arange(64)
    inputs = [{k: v.detach() for k, v in tensors(draw_views(s, batch=64), torch.float32).items()} for s in range(40)]
    alone = [float(objective(v, ids)[0]) for v in inputs]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda v: float(objective(v, ids)[0]), inputs)) == alone
