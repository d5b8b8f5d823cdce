"""What a step costs as the estimators' tables grow: AmCLR, forward and backward, ids drawn anew at each step.

    python -m benchmarks.tables [--samples 10000,1000000,100000000] [--batch 128] [--folder FOLDER]

100 million samples x 8 terms are 3.2 GB. The tables of a row of the output exist one after the other.
Each time is the median over the steps after the first ten; beside it is how long making the tables took.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch
from benchmarks.objectives import machine, views_of

from amclr.objectives import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", default="10000,1000000,100000000")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=None, help="where disk tables go; default: the system's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine(options.device, 1)}; AmCLR, B {options.batch}, D {options.dim}, {options.steps} steps")
    print("| samples | tables | made in s | step ms, median | 95th percentile |\n|---|---|---|---|---|")
    views = views_of(options.batch, options.dim, options.device)
    for samples in map(int, options.samples.split(",")):
        for storage in ("device", "host", "disk"):
            begin = time.perf_counter()
            objective = build("amclr", samples, temperature=0.05, storage=storage, folder=options.folder)
            objective = objective.to(options.device)
            if storage == "disk":
                os.sync()  # as in training, hours later: what was written at the start is on the disk
            made = time.perf_counter() - begin
            draw = torch.Generator().manual_seed(0)
            spent = []
            for _ in range(options.steps):
                ids = torch.randint(samples, (options.batch,), generator=draw)
                start = time.perf_counter()
                objective(views, ids if storage != "device" else ids.to(options.device))[0].backward()
                if options.device == "cuda":
                    torch.cuda.synchronize()
                spent.append(1e3 * (time.perf_counter() - start))
                for v in views.values():
                    v.grad = None
            late = sorted(spent[10:])
            print(f"| {samples:,} | {storage} | {made:.1f} | {statistics.median(late):.2f} | {late[int(0.95 * len(late))]:.2f} |",
                  flush=True)  # fmt: skip
            del objective


if __name__ == "__main__":
    main()
