"""A batch embedded in chunks, against the same batch with one graph through everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amclr.objectives import METHODS, backward_in_chunks, build
from tests.objectives.helpers import peak_bytes

VIEWS = ("image", "image_aug", "text", "text_aug")
BATCH = 14


class Embed(nn.Module):
    """A tower with dropout, and with batch norm where asked for."""

    def __init__(self, norm: bool = False, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.BatchNorm1d(hidden) if norm else nn.Identity(), nn.GELU(), nn.Dropout(0.3),
            nn.Linear(hidden, 5),
        )  # fmt: skip

    def forward(self, chunk: Tensor) -> dict[str, Tensor]:
        """chunk: (b, V, width) -> view -> (b, D)."""
        rows = F.normalize(self.layers(chunk.flatten(0, 1)), dim=-1).unflatten(0, chunk.shape[:2])
        return dict(zip(VIEWS, rows.unbind(1), strict=True))


def make(name: str, norm: bool = False) -> tuple[Embed, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Embed(norm).double()
    return (
        model,
        build(name, 20, temperature=0.2).double(),
        torch.randn(BATCH, 4, 8).double(),
        torch.arange(BATCH) // 2 * 2,
    )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("size", [1, 4, 14])
def test_the_gradient_is_that_of_the_whole_batch(name: str, norm: bool, size: int) -> None:
    """Parameters, learned temperatures, tables, running statistics; dropout draws the same both times."""
    if norm and size == 1:
        size = 2
    model, objective, inputs, ids = make(name, norm)
    torch.manual_seed(5)
    parts = [model(chunk) for chunk in inputs.split(size)]
    groups = {"image": torch.arange(BATCH) % 9, "text_aug": torch.arange(BATCH) % 11 - 3}
    loss, _ = objective({v: torch.cat([p[v] for p in parts]) for v in VIEWS}, ids, groups)
    loss.backward()
    after = torch.rand(1)

    twin, other, _, _ = make(name, norm)
    torch.manual_seed(5)
    found, metrics = backward_in_chunks(twin, inputs.split(size), other, ids, groups=groups, model=twin)
    assert torch.equal(torch.rand(1), after), "the generator has gone on as if the batch had been embedded once"
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-12) and not found.requires_grad
    assert float(metrics["loss"]) == float(found)
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=key)
    for p, q in zip(objective.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), objective.state_dict(), rtol=1e-12, atol=1e-12)


def test_gradients_are_scaled_and_exchanged_once() -> None:
    """`backward` may scale, as for float16, learned temperatures included; all chunks but the last are in `no_sync`."""
    inside: list[bool] = []
    model, objective, inputs, ids = make("clip")

    class NoSync:
        held = False

        def __enter__(self) -> None:
            NoSync.held = True

        def __exit__(self, *_: object) -> None:
            NoSync.held = False

    def backward(x: Tensor) -> None:
        inside.append(NoSync.held)
        (8 * x).backward()

    model.eval()  # no dropout, so that the plain gradient is at hand
    backward_in_chunks(model, inputs.split(5), objective, ids, backward=backward, no_sync=NoSync)
    assert inside == [True, True, False]
    scaled = [p.grad for p in (*model.parameters(), *objective.parameters())]
    twin, other, _, _ = make("clip")
    twin.eval()
    other(twin(inputs), ids)[0].backward()
    for g, p in zip(scaled, (*twin.parameters(), *other.parameters()), strict=True):
        torch.testing.assert_close(g, 8 * p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_survive(dtype: torch.dtype) -> None:
    """The gradient of a large batch is far below what float16 holds, until loss scaling lifts it."""
    torch.manual_seed(0)
    weight, inputs, ids = torch.randn(8, 6), torch.randn(64, 4, 8), torch.arange(64)

    def embed(w: Tensor, chunk: Tensor) -> dict[str, Tensor]:
        rows = F.normalize(chunk @ w, dim=-1).to(dtype)
        return dict(zip(VIEWS, rows.unbind(1), strict=True))

    found = []
    for chunked in (False, True):
        w = weight.clone().requires_grad_()
        objective = build("amclr", 64, temperature=0.2, weights={"cross": 1e-6})
        if chunked:
            backward_in_chunks(
                lambda c, w=w: embed(w, c),
                inputs.split(16),
                objective,
                ids,
                backward=lambda x: (x * 2.0**16).backward(),
            )
        else:
            (objective(embed(w, inputs), ids)[0] * 2.0**16).backward()
        found.append(w.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3 * float(found[0].abs().max()))


def test_chunks_may_come_one_by_one_but_some_must() -> None:
    model, objective, inputs, ids = make("amclr")
    backward_in_chunks(model, iter(inputs.split(5)), objective, ids, model=model)
    with pytest.raises(ValueError, match="chunks is empty"):
        backward_in_chunks(model, [], objective, ids)


def test_a_large_batch_takes_the_memory_of_a_small_one() -> None:
    model = Embed(hidden=4096)
    inputs, ids = torch.randn(1024, 4, 8), torch.arange(1024)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def whole(batch: int) -> None:
        build("amclr", 1024, temperature=0.2)(model(inputs[:batch]), ids[:batch])[0].backward()

    def chunked() -> None:
        backward_in_chunks(model, inputs.split(64), build("amclr", 1024, temperature=0.2), ids, model=model)

    small, large, cached = peak_bytes(lambda: whole(64)), peak_bytes(lambda: whole(1024)), peak_bytes(chunked)
    # Beside a chunk, there is the objective's own work at B = 1024.
    alone = peak_bytes(lambda: build("amclr", 1024, temperature=0.2)(
        {v: F.normalize(torch.randn(1024, 5), dim=-1).requires_grad_() for v in VIEWS}, ids)[0].backward())  # fmt: skip
    assert large > 10 * small and cached < 1.5 * small + 2 * alone, (small, large, cached, alone)
