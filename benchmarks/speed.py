"""Seconds and memory of a training step under the settings that are there to save either: a Markdown table.

    python -m benchmarks.speed [--batch 16] [--rounds 4] [--threads 2] [--only float32 compile]

A step is that of the `finetune` recipe, objective AmCLR: EfficientNet-Lite0 on 2 x B images of 128 x 128,
MiniLM on 2 x B captions of 8 to 24 words, forward, objective, backward and AdamW. Each setting has a
process of its own, so that its peak of memory (resident, PyTorch itself included; and what of it the steps
added) is its own; all are alive at once, and make their steps in
turns, one after the other, so that noise hits all alike. Beside the seconds of the clock stand those that the
processor worked, over all threads: ratios are of these, which hold where others use the machine too. The first step (where compiling takes place) is
told apart, and not counted. A ratio is taken within each round; the table has the median, least and
greatest. Needs amclr[pretrained,adapters], a C++ compiler, and about 2 GB of memory for each setting.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from benchmarks.objectives import machine

from amclr.config.recipes import finetune
from amclr.config.schema import ModelConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.objectives import backward_in_chunks, build
from amclr.training.optim import build_optimizer

SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16-mixed": {"bfloat16": True},
    "channels first": {"channels_first": True},
    "compile": {"compile": True},
    "recompute": {"activation_checkpointing": True},
    "image tower frozen": {"image_lr": 0.0},
    "text tower frozen": {"text_lr": 0.0},
    "adapters of rank 8": {"image_adapters": 8, "text_adapters": 8},
    "micro-batch B/4": {"parts": 4},
}
WORDS = "a brown dog runs along the beach with a stick in its mouth while two children in red coats watch it from afar"


def step_of(batch: int, options: dict[str, Any]) -> Callable[[], None]:
    """A training step under some of the settings."""
    chosen = {k: v for k, v in options.items() if k in ModelConfig.__dataclass_fields__}
    config = finetune()
    config = replace(config, model=replace(config.model, **chosen))
    torch.manual_seed(0)
    model = DualEncoder(config.model, build_tokenizer(config.model, []))
    if options.get("channels_first"):
        model.image_tower.to(memory_format=torch.contiguous_format)
        model.image_tower.layout = torch.contiguous_format
    objective = build("amclr", batch, temperature=0.05, gamma=0.8)
    optimizer = build_optimizer(config.optim, model, objective)
    ids, parts, count = torch.arange(batch), options.get("parts", 1), iter(range(10**9))
    size, words = config.model.image_size, WORDS.split()

    def views(part: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16) if options.get("bfloat16") else nullcontext():
            image, text = model(*part)
        assert image is not None and text is not None
        return dict(zip(("image", "image_aug", "text", "text_aug"), (*image.chunk(2), *text.chunk(2)), strict=True))

    def step() -> None:
        # As in training, batches differ in how long their longest caption is.
        longest = 8 + 7 * next(count) % 17
        drawn = [torch.randint(0, 256, (2 * batch // parts, 3, size, size), dtype=torch.uint8) for _ in range(parts)]
        texts = [" ".join(words[: 5 + k % (longest - 4)]) for k in range(2 * batch // parts)]
        chunks = [(images, model.tokenize(texts)) for images in drawn]
        model.train()
        if parts > 1:
            backward_in_chunks(views, chunks, objective, ids, model=model)
        else:
            loss, _ = objective(views(chunks[0]), ids)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def serve(line: Connection, batch: int, threads: int, options: dict[str, Any]) -> None:
    """Make a step whenever asked, and answer with its seconds, by the clock and of the processor; asked to end, with the peak of memory in GB."""
    torch.set_num_threads(threads)
    step = step_of(batch, options)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak, which loading weights has set
    line.send("ready")
    while line.recv():
        begin, worked = time.perf_counter(), time.process_time()
        step()
        line.send((time.perf_counter() - begin, time.process_time() - worked))
    peak = resident("VmHWM")
    line.send((peak, peak - before))


def resident(field: str) -> float:
    """GB of memory that this process has (VmRSS), or has had at most (VmHWM). Linux."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    options = parser.parse_args()
    # A folder of its own, so that compiling takes the time that it takes at first.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="speed-")
    context = multiprocessing.get_context("spawn")
    lines: dict[str, Connection] = {}
    for name in dict.fromkeys(["float32", *options.only]):
        here, there = context.Pipe()
        arguments = (there, options.batch, options.threads, SETTINGS[name])
        context.Process(target=serve, args=arguments).start()
        assert here.recv() == "ready"
        lines[name] = here

    def round_of() -> dict[str, tuple[float, float]]:
        spent = {}
        for name, line in lines.items():
            line.send(True)
            spent[name] = line.recv()
        print(
            "  ".join(f"{name} {clock:.2f} ({cpu:.2f})" for name, (clock, cpu) in spent.items()),
            file=sys.stderr,
            flush=True,
        )
        return spent

    first = round_of()
    round_of()  # memory is still being fetched
    rounds = [round_of() for _ in range(options.rounds)]
    peaks = {}
    for name, line in lines.items():
        line.send(False)
        peaks[name] = line.recv()
    print(f"{machine('cpu', options.threads)}; AmCLR, B {options.batch}, {options.rounds} rounds in turns\n")
    print(
        "| setting | s a step | processor s | of float32's (least to greatest) | peak GB | of it for steps GB | first step s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in lines:
        ratios = [r[name][1] / r["float32"][1] for r in rounds]
        clock, cpu = (statistics.median(r[name][k] for r in rounds) for k in (0, 1))
        print(
            f"| {name} | {clock:.2f} | {cpu:.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {peaks[name][0]:.2f} | {peaks[name][1]:.2f} "
            f"| {first[name][0]:.1f} |"
        )


if __name__ == "__main__":
    main()
