"""Zero-shot accuracy by the frequency of a kind in the training images, for a comparison on `scenes`.

    amclr compare experiments/scenes-tail.yaml
    python -m benchmarks.tail runs/compare-scenes-tail

Kinds are grouped by their rank in the tail, which the seed of the scenes draws, the same at every `scenes.tail`: at 0
they are equally frequent, and the groups differ only in difficulty. Accuracy in percent, mean and standard deviation
over the training seeds; in brackets, the smallest and largest number of training images that show a kind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from amclr.compare.statistics import spread
from amclr.compare.tables import with_spread
from amclr.data import manifest
from amclr.data.scenes.scene import ranked_kinds
from amclr.data.sources.folders import class_folders, read_lines
from amclr.runs.folder import Run
from amclr.utils.errors import UserError
from amclr.utils.files import read_arrays

GROUPS = {"10 commonest": slice(0, 10), "20 between": slice(10, 30), "10 rarest": slice(30, 40)}


def by_group(folder: Path) -> dict[str, tuple[float, int, int]]:
    """Accuracy of a run per group of kinds, and the smallest and largest number of training images of a kind in it."""
    config = Run.open(folder).config
    if config.data != "scenes":
        raise UserError(f"'{folder}' was trained on {config.data}: give a comparison on scenes")
    root = manifest.load(config, manifest.cache_folder(config), progress=False).zeroshot
    hits = read_arrays(folder / "queries-zeroshot.npz")
    if root is None or hits is None:
        raise UserError(f"'{folder}' has no zero-shot results: the run is not finished, or --scenes.zeroshot was 0")
    paths, _, _ = class_folders(root)
    kinds = [f"{colour}_{shape}" for colour, shape in ranked_kinds(config.scenes.seed)]
    rank = np.array([kinds.index(p.parent.name) for p in paths])
    shown = dict(line.split("\t") for line in read_lines(root / "shown.tsv"))
    counts = np.array([int(shown[k]) for k in kinds])
    groups = {}
    for name, group in GROUPS.items():
        correct = hits["top1"][np.isin(rank, np.arange(len(kinds))[group]), 0]
        groups[name] = (100 * float(correct.mean()), int(counts[group].min()), int(counts[group].max()))
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a comparison, written by amclr compare")
    folder = parser.parse_args().folder
    try:
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    except OSError as error:
        parser.error(f"no comparison in '{folder}' ({error.strerror}): amclr compare experiments/scenes-tail.yaml")
    points = list(rows[0]["grid"])
    print(f"| {' | '.join(['', *points, *GROUPS])} |\n|{'---|' * (1 + len(points) + len(GROUPS))}")
    for row in rows:
        try:
            folders = [folder.joinpath(*Path(run["folder"]).parts[-3:]) for run in row["runs"] if not run["failure"]]
            runs = [by_group(run) for run in folders]
        except UserError as error:
            parser.error(str(error))
        cells = []
        for name in GROUPS if runs else ():
            values, (_, fewest, most) = [run[name][0] for run in runs], runs[0][name]
            cells.append(f"{with_spread(spread(values))} ({fewest} to {most})")
        print(f"| {' | '.join([row['variant'], *map(str, row['grid'].values()), *cells])} |")


if __name__ == "__main__":
    main()
