"""The runs of an experiment: their settings, checked before anything is trained."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from amclr.compare.experiment import Experiment
from amclr.config.checks import flat, from_dict, problems
from amclr.config.recipes import RECIPES
from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.data.batches import BatchPlan
from amclr.data.images.views import policies
from amclr.training.assembly import build_objective
from amclr.training.optim import choose_optimizer
from amclr.utils.errors import UserError, did_you_mean


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
        """Its name: the variant and its point of the grid."""
        return ",".join([self.variant, *(f"{name}={value}" for name, value in self.point.items())])

    @property
    def folder(self) -> str:
        """Its label as the name of a folder."""
        return re.sub(r"[^\w.=,+-]", "_", self.label)


def plan(experiment: Experiment, out: Path) -> list[Cell]:
    """All runs of an experiment under a folder `out`. Raises UserError for settings or data that cannot be trained."""
    cells: list[Cell] = []
    configs: list[Config] = []
    points = [
        dict(zip(experiment.grid, values, strict=True)) for values in itertools.product(*experiment.grid.values())
    ]
    for point, (variant, settings) in itertools.product(points, experiment.variants.items()):
        if both := next((name for name in settings if name in point), None):
            raise UserError(f"variant '{variant}' sets {both}, which the grid varies: leave it out of one of them")
        if experiment.equal == "passes" and "epochs" in settings:
            raise UserError(
                f"variant '{variant}' sets epochs, which follow from equal: passes: leave one of them out "
                "(epochs under settings are those of the variant with the most passes per epoch)"
            )
        config = RECIPES[experiment.recipe]()
        for where, changes in (("settings", experiment.settings), (f"variant '{variant}'", settings), ("grid", point)):
            config = _changed(config, changes, where)
        cell = Cell(variant, point, {})
        if other := next((c for c in cells if c.folder == cell.folder), None):
            raise UserError(f"'{cell.label}' and '{other.label}' would have one folder: rename a variant")
        if experiment.folds:
            if config.source.fold:
                raise UserError(f"{cell.label}: source.fold follows from folds: leave one of them out")
            # The last fold is the largest, so it leaves the fewest images to train on.
            config = with_fold(config, experiment.folds, experiment.folds)
        if config in configs:
            same = cells[configs.index(config)].label
            raise UserError(f"'{cell.label}' and '{same}' are the same run, setting by setting: leave one out")
        _check(config, cell.label)
        configs.append(config)
        cells.append(cell)
    visits = _images_per_epoch(configs)
    if experiment.equal == "passes":
        configs = equal_passes(configs, visits, [c.point for c in cells])
    for cell, config in zip(cells, configs, strict=True):
        for seed in experiment.seeds:
            folded = with_fold(config, experiment.fold_of[seed], experiment.folds) if experiment.folds else config
            cell.configs[seed] = replace(folded, seed=seed, out=str(out / "runs" / cell.folder / f"seed{seed}"))
    return cells


def with_fold(config: Config, k: int, folds: int) -> Config:
    """The settings, with the k-th of `folds` folds held out to validate on."""
    return replace(config, source=replace(config.source, fold=f"{k}/{folds}"))


def equal_passes(configs: Sequence[Config], visits: Sequence[int], points: Sequence[object]) -> list[Config]:
    """The settings, with more epochs for those that need fewer encoder passes than the most expensive at their point.

    visits: how many images an epoch of each visits. Epochs are whole, so passes are equal to within half an epoch.
    """
    per_epoch = [sum(passes_per_step(c)) * (n // c.batch_size) for c, n in zip(configs, visits, strict=True)]
    totals = [c.epochs * passes for c, passes in zip(configs, per_epoch, strict=True)]
    most = [max(total for total, p in zip(totals, points, strict=True) if p == point) for point in points]
    return [replace(c, epochs=round(m / passes)) for c, m, passes in zip(configs, most, per_epoch, strict=True)]


def passes_per_step(config: Config) -> tuple[int, int]:
    """How many views of images, and of captions, a step passes through a tower, or through its head if it is frozen."""
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
            with suppress(ValueError):  # YAML reads 1e-3, without a point, as text
                config = _with(config, name, float(value) if isinstance(value, str) else value)
                continue
            raise UserError(f"{where}: {'.'.join([*name.split('.')[:-1], str(error)])}") from None
    return config


def _with(config: Config, name: str, value: Any) -> Config:
    """A configuration with one setting changed. Raises ValueError for a value of the wrong type."""
    values = asdict(config)
    *groups, last = name.split(".")
    group = values
    for key in groups:
        group = group[key]
    group[last] = value
    changed: Config = from_dict(values)
    return changed


def _check(config: Config, label: str) -> None:
    """Raise UserError for settings of a run that are wrong, as far as that can be seen without its data."""
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


def _images_per_epoch(configs: Iterable[Config]) -> list[int]:
    """How many images an epoch of each configuration visits. Each data set is read once.

    Raises UserError for a data set that does not exist or has less than one batch of images.
    """
    sizes: dict[str, int] = {}
    visits = []
    for config in configs:
        key = repr((config.data, config.source, config.scenes, config.cache))
        if key not in sizes:
            manifest = manifests.load(config, manifests.cache_folder(config))
            samples = manifest.split("train")
            weights = np.array([s.weight for s in samples]) if manifest.parts else None
            sizes[key] = BatchPlan(np.arange(len(samples)), 1, 0, weights).steps_per_epoch if samples else 0
        if sizes[key] < config.batch_size:
            raise UserError(f"{sizes[key]} training images are fewer than one batch: lower batch_size, which is "
                            f"{config.batch_size}, to at most that")  # fmt: skip
        visits.append(sizes[key])
    return visits
