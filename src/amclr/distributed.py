"""The processes that share a batch: gather and sum, and on one process the identity. Needs torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

NOTHING: Mapping[str, int] = {}


def processes() -> int:
    """How many processes torch.distributed has been initialised with; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class World:
    """A batch of N rows over W processes: process r holds `sizes[r]` of them, in the order of the ranks."""

    sizes: tuple[int, ...]
    rank: int = 0

    @classmethod
    def of(cls, rows: int, device: torch.device, together: bool = True, same: Mapping[str, int] = NOTHING) -> World:
        """The world of a batch of which this process holds `rows`; negative: it could not make its part.

        together: gather over the default process group where there is one. same: numbers by name that must
        be the same on all processes, such as the width of the rows. Raises ValueError on every process if any
        passed a negative number of rows or other numbers than the rest, so that none waits for it.
        """
        if not together or processes() == 1:
            return cls((rows,))
        own = torch.tensor([rows, *same.values()], device=device)
        parts = [torch.empty_like(own) for _ in range(processes())]
        dist.all_gather(parts, own)
        found = torch.stack(parts).tolist()
        sizes = tuple(row[0] for row in found)
        if min(sizes) < 0:
            raise ValueError(f"process {sizes.index(min(sizes))} refused its part of the batch: see its message")
        for rank, row in enumerate(found):
            if row[1:] != found[0][1:]:
                raise ValueError(
                    f"processes 0 and {rank} do not do the same: {', '.join(same)} are {found[0][1:]} and {row[1:]}"
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
        """The parts of all processes, joined along the batch's dimension `dim`; without a gradient."""
        if self.alone:
            return part
        part = part.detach().movedim(dim, 0).contiguous()
        # Collectives want equal shapes: the smaller parts are padded.
        longest = max(self.sizes)
        padded = (
            part if len(part) == longest else torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
        )
        parts = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(parts, padded)
        return torch.cat([p[:n] for p, n in zip(parts, self.sizes, strict=True)]).movedim(0, dim).contiguous()

    def gather_rows(self, part: Tensor) -> Tensor:
        """`gather` along dimension 0 with a gradient: that of this process's rows.

        Exact where every process computes the same function of the whole: then no gradients need to be
        exchanged.
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
