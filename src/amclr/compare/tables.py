"""Tables of a comparison, and the notes that belong with them. Functions of what results.json holds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any

from amclr.compare import measures

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


def heading(results: Mapping[str, Any]) -> str:
    """Title of every table and figure: the name of the experiment and its regime."""
    names = {"all": "all captions", "one": "one caption"}
    captions = " or ".join(sorted({names[row["captions"]] for row in results["rows"]}))
    return f"{results['name']} ({results['experiment']['regime'] or captions})"


def main_table(results: Mapping[str, Any]) -> Table:
    """The table: measures, tests against the baseline, and budget of each variant."""
    baseline, grid = results["experiment"]["baseline"], list(results["experiment"]["grid"])
    test_columns = [f"mean against {baseline}", f"p, {replicates(results)}", "p, images"] if baseline else []
    columns = [m for m in results["measures"] if measures.in_table(m)]
    retrieval = [m for m in columns if m in measures.RETRIEVAL]
    others = [m for m in columns if m not in measures.RETRIEVAL]
    epochs_differ = len({row["epochs"] for row in results["rows"]}) > 1 and "epochs" not in grid
    with_epochs = epochs_differ or results["experiment"]["equal"] == "passes"
    header = ["variant", *grid, *map(measures.label, retrieval), *test_columns, *map(measures.label, others),
              *(["epochs"] if with_epochs else []), "passes (thousands)", "seconds", "runs"]  # fmt: skip
    body = []
    for row in results["rows"]:
        succeeded = sum(not run["failure"] for run in row["runs"])
        runs = str(succeeded) if succeeded == len(row["runs"]) else f"{succeeded} of {len(row['runs'])}"
        passes, seconds = "–", "–"
        if row["budget"]:
            total = row["budget"]["image_passes"]["mean"] + row["budget"]["caption_passes"]["mean"]
            passes, seconds = f"{total / 1000:,.4g}", with_spread(row["budget"]["seconds"])
        body.append([
            row["variant"], *(str(row["grid"][name]) for name in grid),
            *(with_spread(row["measures"].get(m)) for m in retrieval), *_test_cells(row, baseline),
            *(with_spread(row["measures"].get(m)) for m in others),
            *([str(row["epochs"])] if with_epochs else []), passes, seconds, f"{runs}, cut" if row["cut"] else runs,
        ])  # fmt: skip
    return header, body


def _test_cells(row: Mapping[str, Any], baseline: str) -> list[str]:
    """The cells of a row's test against the baseline."""
    if not baseline:
        return []
    if test := row["against"].get("r_mean"):
        return [f"{test['difference']:+.1f}", p_value(test["p_seeds"]), p_value(test["p_images"])]
    return ["baseline" if row["variant"] == baseline else "–", "", ""]


EQUAL_COST = "At equal cost: mean recall"
EQUAL_COST_NOTE = (
    "The best evaluation of each run up to a cost that all runs at its point of the grid reached. Schedules are those "
    "of the whole runs: a run that was planned to end there would have lowered its learning rate by then."
)


def equal_cost_table(results: Mapping[str, Any]) -> Table | None:
    """The table of `EQUAL_COST`; None if fewer than two variants can be compared."""
    grid, rows = list(results["experiment"]["grid"]), [row for row in results["rows"] if row["at equal cost"]]
    if len({row["variant"] for row in rows}) < 2:
        return None
    formats: dict[str, Callable[[float], str]] = {
        "steps": "{:,.0f} steps".format, "passes": lambda at: f"{at / 1000:,.4g} thousand passes",
        "seconds": "{:,.1f} seconds".format,
    }  # fmt: skip
    # A cost that is the same at all points of the grid is in the header, others are in the cells.
    amounts = {k: {row["at equal cost"][k]["at"] for row in rows if k in row["at equal cost"]} for k in formats}
    header = ["variant", *grid]
    header += [f"by {show(*amounts[k])}" if len(amounts[k]) == 1 else f"by equal {k}" for k, show in formats.items()]
    body = []
    for row in rows:
        line = [row["variant"], *(str(row["grid"][name]) for name in grid)]
        for kind, show in formats.items():
            best = row["at equal cost"].get(kind)
            line.append(with_spread(best) + (f" ({show(best['at'])})" if best and len(amounts[kind]) > 1 else ""))
        body.append(line)
    return header, body


def with_spread(values: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation of what `statistics.spread` returned; a dash for None."""
    if not values:
        return "–"
    return f"{values['mean']:.1f}" + (f" ± {values['sd']:.1f}" if values["sd"] is not None else "")


def p_value(value: float) -> str:
    """A p-value with two digits."""
    return f"{value:.2g}" if value >= 0.001 else "< 0.001"


def replicates(results: Mapping[str, Any]) -> str:
    """What the runs of a variant differ in: seeds, or folds."""
    return "folds" if results["experiment"]["folds"] else "seeds"


def notes(results: Mapping[str, Any]) -> list[str]:
    """What must be said beside the table."""
    # In a results.json that was read again, the keys are text.
    fold_of = {int(seed): fold for seed, fold in results["experiment"]["fold_of"].items()}
    paraphrases = results["experiment"]["paraphrased"]
    lines = [_views_note(results), _retrieval_note(results), *_test_notes(results, fold_of)]
    if any(m in measures.PARAPHRASED for m in results["measures"]):
        lines.append(
            f"Paraphrased by {paraphrases}: queries are the paraphrases of the captions that have one. RBO: "
            "rank-biased overlap (p = 0.9) of the images that a caption and its paraphrase find, in percent."
        )
    if zeroshot := results.get("zeroshot"):
        lines.append("Zero-shot: " + "; ".join(f"{label}: {about}" for label, about in zeroshot.items()) + ".")
    trained_on: dict[int, dict[str, None]] = {}
    for run in (run for row in results["rows"] for run in row["runs"] if run["trained on"]):
        trained_on.setdefault(fold_of.get(run["seed"], 0), {})[run["trained on"]] = None
    lines += [
        f"Not all runs had the same training images: {'; '.join(sets)}."
        for sets in trained_on.values() if len(sets) > 1
    ]  # fmt: skip
    failed = [
        f"- {_row_name(row)}, seed {run['seed']}: {run['failure']}"
        for row in results["rows"] for run in row["runs"] if run["failure"]
    ]  # fmt: skip
    if failed:
        lines.append("Failed (rerun the same command to try them again):\n\n" + "\n".join(failed))
    if cut := [
        f"- {_row_name(row)}: cut after {row['cut']['after']} seed{'s' * (row['cut']['after'] > 1)}, "
        f"{row['cut']['behind']:.1f} behind" for row in results["rows"] if row["cut"]
    ]:  # fmt: skip
        lines.append("Not run with the remaining seeds, because too far behind the best:\n\n" + "\n".join(cut))
    return lines


def _views_note(results: Mapping[str, Any]) -> str:
    """Which captions and views the runs were trained on."""
    by_views: dict[str, dict[str, None]] = {}
    for row in results["rows"]:
        by_views.setdefault(row["views"], {})[row["variant"]] = None
    names = {"all": "all captions, a random one at each visit", "one": "one caption per image"}
    captions = sorted({names[row["captions"]] for row in results["rows"]})
    views = "; ".join(f"{view}: {', '.join(variants)}" for view, variants in by_views.items())
    return f"Captions: {' or '.join(captions)}. Views at each visit: {views}."


def _retrieval_note(results: Mapping[str, Any]) -> str:
    """What the numbers are means of, and what passes and seconds count."""
    held_out = "held-out fold" if results["experiment"]["folds"] else "validation split"
    chance = f" (chance {results['chance']:.1f})" if results["chance"] is not None else ""
    note = (
        f"Retrieval is the mean of R@1, R@5 and R@10 on the {held_out}, of the epoch with the best mean{chance}; all "
        f"in percent, mean ± standard deviation over the {replicates(results)}. Passes: views of images and captions "
        "through a tower, or through its head if the tower is frozen. Seconds: the training loop with its evaluations."
    )
    at_once = sorted({run["at a time"] for row in results["rows"] for run in row["runs"]})
    if at_once in ([], [1]):
        return note
    return (
        f"{note} Runs were trained {' or '.join(map(str, at_once))} at a time: do not compare their seconds with those "
        "of runs that ran alone."
    )


def _test_notes(results: Mapping[str, Any], fold_of: Mapping[int, int]) -> list[str]:
    """How folds and budgets were made, and what the p-values say."""
    seeds, folds, over = results["experiment"]["seeds"], results["experiment"]["folds"], replicates(results)
    clusters = len({fold_of[s] for s in seeds}) if folds else len(seeds)
    lines = []
    if folds:
        lines.append(
            f"Folds: the training images are cut into {folds} parts, of which "
            f"{'each' if clusters == folds else clusters} in turn is held out, with seeds of its own. Folds differ in "
            "how hard their images are, for all variants alike; the usual validation images are not used."
        )
    if results["experiment"]["equal"] == "passes":
        lines.append(
            "Equal passes: variants that encode fewer views per step have more epochs, with schedules to match."
        )
    if results["experiment"]["baseline"]:
        generalises = (
            "seeds and images (folds share training images, so p is somewhat too small)" if folds
            else "seeds on these images"
        )  # fmt: skip
        lines.append(
            f"p, {over}: sign-flip test of the mean with the {over} as clusters, for other {generalises}; with "
            f"{clusters} {over}, it cannot go below {2 / 2**clusters:.2g}. p, images: with the images as clusters, for "
            f"other images with these weights; it ignores the spread over {over}. Neither is corrected for the number "
            "of variants."
        )
    return lines


def _row_name(row: Mapping[str, Any]) -> str:
    return ",".join([row["variant"], *map(str, row["grid"].values())])


def as_markdown(table: Table) -> str:
    """A table in Markdown."""
    header, body = table
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_csv(results: Mapping[str, Any]) -> str:
    """All numbers as CSV: a line per row of the table, a column per number."""
    lines = []
    for row in results["rows"]:
        line = {"variant": row["variant"], **row["grid"], "runs": len(row["runs"]),
                "failed": sum(bool(run["failure"]) for run in row["runs"])}  # fmt: skip
        for name, values in {**row["measures"], **row["budget"]}.items():
            line |= {name: values["mean"], f"{name} sd": values["sd"]}
        for name, test in row["against"].items():
            line |= {f"{name} {key}": test[key] for key in ("difference", "p_seeds", "p_images")}
        for name, best in row["at equal cost"].items():
            line |= {f"r_mean by equal {name}": best["mean"], f"equal {name}": best["at"]}
        lines.append(line)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(k for line in lines for k in line)))
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
