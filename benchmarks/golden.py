"""Digests of what the program computes, to show that a refactoring has not changed a bit of it.

    python -m benchmarks.golden --write FILE     before the change
    python -m benchmarks.golden --check FILE     after it: lists what differs, and exits with 1 if anything does

Digests hold on one machine with one set of libraries only. Sections, each of which `--only PREFIX` selects:

    objective/  losses, metrics, gradients and state of every method over a few steps: plain, with a queue, individual
                and learnable temperatures, adaptive gamma, the reference estimator, groups, micro-batches, two
                processes, the Triton kernels in the interpreter
    run/        metrics, checkpoints, results and evaluations of short runs of the command line: small towers on scenes,
                frozen packaged encoders, fine-tuned ones, micro-batches, two processes, resumed after SIGTERM
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch import multiprocessing as mp
from torch.nn import functional as F

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported

from amclr.objectives import METHODS, backward_in_chunks, build

VIEWS = ("image", "image_aug", "text", "text_aug")
SAMPLES, STEPS = 60, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "queue": {"queue": 40},
    "individual": {"temperature_mode": "individual"},
    "learnable": {"temperature_mode": "learnable", "rho": 1.0},
    "adaptive": {"gamma": 0.2, "gamma_schedule": "adaptive"},
    "cosine": {"gamma": 0.2, "gamma_schedule": "cosine"},
    "reference": {"estimator": "reference"},
    "cyclic": {"cyclic_weight": 0.1},
    "aligned": {"pairs": "aligned"},
    "weighted": {"weights": {"image": 0.3, "text": 0.1}},
}
SCENES = ("--scenes.train", "240", "--scenes.val", "40", "--scenes.test", "40", "--scenes.zeroshot", "40")
SMALL = ("--batch_size", "24", "--epochs", "2", "--model.dim", "32")
FROZEN = ("--recipe", "frozen", "--data", "scenes", "--views.cached", "2", "--model.hidden", "64")
RUNS: dict[str, tuple[str, ...]] = {
    "scenes": (),
    "scenes-amclr": ("--objective", "amclr", "--loss.gamma", "0.6", "--views.image", "paper"),
    "scenes-individual": ("--objective", "ixamclr", "--loss.gamma", "0.9", "--ema", "0.9"),
    "scenes-micro": ("--micro_batch", "10"),
    "scenes-devices": ("--devices", "2"),
    "scenes-workers": ("--workers", "2", "--source.duplicates", "positives"),
    "scenes-clip": ("--objective", "clip", "--loss.pairs", "all", "--loss.queue", "30"),
    "frozen": (*FROZEN, "--loss.gamma", "0.7"),
    "frozen-one": (*FROZEN, "--source.captions", "one", "--objective", "xamclr"),
    "finetune": ("--recipe", "finetune", "--data", "scenes", "--model.image_size", "64", "--model.hidden", "64"),
}
"""Options of each run, besides SCENES and SMALL."""
TIMES = ("seconds", "share", "second", "time", "per_second")
"""Metrics whose names hold one of these differ from run to run."""

Case = tuple[str, Callable[[], str | dict[str, str]]]
"""A name, and what gives its digest, or several by name."""


def digest(*parts: object) -> str:
    """A short hash of numbers, arrays and texts, to the bit."""
    state = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, Tensor):
            add(str(part.shape))
            state.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            state.update(
                repr(part.tolist()).encode() if part.dtype.kind in "OU" else np.ascontiguousarray(part).tobytes()
            )
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                state.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for each in part:
                add(each)
        else:
            state.update(repr(part).encode())

    add(parts)
    return state.hexdigest()[:16]


# -- objectives ---------------------------------------------------------------------------------------------------------


def batch(step: int, size: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Views, ids and groups of a step; from the second on some samples stand twice."""
    random = torch.Generator().manual_seed(step)
    views = {v: F.normalize(torch.randn(size, 16, generator=random), dim=-1).to(dtype).requires_grad_() for v in VIEWS}
    ids = torch.arange(size) % SAMPLES
    ids = ids[torch.randperm(size, generator=random)]
    text = ids.clone()
    if step:
        ids[0], text[2] = ids[-1], text[-3]
    groups = {v: torch.randint(-4, 16, (size,), generator=random) for v in ("image", "text", "text_aug")}
    return views, {"image": ids, "text": text}, groups


def trained(
    name: str, settings: Mapping[str, Any], size: int = 24, grouped: bool = False, diagnose: bool = False,
    chunks: int = 0, rows: slice = slice(None), dtype: torch.dtype = torch.float32,
) -> str:  # fmt: skip
    """Digest of a few steps of an objective; "refused" where the method does not take the settings."""
    try:
        objective = build(name, SAMPLES, **{"temperature": 0.07, "gamma": 0.8, **settings})
    except ValueError:
        return "refused"
    objective.diagnose = diagnose
    seen: list[object] = []
    for step in range(STEPS):
        objective.start_epoch(step, STEPS)
        views, ids, groups = batch(step, size, dtype)
        own = {v: x.detach()[rows].clone().requires_grad_() for v, x in views.items()}
        own_ids, own_groups = ({k: x[rows] for k, x in labels.items()} for labels in (ids, groups))
        objective.zero_grad()
        if chunks:
            parts = [{v: x[start : start + chunks] for v, x in own.items()} for start in range(0, size, chunks)]
            loss, metrics = backward_in_chunks(lambda part: part, parts, objective, own_ids)
        else:
            loss, metrics = objective(own, own_ids, own_groups if grouped else None)
            loss.backward()
        gradients = {v: x.grad for v, x in own.items() if x.grad is not None}
        learned = [p.grad for p in objective.parameters() if p.grad is not None]
        seen += [loss, metrics, gradients, learned]
    views, ids, groups = batch(9, size, dtype)
    objective.eval()
    seen += [objective({v: x[rows] for v, x in views.items()}, {k: x[rows] for k, x in ids.items()})[0]]
    return digest(seen, objective.state_dict())


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for name in METHODS:
        for variant in ("plain", "queue", "individual", "learnable", "reference"):
            settings = {**VARIANTS[variant], "averaged": True}
            found[f"{name}/{variant}"] = trained(name, settings, rows=(slice(0, 15), slice(15, 24))[rank], grouped=True)
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def two_processes() -> dict[str, str]:
    """Digests of two gloo processes that share a batch."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (port, folder), nprocs=2)
        both = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    return {name: f"{value}+{both[1][name]}" for name, value in both[0].items()}


def objectives() -> Iterator[Case]:
    """Every case of `objective/`, by name."""
    for name in METHODS:
        case = partial(trained, name)
        for variant, settings in VARIANTS.items():
            yield f"{name}/{variant}", partial(case, settings)
            yield f"{name}/{variant}/groups", partial(case, settings, grouped=True, diagnose=True)
        yield f"{name}/float64", partial(case, {}, dtype=torch.float64)
        yield f"{name}/large", partial(case, {}, size=600)
        yield f"{name}/sharp", partial(case, {"temperature": 0.01}, size=600)
        yield f"{name}/chunks", partial(case, {}, chunks=10)
        yield f"{name}/bfloat16", partial(case, {}, dtype=torch.bfloat16)
        for variant in ("plain", "learnable", "individual"):
            settings = {**VARIANTS[variant], "backend": "triton"}
            yield f"{name}/triton/{variant}", partial(case, settings, size=12, grouped=True)
    yield "processes", two_processes


# -- runs ---------------------------------------------------------------------------------------------------------------


def amclr(*arguments: str, cache: Path, stop_after: Path | None = None) -> int:
    """Run the command line; with `stop_after`, send SIGTERM once that file holds a few rows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AMCLR_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "amclr", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)
        while stop_after and process.poll() is None:
            if stop_after.is_file() and stop_after.read_text().count('"train"') >= 1:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.05)
        code = process.wait()
        if code and not stop_after:
            log.seek(0)
            raise SystemExit(f"amclr {' '.join(arguments)} ended with {code}:\n{log.read()[-3000:]}")
    return code


def of_run(folder: Path) -> dict[str, str]:
    """Digests of what a run has left: metrics, the newest and the best checkpoint, results."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in row.items() if not any(t in k for t in TIMES)}
        for row in rows if row["kind"] in ("train", "eval", "start")
    ]  # fmt: skip
    found = {"metrics": digest(kept)}
    for name in ("last", "best"):
        state = torch.load(folder / "checkpoints" / f"{name}.pt", map_location="cpu", weights_only=True)
        state = state.get("state", state)
        for part in ("model", "optimizer", "objective", "step", "best", "samples", "skipped"):
            found[f"{name}/{part}"] = digest(state[part])
    results = json.loads((folder / "results.json").read_text())
    found["results"] = digest(_numbers(results))
    found["queries"] = digest(dict(np.load(folder / "queries.npz")))
    return found


def _numbers(value: Any) -> Any:
    """The numbers of a JSON value by their names, without texts, which may hold paths."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items() if not isinstance(v, str) and "seconds" not in k}
    return value


def one_run(name: str, work: Path) -> dict[str, str]:
    """Train, evaluate, and digest."""
    folder = work / name
    if not folder.exists():
        amclr("train", *SCENES, *RUNS[name], *SMALL, "--out", str(folder), cache=work / "cache")
    found = of_run(folder)
    amclr("evaluate", str(folder), "--split", "test", "--paraphrased", "rules", cache=work / "cache")
    [results] = (folder / "evaluations").glob("*.json")
    return found | {"evaluation": digest(_numbers(json.loads(results.read_text())))}


def resumed(work: Path) -> dict[str, str]:
    """A run that SIGTERM stops on its way and that is then resumed, and trained for longer."""
    folder = work / "resumed"
    amclr("train", *SCENES, *SMALL, "--out", str(folder), cache=work / "cache", stop_after=folder / "metrics.jsonl")
    amclr("train", "--resume", str(folder), cache=work / "cache")
    found = of_run(folder)
    amclr("train", "--resume", str(folder), "--epochs", "3", cache=work / "cache")
    return found | {f"longer/{k}": v for k, v in of_run(folder).items()}


def runs(work: Path) -> Iterator[Case]:
    """Every case of `run/`, by name."""
    for name in RUNS:
        yield name, partial(one_run, name, work)
    yield "resumed", partial(resumed, work)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="record digests; those not selected are kept")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with recorded digests")
    parser.add_argument("--only", default="", metavar="PREFIX", help="cases whose names begin so")
    options = parser.parse_args()
    if bool(options.write) == bool(options.check):
        parser.error("give either --write FILE or --check FILE")
    torch.set_num_threads(1)
    recorded: dict[str, str] = {}
    if (options.write or options.check).is_file():
        recorded = json.loads((options.write or options.check).read_text())
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work:
        for section, cases in (("objective", objectives()), ("run", runs(Path(work)))):
            for name, case in cases:
                if not f"{section}/{name}".startswith(options.only):
                    continue
                value = case()
                parts = value if isinstance(value, dict) else {"": value}
                found |= {f"{section}/{name}/{part}".rstrip("/"): each for part, each in parts.items()}
                if section == "run":
                    print(f"{section}/{name}: {len(parts)} digests", flush=True)
    if options.write:
        options.write.write_text(json.dumps(recorded | found, indent=1) + "\n")
        print(f"{len(found)} digests written to {options.write}")
        return 0
    expected = {name: value for name, value in recorded.items() if name.startswith(options.only)}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    for name in differing:
        print(f"differs: {name}: {expected.get(name, 'not recorded')} was, {found.get(name, 'missing')} is")
    print(f"{len(expected) - len([n for n in differing if n in expected])} of {len(expected)} digests are equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
