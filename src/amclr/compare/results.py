"""What the runs of a comparison show together: results.json, and `Comparison`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amclr.compare import measures, report
from amclr.compare.experiment import Experiment
from amclr.compare.outcome import Extras, Outcome
from amclr.compare.plan import Cell
from amclr.compare.statistics import at_equal_cost, paired_test, spread
from amclr.config.schema import Config
from amclr.data.images.views import title
from amclr.evaluation.metrics import chance_recalls
from amclr.training.assembly import build_objective
from amclr.utils.files import write_text


@dataclass(frozen=True, repr=False)
class Comparison:
    """The results of an experiment. A notebook shows its tables and figures."""

    folder: Path
    results: dict[str, Any]
    """The contents of results.json."""

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return sum(len(row["runs"]) for row in self.results["rows"])

    @property
    def failed(self) -> int:
        """How many runs failed."""
        return sum(bool(run["failure"]) for row in self.results["rows"] for run in row["runs"])

    @property
    def table(self) -> str:
        """The table with its notes, as in table.md."""
        return (self.folder / "table.md").read_text(encoding="utf-8")

    def __repr__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"<amclr comparison {str(self.folder)!r}: {len(self.results['rows'])} variants, {self.runs} runs{failed}>"
        )

    def _repr_html_(self) -> str:
        return report.notebook(self.results, self.folder)


def run_name(folder: str | Path) -> str:
    """VARIANT/seedN, the name of a run in side-by-side.json, from its folder."""
    return "/".join(Path(folder).parts[-2:])


def write_results(
    experiment: Experiment, extras: Extras, cells: Sequence[Cell], outcomes: Sequence[Outcome],
    cut: Mapping[str, Any], concurrency: Mapping[str, int], folder: Path, command: str,
) -> Comparison:  # fmt: skip
    """Put the outcomes together, and write results.json, tables, figures and report.

    cut: the variants that were not run with all seeds, by label, as by `too_far_behind`.
    concurrency: how many runs there were at a time while each was trained, by `run_name`.
    command: what made the comparison.
    """
    names = list(dict.fromkeys(m for o in outcomes for m in o.measures))
    equal_cost: dict[str, dict[str, Any]] = {}
    for _, at_point in itertools.groupby(cells, key=lambda cell: cell.point):
        curves = {c.label: [o.curve for o in outcomes if o.cell is c and not o.failure] for c in at_point}
        equal_cost |= at_equal_cost({label: runs for label, runs in curves.items() if runs})
    rows = []
    for cell in cells:
        runs = [o for o in outcomes if o.cell is cell]
        succeeded = [o for o in runs if not o.failure]
        baseline = [o for o in outcomes if o.cell.variant == experiment.baseline and o.cell.point == cell.point]
        tests = {} if cell.variant == experiment.baseline else {
            m: paired_test(succeeded, baseline, m, experiment.fold_of) for m in names
        }  # fmt: skip
        config = next(iter(cell.configs.values()))
        rows.append({
            "variant": cell.variant, "grid": cell.point, "captions": config.source.captions,
            "views": describe_views(config), "epochs": config.epochs, "cut": cut.get(cell.label),
            "measures": {m: spread(values) for m in names
                         if (values := [o.measures[m] for o in succeeded if m in o.measures])},
            "budget": {k: spread([o.budget[k] for o in succeeded]) for k in (succeeded[0].budget if succeeded else ())},
            "against": {m: test for m, test in tests.items() if test},
            "at equal cost": equal_cost.get(cell.label, {}),
            "runs": [{"seed": o.seed, "folder": str(o.folder), "failure": o.failure, **o.measures, **o.budget,
                      "trained on": o.trained_on, "at a time": concurrency.get(run_name(o.folder), 1),
                      "curve": o.curve} for o in runs],
        })  # fmt: skip
    results = {
        "name": experiment.name, "command": command, "experiment": asdict(experiment),
        "measures": {m: measures.label(m) for m in names}, "chance": _chance(outcomes),
        "zeroshot": {label: classes.about for label, classes in extras.classes.items()},
        "machines": _machines(outcomes), "rows": rows,
    }  # fmt: skip
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    report.write(results, folder)
    return Comparison(folder, results)


def describe_views(config: Config) -> str:
    """How many views of an image and of a caption the objective of a run sees, and how those of images are made."""
    views = build_objective(config, 1).required_views
    images = [title(getattr(config.views, v)) for v in views if v.startswith("image")]
    texts = sum(v.startswith("text") for v in views)
    return f"{len(images)} of an image ({', '.join(images)}), {texts} of a caption"


def _chance(outcomes: Sequence[Outcome]) -> float | None:
    """Mean of R@1, R@5 and R@10 of an image for a random order, in percent."""
    sizes = {len(o.shares["r_mean"]) for o in outcomes if o.shares}
    if not sizes or max(sizes) - min(sizes) > 1:  # folds may differ by one image
        return None
    return float(np.mean([recall for n in sizes for recall in chance_recalls(n)]))


def _machines(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The different machines that the runs were trained on."""
    machines = []
    for outcome in outcomes:
        file = outcome.folder / "environment.json"
        if file.is_file():
            machine = json.loads(file.read_text(encoding="utf-8"))
            machine.pop("command", None)
            if machine not in machines:
                machines.append(machine)
    return machines
