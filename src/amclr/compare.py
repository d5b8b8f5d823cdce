"""`compare`: the runs of an experiment file, one after the other, and what they say together.

    OUT/runs/VARIANT/seedN    run folders           OUT/table.md, table.csv    means and spread over the seeds
    OUT/results.json          all of it, by run     OUT/report.html            tables and figures in one file

Runs of a seed have the same order of samples, the same views and the same starting weights, whatever their
objective: all of these are functions of the seed.
"""

from __future__ import annotations

import difflib
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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout

from amclr import report
from amclr.classes import ClassSet, read_classes, short_names
from amclr.config import Config, fixed_differences, flat, from_dict, problems
from amclr.data import manifest as manifests
from amclr.data.paraphrases import Rewording
from amclr.data.rows import printable
from amclr.data.views import policies, title
from amclr.engine import Stopped, build_objective, train
from amclr.errors import UserError
from amclr.evaluate import RECALLS
from amclr.files import read_arrays, write_text
from amclr.measure import measure_classes, measure_run_paraphrased
from amclr.objectives import METHODS
from amclr.optim import choose_optimizer
from amclr.recipes import RECIPES
from amclr.run import Run, load

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
    baseline: str = ""
    """The variant that the others are tested against."""
    zeroshot: tuple[str, ...] = ()
    """Folders of pictures by class."""
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
            raise UserError(f"'{file}': unknown key '{key}'{more}: {_near(key, known)}")
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
    experiment = Experiment(
        name=str(given.get("name", file.stem)), regime=str(given.get("regime", "")),
        recipe=str(given.get("recipe", "frozen")), settings=settings,
        variants=_variants(file, given.get("variants")), grid=grid,
        seeds=_seeds(seeds or given.get("seeds", (0, 1, 2))), baseline=str(given.get("baseline", "")),
        zeroshot=tuple(map(str, [folders] if isinstance(folders, str) else folders)),
        **{key: str(given.get(key, "")) for key in ("classnames", "templates", "paraphrased")},
    )  # fmt: skip
    if experiment.recipe not in RECIPES:
        raise UserError(f"'{file}': unknown recipe '{experiment.recipe}': {_near(experiment.recipe, RECIPES)}")
    if experiment.baseline and experiment.baseline not in experiment.variants:
        near = _near(experiment.baseline, experiment.variants)
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
                    f"'{file}': variants: unknown objective '{name}': {_near(name, METHODS)}; a variant of another "
                    "name needs its settings"
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


def _mapping(file: Path, where: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UserError(f"'{file}': {where} must be names with values, as in {where.split(':')[0]}: {{NAME: VALUE}}, "
                        f"got {given!r}")  # fmt: skip
    return {str(key): value for key, value in given.items()}


def _near(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """What to type instead of a name that is not known."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean '{near[0]}'?" if near else otherwise or f"choose from {', '.join(known)}"


def plan(experiment: Experiment, out: Path) -> list[Cell]:
    """All runs, with their settings checked. Raises UserError naming the slip, before anything has been trained."""
    cells: list[Cell] = []
    folders: dict[str, str] = {}
    made: list[tuple[Config, str]] = []
    points = [
        dict(zip(experiment.grid, values, strict=True)) for values in itertools.product(*experiment.grid.values())
    ]
    for point, (variant, own) in itertools.product(points, experiment.variants.items()):
        if both := next((name for name in own if name in point), None):
            raise UserError(f"variant '{variant}' sets {both}, which the grid varies: leave it out of one of them")
        base = RECIPES[experiment.recipe]()
        for where, changes in (("settings", experiment.settings), (f"variant '{variant}'", own), ("grid", point)):
            base = _changed(base, changes, where)
        cell = Cell(variant, point, {})
        if cell.folder in folders:
            raise UserError(f"'{cell.label}' and '{folders[cell.folder]}' would have one folder: rename a variant")
        folders[cell.folder] = cell.label
        if same := next((label for other, label in made if other == base), ""):
            raise UserError(f"'{cell.label}' and '{same}' are the same run, setting by setting: leave one out")
        made.append((base, cell.label))
        for seed in experiment.seeds:
            cell.configs[seed] = replace(base, seed=seed, out=str(out / "runs" / cell.folder / f"seed{seed}"))
        cells.append(cell)
        _check(base, cell.label)
    _check_data([next(iter(c.configs.values())) for c in cells])
    _asked(experiment)
    return cells


def _changed(config: Config, changes: Mapping[str, Any], where: str) -> Config:
    """A configuration with some settings changed, by their dotted names."""
    known = flat(asdict(Config()))
    for name, value in changes.items():
        if name in ("seed", "out"):
            raise UserError(
                f"{where}: {name} is not set here: {'give seeds: [0, 1, 2]' if name == 'seed' else '--out'}"
            )
        if name not in known:
            raise UserError(f"{where}: unknown setting '{name}': {_near(name, known, 'amclr train --help lists them')}")
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
    if config.start and not (Path(config.start) / "config.yaml").is_file():
        raise UserError(f"{label}: start: there is no run folder '{config.start}'")
    if config.devices > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("amclr compare trains each run in one process: leave out torchrun and devices")


def _check_data(configs: Iterable[Config]) -> None:
    """Raise UserError where there is no data, or less than a batch of it; each set is read once."""
    read: dict[str, int] = {}
    for config in configs:
        key = repr((config.data, config.source, config.scenes, config.cache))
        if key not in read:
            cache = manifests.cache_folder(config)
            read[key] = len(manifests.load(config, cache).split("train"))
        if read[key] < config.batch_size:
            raise UserError(f"{read[key]} training pictures are fewer than one batch: lower batch_size, which is "
                            f"{config.batch_size}, to at most that")  # fmt: skip


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
    """What each picture adds to a measure, (N,): its own queries, and those of its captions."""
    asked: dict[str, str] = field(default_factory=dict)
    """A digest of the queries of each measure: shares may only be compared where it is the same."""
    trained_on: str = ""
    """A digest of the training pictures."""
    budget: dict[str, float] = field(default_factory=dict)
    """Steps, passes of pictures and captions through a tower, seconds of the training loop."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """Epoch and mean recall of each evaluation."""


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
    """Collect what a finished run left, and what it finds among the pictures by class and by paraphrases."""
    run = Run.open(outcome.folder)
    found = read_arrays(run.folder / "queries.npz")
    if found is None:
        raise UserError(
            f"'{run.folder / 'queries.npz'}' cannot be read: remove it, and the same command makes it again"
        )
    _, owner = np.unique(found["image_of_text"], return_inverse=True)
    count, shares = int(owner.max()) + 1, {}
    for name, of in (("r_mean", np.ones(len(RECALLS)) / len(RECALLS)), ("r1", np.eye(len(RECALLS))[0])):
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
            measure_classes(
                model, classes.root, run.config, asked.classnames, asked.templates, progress=progress, hits=file
            )
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
            raise UserError(f"the validation pictures or captions of '{run.folder}' are others than when it was made: "
                            "leave paraphrased out, or remove that run")  # fmt: skip
        of = np.ones(len(RECALLS)) / len(RECALLS)
        for name, of_query in (
            ("paraphrased img_r_mean", kept["paraphrased"] @ of),
            ("paraphrased drop", (kept["as_is"] - kept["paraphrased"]) @ of),
            ("paraphrased overlap", kept["overlap"]), ("paraphrased rbo", kept["rbo"]),
        ):  # fmt: skip
            shares[name] = 100 * np.bincount(kept["image_of_text"], of_query, count) / len(of_query)
            outcome.asked[name] = str(kept["queries"])
    outcome.shares = shares
    outcome.measures = {name: float(share.sum()) for name, share in shares.items()}
    pinned = json.loads((run.folder / "samples.json").read_text(encoding="utf-8"))
    outcome.trained_on = f"{pinned['training pictures']}, sha256 {pinned['sha256 of their names'][:12]}"
    rows = run.metrics()
    outcome.curve = [(row["epoch"], row["r_mean"]) for row in rows if row["kind"] == "eval"]
    outcome.budget = _budget(run.config, rows)


def _budget(config: Config, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a run took. Seconds are those of the loop, evaluations between steps included, features beforehand not."""
    steps, seconds = 0, 0.0
    for row in rows:
        if row["kind"] == "train":
            seconds += row["seconds_per_step"] * (row["step"] - steps)
            steps = row["step"]
    steps = max((row["step"] for row in rows if row["kind"] == "eval"), default=steps)
    views = build_objective(config, 1).required_views
    pictures = sum(v.startswith("image") for v in views)
    each = config.batch_size * steps
    return {"steps": steps, "picture_passes": pictures * each, "caption_passes": (len(views) - pictures) * each,
            "seconds": seconds}  # fmt: skip


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


def against(own: Sequence[Outcome], base: Sequence[Outcome], measure: str) -> dict[str, Any] | None:
    """A variant's difference from the baseline, paired over the seeds and the queries that both have.

    p_seeds: by `sign_flip` with the seeds as clusters: would it be so with other seeds, for these pictures? The
    strict one, with few seeds: 0.25 at the least with three. p_pictures: with the pictures as clusters, a picture
    and its captions together, means over the seeds: would it be so for other pictures, with these weights? It
    knows nothing of how much seeds differ, so a small one alone does not say that a method is better. None where
    nothing can be paired.
    """
    pairs = [
        (o, b) for o in own for b in base
        if o.seed == b.seed and measure in o.shares and measure in b.shares and o.asked[measure] == b.asked[measure]
    ]  # fmt: skip
    if not pairs:
        return None
    # Weights of all seeds are asked the same, or their shares could not be averaged.
    pairs = [p for p in pairs if p[0].asked[measure] == pairs[0][0].asked[measure]]
    rows = np.stack([o.shares[measure] - b.shares[measure] for o, b in pairs])
    return {"difference": float(rows.sum(axis=1).mean()), "seeds": len(pairs), "pictures": rows.shape[1],
            "p_seeds": sign_flip(rows.sum(axis=1)), "p_pictures": sign_flip(rows.mean(axis=0))}  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None of one value) and the values."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "values": list(values)}  # fmt: skip


# -- all of it ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What came of an experiment."""

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


def compare(
    file: Path, *, data: str = "", seeds: str = "", out: str = "", zeroshot: Sequence[str] = (), progress: bool = True
) -> Comparison:
    """Make the runs of an experiment file and write what they say together; the Python form of `amclr compare`.

    data, seeds, zeroshot: instead of what the file says; out: where to (runs/compare-NAME). Finished runs
    are taken as they are, others go on where they were, and a run that fails does not stop those after it.
    Raises UserError for a slip in the file, before anything is trained, and Stopped after a signal.
    """
    experiment = read(file, data=data, seeds=seeds, zeroshot=zeroshot)
    name = re.sub(r"[^\w.=,+-]", "_", experiment.name)
    folder = Path(out or f"runs/compare-{name}")
    cells = plan(experiment, folder)
    todo = [(cell, seed) for seed in experiment.seeds for cell in cells]
    done = sum(is_done(cell.configs[seed]) for cell, seed in todo)  # a folder in use shows before anything runs
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{folder}': {error.strerror}: give another --out") from None
    given = {"data": data, "seeds": seeds, "out": out}
    parts = ["amclr", "compare", str(file), *(p for k, v in given.items() if v for p in (f"--{k}", v))]
    command = shlex.join([*parts, *(["--zeroshot", *zeroshot] if zeroshot else [])])
    try:
        with FileLock(folder / ".lock", timeout=0):
            if progress and done:
                print(f"{done} of {len(todo)} runs are done already", file=sys.stderr)
            asked = _asked(experiment)
            outcomes = [
                _told(run_one(cell, seed, asked, progress), k, len(todo), progress)
                for k, (cell, seed) in enumerate(todo)
            ]
            return _write(experiment, cells, outcomes, folder, command)
    except Timeout:
        raise UserError(f"another amclr compare is at work in '{folder}': wait for it, or give another --out") from None
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT, folder)
        stopped.args = (f"stopped; what is done is kept, and this goes on: {command}",)
        raise stopped from None


def _told(outcome: Outcome, number: int, of: int, progress: bool) -> Outcome:
    if progress:
        said = outcome.failure or ", ".join(f"{report.measure_name(k)} {v:.1f}" for k, v in outcome.measures.items())
        name = f"{printable(outcome.cell.label)}, seed {outcome.seed}"
        print(f"run {number + 1} of {of}: {name}: {'failed: ' * bool(outcome.failure)}{said}", file=sys.stderr)
    return outcome


@dataclass(frozen=True)
class Asked:
    """What every run is measured on besides its validation split."""

    classes: dict[str, ClassSet]
    """Folders of pictures by class, by a short name for each."""
    classnames: str
    templates: str
    rewording: Rewording | None
    """What paraphrases the captions of the validation split."""


def _asked(experiment: Experiment) -> Asked:
    """What an experiment asks of its runs. Raises UserError for folders, files and names that are not there."""
    roots = short_names([Path(root) for root in experiment.zeroshot])
    classes = {k: read_classes(root, experiment.classnames, experiment.templates) for k, root in roots.items()}
    rewording = Rewording.find(experiment.paraphrased) if experiment.paraphrased else None
    return Asked(classes, experiment.classnames, experiment.templates, rewording)


def _write(
    experiment: Experiment, cells: Sequence[Cell], outcomes: Sequence[Outcome], folder: Path, command: str
) -> Comparison:
    """Put the results together, and write tables, figures and report."""
    own = {cell.label: [o for o in outcomes if o.cell is cell] for cell in cells}
    measures = list(dict.fromkeys(m for o in outcomes for m in o.measures))
    rows = []
    for cell in cells:
        fine = [o for o in own[cell.label] if not o.failure]
        base = [o for o in outcomes if o.cell.variant == experiment.baseline and o.cell.point == cell.point]
        config = next(iter(cell.configs.values()))
        rows.append({
            "variant": cell.variant, "grid": cell.point, "captions": config.source.captions, "views": _views(config),
            "measures": {m: spread([o.measures[m] for o in fine if m in o.measures]) for m in measures
                         if any(m in o.measures for o in fine)},
            "budget": {k: spread([o.budget[k] for o in fine]) for k in (fine[0].budget if fine else ())},
            "against": {m: found for m in measures if cell.variant != experiment.baseline
                        if (found := against(fine, base, m))},
            "runs": [{"seed": o.seed, "folder": str(o.folder), "failure": o.failure, **o.measures, **o.budget,
                      "curve": o.curve} for o in own[cell.label]],
        })  # fmt: skip
    results = {
        "name": experiment.name, "command": command, "experiment": asdict(experiment),
        "measures": {m: report.measure_name(m) for m in measures}, "chance": _chance(outcomes),
        "zeroshot": {label: classes.about for label, classes in _asked(experiment).classes.items()},
        "training pictures": list(dict.fromkeys(o.trained_on for o in outcomes if o.trained_on)),
        "machines": _machines(outcomes), "rows": rows,
    }  # fmt: skip
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    report.write(results, folder)
    return Comparison(folder, results)


def _views(config: Config) -> str:
    """The view regime of a run: which views its objective sees of a picture and of a caption, and how they are made."""
    views = build_objective(config, 1).required_views
    made = [title(getattr(config.views, v)) for v in views if v.startswith("image")]
    texts = sum(v.startswith("text") for v in views)
    return f"{len(made)} of a picture ({', '.join(made)}), {texts} of a caption"


def _chance(outcomes: Sequence[Outcome]) -> float | None:
    """Mean of R@1, R@5 and R@10 of an image for a random order, in percent."""
    sizes = {len(o.shares["r_mean"]) for o in outcomes if o.shares}
    if len(sizes) != 1:
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
