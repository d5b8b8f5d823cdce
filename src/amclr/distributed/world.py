"""The processes that share a batch: gather and sum, which on one process are the identity. Needs torch alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NO_NUMBERS: Mapping[str, int] = {}


def processes() -> int:
    """The number of processes of torch.distributed; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process() -> int:
    """The rank of this process; 0 without torch.distributed."""
    return dist.get_rank() if processes() > 1 else 0


@dataclass(frozen=True)
class Processes:
    """The processes of a torchrun that share work, but no model; without torchrun, one."""

    rank: int = 0
    count: int = 1

    @classmethod
    def start(cls) -> Processes:
        """Connect to the others, where torchrun started several."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            # They only wait for the slowest at the end, which may take hours.
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        return cls(dist.get_rank(), count)

    def wait(self) -> None:
        """Wait for all the others."""
        if self.count > 1:
            dist.barrier()


@dataclass(frozen=True)
class World:
    """A batch of N rows over W processes: process r holds `sizes[r]` of them, in the order of the ranks."""

    sizes: tuple[int, ...]
    rank: int = 0

    @classmethod
    def of(cls, rows: int, device: torch.device, together: bool = True, same: Mapping[str, int] = NO_NUMBERS) -> World:
        """The world of a batch of which this process holds `rows`; negative if it could not make its part.

        together: gather over the default process group where there is one. same: numbers by name that must be equal
        on all processes, such as the width of the rows. Raises ValueError on every process if any passes a negative
        number of rows or different numbers, so that none waits for it.
        """
        if not together or processes() == 1:
            return cls((rows,))
        numbers = torch.tensor([rows, *same.values()], device=device)
        parts = [torch.empty_like(numbers) for _ in range(processes())]
        dist.all_gather(parts, numbers)
        gathered = torch.stack(parts).tolist()
        sizes = tuple(row[0] for row in gathered)
        if min(sizes) < 0:
            raise ValueError(f"process {sizes.index(min(sizes))} refused its part of the batch: see its message")
        for rank, row in enumerate(gathered):
            if row[1:] != gathered[0][1:]:
                raise ValueError(
                    f"processes 0 and {rank} do not do the same: {', '.join(same)} are {gathered[0][1:]} and {row[1:]}"
                )
        return cls(sizes, dist.get_rank())

    @property
    def alone(self) -> bool:
        """Whether this process holds the whole batch."""
        return len(self.sizes) == 1

    @property
    def start(self) -> int:
        """The first row of this process in the whole batch."""
        return sum(self.sizes[: self.rank])

    @property
    def mine(self) -> slice:
        """The rows of this process in the whole batch."""
        return slice(self.start, self.start + self.sizes[self.rank])

    def gather(self, part: Tensor, dim: int = 0) -> Tensor:
        """The parts of all processes, concatenated along the batch dimension `dim`; without a gradient."""
        if self.alone:
            return part
        part = part.detach().movedim(dim, 0).contiguous()
        # Collectives need equal shapes: smaller parts are padded.
        longest = max(self.sizes)
        padded = (
            part if len(part) == longest else torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
        )
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, self.sizes, strict=True)]).movedim(0, dim).contiguous()

    def gather_rows(self, part: Tensor) -> Tensor:
        """`gather` along dimension 0 with a gradient: that of this process's rows.

        Exact where every process computes the same function of the whole: then no gradients need to be exchanged.
        """
        return part if self.alone else _Rows.apply(part, self)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if not self.alone:
            value = value.clone()
            dist.all_reduce(value)
        return value


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, world: World) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.mine = world.mine
        return world.gather(part)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient[ctx.mine], None


def share_of(count: int, rank: int, size: int) -> slice:
    """The slice of `count` items that process `rank` of `size` takes: shares differ by one at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


def average_statistics(model: nn.Module) -> None:
    """Average the running statistics of batch norms over the processes."""
    if processes() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.running_mean is not None]
    buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    if not buffers:
        return
    flat = torch.cat([b.detach().flatten() for b in buffers]) / processes()
    dist.all_reduce(flat)
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def is_sharded(value: object) -> bool:
    """Whether a tensor is sharded over the processes (a DTensor); checked without importing that module."""
    return hasattr(value, "full_tensor")


def local(tensor: Any) -> Tensor:
    """This process's shard of a sharded tensor; any other unchanged."""
    shard: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return shard


def whole(value: Any, keep: bool = True) -> Any:
    """A nested state with its sharded tensors (DTensor) gathered.

    All processes call it. keep: false drops the gathered tensors, on processes that do not need them.
    """
    if isinstance(value, dict):
        return {k: whole(v, keep) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(v, keep) for v in value)
    if is_sharded(value):
        gathered = value.full_tensor()
        return gathered.cpu() if keep else gathered.new_empty(0)
    return value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded over the processes as `like` is, if it is."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    sharded: Tensor = distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return sharded
