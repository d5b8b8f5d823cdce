"""`compare`: the runs of an experiment file, one after the other or side by side, and what they say together.

    OUT/runs/VARIANT/seedN    run folders           OUT/table.md, table.csv    means and spread over the seeds
    OUT/results.json          all of it, by run     OUT/report.html            tables and figures in one file
    OUT/side-by-side.json     how many ran at a time

Runs of a seed have the same order of samples, the same views and the same starting weights, whatever their
objective: all of these are functions of the seed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from amclr.compare import report
from amclr.config.recipes import RECIPES
from amclr.config.schema import Config, fixed_differences, flat, from_dict, problems
from amclr.data import manifest as manifests
from amclr.data.batches import BatchPlan
from amclr.data.images.views import policies, title
from amclr.data.sources.rows import printable
from amclr.data.text.store import Rewording
from amclr.distributed.jobs import Call, Lost, side_by_side
from amclr.distributed.signals import ending
from amclr.evaluation.classes import ClassSet, read_classes, short_names
from amclr.evaluation.evaluator import measure_classes, measure_run_paraphrased
from amclr.evaluation.metrics import RECALLS
from amclr.objectives import METHODS
from amclr.runs.folder import Run
from amclr.runs.loading import load
from amclr.training.assembly import build_objective
from amclr.training.loop import Stopped, train
from amclr.training.optim import choose_optimizer
from amclr.utils.errors import UserError, did_you_mean
from amclr.utils.files import read_arrays, write_text

EQUAL = ("steps", "passes")
BESIDE = "side-by-side.json"
EXACT, DRAWS = 14, 9_999
"""Up to so many clusters every choice of signs is tried; of more, so many are drawn."""


# -- the experiment ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says."""

    variants: dict[str, dict[str, Any]]
    """What is compared: names, each with its settings on top of the others."""
    name: str = ""
    """Title of tables and figures; the file's name by default."""
    regime: str = ""
    """What to know of captions and views, in a few words, beside every table."""
    recipe: str = "frozen"
    """The settings that the others change."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings by their dotted names, and the values that every variant is run with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A list of seeds, or how many."""
    folds: int = 0
    """Cross-validation: the training images are cut into so many parts, each of which is kept aside by the runs of
    one seed, and validated on; 0 for none."""
    fold_of: dict[int, int] = field(default_factory=dict)
    """The fold, from 1 on, of each seed of the file: the first seeds in their order, and round again."""
    baseline: str = ""
    """The variant that the others are tested against."""
    equal: str = "steps"
    """steps: all have the epochs that are set. passes: those that see fewer views at a step have more epochs, so that
    all end with as many encoder passes."""
    cut: dict[str, float] = field(default_factory=dict)
    """Empty, or `behind` and `after`: from so many seeds on, a variant so many points of mean recall behind the best at
    its point of the grid is not run with those that remain."""
    zeroshot: tuple[str, ...] = ()
    """Folders of images by class."""
    classnames: str = ""
    """Names of their classes, as `amclr evaluate --classnames` takes them."""
    templates: str = ""
    """Prompts for their classes, as `amclr evaluate --templates` takes them."""
    paraphrased: str = ""
    """`rules`, or a file or folder of paraphrases: what the captions find in other words, too."""


@dataclass(frozen=True)
class Cell:
    """A variant at a point of the grid: a row of the table, with the settings of each seed."""

    variant: str
    point: dict[str, Any]
    configs: dict[int, Config]

    @property
    def group(self) -> str:
        """Its point of the grid, in words."""
        return ", ".join(map(str, self.point.values()))

    @property
    def label(self) -> str:
        """Its name, and that of its folder."""
        return ",".join([self.variant, *(f"{name}={value}" for name, value in self.point.items())])

    @property
    def folder(self) -> str:
        """The label as a name of a folder."""
        return re.sub(r"[^\w.=,+-]", "_", self.label)


class _Loader(yaml.SafeLoader):
    """YAML in which no name may stand twice: the first would be lost without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := next((n for n in names if names.count(n) > 1 and n != "<<"), None):
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(file: Path, *, data: str = "", seeds: str = "", zeroshot: Sequence[str] = ()) -> Experiment:
    """Read an experiment file; what is given besides counts instead. Raises UserError naming the slip."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"cannot read the experiment file '{file}': {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' is no YAML: {' '.join(str(error).split())}") from None
    known = [f.name for f in fields(Experiment)]
    if not isinstance(values, dict) or "variants" not in values:
        raise UserError(f"'{file}' has no variants: say what to compare, as in variants: [sogclr, amclr]")
    for key in values:
        if key not in known:
            more = " (a setting belongs under settings)" if key in flat(asdict(Config())) else ""
            raise UserError(f"'{file}': unknown key '{key}'{more}: {did_you_mean(key, known)}")
    given = {key: value for key, value in values.items() if value is not None}
    settings = flat(_mapping(file, "settings", given.get("settings", {})))
    if data:
        settings["data"] = data
    grid = flat(_mapping(file, "grid", given.get("grid", {})))
    for name, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"'{file}': grid: {name} must be a list of values, as in {name}: [A, B], got {choices!r}")
    folders = list(zeroshot) or given.get("zeroshot", [])
    if not isinstance(folders, str | list):
        raise UserError(f"'{file}': zeroshot must be a list of folders, as in zeroshot: [FOLDER], got {folders!r}")
    folds = given.get("folds", 0)
    if type(folds) is not int or folds < 0 or folds == 1:
        raise UserError(f"'{file}': folds must be how many, 2 at the least, got {folds!r}")
    every = _seeds(given.get("seeds", folds or (0, 1, 2)))
    chosen = _seeds(seeds) if seeds else every
    if folds and len(every) % folds:
        raise UserError(f"'{file}': {len(every)} seeds for {folds} folds: give as many for each, or leave them out")
    if folds and not set(chosen) <= set(every):
        raise UserError(f"--seeds {seeds}: the seeds of the folds are {', '.join(map(str, every))}: give some of those")
    experiment = Experiment(
        name=str(given.get("name", file.stem)), regime=str(given.get("regime", "")),
        recipe=str(given.get("recipe", "frozen")), settings=settings,
        variants=_variants(file, given.get("variants")), grid=grid,
        seeds=chosen, folds=folds, fold_of={seed: k % folds + 1 for k, seed in enumerate(every)} if folds else {},
        baseline=str(given.get("baseline", "")),
        equal=str(given.get("equal", "steps")), cut=_cut(file, given.get("cut", {})),
        zeroshot=tuple(map(str, [folders] if isinstance(folders, str) else folders)),
        **{key: str(given.get(key, "")) for key in ("classnames", "templates", "paraphrased")},
    )  # fmt: skip
    if experiment.equal not in EQUAL:
        raise UserError(f"'{file}': equal: {did_you_mean(experiment.equal, EQUAL)}")
    if experiment.recipe not in RECIPES:
        raise UserError(f"'{file}': unknown recipe '{experiment.recipe}': {did_you_mean(experiment.recipe, RECIPES)}")
    if experiment.baseline and experiment.baseline not in experiment.variants:
        near = did_you_mean(experiment.baseline, experiment.variants)
        raise UserError(f"'{file}': baseline: there is no variant '{experiment.baseline}': {near}")
    return experiment


def _variants(file: Path, given: Any) -> dict[str, dict[str, Any]]:
    """Variants by name. A list, or a name without settings, is of objectives."""
    if isinstance(given, list):
        if twice := next((v for v in given if given.count(v) > 1), None):
            raise UserError(f"'{file}': variants: '{twice}' stands twice: leave one out")
        given = dict.fromkeys(given)
    found = {}
    for name, settings in _mapping(file, "variants", given).items():
        if settings is None:
            if name not in METHODS:
                raise UserError(
                    f"'{file}': variants: unknown objective '{name}': {did_you_mean(name, METHODS)}; a variant of "
                    "another name needs its settings"
                )
            settings = {"objective": name}
        found[str(name)] = flat(_mapping(file, f"variants: {name}", settings))
    if not found:
        raise UserError(f"'{file}': variants is empty: say what to compare, as in variants: [sogclr, amclr]")
    return found


def _seeds(given: Any) -> tuple[int, ...]:
    """A list of seeds, or how many; on the command line with commas, or a number."""
    if isinstance(given, str):
        parts = given.split(",") if "," in given else given
        try:
            given = [int(p) for p in parts if p.strip()] if isinstance(parts, list) else int(parts)
        except ValueError:
            given = None
    seeds = list(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(seeds, Sequence) or not all(type(s) is int and s >= 0 for s in seeds) or not seeds:
        raise UserError(
            "seeds must be a list of whole numbers or how many, at least one: seeds: [0, 1, 2] or --seeds 3"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {next(s for s in seeds if list(seeds).count(s) > 1)} stands twice: leave one out")
    return tuple(seeds)


def _cut(file: Path, given: Any) -> dict[str, float]:
    """When a variant is not gone on with: {} for never."""
    if not (values := _mapping(file, "cut", given)):
        return {}
    for key in values:
        if key not in ("behind", "after"):
            raise UserError(f"'{file}': cut: unknown key '{key}': {did_you_mean(key, ('behind', 'after'))}")
    behind, after = values.get("behind"), values.get("after", 1)
    if isinstance(behind, bool) or not isinstance(behind, int | float) or not behind > 0:
        raise UserError(f"'{file}': cut: behind must be a number of points above 0, as in cut: {{behind: 5}}, "
                        f"got {behind!r}")  # fmt: skip
    if type(after) is not int or after < 1:
        raise UserError(f"'{file}': cut: after must be a number of seeds, 1 at the least, got {after!r}")
    return {"behind": float(behind), "after": after}


def _mapping(file: Path, where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"'{file}': {where} must be names with values, as in {where.split(':')[0]}: {{NAME: VALUE}}, "
                        f"got {given!r}")  # fmt: skip
    return {str(key): value for key, value in given.items()}


def plan(experiment: Experiment, out: Path) -> list[Cell]:
    """All runs, with their settings checked. Raises UserError naming the slip, before anything has been trained."""
    cells: list[Cell] = []
    made: list[Config] = []
    points = [
        dict(zip(experiment.grid, values, strict=True)) for values in itertools.product(*experiment.grid.values())
    ]
    for point, (variant, own) in itertools.product(points, experiment.variants.items()):
        if both := next((name for name in own if name in point), None):
            raise UserError(f"variant '{variant}' sets {both}, which the grid varies: leave it out of one of them")
        if experiment.equal == "passes" and "epochs" in own:
            raise UserError(
                f"variant '{variant}' sets epochs, which follow from equal: passes: leave one of them out "
                "(epochs under settings are those of the variant that takes most)"
            )
        base = RECIPES[experiment.recipe]()
        for where, changes in (("settings", experiment.settings), (f"variant '{variant}'", own), ("grid", point)):
            base = _changed(base, changes, where)
        cell = Cell(variant, point, {})
        if other := next((c for c in cells if c.folder == cell.folder), None):
            raise UserError(f"'{cell.label}' and '{other.label}' would have one folder: rename a variant")
        if experiment.folds:
            if base.source.fold:
                raise UserError(f"{cell.label}: source.fold follows from folds: leave one of them out")
            base = in_fold(base, experiment.folds, experiment.folds)  # the last is the largest: what is left, the least
        if base in made:
            same = cells[made.index(base)].label
            raise UserError(f"'{cell.label}' and '{same}' are the same run, setting by setting: leave one out")
        _check(base, cell.label)
        made.append(base)
        cells.append(cell)
    visits = _check_data(made)
    if experiment.equal == "passes":
        made = as_many_passes(made, visits, [c.point for c in cells])
    for cell, base in zip(cells, made, strict=True):
        for seed in experiment.seeds:
            own = in_fold(base, experiment.fold_of[seed], experiment.folds) if experiment.folds else base
            cell.configs[seed] = replace(own, seed=seed, out=str(out / "runs" / cell.folder / f"seed{seed}"))
    return cells


def in_fold(config: Config, k: int, folds: int) -> Config:
    """The settings with the k-th of so many folds as what is validated on."""
    return replace(config, source=replace(config.source, fold=f"{k}/{folds}"))


def as_many_passes(configs: Sequence[Config], visits: Sequence[int], points: Sequence[object]) -> list[Config]:
    """The settings with more epochs for those that take fewer encoder passes than the most expensive at their point.

    visits: images that an epoch of each visits. Epochs are whole, so passes are equal to half an epoch of each.
    """
    each = [sum(passes_per_step(c)) * (n // c.batch_size) for c, n in zip(configs, visits, strict=True)]
    whole = [c.epochs * passes for c, passes in zip(configs, each, strict=True)]
    most = [max(w for w, p in zip(whole, points, strict=True) if p == point) for point in points]
    return [replace(c, epochs=round(m / passes)) for c, m, passes in zip(configs, most, each, strict=True)]


def passes_per_step(config: Config) -> tuple[int, int]:
    """Views of images, and of captions, that a step passes through a tower or its head."""
    views = build_objective(config, 1).required_views
    images = sum(v.startswith("image") for v in views)
    return config.batch_size * images, config.batch_size * (len(views) - images)


def _changed(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    """A configuration with some settings changed, by their dotted names."""
    known = flat(asdict(Config()))
    for name, value in changes.items():
        if name in ("seed", "out"):
            raise UserError(
                f"{where}: {name} is not set here: {'give seeds: [0, 1, 2]' if name == 'seed' else '--out'}"
            )
        if name not in known:
            raise UserError(
                f"{where}: unknown setting '{name}': {did_you_mean(name, known, 'amclr train --help lists them')}"
            )
        try:
            config = _with(config, name, value)
        except ValueError as error:
            with suppress(ValueError):  # YAML takes 1e-3, without a point, for a word
                config = _with(config, name, float(value) if isinstance(value, str) else value)
                continue
            raise UserError(f"{where}: {'.'.join([*name.split('.')[:-1], str(error)])}") from None
    return config


def _with(config: Config, name: str, value: Any) -> Config:
    """A configuration with one setting changed. Raises ValueError for a value of another type."""
    values = asdict(config)
    *groups, last = name.split(".")
    place = values
    for group in groups:
        place = place[group]
    place[last] = value
    changed: Config = from_dict(values)
    return changed


def _check(config: Config, label: str) -> None:
    """Raise UserError for settings of a run that will not do, as far as shows without its data."""
    try:
        if wrong := problems(config):
            raise UserError("; ".join(wrong))
        policies(config)
        choose_optimizer(config.optim)
        build_objective(config, 1)
    except UserError as error:
        raise UserError(f"{label}: {error}") from None
    if config.init_from and not (Path(config.init_from) / "config.yaml").is_file():
        raise UserError(f"{label}: init_from: there is no run folder '{config.init_from}'")
    if config.devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("amclr compare trains each run in one process: leave out torchrun and devices")


def _check_data(configs: Iterable[Config]) -> list[int]:
    """How many images an epoch of each visits. Each set is read once.

    Raises UserError where there is no data, or less than a batch of it.
    """
    read: dict[str, int] = {}
    found = []
    for config in configs:
        key = repr((config.data, config.source, config.scenes, config.cache))
        if key not in read:
            manifest = manifests.load(config, manifests.cache_folder(config))
            samples = manifest.split("train")
            weights = np.array([s.weight for s in samples]) if manifest.parts else None
            read[key] = BatchPlan(np.arange(len(samples)), 1, 0, weights).steps_per_epoch if samples else 0
        if read[key] < config.batch_size:
            raise UserError(f"{read[key]} training images are fewer than one batch: lower batch_size, which is "
                            f"{config.batch_size}, to at most that")  # fmt: skip
        found.append(read[key])
    return found


# -- the runs ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What came of a run."""

    cell: Cell
    seed: int
    folder: Path
    failure: str = ""
    """Why there are no measures; empty where there are."""
    measures: dict[str, float] = field(default_factory=dict)
    """In percent, by name."""
    shares: dict[str, np.ndarray] = field(default_factory=dict)
    """What each image adds to a measure, (N,): its own queries, and those of its captions."""
    asked: dict[str, str] = field(default_factory=dict)
    """A digest of the queries of each measure: shares may only be compared where it is the same."""
    trained_on: str = ""
    """A digest of the training images."""
    budget: dict[str, float] = field(default_factory=dict)
    """Steps, passes of images and captions through a tower, seconds of the training loop."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Epoch, steps, passes, seconds and mean recall of each evaluation."""


def is_done(config: Config) -> bool:
    """Whether a run is there and finished; False where it is to begin or to go on.

    Raises UserError where the folder holds a run of other settings.
    """
    folder = Path(config.out)
    if not (folder / "config.yaml").is_file():
        return False
    then = Run.open(folder).config
    paraphrases = config.source.paraphrases or then.source.paraphrases  # a run records which it found
    config = replace(config, source=replace(config.source, paraphrases=paraphrases))
    # A run that goes on may have more epochs; compared with others, all must have planned for as many.
    fixed = fixed_differences(then, config) | {
        name: (getattr(then, name), getattr(config, name))
        for name in ("epochs", "eval_every") if getattr(then, name) != getattr(config, name)
    }  # fmt: skip
    if fixed:
        told = "; ".join(f"{name} is {was} there, {now} here" for name, (was, now) in fixed.items())
        raise UserError(f"'{folder}' holds a run of other settings: {told}. Give another --out, or remove that run")
    return (folder / "results.json").is_file() and read_arrays(folder / "queries.npz") is not None


def run_one(cell: Cell, seed: int, asked: Asked, progress: bool) -> Outcome:
    """Train a run, go on with it, or take it as it is; and measure what is asked besides."""
    config = cell.configs[seed]
    outcome = Outcome(cell, seed, Path(config.out))
    try:
        outcome.folder.parent.mkdir(parents=True, exist_ok=True)
        # Where a comparison was killed, its processes may yet be at their last step.
        with FileLock(outcome.folder.with_name(f".{outcome.folder.name}.lock")):
            if not is_done(config):
                begun = (outcome.folder / "config.yaml").is_file()
                if not begun:
                    _sweep(outcome.folder)
                train(None if begun else config, resume=outcome.folder if begun else None, progress=progress)
            _measure(outcome, asked, progress)
    except Stopped:
        raise
    except Exception as error:  # of many runs, one that fails should not cost the others
        outcome.failure = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            # Beside the run folder: one that holds no run yet has to stay empty.
            trace = outcome.folder.with_name(f"{outcome.folder.name}-error.txt")
            trace.parent.mkdir(parents=True, exist_ok=True)
            write_text(trace, traceback.format_exc())
            outcome.failure = f"{type(error).__name__}: {outcome.failure} (see {trace})"
    outcome.failure = printable(outcome.failure)
    return outcome


def _sweep(folder: Path) -> None:
    """Remove what a kill left of a run that had only made its folder."""
    if folder.is_dir() and not any(f.is_file() and f.name != "environment.json" and f.suffix != ".part"
                                   for f in folder.rglob("*")):  # fmt: skip
        shutil.rmtree(folder)


def _measure(outcome: Outcome, asked: Asked, progress: bool) -> None:
    """Collect what a finished run left, and what it finds among the images by class and by paraphrases."""
    run = Run.open(outcome.folder)
    found = read_arrays(run.folder / "queries.npz")
    if found is None:
        raise UserError(
            f"'{run.folder / 'queries.npz'}' cannot be read: remove it, and the same command makes it again"
        )
    _, owner = np.unique(found["image_of_text"], return_inverse=True)
    count, shares = int(owner.max()) + 1, {}
    mean = np.ones(len(RECALLS)) / len(RECALLS)
    for name, of in (("r_mean", mean), ("r1", np.eye(len(RECALLS))[0])):
        shares[f"txt_{name}"] = 100 * (found["txt"] @ of) / count
        shares[f"img_{name}"] = 100 * np.bincount(owner, found["img"] @ of, count) / len(owner)
    shares["r_mean"] = (shares["txt_r_mean"] + shares["img_r_mean"]) / 2
    outcome.asked = dict.fromkeys(shares, str(found["queries"]))
    model = None
    files = {label: run.folder / f"zeroshot-{label}.npz" for label in asked.classes}
    for label, file in files.items():
        kept, classes = read_arrays(file), asked.classes[label]
        if kept is None or str(kept["zeroshot"]) != classes.digest:
            model = model or load(run.folder)
            measure_classes(model, classes, run.config, progress, hits=file)
    for label, file in {**files, "own classes": run.folder / "queries-zeroshot.npz"}.items():
        if (kept := read_arrays(file)) is not None:
            shares[f"zeroshot {label}"] = 100 * kept["top1"][:, 0].astype(float) / len(kept["top1"])
            outcome.asked[f"zeroshot {label}"] = str(kept["queries"])
    if asked.rewording:
        file = run.folder / "queries-paraphrased.npz"
        kept = read_arrays(file)
        if kept is None or str(kept["by"]) != asked.rewording.digest:
            measure_run_paraphrased(model or load(run.folder), run.config, asked.rewording, file, progress)
            kept = read_arrays(file)
        if kept is None or str(kept["of"]) != str(found["queries"]):
            raise UserError(f"the validation images or captions of '{run.folder}' are others than when it was made: "
                            "leave paraphrased out, or remove that run")  # fmt: skip
        for name, of_query in (
            ("paraphrased img_r_mean", kept["paraphrased"] @ mean),
            ("paraphrased drop", (kept["as_is"] - kept["paraphrased"]) @ mean),
            ("paraphrased overlap", kept["overlap"]), ("paraphrased rbo", kept["rbo"]),
        ):  # fmt: skip
            shares[name] = 100 * np.bincount(kept["image_of_text"], of_query, count) / len(of_query)
            outcome.asked[name] = str(kept["queries"])
    outcome.shares = shares
    outcome.measures = {name: float(share.sum()) for name, share in shares.items()}
    pinned = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))
    outcome.trained_on = f"{pinned['training images']}, sha256 {pinned['sha256 of their names'][:12]}"
    rows = run.metrics()
    outcome.curve = _curve(run.config, rows)
    outcome.budget = _budget(run.config, rows)


def _budget(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a run took. Seconds are those of the loop, evaluations between steps included, features beforehand not."""
    logged, seconds = _seconds(rows)
    steps = max((row["step"] for row in rows if row["kind"] == "eval"), default=logged[-1])
    images, captions = passes_per_step(config)
    return {"steps": steps, "image_passes": images * steps, "caption_passes": captions * steps,
            "seconds": seconds[-1]}  # fmt: skip


def _seconds(rows: Iterable[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """The steps at which time was logged, and the seconds of the loop until each."""
    steps, seconds = [0], [0.0]
    for row in rows:
        if row["kind"] == "train":
            seconds.append(seconds[-1] + row["seconds_per_step"] * (row["step"] - steps[-1]))
            steps.append(row["step"])
    return steps, seconds


def _curve(config: Config, rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Mean recall at each evaluation, and what had been spent by then. Seconds between two that were logged: evenly."""
    each, (logged, seconds) = sum(passes_per_step(config)), _seconds(rows)
    return [
        {"epoch": row["epoch"], "steps": row["step"], "passes": each * row["step"],
         "seconds": float(np.interp(row["step"], logged, seconds)), "r_mean": row["r_mean"]}
        for row in rows if row["kind"] == "eval"
    ]  # fmt: skip


# -- statistics --------------------------------------------------------------------------------


def sign_flip(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip permutation test that the sum of paired differences is 0. differences: (n,).

    Each is the difference of one cluster: all that belongs together, and would change sign together if the two
    methods changed names. Assumes that clusters are independent, and that under the null hypothesis a difference
    is as likely as its negative; no distribution, and no number of clusters, is assumed. The p-value is the share
    of the 2^n choices of signs whose sum is as far from 0 (all of them up to 14 clusters, else 9,999 drawn ones
    and the one seen), so it is 2 / 2^n at the least: n = 3 cannot go below 0.25, and 0.05 needs n = 6.
    """
    kept = differences[differences != 0]  # whatever its sign, a 0 adds nothing
    if not len(kept):
        return 1.0
    seen = abs(kept.sum()) - 1e-9 * np.abs(kept).sum()  # sums of the same numbers in another order round otherwise
    if len(kept) <= EXACT:
        every = 1.0 - 2 * (np.arange(1 << len(kept))[:, None] >> np.arange(len(kept)) & 1)
        return float((np.abs(every @ kept) >= seen).mean())
    draw, far = np.random.default_rng(seed), 1
    for some in np.array_split(np.arange(DRAWS), -(-DRAWS * len(kept) // 10_000_000)):
        signs = 2.0 * draw.integers(0, 2, (len(some), len(kept)), dtype=np.int8) - 1
        far += int((np.abs(signs @ kept) >= seen).sum())
    return far / (DRAWS + 1)


def against(
    own: Sequence[Outcome], base: Sequence[Outcome], measure: str, fold_of: Mapping[int, int] | None = None
) -> dict[str, Any] | None:
    """A variant's difference from the baseline, paired over the seeds and the queries that both have.

    p_seeds: by `sign_flip` with the seeds as clusters: would it be so with other seeds, for these images? The
    strict one, with few seeds: 0.25 at the least with three. p_images: with the images as clusters, an image
    and its captions together, means over the seeds: would it be so for other images, with these weights? It
    knows nothing of how much seeds differ, so a small one alone does not say that a method is better. None where
    nothing can be paired. fold_of: the fold of each seed; then folds, their seeds together, are the clusters of the
    one, and the images of all folds those of the other.
    """
    pairs = [
        (o, b) for o in own for b in base
        if o.seed == b.seed and measure in o.shares and measure in b.shares and o.asked[measure] == b.asked[measure]
    ]  # fmt: skip
    if not pairs:
        return None
    if not fold_of:  # weights of all seeds are asked the same, or their shares could not be averaged
        pairs = [p for p in pairs if p[0].asked[measure] == pairs[0][0].asked[measure]]
    by_asked, by_cluster = defaultdict[str, list[np.ndarray]](list), defaultdict[int, list[float]](list)
    for o, b in pairs:
        row = o.shares[measure] - b.shares[measure]
        by_asked[o.asked[measure]].append(row)
        by_cluster[fold_of[o.seed] if fold_of else o.seed].append(float(row.sum()))
    clusters = np.array([np.mean(same) for same in by_cluster.values()])
    # An image counts as it does among those of its own fold.
    images = np.concatenate([np.mean(same, axis=0) for same in by_asked.values()])
    return {"difference": float(clusters.mean()), "seeds": len(pairs), "images": len(images),
            "p_seeds": sign_flip(clusters), "p_images": sign_flip(images)}  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of one value) and the values."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "values": list(values)}  # fmt: skip


def at_equal_cost(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> dict[str, dict[str, Any]]:
    """The best recall of each variant by the time that all of them got to, by steps, passes and seconds.

    curves: the evaluations of each run of each variant, as in `Outcome.curve`. Of each kind of cost, the most that
    all runs reached (`at`), and the best mean recall of each run up to there with its spread. Where a run had not
    been evaluated by then, its variant has no entry of that kind.
    """
    every = [curve for runs in curves.values() for curve in runs]
    found: dict[str, dict[str, Any]] = {name: {} for name in curves}
    for cost in ("steps", "passes", "seconds") if every and all(every) else ():
        at = min(curve[-1][cost] for curve in every)
        for name, runs in curves.items():
            best = [max((e["r_mean"] for e in curve if e[cost] <= at), default=None) for curve in runs]
            if values := [b for b in best if b is not None] if None not in best else []:
                found[name][cost] = {"at": at, **spread(values)}
    return found


def hopeless(outcomes: Sequence[Outcome], experiment: Experiment, seeds: int) -> dict[str, dict[str, float]]:
    """Which variants are too far behind after so many seeds, by label: that number, and the points behind.

    Means are compared at the same point of the grid, of variants that have a result of every one of the seeds.
    """
    recalls: dict[str, list[float]] = {}
    cells = {o.cell.label: o.cell for o in outcomes}
    for outcome in outcomes:
        if not outcome.failure:
            recalls.setdefault(outcome.cell.label, []).append(outcome.measures["r_mean"])
    means = {label: statistics.mean(own) for label, own in recalls.items() if len(own) == seeds}
    found = {}
    for label, mean in means.items():
        cell = cells[label]
        behind = max(m for other, m in means.items() if cells[other].point == cell.point) - mean
        if cell.variant != experiment.baseline and behind > experiment.cut["behind"]:
            found[label] = {"after": seeds, "behind": behind}
    return found


# -- all of it ---------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Comparison:
    """What came of an experiment. A notebook shows its tables and figures."""

    folder: Path
    results: dict[str, Any]
    """What results.json holds."""

    @property
    def runs(self) -> int:
        """All runs."""
        return sum(len(row["runs"]) for row in self.results["rows"])

    @property
    def failed(self) -> int:
        """Runs without a result."""
        return sum(bool(run["failure"]) for row in self.results["rows"] for run in row["runs"])

    @property
    def table(self) -> str:
        """The table with its notes, as table.md has it."""
        return (self.folder / "table.md").read_text(encoding="utf-8")

    def __repr__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return (
            f"<amclr comparison {str(self.folder)!r}: {len(self.results['rows'])} variants, {self.runs} runs{failed}>"
        )

    def _repr_html_(self) -> str:
        return report.notebook(self.results, self.folder)


def compare(
    file: Path, *, data: str = "", seeds: str = "", out: str = "", zeroshot: Sequence[str] = (), jobs: int = 1,
    progress: bool = True,
) -> Comparison:  # fmt: skip
    """Make the runs of an experiment file and write what they say together; the Python form of `amclr compare`.

    data, seeds, zeroshot: instead of what the file says; out: where to (runs/compare-NAME); jobs: so many runs at a
    time, each in a process of its own. Finished runs are taken as they are, others go on where they were, and a run
    that fails does not stop those after it.
    Raises UserError for a slip in the file, before anything is trained, and Stopped after a signal.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be 1 or more, got {jobs}")
    experiment = read(file, data=data, seeds=seeds, zeroshot=zeroshot)
    name = re.sub(r"[^\w.=,+-]", "_", experiment.name)
    folder = Path(out or f"runs/compare-{name}")
    cells, asked = plan(experiment, folder), _asked(experiment)
    # A folder in use shows before anything runs.
    done = sum(is_done(config) for cell in cells for config in cell.configs.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{folder}': {error.strerror}: give another --out") from None
    given = {"data": data, "seeds": seeds, "out": out, "jobs": str(jobs) if jobs > 1 else ""}
    parts = ["amclr", "compare", str(file), *(p for k, v in given.items() if v for p in (f"--{k}", v))]
    command = shlex.join([*parts, *(["--zeroshot", *zeroshot] if zeroshot else [])])
    try:
        with FileLock(folder / ".lock", timeout=0), ending():
            if progress and done:
                print(f"{done} of {len(cells) * len(experiment.seeds)} runs are done already", file=sys.stderr)
            outcomes, cut = _all_runs(experiment, cells, Runs(folder, experiment, asked, jobs, progress))
            return _write(experiment, asked, cells, outcomes, cut, folder, command)
    except Timeout:
        raise UserError(f"another amclr compare is at work in '{folder}': wait for it, or give another --out") from None
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(getattr(error, "signum", signal.SIGINT), folder)
        stopped.args = (f"stopped; what is done is kept, and this goes on: {command}",)
        raise stopped from None


def _all_runs(
    experiment: Experiment, cells: Sequence[Cell], runs: Runs
) -> tuple[list[Outcome], dict[str, dict[str, float]]]:
    """Make the runs, seed by seed; and which variants were cut, by label.

    Where variants may be cut, the next seed begins when all runs of the last one have ended, whatever ran beside what.
    """
    seeds, outcomes = experiment.seeds, list[Outcome]()
    first = int(experiment.cut.get("after", len(seeds)))
    cut: dict[str, dict[str, float]] = {}
    for new in (seeds[:first], *((seed,) for seed in seeds[first:])):
        so_far = seeds.index(new[-1]) + 1
        left = [cell for cell in cells if cell.label not in cut]
        runs.total = len(outcomes) + len(left) * (len(new) + len(seeds) - so_far)
        outcomes += runs.make([(cell, seed) for seed in new for cell in left])
        if so_far < len(seeds):
            cut |= hopeless(outcomes, experiment, so_far)
    return outcomes, cut


@dataclass
class Runs:
    """Makes runs, one after the other or side by side, and tells of each."""

    folder: Path
    experiment: Experiment
    asked: Asked
    jobs: int
    progress: bool
    total: int = 0
    """All runs that there will be."""
    told: int = 0
    """Runs made so far."""

    def make(self, todo: Sequence[tuple[Cell, int]]) -> list[Outcome]:
        """Make runs, or take them as they are; what came of each, in their order."""
        apart = [run for run in todo if not self._is_measured(run[0].configs[run[1]])] if self.jobs > 1 else []
        at_once = min(self.jobs, len(apart))
        self._note([cell.configs[seed] for cell, seed in todo], at_once if apart else 1)
        found = {
            (cell.label, seed): self._tell(run_one(cell, seed, self.asked, self.progress))
            for cell, seed in todo if (cell, seed) not in apart
        }  # fmt: skip
        if apart:
            found |= self._side_by_side(apart, at_once)
        return [found[cell.label, seed] for cell, seed in todo]

    def _side_by_side(self, todo: Sequence[tuple[Cell, int]], at_once: int) -> dict[tuple[str, int], Outcome]:
        """Make runs, so many at a time, under one bar."""
        configs = [cell.configs[seed] for cell, seed in todo]
        outputs = [Path(c.out).with_name(f"{Path(c.out).name}-output.txt") for c in configs]
        calls = [Call(_apart, (*run, self.experiment), output) for run, output in zip(todo, outputs, strict=True)]
        sizes = np.array([c.epochs * sum(passes_per_step(c)) for c in configs], dtype=float)
        shares = np.array([_share_done(c) for c in configs])
        found: dict[tuple[str, int], Outcome] = {}

        def told() -> str:
            return f"{self.told} of {self.total} runs made, {at_once} at a time"

        bar = tqdm(
            total=float(sizes.sum()), initial=float(sizes @ shares), smoothing=0, miniters=0, disable=not self.progress,
            mininterval=1 if sys.stderr.isatty() else 60, leave=False,
            desc=told(), bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed} so far, {remaining} left",
        )  # fmt: skip

        def tick() -> None:
            for k, (cell, seed) in enumerate(todo):
                shares[k] = 1.0 if (cell.label, seed) in found else _share_done(configs[k])
            bar.set_description_str(told(), refresh=False)
            bar.update(float(sizes @ shares) - bar.n)

        with bar, closing(side_by_side(calls, at_once, tick)) as ended:
            for k, result in ended:
                cell, seed = todo[k]
                outcome = result if isinstance(result, Outcome) else Outcome(cell, seed, Path(configs[k].out))
                outcome.cell = cell
                if isinstance(result, Lost):
                    see = f" (see {outputs[k]})" if outputs[k].is_file() else ""
                    outcome.failure = printable(f"{result}{see}")
                elif result is None:
                    outcome.failure = "a signal stopped its process"
                found[cell.label, seed] = self._tell(outcome, bar)
        return found

    def _tell(self, outcome: Outcome, bar: Any = None) -> Outcome:
        self.told += 1
        if self.progress:
            said = outcome.failure or ", ".join(
                f"{report.measure_name(k)} {v:.1f}" for k, v in outcome.measures.items()
            )
            name = f"{printable(outcome.cell.label)}, seed {outcome.seed}"
            line = f"run {self.told} of {self.total}: {name}: {'failed: ' * bool(outcome.failure)}{said}"
            (tqdm if bar is None else bar).write(line, file=sys.stderr)
        return outcome

    def _is_measured(self, config: Config) -> bool:
        """Whether a run is there with all that is asked of it, so that it takes a moment to read."""
        files = [f"zeroshot-{label}.npz" for label in self.asked.classes]
        files += ["queries-paraphrased.npz"] if self.asked.rewording else []
        return is_done(config) and all((Path(config.out) / file).is_file() for file in files)

    def _note(self, configs: Sequence[Config], at_once: int) -> None:
        """Keep how many ran at a time while a run was being trained: its seconds are to be read with that."""
        before = beside(self.folder)
        noted = dict(before)
        for config in configs:
            if not is_done(config):
                begun = (Path(config.out) / "config.yaml").is_file()
                noted[_place(config.out)] = max(at_once, before.get(_place(config.out), 1) if begun else 1)
        if noted != before:
            write_text(self.folder / BESIDE, json.dumps(noted, indent=1) + "\n")


def beside(folder: Path) -> dict[str, int]:
    """How many runs at a time there were while a run was trained, by VARIANT/seedN."""
    file = folder / BESIDE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _place(out: str | Path) -> str:
    """VARIANT/seedN of a run folder."""
    return "/".join(Path(out).parts[-2:])


def _apart(cell: Cell, seed: int, experiment: Experiment) -> Outcome | None:
    """`run_one` in a process of its own; None where a signal stopped it."""
    try:
        return run_one(cell, seed, _asked(experiment), progress=False)
    except (Stopped, KeyboardInterrupt):
        return None


def _share_done(config: Config) -> float:
    """How much of its training a run has behind it, from 0 to 1, by the last rows of its metrics."""
    try:
        with (Path(config.out) / "metrics.jsonl").open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 4096))
            epochs = re.findall(rb'"epoch": ([\d.]+)', handle.read())
    except OSError:
        return 0.0
    return float(epochs[-1]) / config.epochs if epochs else 0.0


@dataclass(frozen=True)
class Asked:
    """What every run is measured on besides its validation split."""

    classes: dict[str, ClassSet]
    """Folders of images by class, by a short name for each."""
    rewording: Rewording | None
    """What paraphrases the captions of the validation split."""


def _asked(experiment: Experiment) -> Asked:
    """What an experiment asks of its runs. Raises UserError for folders, files and names that are not there."""
    roots = short_names([Path(root) for root in experiment.zeroshot])
    classes = {k: read_classes(root, experiment.classnames, experiment.templates) for k, root in roots.items()}
    rewording = Rewording.find(experiment.paraphrased) if experiment.paraphrased else None
    return Asked(classes, rewording)


def _write(
    experiment: Experiment, asked: Asked, cells: Sequence[Cell], outcomes: Sequence[Outcome], cut: Mapping[str, Any],
    folder: Path, command: str,
) -> Comparison:  # fmt: skip
    """Put the results together, and write tables, figures and report."""
    own = {cell.label: [o for o in outcomes if o.cell is cell] for cell in cells}
    measures = list(dict.fromkeys(m for o in outcomes for m in o.measures))
    equal: dict[str, dict[str, Any]] = {}
    for _, same in itertools.groupby(cells, key=lambda cell: cell.point):
        fine_runs = {c.label: [o.curve for o in own[c.label] if not o.failure] for c in same}
        equal |= at_equal_cost({label: runs for label, runs in fine_runs.items() if runs})
    at_a_time = beside(folder)
    rows = []
    for cell in cells:
        fine = [o for o in own[cell.label] if not o.failure]
        base = [o for o in outcomes if o.cell.variant == experiment.baseline and o.cell.point == cell.point]
        config = next(iter(cell.configs.values()))
        rows.append({
            "variant": cell.variant, "grid": cell.point, "captions": config.source.captions, "views": _views(config),
            "epochs": config.epochs, "cut": cut.get(cell.label),
            "measures": {m: spread([o.measures[m] for o in fine if m in o.measures]) for m in measures
                         if any(m in o.measures for o in fine)},
            "budget": {k: spread([o.budget[k] for o in fine]) for k in (fine[0].budget if fine else ())},
            "against": {m: found for m in measures if cell.variant != experiment.baseline
                        if (found := against(fine, base, m, experiment.fold_of))},
            "at equal cost": equal.get(cell.label, {}),
            "runs": [{"seed": o.seed, "folder": str(o.folder), "failure": o.failure, **o.measures, **o.budget,
                      "trained on": o.trained_on,
                      "at a time": at_a_time.get(_place(o.folder), 1), "curve": o.curve} for o in own[cell.label]],
        })  # fmt: skip
    results = {
        "name": experiment.name, "command": command, "experiment": asdict(experiment),
        "measures": {m: report.measure_name(m) for m in measures}, "chance": _chance(outcomes),
        "zeroshot": {label: classes.about for label, classes in asked.classes.items()},
        "machines": _machines(outcomes), "rows": rows,
    }  # fmt: skip
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    report.write(results, folder)
    return Comparison(folder, results)


def _views(config: Config) -> str:
    """The view regime of a run: which views its objective sees of an image and of a caption, and how they are made."""
    views = build_objective(config, 1).required_views
    made = [title(getattr(config.views, v)) for v in views if v.startswith("image")]
    texts = sum(v.startswith("text") for v in views)
    return f"{len(made)} of an image ({', '.join(made)}), {texts} of a caption"


def _chance(outcomes: Sequence[Outcome]) -> float | None:
    """Mean of R@1, R@5 and R@10 of an image for a random order, in percent."""
    sizes = {len(o.shares["r_mean"]) for o in outcomes if o.shares}
    if not sizes or max(sizes) - min(sizes) > 1:  # folds may differ by one image
        return None
    return float(np.mean([100 * min(1.0, k / n) for n in sizes for k in RECALLS]))


def _machines(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What the runs ran on, each once."""
    found = []
    for outcome in outcomes:
        file = outcome.folder / "environment.json"
        if file.is_file():
            machine = json.loads(file.read_text(encoding="utf-8"))
            machine.pop("command", None)
            if machine not in found:
                found.append(machine)
    return found
