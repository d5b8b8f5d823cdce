"""What came of a run: its measures, its budget and its learning curve."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from amclr.compare.experiment import Experiment
from amclr.compare.measures import PARAPHRASED, RETRIEVAL, ZEROSHOT, RetrievalHits, by_image
from amclr.compare.plan import Cell, passes_per_step
from amclr.config.schema import Config
from amclr.data.text.rewording import Rewording
from amclr.evaluation.classes import ClassSet, read_classes, short_names
from amclr.evaluation.run import measure_run_paraphrased
from amclr.evaluation.zeroshot import measure_classes
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.folder import Run
from amclr.runs.loading import load
from amclr.utils.errors import UserError
from amclr.utils.files import read_arrays

Model = Callable[[], DualEncoder]
"""Loads the model of a run when it is first called."""


@dataclass(frozen=True)
class Extras:
    """What every run is measured on besides its validation split."""

    classes: dict[str, ClassSet]
    """Folders of images by class, by short name."""
    rewording: Rewording | None
    """Where paraphrases of the validation captions come from."""

    @classmethod
    def of(cls, experiment: Experiment) -> Extras:
        """The extras of an experiment. Raises UserError for folders, files and names that do not exist."""
        roots = short_names([Path(root) for root in experiment.zeroshot])
        classes = {k: read_classes(root, experiment.classnames, experiment.templates) for k, root in roots.items()}
        return cls(classes, Rewording.find(experiment.paraphrased) if experiment.paraphrased else None)


@dataclass
class Outcome:
    """What came of a run."""

    cell: Cell
    seed: int
    folder: Path
    failure: str = ""
    """Why there are no measures; empty if there are."""
    measures: dict[str, float] = field(default_factory=dict)
    """In percent, by name."""
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    """What each image adds to a measure, (N,), by its own queries and those of its captions."""
    queries: dict[str, str] = field(default_factory=dict)
    """A digest of the queries of each measure: shares may be compared only if it is the same."""
    trained_on: str = ""
    """The number of the training images, and a digest of their names."""
    budget: dict[str, float] = field(default_factory=dict)
    """Steps, passes of images and captions through a tower, seconds of the training loop."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Epoch, steps, passes, seconds and mean recall of each evaluation."""

    def add(self, measure: str, shares: np.ndarray, queries: str) -> None:
        """Add a measure with what each image adds to it, (N,), and the digest of its queries."""
        self.shares[measure], self.queries[measure] = shares, queries
        self.measures[measure] = float(shares.sum())


def collect(cell: Cell, seed: int, extras: Extras, progress: bool) -> Outcome:
    """The outcome of a finished run, which is measured on the extras if it has not been yet."""
    run = Run.open(Path(cell.configs[seed].out))
    outcome = Outcome(cell, seed, run.folder)
    file = run.folder / "queries.npz"
    arrays = read_arrays(file)
    if arrays is None:
        raise UserError(f"'{file}' cannot be read: remove it, and the same command writes it again")
    hits, queries = RetrievalHits(arrays), str(arrays["queries"])
    for name, measure in RETRIEVAL.items():
        outcome.add(name, measure.shares(hits), queries)
    model = cache(lambda: load(run.folder))
    _add_zeroshot(outcome, run, extras.classes, model, progress)
    if extras.rewording:
        arrays = _paraphrase_hits(run, extras.rewording, queries, model, progress)
        for name, paraphrased in PARAPHRASED.items():
            shares = by_image(paraphrased.per_caption(arrays), arrays["image_of_text"], hits.images)
            outcome.add(name, shares, str(arrays["queries"]))
    samples = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))
    outcome.trained_on = f"{samples['training images']}, sha256 {samples['sha256 of their names'][:12]}"
    rows = run.metrics()
    outcome.curve = learning_curve(run.config, rows)
    outcome.budget = _budget(run.config, rows)
    return outcome


def _add_zeroshot(
    outcome: Outcome, run: Run, classes: Mapping[str, ClassSet], model: Model, progress: bool
) -> None:  # fmt: skip
    """Add zero-shot accuracy on folders of images by class, and on those that come with the data set."""
    files = {label: run.folder / f"zeroshot-{label}.npz" for label in classes}
    for label, file in files.items():
        arrays = read_arrays(file)
        if arrays is None or str(arrays["zeroshot"]) != classes[label].digest:
            measure_classes(model(), classes[label], run.config, progress, hits=file)
    for label, file in {**files, "own classes": run.folder / "queries-zeroshot.npz"}.items():
        if (arrays := read_arrays(file)) is not None:
            shares = 100 * arrays["top1"][:, 0].astype(float) / len(arrays["top1"])
            outcome.add(f"{ZEROSHOT}{label}", shares, str(arrays["queries"]))


def _paraphrase_hits(
    run: Run, rewording: Rewording, queries: str, model: Model, progress: bool
) -> dict[str, np.ndarray]:  # fmt: skip
    """The hits of a run's captions and their paraphrases. queries: the digest of its validation queries."""
    file = run.folder / "queries-paraphrased.npz"
    arrays = read_arrays(file)
    if arrays is None or str(arrays["by"]) != rewording.digest:
        measure_run_paraphrased(model(), run.config, rewording, file, progress)
        arrays = read_arrays(file)
    if arrays is None or str(arrays["of"]) != queries:
        raise UserError(f"the validation images or captions of '{run.folder}' have changed since it was trained: "
                        "leave paraphrased out, or remove that run")  # fmt: skip
    return arrays


def _budget(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a run took. Seconds are those of the loop with its evaluations, without features computed beforehand."""
    logged, seconds = _logged_seconds(rows)
    steps = max((row["step"] for row in rows if row["kind"] == "eval"), default=logged[-1])
    images, captions = passes_per_step(config)
    return {"steps": steps, "image_passes": images * steps, "caption_passes": captions * steps,
            "seconds": seconds[-1]}  # fmt: skip


def _logged_seconds(rows: Iterable[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """The steps at which time was logged, and the seconds of the loop up to each."""
    steps, seconds = [0], [0.0]
    for row in rows:
        if row["kind"] == "train":
            seconds.append(seconds[-1] + row["seconds_per_step"] * (row["step"] - steps[-1]))
            steps.append(row["step"])
    return steps, seconds


def learning_curve(config: Config, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean recall at each evaluation, and what had been spent by then. Seconds are interpolated between logged ones."""
    per_step, (logged, seconds) = sum(passes_per_step(config)), _logged_seconds(rows)
    return [
        {"epoch": row["epoch"], "steps": row["step"], "passes": per_step * row["step"],
         "seconds": float(np.interp(row["step"], logged, seconds)), "r_mean": row["r_mean"]}
        for row in rows if row["kind"] == "eval"
    ]  # fmt: skip
