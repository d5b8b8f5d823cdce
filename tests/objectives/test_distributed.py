"""Several gloo processes, each with its part of a batch, against one process with the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch import multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from amclr.objectives import METHODS, build

VIEWS = ("image", "image_aug", "text", "text_aug")
BATCH, SAMPLES, STEPS = 12, 20, 3
PARTS = {"equal": (6, 6), "unequal": (9, 3), "three": (5, 1, 6)}
KERNELS = {
    **{name: {"name": name, "backend": "triton", "groups": name == "amclr"} for name in ("amclr", "iamclr", "clip")},
    "half": {"name": "xamclr", "backend": "triton", "views": "float16"},
}
"""In float32 or less, and so apart."""
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in METHODS},
    "reference": {"name": "xamclr", "estimator": "reference"},
    "learnable": {"name": "amclr", "temperature_mode": "learnable", "rho": 1.0},
    "aligned": {"name": "sogclr", "pairs": "aligned"},
    "adaptive": {"name": "amclr", "gamma": 0.2, "gamma_schedule": "adaptive"},
    "queue": {"name": "xamclr", "queue": 17, "groups": True},
    "queue, individual": {"name": "iamclr", "queue": 8},
    "queue, learned": {"name": "clip", "queue": 30},
    "queue, adaptive": {"name": "amclr", "gamma": 0.2, "gamma_schedule": "adaptive", "queue": 9},
    "cyclic": {"name": "xamclr", "cyclic_weight": 0.1},
    "weighted": {"name": "xamclr", "weights": {"image": 0.3, "text": 0.1}},
    **{
        f"{name} with groups": {"name": name, "groups": True}
        for name in ("sogclr", "ixamclr", "clip", "siglip", "simclr")
    },
}


def make(settings: dict[str, Any]) -> Any:
    settings = {k: v for k, v in settings.items() if k not in ("groups", "views")}
    made = build(num_samples={"image": SAMPLES, "text": SAMPLES}, temperature=0.1, **settings)
    return made if "backend" in settings else made.double()


def batch(step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Views and ids of a whole batch; from the second on, samples stand twice, across the processes too."""
    generator = torch.Generator().manual_seed(step)
    views = {v: torch.randn(BATCH, 5, generator=generator, dtype=torch.float64) for v in VIEWS}
    ids = torch.randperm(SAMPLES, generator=generator)[:BATCH]
    text = ids.clone()
    if step:
        ids[0], ids[1], text[2] = ids[-1], ids[-2], text[-3]
    return {v: F.normalize(x, dim=-1) for v, x in views.items()}, {"image": ids, "text": text}


def groups(step: int) -> dict[str, Tensor]:
    """Groups of a whole batch: of images, and of captions across their two views; some have none."""
    generator = torch.Generator().manual_seed(100 + step)
    return {v: torch.randint(-2, 16, (BATCH,), generator=generator) for v in ("image", "text", "text_aug")}


def steps_of(settings: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Losses, gradients of `rows`, and the final state, of a few steps."""
    objective = make(settings)
    dtype = getattr(torch, settings.get("views", "float32" if "backend" in settings else "float64"))
    objective.diagnose = dtype == torch.float64  # without it, kernels do what is between the passes
    losses, gradients = [], []
    for step in range(STEPS):
        views, ids = batch(step)
        own = {v: x[rows].to(dtype, copy=True).requires_grad_() for v, x in views.items()}
        shown = {v: g[rows] for v, g in groups(step).items()} if settings.get("groups") else None
        loss, metrics = objective(own, {of: i[rows] for of, i in ids.items()}, shown)
        objective.zero_grad()
        loss.backward()
        losses.append({k: m.detach() for k, m in metrics.items()} | {"loss": loss.detach()})
        gradients.append({v: x.grad for v, x in own.items() if x.grad is not None})
    learned = {k: p.grad for k, p in objective.named_parameters()}
    return {"losses": losses, "gradients": gradients, "state": objective.state_dict(), "learned": learned}


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)


def together(work: Callable[..., None], arguments: tuple[Any, ...], size: int) -> None:
    """`size` processes that each call `work(rank, *arguments)`: forked, so that nothing is imported again."""
    mp.start_processes(work, arguments, nprocs=size, start_method="fork")


def work(rank: int, sizes: tuple[int, ...], folder: str, cases: dict[str, dict[str, Any]]) -> None:
    start(rank, len(sizes), folder)
    first = sum(sizes[:rank])
    rows = slice(first, first + sizes[rank])
    found = {name: steps_of(settings, rows) for name, settings in cases.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", PARTS)
def test_processes_equal_one(parts: str, tmp_path: Path) -> None:
    """Loss, metrics, gradients, tables and learned temperatures of every objective, over steps with duplicates."""
    sizes = PARTS[parts]
    together(work, (sizes, str(tmp_path), SETTINGS), len(sizes))
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(len(sizes))]
    for name, settings in SETTINGS.items():
        whole = steps_of(settings, slice(None))
        for found in (r[name] for r in ranks):
            for mine, expected in zip(found["losses"], whole["losses"], strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
            torch.testing.assert_close(found["state"], whole["state"], rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(found["learned"], whole["learned"], rtol=1e-8, atol=1e-10)
            assert all(torch.equal(v, ranks[0][name]["state"][k]) for k, v in found["state"].items()), "not one table"
        for step in range(STEPS):
            joined = {v: torch.cat([r[name]["gradients"][step][v] for r in ranks]) for v in whole["gradients"][step]}
            torch.testing.assert_close(joined, whole["gradients"][step], rtol=1e-8, atol=1e-11)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels of these tests run in Triton's interpreter")
def test_kernels_of_processes_equal_one(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    together(work, ((7, 5), str(tmp_path), KERNELS), 2)
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for name, settings in KERNELS.items():
        whole = steps_of({**settings, "backend": "eager"}, slice(None))
        for found in (r[name] for r in ranks):
            for mine, expected in zip(found["losses"], whole["losses"], strict=True):
                assert float(mine["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)
            torch.testing.assert_close(found["state"], whole["state"], rtol=1e-4, atol=1e-5)
        for step in range(STEPS):
            joined = {v: torch.cat([r[name]["gradients"][step][v] for r in ranks]) for v in whole["gradients"][step]}
            # In half precision the weights and the gradient are rounded to it.
            close = {"rtol": 1e-2, "atol": 1e-4} if "views" in settings else {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(joined, whole["gradients"][step], **close)


def work_with_ddp(rank: int, sizes: tuple[int, ...], folder: str) -> None:
    start(rank, len(sizes), folder)
    first = sum(sizes[:rank])
    torch.save(weights_after(DistributedDataParallel, slice(first, first + sizes[rank])), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def weights_after(wrap: Any, rows: slice) -> dict[str, Tensor]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 4).double()
    model = wrap(layer)
    objective = build("amclr", SAMPLES, temperature=0.2, averaged=True).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for step in range(STEPS):
        views, ids = batch(step)
        stacked = F.normalize(model(torch.cat([views[v][rows] for v in VIEWS])), dim=-1)
        loss, _ = objective(dict(zip(VIEWS, stacked.chunk(4), strict=True)), ids["image"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: v.detach() for k, v in layer.state_dict().items()}


def test_under_ddp_the_weights_are_those_of_one_process(tmp_path: Path) -> None:
    """DDP averages gradients: `averaged` makes the average the gradient of the whole batch, whatever the parts."""
    together(work_with_ddp, ((8, 4), str(tmp_path)), 2)
    expected = weights_after(lambda m: m, slice(None))
    for rank in range(2):
        torch.testing.assert_close(
            torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, rtol=1e-9, atol=1e-12
        )


def work_with_a_fault(rank: int, folder: str) -> None:
    start(rank, 2, folder)
    objective = build("sogclr", SAMPLES)
    views, ids = batch(0)
    if rank == 1:
        views["text"] = views["text"][:3]
    try:
        objective(views, ids)
    except ValueError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    # Another slip: one process alone asks for diagnostics, whose sums would have to be gathered.
    views, ids = batch(0)
    objective.diagnose = rank == 1
    try:
        objective(views, ids)
    except ValueError as error:
        Path(folder, f"{rank}-diagnose.txt").write_text(str(error))
    objective.diagnose = False
    # Or passes groups, which the others would not gather.
    try:
        objective(views, ids, groups(0) if rank else None)
    except ValueError as error:
        Path(folder, f"{rank}-groups.txt").write_text(str(error))
    # No tensor at all, on one of them.
    try:
        objective({**views, "text": None} if rank else views, ids)
    except ValueError as error:
        Path(folder, f"{rank}-none.txt").write_text(str(error))
    # Or its views have other dimensions than the queue.
    queued = build("sogclr", SAMPLES, queue=4)
    views, ids = batch(0)
    queued(views, ids)
    try:
        queued({v: F.normalize(torch.ones(BATCH, 7), dim=-1) for v in views} if rank else views, ids)
    except ValueError as error:
        Path(folder, f"{rank}-queue.txt").write_text(str(error))
    # On a process alone it still works, and can be told to stay alone.
    alone = build("sogclr", SAMPLES, distributed=False)
    alone(batch(0)[0], batch(0)[1])
    dist.destroy_process_group()


@pytest.mark.timeout(120)
def test_if_one_process_refuses_its_batch_all_do(tmp_path: Path) -> None:
    together(work_with_a_fault, (str(tmp_path),), 2)
    assert "view 'text' has shape (3, 5)" in (tmp_path / "1.txt").read_text()
    assert "process 1 refused its part of the batch" in (tmp_path / "0.txt").read_text()
    for rank in range(2):
        for slip in ("diagnose", "groups"):
            assert "processes 0 and 1 do not do the same" in (tmp_path / f"{rank}-{slip}.txt").read_text()
    assert "view 'text' must be a floating-point" in (tmp_path / "1-none.txt").read_text()
    assert "process 1 refused" in (tmp_path / "0-none.txt").read_text()
    assert "views have 7 dimensions" in (tmp_path / "1-queue.txt").read_text()
    assert "process 1 refused" in (tmp_path / "0-queue.txt").read_text()
