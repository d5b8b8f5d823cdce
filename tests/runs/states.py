"""States to save in checkpoints, and what tests compare of them."""

from __future__ import annotations

import math
import resource
import struct
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from amclr.runs.checkpoints import Checkpoints


def state_of(step: int, numbers: int = 40) -> dict[str, Any]:
    """A state with everything that one may hold, other values for every step."""
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(numbers, 3, generator=draw)
    module = nn.BatchNorm1d(3).state_dict()
    module["running_mean"] += step
    return {
        "model": {"weight": weight, "half": weight.to(torch.bfloat16), "turned": weight.T, "none": torch.empty(0, 4)},
        "norm": module,
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step)), "tied": weight}},
            "param_groups": [{"lr": 1e-3 * step, "betas": (0.9, math.nan), "fused": None, "params": [0, 1]}],
        },
        "mask": weight > 0, "ids": torch.arange(numbers), "step": step, "best": -math.inf, "measured": True,
        "skipped": [step, -1], "text": "ä \n" + str(step), "raw": b"\x00" + bytes([step % 256]),
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal in every bit, without what is tested."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad and bits(a) == bits(b)
    if isinstance(a, dict):
        attributes = not isinstance(a, OrderedDict) or same(vars(a), vars(b))
        return attributes and same(list(a), list(b)) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return bool(a == b)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage().tolist())


def names(saved: Checkpoints) -> list[str]:
    return sorted(f.name for f in saved.folder.iterdir())


@contextmanager
def full_disk(limit: int = 1 << 12) -> Iterator[None]:
    """No file may grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
