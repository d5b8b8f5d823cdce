"""The cost of paraphrases: generating them by rules, and drawing second text views from a store while training.

    python -m benchmarks.paraphrases --data FLICKR8K [--captions 2000] [--steps 60]

Steps of the recipe `frozen` on cached features: SogCLR, which has no second views; AmCLR with other captions as second
text views; AmCLR with paraphrases from a store, one per caption, that the rules generate first. Milliseconds are
medians over interleaved steps. Needs amclr[pretrained].
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.objectives import machine

from amclr.config.recipes import frozen
from amclr.config.schema import ParaphraseConfig, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.text.rules import reword
from amclr.paraphrase import paraphrase
from amclr.training.loop import Training, assemble
from amclr.training.step import backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Flickr8k in the Kaggle layout")
    parser.add_argument("--captions", type=int, default=2000, help="captions to reword")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine("cpu", options.threads))

    base = replace(frozen(), data=options.data, accelerator="cpu", source=SourceConfig(paraphrases="none"))
    cache = manifests.cache_folder(base)
    captions = sorted({c for s in manifests.load(base, cache).samples for c in s.captions})
    begin = time.perf_counter()
    rewordings = [reword(c, 3) for c in captions[:: max(1, len(captions) // options.captions)]]
    seconds = time.perf_counter() - begin
    print(f"rules: {len(rewordings) / seconds:.0f} captions/s, {sum(map(len, rewordings)) / len(rewordings):.1f} of 3 paraphrases each, "
          f"none for {sum(not r for r in rewordings) / len(rewordings):.0%}")  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        paraphrase(ParaphraseConfig(model="rules", k=1, out=str(store)), options.data)
        stored = replace(base, source=SourceConfig(paraphrases=str(store)), views=replace(base.views, paraphrases=1.0))
        runs = {
            "SogCLR, no second views": replace(base, objective="sogclr"),
            "AmCLR, other captions": replace(base, objective="amclr"),
            "AmCLR, paraphrases from a store": replace(stored, objective="amclr"),
        }
        trainings = {n: assemble(c, Path(folder) / str(k), None, True) for k, (n, c) in enumerate(runs.items())}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for step in range(options.steps):
            for name, training in trainings.items():
                times[name].append(one_step(training, step))
    print("\n| step | batch ms | forward, backward, update ms | sum ms |\n|---|---|---|---|")
    for name, pairs in times.items():
        batch, rest = (1e3 * statistics.median(t) for t in zip(*pairs[5:], strict=True))
        print(f"| {name} | {batch:.2f} | {rest:.1f} | {batch + rest:.1f} |")


def one_step(training: Training, step: int) -> tuple[float, float]:
    """Seconds to assemble a batch, and seconds to train on it."""
    begin = time.perf_counter()
    batch = training.batches[step]
    ready = time.perf_counter()
    training.wrapped.train()
    backward(training, batch)
    training.optimizer.step()
    training.optimizer.zero_grad()
    return ready - begin, time.perf_counter() - ready


if __name__ == "__main__":
    main()
