"""Figures of a comparison. Functions of what results.json holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amclr.compare import measures
from amclr.compare.tables import heading, replicates
from amclr.utils import figures


def captions(results: Mapping[str, Any]) -> dict[str, str]:
    """The captions of the figures, by file name."""
    over = replicates(results)
    values = f"mean and standard deviation over the {over}, and every {over[:-1]}."
    if results["experiment"]["folds"]:
        values = (
            "mean, standard deviation and every run. From each value, the mean of all variants on the same fold and "
            "seed is subtracted, and the overall mean added."
        )
    return {
        "retrieval.png": f"Retrieval: {values}", "zeroshot.png": f"Zero-shot accuracy: {values}",
        "learning.png": f"Learning curves: mean over the {over}, plus and minus one standard deviation.",
        "cost.png": "Cost: encoder passes and seconds of training against retrieval.",
    }  # fmt: skip


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw the figures into a folder; return the captions of those drawn, by file name."""
    if not any(row["measures"] for row in results["rows"]):
        return {}
    title, legend = heading(results), ", ".join(results["experiment"]["grid"])
    suffix = "\nless the mean of each fold" if results["experiment"]["folds"] else ""
    retrieval = (m for m in measures.RETRIEVAL if measures.in_table(m))
    axis = f"mean of R@1, R@5, R@10 (%){suffix}"
    figures.points(_panels(results, retrieval), folder / "retrieval.png", title, axis, legend)
    drawn = ["retrieval.png"]
    if zeroshot := [m for m in results["measures"] if m.startswith(measures.ZEROSHOT)]:
        axis = f"zero-shot top-1 (%){suffix}"
        figures.points(_panels(results, zeroshot), folder / "zeroshot.png", title, axis, legend)
        drawn.append("zeroshot.png")
    if _draw_learning_curves(results, folder / "learning.png"):
        drawn.append("learning.png")
    costs = [
        (row["variant"], _group(row), [
            (run["image_passes"] + run["caption_passes"], run["seconds"], run["r_mean"])
            for run in row["runs"] if not run["failure"]
        ]) for row in results["rows"] if row["budget"]
    ]  # fmt: skip
    figures.cost(costs, folder / "cost.png", title, "mean recall (%)", legend)
    return {name: caption for name, caption in captions(results).items() if name in (*drawn, "cost.png")}


def _group(row: Mapping[str, Any]) -> str:
    """The point of the grid of a row, in words."""
    return ", ".join(map(str, row["grid"].values()))


def _panels(
    results: Mapping[str, Any], names: Iterable[str]
) -> list[tuple[str, dict[tuple[str, str], list[float]]]]:  # fmt: skip
    """Per measure: its label, and the values of the runs by variant and point of the grid."""
    panels = []
    for name in names:
        values = {}
        for row in results["rows"]:
            if name in row["measures"]:
                in_folds = results["experiment"]["folds"]
                runs = without_fold_means(results, row, name) if in_folds else row["measures"][name]["values"]
                values[row["variant"], _group(row)] = runs
        panels.append((measures.label(name), {key: runs for key, runs in values.items() if runs}))
    return panels


def without_fold_means(results: Mapping[str, Any], row: Mapping[str, Any], measure: str) -> list[float]:
    """A measure of a row's runs, less the mean of all variants on the same fold and seed, plus the overall mean.

    What remains is what the variants are compared by (the normalisation of Cousineau 2005). Runs are left out if
    another variant at this point of the grid has no run on their fold.
    """
    same_point = [other for other in results["rows"] if other["grid"] == row["grid"]]
    by_seed: dict[int, list[float]] = {}
    for run in (run for other in same_point for run in other["runs"] if measure in run):
        by_seed.setdefault(run["seed"], []).append(run[measure])
    level = {seed: float(np.mean(values)) for seed, values in by_seed.items() if len(values) == len(same_point)}
    mean = float(np.mean([*level.values()])) if level else 0.0
    return [run[measure] - level[run["seed"]] + mean for run in row["runs"] if run["seed"] in level]


def _draw_learning_curves(results: Mapping[str, Any], file: Path) -> bool:
    """Draw the mean recall of the evaluations, a panel per point of the grid; False if there is nothing to draw."""
    legend, rows = ", ".join(results["experiment"]["grid"]), results["rows"]
    # If variants at one point of the grid have different numbers of epochs, curves are comparable by passes only.
    by_epoch = len({(_group(row), row["epochs"]) for row in rows}) == len({_group(row) for row in rows})
    panels: dict[str, dict[str, tuple[list[float], np.ndarray]]] = {}
    for row in rows:
        curves = [run["curve"] for run in row["runs"] if not run["failure"]]
        if curves and len({tuple(e["steps"] for e in curve) for curve in curves}) == 1:
            x = [e["epoch"] if by_epoch else e["passes"] / 1e3 for e in curves[0]]
            panel = panels.setdefault(f"{legend} {_group(row)}".strip(), {})
            panel[row["variant"]] = x, np.array([[e["r_mean"] for e in curve] for curve in curves])
    if panels:
        across = "epoch" if by_epoch else "encoder passes (thousands)"
        figures.many_curves(panels, file, heading(results), "mean recall (%)", across)
    return bool(panels)
