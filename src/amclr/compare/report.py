"""What the results of a comparison look like: tables, notes, figures, and one page with all of it.

Everything here is a function of what results.json holds.
"""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from amclr.utils import figures
from amclr.utils.files import write_text
from amclr.utils.html import image, paragraph, table

RETRIEVAL = {"txt_r_mean": "text retrieval", "img_r_mean": "image retrieval", "r_mean": "mean"}
"""Measures in the table, each the mean of R@1, R@5 and R@10 in percent; `mean` is that of both sides."""
PARAPHRASED = {"paraphrased img_r_mean": "image retrieval, paraphrased", "paraphrased rbo": "RBO, paraphrased"}
"""Measures in the table where queries are paraphrased: the same mean, and how alike the images are that a caption
and its paraphrase find (rank-biased overlap, in percent)."""
FIRST = {"txt_r1": "text R@1", "img_r1": "image R@1", "paraphrased drop": "drop, paraphrased",
         "paraphrased overlap": "overlap at 10, paraphrased"}  # fmt: skip
"""Measures that table.csv, results.json and the report have besides."""

EQUAL = "At equal cost: mean recall"
EQUAL_NOTE = (
    "The best evaluation of each run up to where all runs at its point of the grid got to. Schedules are those of the "
    "whole runs: one that was to end there would have lowered its learning rate by then."
)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write table.csv, table.md, the figures and report.html."""
    write_text(folder / "table.csv", _csv(results))
    parts = [f"**{_heading(results)}**", _markdown(*_table(results)), *_notes(results)]
    if equal := _at_equal_cost(results):
        parts += [f"**{EQUAL}**", _markdown(*equal), EQUAL_NOTE]
    write_text(folder / "table.md", "\n\n".join([*parts, f"Made by `{results['command']}`"]) + "\n")
    write_text(folder / "report.html", _html(results, draw(results, folder), folder))


def measure_name(measure: str) -> str:
    """What a measure is called in tables and figures."""
    return (RETRIEVAL | PARAPHRASED | FIRST).get(measure) or f"{measure.removeprefix('zeroshot ')} top-1"


def _heading(results: Mapping[str, Any]) -> str:
    """Title of every table and figure: name and regime."""
    captions = " or ".join(sorted({{"all": "all captions", "one": "one caption"}[row["captions"]]
                                   for row in results["rows"]}))  # fmt: skip
    return f"{results['name']} ({results['experiment']['regime'] or captions})"


def _table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    baseline, grid = results["experiment"]["baseline"], list(results["experiment"]["grid"])
    tested = [f"mean against {baseline}", f"p, {_over(results)}", "p, images"] if baseline else []
    shown = [m for m in results["measures"] if m in RETRIEVAL]
    tops = [m for m in results["measures"] if m in PARAPHRASED or m.startswith("zeroshot")]
    # Where epochs are in the grid they stand there.
    epochs = len({row["epochs"] for row in results["rows"]}) > 1 and "epochs" not in grid
    epochs = epochs or results["experiment"]["equal"] == "passes"
    header = ["variant", *grid, *(RETRIEVAL[m] for m in shown), *tested, *(measure_name(m) for m in tops),
              *(["epochs"] if epochs else []), "passes (thousands)", "seconds", "runs"]  # fmt: skip
    body = []
    for row in results["rows"]:
        found = row["against"].get("r_mean")
        test = ["baseline" if row["variant"] == baseline else "–", "", ""] if baseline else []
        if found:
            test = [f"{found['difference']:+.1f}", p_value(found["p_seeds"]), p_value(found["p_images"])]
        fine = sum(not run["failure"] for run in row["runs"])
        runs = str(fine) if fine == len(row["runs"]) else f"{fine} of {len(row['runs'])}"
        passes, seconds = "–", "–"
        if row["budget"]:
            total = row["budget"]["image_passes"]["mean"] + row["budget"]["caption_passes"]["mean"]
            passes, seconds = f"{total / 1000:,.4g}", with_spread(row["budget"]["seconds"])
        body.append([
            row["variant"], *(str(row["grid"][name]) for name in grid),
            *(with_spread(row["measures"].get(m)) for m in shown), *test,
            *(with_spread(row["measures"].get(m)) for m in tops),
            *([str(row["epochs"])] if epochs else []), passes, seconds, f"{runs}, cut" if row["cut"] else runs,
        ])  # fmt: skip
    return header, body


def _at_equal_cost(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the table at equal cost; None where fewer than two variants can be compared."""
    grid, rows = list(results["experiment"]["grid"]), [row for row in results["rows"] if row["at equal cost"]]
    if len({row["variant"] for row in rows}) < 2:
        return None
    told: dict[str, Callable[[float], str]] = {
        "steps": "{:,.0f} steps".format, "passes": lambda at: f"{at / 1000:,.4g} thousand passes",
        "seconds": "{:,.1f} seconds".format,
    }  # fmt: skip
    # What is the same at all points of the grid is told once.
    amounts = {k: {row["at equal cost"][k]["at"] for row in rows if k in row["at equal cost"]} for k in told}
    header = ["variant", *grid]
    header += [f"by {tell(*amounts[k])}" if len(amounts[k]) == 1 else f"by equal {k}" for k, tell in told.items()]
    body = []
    for row in rows:
        line = [row["variant"], *(str(row["grid"][name]) for name in grid)]
        for kind, tell in told.items():
            found = row["at equal cost"].get(kind)
            line.append(with_spread(found) + (f" ({tell(found['at'])})" if found and len(amounts[kind]) > 1 else ""))
        body.append(line)
    return header, body


def with_spread(found: Mapping[str, Any] | None) -> str:
    """What `compare.spread` found, as tables tell it; a dash for nothing."""
    if not found:
        return "–"
    return f"{found['mean']:.1f}" + (f" ± {found['sd']:.1f}" if found["sd"] is not None else "")


def p_value(value: float) -> str:
    """A p-value as tables tell it."""
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"


def _over(results: Mapping[str, Any]) -> str:
    """What the runs of a variant differ in."""
    return "folds" if results["experiment"]["folds"] else "seeds"


def _notes(results: Mapping[str, Any]) -> list[str]:
    """What must stand beside the table."""
    views: dict[str, list[str]] = {}
    for row in results["rows"]:
        views.setdefault(row["views"], []).append(row["variant"])
    captions = {"all": "all captions, a random one at each visit", "one": "one caption per image"}
    regimes = {captions[row["captions"]] for row in results["rows"]}
    told = "; ".join(f"{view}: {', '.join(dict.fromkeys(names))}" for view, names in views.items())
    seeds, folds, over = results["experiment"]["seeds"], results["experiment"]["folds"], _over(results)
    # A comparison that was written and read again has its keys as words.
    fold_of = {int(seed): fold for seed, fold in results["experiment"]["fold_of"].items()}
    clusters = len({fold_of[s] for s in seeds}) if folds else len(seeds)
    trained_on: dict[int, dict[str, None]] = {}
    for run in (run for row in results["rows"] for run in row["runs"] if run["trained on"]):
        trained_on.setdefault(fold_of.get(run["seed"], 0), {})[run["trained on"]] = None
    notes = [
        f"Captions: {' or '.join(sorted(regimes))}. Views at each visit: {told}.",
        f"Retrieval is the mean of R@1, R@5 and R@10 on the {'fold kept aside' if folds else 'validation split'}, "
        "of the epoch with the best mean"
        + (f" (chance {results['chance']:.1f})" if results["chance"] is not None else "")
        + f"; all in percent, mean ± standard deviation over the {over}. Passes: views of images and captions "
        "through a tower, or through its head where the tower is frozen. Seconds: the training loop with its "
        "evaluations." + _company(results),
    ]
    if folds:
        notes.append(
            f"Folds: the training images are cut into {folds} parts, of which "
            f"{'each' if clusters == folds else clusters} in turn is kept aside, with seeds of its own. Folds differ "
            "in how hard their images are, for all variants alike; the usual validation images are not used."
        )
    if results["experiment"]["equal"] == "passes":
        notes.append("Equal passes: variants that see fewer views at a step have more epochs, and schedules as long.")
    if results["experiment"]["baseline"]:
        notes.append(
            f"p, {over}: sign-flip test of the mean with the {over} as clusters, for other "
            + (
                "seeds and images (folds share training images, so that p is somewhat too small)"
                if folds
                else "seeds on these images"
            )
            + f"; with {over} as many as here, {clusters}, it cannot go below {2 / 2**clusters:.2g}. p, images: with "
            "the images as clusters, for other images with these weights; it knows nothing of the spread over "
            f"{over}. Neither is corrected for the number of variants."
        )
    if any(m in PARAPHRASED for m in results["measures"]):
        notes.append(
            f"Paraphrased by {results['experiment']['paraphrased']}: captions that have a paraphrase ask with it. RBO: "
            "rank-biased overlap (p = 0.9) of the images that a caption and its paraphrase find, in percent."
        )
    if zeroshot := results.get("zeroshot"):
        notes.append("Zero-shot: " + "; ".join(f"{label}: {about}" for label, about in zeroshot.items()) + ".")
    for sets in trained_on.values():
        if len(sets) > 1:
            notes.append(f"Not all runs had the same training images: {'; '.join(sets)}.")
    failed = [
        f"- {_row_name(row)}, seed {run['seed']}: {run['failure']}"
        for row in results["rows"] for run in row["runs"] if run["failure"]
    ]  # fmt: skip
    if failed:
        notes.append("Failed (the same command tries them again):\n\n" + "\n".join(failed))
    if cut := [
        f"- {_row_name(row)}: cut after {row['cut']['after']} seed{'s' * (row['cut']['after'] > 1)}, "
        f"{row['cut']['behind']:.1f} behind" for row in results["rows"] if row["cut"]
    ]:  # fmt: skip
        notes.append("Not run with the other seeds, since too far behind the best:\n\n" + "\n".join(cut))
    return notes


def _row_name(row: Mapping[str, Any]) -> str:
    return ",".join([row["variant"], *map(str, row["grid"].values())])


def _company(results: Mapping[str, Any]) -> str:
    """What to know of seconds where runs did not run alone."""
    found = sorted({run["at a time"] for row in results["rows"] for run in row["runs"]})
    if found in ([], [1]):
        return ""
    told = f"{found[-1]} at a time" if len(found) == 1 else f"{' or '.join(map(str, found))} at a time"
    return f" Runs were made {told}: seconds are those beside others, not to be compared with those of runs alone."


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _csv(results: Mapping[str, Any]) -> str:
    """A line per row of the table, a column per number."""
    lines = []
    for row in results["rows"]:
        line = {"variant": row["variant"], **row["grid"], "runs": len(row["runs"]),
                "failed": sum(bool(run["failure"]) for run in row["runs"])}  # fmt: skip
        for name, found in {**row["measures"], **row["budget"]}.items():
            line |= {name: found["mean"], f"{name} sd": found["sd"]}
        for name, found in row["against"].items():
            line |= {f"{name} {key}": found[key] for key in ("difference", "p_seeds", "p_images")}
        for name, found in row["at equal cost"].items():
            line |= {f"r_mean by equal {name}": found["mean"], f"equal {name}": found["at"]}
        lines.append(line)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(k for line in lines for k in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _alike(results: Mapping[str, Any], row: Mapping[str, Any], measure: str) -> list[float]:
    """A measure of a row's runs, all folds made alike: less the mean of all variants on their fold, plus that of all.

    The means are of each fold and seed. What remains is what variants are compared by (the normalisation of Cousineau
    2005). Left out are runs of a fold that another variant at this point of the grid has no run of.
    """
    same = [other for other in results["rows"] if other["grid"] == row["grid"]]
    every: dict[int, list[float]] = {}
    for run in (run for other in same for run in other["runs"] if measure in run):
        every.setdefault(run["seed"], []).append(run[measure])
    level = {seed: float(np.mean(own)) for seed, own in every.items() if len(own) == len(same)}
    mean = float(np.mean([*level.values()])) if level else 0.0
    return [run[measure] - level[run["seed"]] + mean for run in row["runs"] if run["seed"] in level]


def _captions(results: Mapping[str, Any]) -> dict[str, str]:
    """The figures, and what is told of them."""
    over = _over(results)
    every = f"mean and standard deviation over the {over}, and every {over[:-1]}."
    if results["experiment"]["folds"]:
        every = (
            "mean, standard deviation and every run, with all folds made alike: less the mean of all variants on the "
            "same fold and seed."
        )
    return {
        "retrieval.png": f"Retrieval: {every}", "zeroshot.png": f"Zero-shot accuracy: {every}",
        "learning.png": f"Learning curves: mean over the {over}, and one standard deviation to each side.",
        "cost.png": "What it costs: encoder passes and seconds of training against retrieval.",
    }  # fmt: skip


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draw the figures; captions by file name, of those that there are."""
    rows = [(row["variant"], ", ".join(map(str, row["grid"].values())), row) for row in results["rows"]]
    drawn, heading = list[str](), _heading(results)
    legend = ", ".join(results["experiment"]["grid"])

    folds = results["experiment"]["folds"]
    note = "\nfolds made alike" if folds else ""

    def values(row: Mapping[str, Any], measure: str) -> list[float]:
        if measure not in row["measures"]:
            return []
        return _alike(results, row, measure) if folds else row["measures"][measure]["values"]

    def panels(measures: Iterable[str]) -> list[tuple[str, dict[tuple[str, str], list[float]]]]:
        found = {m: {(v, g): values(row, m) for v, g, row in rows} for m in measures}
        return [(measure_name(m), {k: own for k, own in by_row.items() if own}) for m, by_row in found.items()]

    if any(row["measures"] for _, _, row in rows):
        figures.points(
            panels(RETRIEVAL), folder / "retrieval.png", heading, f"mean of R@1, R@5, R@10 (%){note}", legend
        )
        drawn.append("retrieval.png")
        if tops := [m for m in results["measures"] if m.startswith("zeroshot")]:
            figures.points(panels(tops), folder / "zeroshot.png", heading, f"zero-shot top-1 (%){note}", legend)
            drawn.append("zeroshot.png")
        many: dict[str, dict[str, tuple[list[float], np.ndarray]]] = {}
        # Where one variant has more epochs than another beside it, an epoch is no measure of both.
        by_epoch = len({(group, row["epochs"]) for _, group, row in rows}) == len({group for _, group, _ in rows})
        for variant, group, row in rows:
            found = [run["curve"] for run in row["runs"] if not run["failure"]]
            if found and len({tuple(e["steps"] for e in curve) for curve in found}) == 1:
                x = [e["epoch"] if by_epoch else e["passes"] / 1e3 for e in found[0]]
                panel = many.setdefault(f"{legend} {group}".strip(), {})
                panel[variant] = x, np.array([[e["r_mean"] for e in curve] for curve in found])
        if many:
            across = "epoch" if by_epoch else "encoder passes (thousands)"
            figures.many_curves(many, folder / "learning.png", heading, "mean recall (%)", across)
            drawn.append("learning.png")
        costs = [
            (variant, group, [
                (run["image_passes"] + run["caption_passes"], run["seconds"], run["r_mean"])
                for run in row["runs"] if not run["failure"]
            ]) for variant, group, row in rows if row["budget"]
        ]  # fmt: skip
        figures.cost(costs, folder / "cost.png", heading, "mean recall (%)", legend)
        drawn.append("cost.png")
    return {name: about for name, about in _captions(results).items() if name in drawn}


def summary(results: Mapping[str, Any], folder: Path, images: Mapping[str, str], style: str = "") -> str:
    """Tables, notes and figures as HTML. images: captions by file name; style: that of the figures."""
    equal = _at_equal_cost(results)
    return "\n".join([
        table(*_table(results)), *map(paragraph, _notes(results)),
        *([f"<h2>{EQUAL}</h2>", table(*equal), paragraph(EQUAL_NOTE)] if equal else []),
        *(image(folder / name, about, style) for name, about in images.items()),
    ])  # fmt: skip


def notebook(results: Mapping[str, Any], folder: Path) -> str:
    """What a notebook shows of a comparison: tables, notes, and the figures that were drawn."""
    heading = f"<h3>{html.escape(_heading(results))}</h3>"
    return f"<div>{heading}\n{summary(results, folder, _captions(results), 'max-width: 100%')}</div>"


CSS = """body{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;display:block;overflow-x:auto}th,td{padding:.3em .7em;border-bottom:1px solid #ccc;
text-align:left;white-space:nowrap}img{max-width:100%}pre{background:#f5f5f5;padding:1em;overflow-x:auto}
figure{margin:1.5em 0}figcaption{color:#555}"""


def _html(results: Mapping[str, Any], images: Mapping[str, str], folder: Path) -> str:
    """All of it in one page, which needs nothing else."""
    runs = [
        [row["variant"], ", ".join(map(str, row["grid"].values())), str(run["seed"]),
         *(f"{run[m]:.2f}" if m in run else "–" for m in results["measures"]),
         f"{run['seconds']:.1f}" if "seconds" in run else "–", run["failure"] or run["folder"]]
        for row in results["rows"] for run in row["runs"]
    ]  # fmt: skip
    experiment = {k: list(v) if isinstance(v, tuple) else v for k, v in results["experiment"].items()}
    heading = html.escape(_heading(results))
    parts = [
        f"<h1>{heading}</h1>", summary(results, folder, images),
        "<h2>Runs</h2>",
        table(["variant", "grid", "seed", *results["measures"].values(), "seconds", "folder"], runs),
        "<h2>Settings</h2>", f"<pre>{html.escape(yaml.safe_dump(experiment, sort_keys=False))}</pre>",
        "<p>Every setting of a run, resolved, is in config.yaml in its folder.</p>",
        "<h2>Command</h2>", f"<pre>{html.escape(results['command'])}</pre>",
        "<h2>Machine</h2>", f"<pre>{html.escape(yaml.safe_dump(results['machines'], sort_keys=False))}</pre>",
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{heading}</title><style>{CSS}</style>\n'
        + "\n".join(parts) + "\n</html>\n"
    )  # fmt: skip
