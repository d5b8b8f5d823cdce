"""Cross-validation of a comparison: train on all but one part of the training pictures, measure on that, in turn.

    python -m benchmarks.folds FLICKR8K experiments/flickr8k-frozen-folds.yaml [--out runs/folds]

FLICKR8K holds Images/, captions.txt and train.txt. Fold k has the training pictures k, k + K, k + 2K, ... of K folds kept
aside, and seed 100 + k; runs that are finished are taken as they are. Printed: the mean of R@1, R@5, R@10 over the
folds in percent, its standard deviation, and the difference to the experiment's baseline with two p-values by sign-flip
permutation, with folds and with pictures as clusters (every picture is measured in one fold).
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from amclr import compare
from amclr.compare import Asked, Outcome, sign_flip, spread
from amclr.data.tables import read_lines
from amclr.report import p_value, with_spread

FIRST_SEED = 100


def write_fold(data: Path, folder: Path, fold: int, folds: int) -> None:
    """A data set with its split, of which the pictures of a fold are what is measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "Images").exists():
        (folder / "Images").symlink_to((data / "Images").resolve())
    names = read_lines(data / "train.txt")
    kept = set(names[fold::folds])
    (folder / "val.txt").write_text("".join(f"{n}\n" for n in names if n in kept), encoding="utf-8")
    (folder / "train.txt").write_text("".join(f"{n}\n" for n in names if n not in kept), encoding="utf-8")
    header, *lines = (data / "captions.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    wanted = set(names)
    own = [line for line in lines if line.split(",")[0] in wanted]
    (folder / "captions.txt").write_text("".join([header, *own]), encoding="utf-8")


def outcomes(file: Path, data: Path, seed: int, out: Path) -> dict[str, Outcome]:
    """What the finished runs of a fold have found, by variant."""
    experiment = compare.read(file, data=str(data), seeds=f"{seed},")
    cells = compare.plan(experiment, out)
    return {cell.label: compare.run_one(cell, seed, Asked({}, None), progress=False) for cell in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Flickr8k")
    parser.add_argument("experiment", type=Path, help="what to compare")
    parser.add_argument("--baseline", help="what the others are compared with, instead of the experiment's")
    parser.add_argument("--folds", type=int, default=6)
    parser.add_argument("--only", type=int, nargs="+", help="make these folds alone")
    parser.add_argument("--out", type=Path, default=Path("runs/folds"))
    options = parser.parse_args()
    found: dict[str, list[Outcome]] = defaultdict(list)
    for fold in options.only or range(options.folds):
        folder, seed = options.out / f"fold{fold}", FIRST_SEED + fold
        write_fold(options.data, folder / "data", fold, options.folds)
        data = folder / "data"
        compare.compare(options.experiment, data=str(data), seeds=f"{seed},", out=str(folder / "comparison"))
        for variant, outcome in outcomes(options.experiment, data, seed, folder / "comparison").items():
            if outcome.failure:
                raise SystemExit(f"fold {fold}, {variant}: {outcome.failure}")
            found[variant].append(outcome)
    baseline = options.baseline or compare.read(options.experiment).baseline
    if baseline not in found:
        parser.error(f"no variant '{baseline}': choose from {', '.join(found)}")
    base = found[baseline]
    print(
        f"| variant | text | image | mean | against {baseline} | p, folds | p, pictures |\n|---|---|---|---|---|---|---|"
    )
    for variant, own in found.items():
        measures = ("txt_r_mean", "img_r_mean", "r_mean")
        cells = [with_spread(spread([o.measures[m] for o in own])) for m in measures]
        if variant == baseline:
            cells += ["", "", ""]
        else:
            differences = [o.shares["r_mean"] - b.shares["r_mean"] for o, b in zip(own, base, strict=True)]
            by_fold = np.array([d.sum() for d in differences])
            # A picture's share counts as it does in its own fold.
            cells += [
                f"{by_fold.mean():+.2f}",
                *(p_value(sign_flip(d)) for d in (by_fold, np.concatenate(differences))),
            ]
        print(f"| {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
