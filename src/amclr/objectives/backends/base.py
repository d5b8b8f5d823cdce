"""What the objectives ask of a backend: two passes over similarity blocks."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from amclr.objectives.layout import Layout
from amclr.objectives.positives import Positives

LOG2E = math.log2(math.e)


class Workspace(threading.local):
    """Tiles that the same thread uses again at the next step.

    On a CPU, touching fresh memory costs more than computing with it: about a tenth of a step at B = 512. It holds
    one tile or, of each concurrent grid, the tiles that the grid keeps. On an accelerator every tile is new: its
    allocator reuses memory by itself.
    """

    def __init__(self) -> None:
        self.held: dict[object, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # copies and pickles of an objective start empty

    def empty(self, key: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor like `like`; it overwrites the previous one with that key."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape)
        buffer = self.held.get(key)
        if buffer is None or buffer.numel() < size or buffer.dtype != like.dtype:
            with torch.inference_mode(False):  # else it could not be written to in training
                buffer = self.held[key] = torch.empty(size, dtype=like.dtype)
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class BlockInputs:
    """What the blocks of a step are made from, with V views, T terms, a batch of N rows and M of them on this process.

    every: V views (N, D) of the whole batch. mine: this process's rows. layouts: which blocks, and the order of the
    terms. taus: a float, a tensor () or (T, N). matmul_dtype: type of the features in matrix products.
    largest_weight: an upper bound on B times the weights of two anchors, for half precision.
    """

    every: Sequence[Tensor]
    mine: slice
    layouts: Sequence[Layout]
    taus: float | Tensor
    positives: Positives
    matmul_dtype: str = "auto"
    largest_weight: float = 1.0
    workspace: Workspace = field(default_factory=Workspace)


class SimilarityBlocks(Protocol):
    """The similarity blocks of a step, never held whole. Made from `BlockInputs`; called without gradients."""

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """Log of the sum over the negatives of exp(s / tau), and s_ii, of this process's anchors: (T, M) each."""
        ...

    def gradients(
        self, offsets: Tensor, weight_sums: Tensor, gradient: Tensor, written: set[int], weighted_sums: bool
    ) -> Tensor | None:
        """Add the gradient of this process's rows to `gradient` (V, M, D).

        offsets (T, N): subtracted from an anchor's exponents, +inf where it has no weight. weight_sums (T, N): the sums
        of its weights. written: views whose gradient is initialised; those of other views are overwritten and added to
        the set. With `weighted_sums`, returns sum_j w_ij s_ij of this process's anchors, (T, M).
        """
        ...
