"""Every objective on Flickr8k with frozen packaged encoders: mean recall and zero-shot, mean and spread over seeds.

    python benchmarks/flickr8k.py --data FLICKR8K [--seeds 3] [--objectives sogclr,amclr] [--temperature 0.05]

The towers' features are computed once and cached. Every run of a seed has the same starting weights,
steps, batches and cached views; another seed has other weights, order and dropout. As published: baselines see one view of each picture and caption, AmCLR and xAmCLR two. Runs
that finished are not run again. The table goes to the terminal and to OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from amclr.engine import train
from amclr.measure import measure_classes
from amclr.objectives import METHODS
from amclr.recipes import frozen
from amclr.run import Run, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="Flickr8k in the Kaggle layout, with train.txt and val.txt"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-flickr8k"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--objectives", default=",".join(m for m in METHODS if m != "simclr"))
    parser.add_argument("--temperature", type=float, default=None, help="default: the recipe's")
    parser.add_argument("--epochs", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--zeroshot", type=Path, nargs="*", default=[], help="folders of pictures by class")
    options = parser.parse_args()

    rows = []
    for objective in options.objectives.split(","):
        results = []
        for seed in range(options.seeds):
            base = frozen()
            temperature = options.temperature or base.loss.temperature
            out = options.out / f"{objective}-tau{temperature:g}-seed{seed}"
            config = replace(
                base, data=str(options.data), out=str(out), objective=objective, seed=seed,
                epochs=options.epochs or base.epochs, loss=replace(base.loss, temperature=temperature),
            )  # fmt: skip
            results.append(measure(config, out, options.zeroshot))
            print(f"{objective} seed {seed}: {results[-1]}", file=sys.stderr, flush=True)
        rows.append((objective, results))
    table = markdown(rows)
    (options.out / "table.md").write_text(table + "\n")
    print(table)


def measure(config, out: Path, zeroshot: list[Path]) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Train (or go on, or take what is there) and collect the figures of the table."""
    file = out / "results.json"
    if not file.is_file():
        train(config, resume=out if (out / "config.yaml").is_file() else None)
    results = json.loads(file.read_text())
    found = {k: results[k] for k in ("txt_r1", "txt_r_mean", "img_r1", "img_r_mean")}
    for folder in zeroshot:
        key = folder.parent.name if folder.name in ("val", "test") else folder.name
        kept = out / f"zeroshot-{key}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(measure_classes(load(out), folder, config)))
        found[f"{key} top-1"] = json.loads(kept.read_text())["zeroshot_top1"]
    steps = [r for r in Run.open(out).metrics() if r["kind"] == "train"]
    return {**found, "steps": steps[-1]["step"]}


def markdown(rows: list[tuple[str, list[dict[str, float]]]]) -> str:
    """The table: mean and standard deviation over the seeds."""
    columns = [k for k in rows[0][1][0] if k != "steps"]
    names = {"txt_r1": "text R@1", "txt_r_mean": "text mean", "img_r1": "image R@1", "img_r_mean": "image mean"}
    lines = ["| objective | " + " | ".join(names.get(c, c) for c in columns) + " | steps | seeds |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for objective, results in rows:
        cells = []
        for c in columns:
            values = [r[c] for r in results]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {objective} | {' | '.join(cells)} | {results[0]['steps']:.0f} | {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
