"""Faults of a step: numbers that are not finite, and memory that runs out. They are detected, undone and saved."""

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
"""Messages of errors where the machine's memory runs out: torch's allocator, oneDNN, the C++ library."""
MAX_SAVED = 20
"""Faulty batches saved per run at most: they are as large as their images."""


class Undo:
    """Restores what a step changes before its optimiser step: batch norm statistics and the estimator tables."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.objective = objective
        objective.remember = True
        norms = [m for m in model.modules() if isinstance(m, _NormBase)]
        self.buffers = [b for m in norms for b in m.buffers(recurse=False)]
        self.saved = [b.clone() for b in self.buffers]

    def mark(self) -> None:
        """Save the state before a step."""
        self.objective.commit()
        if self.buffers:
            torch._foreach_copy_(self.saved, self.buffers)

    def restore(self) -> None:
        """Restore the state of the last `mark`."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.saved)
        self.objective.undo()


def short_message(error: BaseException) -> str:
    """An error's message in one line of at most 120 characters."""
    return " ".join(str(error).split())[:120].rstrip(". ")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory of a device or of the machine ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None
    )


def save_fault(
    folder: Path, step: int, rank: int, batch: Batch, names: Sequence[str], loss: Tensor, norm: Tensor | None,
    model: nn.Module,
) -> str:  # fmt: skip
    """Save the batch of a step whose numbers are not finite; returns what is not, in a few words.

    folder/step-K.json has the loss, the samples' names and the weights that are not finite; step-K.pt has the batch as
    the model saw it, for `torch.load`.
    """
    weights = [name for name, p in model.named_parameters() if not bool(local(p.detach()).isfinite().all())]
    what = f"the loss is {loss.item()}" if not bool(loss.isfinite()) else "the gradient is not finite"
    if weights:
        what += f" (weights that are not finite already: {', '.join(weights[:3])})"
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.pt"))) < MAX_SAVED:
        name = f"step-{step:08d}" + (f"-rank{rank}" if rank else "")
        report: dict[str, Any] = {
            "step": step, "what": what, "loss": str(loss.item()), "gradient norm": str(norm and norm.item()),
            "samples": list(names), "weights that are not finite": weights,
        }  # fmt: skip
        state = {"images": batch.images, "tokens": batch.tokens, "ids": batch.ids, "groups": batch.groups,
                 "image_views": batch.image_views, "text_views": batch.text_views}  # fmt: skip
        with written(folder / f"{name}.pt") as handle:
            torch.save(state, handle)
        write_text(folder / f"{name}.json", json.dumps(report, indent=1) + "\n")
    return what
