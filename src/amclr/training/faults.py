"""What goes wrong in a step: its numbers, its memory. Found, undone, and kept for whoever looks into it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from amclr.data.batches import Batch
from amclr.distributed.world import local
from amclr.objectives import Objective
from amclr.utils.files import write_text, written

NO_MEMORY = r"can't allocate memory|could not create a (primitive|memory)|bad_alloc"
"""What errors say where the machine's memory does not suffice: torch's allocator, oneDNN, the C++ library."""
DUMPS = 20
"""Faulty batches kept per run at most: they take the space of their images."""


class Undo:
    """What a step changes before its optimiser does, to be put back: batch norms' statistics, the tables."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.objective = objective
        objective.remember = True
        norms = [m for m in model.modules() if isinstance(m, _NormBase)]
        self.buffers = [b for m in norms for b in m.buffers(recurse=False)]
        self.before = [b.clone() for b in self.buffers]

    def mark(self) -> None:
        """Remember how things are before a step."""
        self.objective.commit()
        if self.buffers:
            torch._foreach_copy_(self.before, self.buffers)

    def back(self) -> None:
        """Put things back as they were at the last mark."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.before)
        self.objective.undo()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the machine, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None
    )


def keep_fault(
    folder: Path, step: int, rank: int, batch: Batch, names: Sequence[str], loss: Tensor, norm: Tensor | None,
    model: nn.Module,
) -> str:  # fmt: skip
    """Save what made the numbers of a step go wrong; say in a few words what that was.

    folder/step-K.json has the loss, the samples' names and the weights that are not finite; step-K.pt the
    batch as the model saw it, for `torch.load`.
    """
    bad = [name for name, p in model.named_parameters() if not bool(local(p.detach()).isfinite().all())]
    what = f"the loss is {loss.item()}" if not bool(loss.isfinite()) else "the gradient is not finite"
    if bad:
        what += f" (weights that are not finite already: {', '.join(bad[:3])})"
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.pt"))) < DUMPS:
        name = f"step-{step:08d}" + (f"-rank{rank}" if rank else "")
        told: dict[str, Any] = {
            "step": step, "what": what, "loss": str(loss.item()), "gradient norm": str(norm and norm.item()),
            "samples": list(names), "weights that are not finite": bad,
        }  # fmt: skip
        state = {"images": batch.images, "tokens": batch.tokens, "ids": batch.ids, "groups": batch.groups,
                 "image_views": batch.image_views, "text_views": batch.text_views}  # fmt: skip
        with written(folder / f"{name}.pt") as handle:
            torch.save(state, handle)
        write_text(folder / f"{name}.json", json.dumps(told, indent=1) + "\n")
    return what
