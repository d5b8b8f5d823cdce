"""Time and memory of the objectives, forward and backward, as ratios measured in one run.

    make bench, or python -m benchmarks.objectives [--sizes 128,512] [--dims 256] [--dtype float32] [--device cpu]

Compared are: this project's objectives; the straightforward formulation, which materialises a B x B
matrix per term and leaves the gradient to autograd; open_clip's ClipLoss and SigLipLoss (2 terms each)
and LibAUC's GCLoss (SogCLR, 2 terms), where installed; and the floor, torch's own matrix products alone
that any form of the gradient needs (three per similarity block; four where the memory may not grow with
B x B, so there 1.33 is the least; consistency penalties, `--cyclic 0.1`, are no part of it). Each time
is the median of rounds in which all rivals take turns, each round in another order; the memory is the
most that a step allocates beyond its inputs, the gradient included. On a GPU features are bfloat16 unless
`--dtype` says otherwise, and batches go on to 262,144 pairs, where what does not fit says so.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional as F

from amclr.objectives import build

VIEWS = ("image", "image_aug", "text", "text_aug")
Step = Callable[[], None]


def views_of(batch: int, dim: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {v: F.normalize(torch.randn(batch, dim, generator=generator), dim=-1).to(device, dtype) for v in VIEWS}
    return {v: r.requires_grad_() for v, r in rows.items()}


def ours(name: str, views: dict[str, torch.Tensor], tau: float, cyclic: float = 0.0) -> Step:
    batch = len(views["image"])
    # The rivals do not look at what they are given either.
    objective = build(name, batch, temperature=tau, cyclic_weight=cyclic, validate=False).to(views["image"].device)
    ids = torch.arange(batch, device=views["image"].device)
    return lambda: backward(objective(views, ids)[0], views)


def straightforward(name: str, views: dict[str, torch.Tensor], tau: float, cyclic: float = 0.0) -> Step:
    """Every term on its own, as published code writes it: similarities, then masked exponentials and weights in fp32."""
    built = build(name, 1, cyclic_weight=cyclic)
    pairs = [(t.anchor, t.candidate) for t in built.terms]
    batch = len(views["image"])
    device = views["image"].device
    table = torch.zeros(len(pairs), batch, device=device)
    ids, eye = torch.arange(batch, device=device), torch.eye(batch, device=device)

    def step() -> None:
        loss = torch.zeros((), device=device)
        for k, (anchor, candidate) in enumerate(pairs):
            s = (views[anchor] @ views[candidate].T).float()
            d = s - s.diagonal()[:, None]
            e = (d.detach() / tau).exp() * (1 - eye)
            g = e.sum(1) / (batch - 1)
            u = 0.2 * table[k, ids] + 0.8 * g
            table[k, ids] = u
            w = e / u[:, None]
            loss = loss + ((w * d * (1 - eye)).sum(1) / (batch - 1)).mean()
        for image, text in built.pairs if built.settings.cyclic_weight else ():
            x, y = views[image].float(), views[text].float()
            s = x @ y.T
            inconsistency = (x @ x.T - y @ y.T).square().mean() + (s - s.T).square().mean()
            loss = loss + (built.settings.cyclic_weight or 0) * batch / len(built.pairs) * inconsistency
        backward(loss, views)

    return step


def floor(blocks: int, views: dict[str, torch.Tensor]) -> Step:
    """The matrix products of `blocks` similarity blocks and their gradients, nothing else.

    As many rows at a time as take 2 GiB, which on a CPU is all of them.
    """
    x, y = views["image"].detach(), views["text"].detach()
    rows = max(1, (1 << 31) // (len(y) * y.element_size()))

    def step() -> None:
        for _ in range(blocks):
            for part in x.split(rows):
                s = part @ y.T
                s @ y
                s.T @ part

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
        with contextlib.redirect_stdout(io.StringIO()):
            gcl = GCLoss("bimodal", N=batch, tau=tau, gamma=0.8, device=views["image"].device)
        ids = torch.arange(batch)  # its estimates are on the CPU, wherever the views are
        found["LibAUC GCLoss"] = lambda: backward(gcl(views["image"], views["text"], ids)[0], views)
    except ImportError:
        pass
    return found


def backward(loss: torch.Tensor, views: dict[str, torch.Tensor]) -> None:
    loss.backward()
    for v in views.values():
        v.grad = None


def fits(step: Step) -> bool:
    """Whether a step finds the memory that it takes."""
    try:
        step()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def median_times(steps: dict[str, Step], seconds: float, device: str) -> dict[str, float]:
    """Median seconds of each step. They take turns, so that noise hits all alike, in another order each time.

    What one leaves in the cache would else always be there, or missing, for the same next one.
    """
    spent: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffled = list(steps), random.Random(0)

    def round_of(record: bool) -> None:
        shuffled.shuffle(order)
        for name in order:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            if record:
                spent[name].append(time.perf_counter() - start)

    round_of(False)
    # Where a round takes longer than all the time that there is, what starts slowly no longer shows.
    begin = time.perf_counter()
    round_of(True)
    least = 3 if time.perf_counter() - begin < seconds else 1
    while time.perf_counter() < begin + seconds or len(next(iter(spent.values()))) < least:
        round_of(True)
    return {name: statistics.median(times) for name, times in spent.items()}


def peak_bytes(step: Step, device: str) -> int:
    """The most that one step allocates beyond what it found."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with quiet_stderr(), torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:  # fmt: skip
        step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler writes to the process's standard error what nobody can act on."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def machine(device: str, threads: int) -> str:
    """A line that says where figures come from."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = (
            re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
            if os.path.exists("/proc/cpuinfo")
            else None
        )
        name = f"{found[1] if found else platform.machine()}, {threads} thread(s)"
    return f"torch {torch.__version__}, {name}"


def print_header(columns: list[str]) -> None:
    """The beginning of a Markdown table."""
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")


def print_row(cells: Iterable[object]) -> None:
    """A row of it, at once."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="batch sizes; by default 128 to 8192, on a GPU to 262144")
    parser.add_argument("--dims", default="256,512")
    parser.add_argument("--methods", default="sogclr,amclr,xamclr")
    parser.add_argument("--tau", type=float, default=0.05)
    parser.add_argument("--cyclic", type=float, default=0.0, help="weight of the consistency penalties")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time per row of the table, at least three rounds")
    parser.add_argument("--plain-gb", type=float, help="leave the straightforward form out above this; by default 8, "
                                                       "on a GPU where it does not fit")  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of the features")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    plain_bytes = 1e9 * (options.plain_gb or (math.inf if on_gpu else 8))
    sizes = options.sizes or ("128,1024,8192,32768,65536,262144" if on_gpu else "128,256,512,1024,2048,4096,8192")
    print(f"{machine(options.device, options.threads)}, {dtype}, tau {options.tau:g}; forward + backward. x / ours is how "
          "many times what ours takes.")  # fmt: skip
    names = ["open_clip ClipLoss", "open_clip SigLipLoss", "LibAUC GCLoss"]
    columns = ["D", "B", "method", "ours ms", "ours / floor", "straightforward / ours", "ours MB", "straightforward / ours",
               *(f"{n} / ours" for n in names)]  # fmt: skip
    print_header(columns)
    for dim in map(int, options.dims.split(",")):
        for batch in map(int, sizes.split(",")):
            views = views_of(batch, dim, options.device, getattr(torch, dtype))
            others = rivals(views, options.tau)
            absent = {n: "does not fit" if n in others else "-" for n in names}
            for name in options.methods.split(","):
                terms = len(build(name, 1).terms)
                steps = {
                    "ours": ours(name, views, options.tau, options.cyclic),
                    "floor": floor(terms // 2, views),
                    **others,
                }
                # Five B x B matrices a term are held for the backward pass.
                if terms * 5 * 4 * batch**2 < plain_bytes:
                    steps["plain"] = straightforward(name, views, options.tau, options.cyclic)
                if on_gpu:
                    steps = {n: step for n, step in steps.items() if fits(step)}
                row = [str(dim), str(batch), name]
                if "ours" in steps:
                    row += measured(name, steps, absent, views, options)
                else:
                    row += ["does not fit"] * (len(columns) - len(row))
                print_row(row)


def measured(
    name: str,
    steps: dict[str, Step],
    absent: dict[str, str],
    views: dict[str, torch.Tensor],
    options: argparse.Namespace,
) -> list[str]:
    """The figures of a row: times and memory of a method, and of its rivals as ratios.

    absent: by rival, what to say where it is not among the steps.
    """
    t = median_times(steps, options.seconds, options.device)
    # With a new objective: this one holds its tiles from step to step, and they count.
    memory = peak_bytes(lambda: ours(name, views, options.tau, options.cyclic)(), options.device)
    plain = plain_memory = "does not fit"
    if "plain" in steps:
        plain = f"{t['plain'] / t['ours']:.2f}"
        plain_memory = f"{peak_bytes(steps['plain'], options.device) / memory:.1f}"
    floor = f"{t['ours'] / t['floor']:.2f}" if "floor" in t else "does not fit"
    row = [f"{1e3 * t['ours']:.2f}", floor, plain, f"{memory / 1e6:.1f}", plain_memory]
    return row + [f"{t[n] / t['ours']:.2f}" if n in t else why for n, why in absent.items()]


if __name__ == "__main__":
    main()
