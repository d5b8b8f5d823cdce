"""Who computes the similarity blocks: torch, tile by tile, anywhere; or Triton kernels on a GPU."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from amclr.objectives.backends.base import BlockInputs, SimilarityBlocks
from amclr.objectives.backends.torch_tiles import TorchBlocks

__all__ = ["BACKENDS", "BlockInputs", "SimilarityBlocks", "similarity_blocks", "uses_triton"]

BACKENDS = ("auto", "eager", "triton")


def uses_triton(backend: str, like: Tensor) -> bool:
    """Whether a batch goes to Triton. Raises ValueError if `backend` asks for it and it cannot run."""
    if backend == "eager" or like.dtype == torch.float64:
        return False
    if backend == "triton":
        if like.device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
            raise ValueError("backend 'triton' needs views on a GPU (or TRITON_INTERPRET=1): use backend='auto'")
        return True
    return like.device.type == "cuda" and _triton_installed()


def similarity_blocks(inputs: BlockInputs, triton: bool) -> SimilarityBlocks:
    """The blocks of a step by one of the backends."""
    if not triton:
        return TorchBlocks(inputs)
    from amclr.objectives.backends.triton_kernels import TritonBlocks

    return TritonBlocks(inputs)


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None
