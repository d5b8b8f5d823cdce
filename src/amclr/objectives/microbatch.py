"""A large batch in the memory of a small one: the gradient cache (Gao et al. 2021, arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from amclr.objectives.objective import Objective

Chunk = TypeVar("Chunk")


def backward_in_chunks(
    embed: Callable[[Chunk], Mapping[str, Tensor]],
    chunks: Iterable[Chunk],
    objective: Objective,
    ids: Tensor | Mapping[str, Tensor],
    *,
    groups: Mapping[str, Tensor] | None = None,
    model: nn.Module | None = None,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Accumulate the gradient of a whole batch while only a chunk's activations are held at a time.

    All chunks are embedded without a graph; the objective gives the gradient of the whole batch with
    respect to the embeddings; the chunks are embedded again, with a graph, and that gradient is sent
    through them. Random draws (dropout) are the same both times. So the result is exactly that of one
    backward pass through everything, for one more forward pass. Norm layers that use the statistics of
    a batch see those of a chunk.

    Args:
        embed: a chunk -> view name -> (b, D) unit rows.
        chunks: the parts of the batch, in the order of `ids`.
        objective: called once, with all embeddings.
        ids: (B,) or by modality, as the objective takes them.
        groups: by view, as the objective takes them.
        model: its batch norms follow their running statistics in the second pass alone.
        backward: how to run backward, such as `fabric.backward` or `lambda x: scaler.scale(x).backward()`.
        no_sync: a context in which gradients are not exchanged, such as DDP's `no_sync`; entered for all
            chunks but the last.

    Returns the objective's loss, detached, and its metrics.
    """
    chunks = list(chunks)
    if not chunks:
        raise ValueError("chunks is empty: pass the parts of the batch, each a chunk that `embed` takes")
    states, parts = [], []
    with torch.no_grad(), _statistics_kept(model):
        for chunk in chunks:
            states.append(_random_state())
            parts.append(embed(chunk))
    leaves = {v: _wide(torch.cat([p[v] for p in parts])).detach().requires_grad_() for v in parts[0]}
    sizes = [len(next(iter(p.values()))) for p in parts]
    del parts
    loss, metrics = objective(leaves, ids, groups)
    learned = [p for p in objective.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [*leaves.values(), *learned], allow_unused=True)
    gradients = {v: g for v, g in zip(leaves, found, strict=False) if g is not None}
    start = 0
    for number, (chunk, state, size) in enumerate(zip(chunks, states, sizes, strict=True)):
        last = number == len(sizes) - 1
        with nullcontext() if last else no_sync():
            _set_random_state(state)
            views = embed(chunk)
            # A scalar whose gradient is the one to send: so that loss scaling and hooks work as ever.
            carrier = torch.stack(
                [(_wide(views[v]) * g[start : start + size]).sum() for v, g in gradients.items()]
            ).sum()
            if last:
                carried = zip(learned, found[len(leaves) :], strict=True)
                carrier = carrier + sum((p * g).sum() for p, g in carried if g is not None)
            if carrier.requires_grad:
                backward(carrier)
        start += size
    return loss.detach(), metrics


def _wide(x: Tensor) -> Tensor:
    """At least float32: in float16, a gradient would be rounded away before loss scaling can lift it."""
    return x.to(torch.promote_types(torch.float32, x.dtype))


State = tuple[Tensor, list[Tensor]]


def _random_state() -> State:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


@contextmanager
def _statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """Leave the running statistics of batch norms as they are."""
    norms = [m for m in (model.modules() if model else ()) if isinstance(m, _NormBase) and m.training]
    before = [(m.momentum, None if m.num_batches_tracked is None else m.num_batches_tracked.clone()) for m in norms]
    try:
        for m in norms:
            m.momentum = 0.0
        yield
    finally:
        for m, (momentum, count) in zip(norms, before, strict=True):
            m.momentum = momentum
            if count is not None and m.num_batches_tracked is not None:
                m.num_batches_tracked.copy_(count)
