"""Time and memory of the objectives, forward and backward, as ratios measured in one run.

    python benchmarks/objectives.py [--sizes 128,512,1024] [--dims 256,512] [--threads 1] [--device cpu]

Compared are: this project's objectives; the straightforward formulation, which materialises a B x B
matrix per term and leaves the gradient to autograd; open_clip's ClipLoss and SigLipLoss and LibAUC's
GCLoss, where installed; and the floor, the matrix products alone that any form of the gradient needs
(three per similarity block). Each time is the median of rounds in which all rivals take turns.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from amclr.objectives import build

VIEWS = ("image", "image_aug", "text", "text_aug")
Step = Callable[[], None]


def views_of(batch: int, dim: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {v: F.normalize(torch.randn(batch, dim, generator=generator), dim=-1).to(device) for v in VIEWS}
    return {v: r.requires_grad_() for v, r in rows.items()}


def ours(name: str, views: dict[str, torch.Tensor], tau: float) -> Step:
    batch = len(views["image"])
    objective = build(name, batch, temperature=tau).to(views["image"].device)
    ids = torch.arange(batch, device=views["image"].device)
    return lambda: backward(objective(views, ids)[0], views)


def straightforward(name: str, views: dict[str, torch.Tensor], tau: float) -> Step:
    """Every term on its own, as published code writes it: similarities, masked exponentials, weights, in fp32."""
    pairs = [(t.anchor, t.candidate) for t in build(name, 1).terms]
    batch = len(views["image"])
    device = views["image"].device
    table = torch.zeros(len(pairs), batch, device=device)
    ids, eye = torch.arange(batch, device=device), torch.eye(batch, device=device)

    def step() -> None:
        loss = torch.zeros((), device=device)
        for k, (anchor, candidate) in enumerate(pairs):
            s = views[anchor] @ views[candidate].T
            d = s - s.diagonal()[:, None]
            e = (d.detach() / tau).exp() * (1 - eye)
            g = e.sum(1) / (batch - 1)
            u = 0.2 * table[k, ids] + 0.8 * g
            table[k, ids] = u
            w = e / u[:, None]
            loss = loss + ((w * d * (1 - eye)).sum(1) / (batch - 1)).mean()
        backward(loss, views)

    return step


def floor(blocks: int, views: dict[str, torch.Tensor]) -> Step:
    """The matrix products of `blocks` similarity blocks and their gradients, nothing else."""
    x, y = views["image"].detach(), views["text"].detach()

    def step() -> None:
        for _ in range(blocks):
            s = x @ y.T
            s @ y
            s.T @ x

    return step


def rivals(views: dict[str, torch.Tensor], tau: float) -> dict[str, Step]:
    found: dict[str, Step] = {}
    scale = torch.tensor(1 / tau, device=views["image"].device)
    try:
        from open_clip.loss import ClipLoss, SigLipLoss

        clip, siglip = ClipLoss(), SigLipLoss()
        bias = torch.tensor(-10.0, device=scale.device)
        found["open_clip ClipLoss"] = lambda: backward(clip(views["image"], views["text"], scale), views)
        found["open_clip SigLipLoss"] = lambda: backward(siglip(views["image"], views["text"], scale, bias), views)
    except ImportError:
        pass
    try:
        from libauc.losses import GCLoss

        batch = len(views["image"])
        gcl = GCLoss("bimodal", N=batch, tau=tau, gamma=0.8, device=views["image"].device)
        ids = torch.arange(batch, device=views["image"].device)
        found["LibAUC GCLoss (SogCLR)"] = lambda: backward(gcl(views["image"], views["text"], ids)[0], views)
    except Exception as error:  # absent, or at odds with the installed torch
        print(f"LibAUC left out: {type(error).__name__}: {str(error)[:90]}")
    return found


def backward(loss: torch.Tensor, views: dict[str, torch.Tensor]) -> None:
    loss.backward()
    for v in views.values():
        v.grad = None


def median_times(steps: dict[str, Step], seconds: float, device: str) -> dict[str, float]:
    """Median seconds of each step; the rivals take turns, so that noise hits all alike."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(spent.values()))) < 3:
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def peak_bytes(step: Step, device: str) -> int:
    """The most that one step allocates beyond what it found."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="128,256,512,1024,2048")
    parser.add_argument("--dims", default="256,512")
    parser.add_argument("--methods", default="sogclr,amclr,xamclr")
    parser.add_argument("--tau", type=float, default=0.05)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time per cell of the table")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {options.threads} thread(s), "
          f"{options.device}, fp32, tau {options.tau:g}; forward + backward")  # fmt: skip
    print(
        "| D | B | method | ours ms | / floor | straightforward / ours | peak MB | straightforward / ours | rivals / ours |"
    )
    print("|---" * 9 + "|")
    for dim in map(int, options.dims.split(",")):
        for batch in map(int, options.sizes.split(",")):
            views = views_of(batch, dim, options.device)
            others = rivals(views, options.tau)
            for name in options.methods.split(","):
                mine, plain = ours(name, views, options.tau), straightforward(name, views, options.tau)
                steps = {"ours": mine, "plain": plain, "floor": floor(len(build(name, 1).terms) // 2, views), **others}
                t = median_times(steps, options.seconds, options.device)
                memory, plain_memory = peak_bytes(mine, options.device), peak_bytes(plain, options.device)
                beside = ", ".join(f"{k} {t[k] / t['ours']:.2f}" for k in others)
                print(f"| {dim} | {batch} | {name} | {1e3 * t['ours']:.2f} | {t['ours'] / t['floor']:.2f} | "
                      f"{t['plain'] / t['ours']:.2f} | {memory / 1e6:.1f} | {plain_memory / memory:.1f} | {beside} |",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
