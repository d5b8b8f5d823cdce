"""Experiment files: their keys, and the errors for keys and values that are wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from amclr.config.checks import flat
from amclr.config.recipes import RECIPES
from amclr.config.schema import Config
from amclr.objectives import METHODS
from amclr.utils.errors import UserError, did_you_mean

EQUAL = ("steps", "passes")


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says."""

    variants: dict[str, dict[str, Any]]
    """What is compared: names, each with the settings that it changes."""
    name: str = ""
    """Title of tables and figures. Default: the file's name."""
    regime: str = ""
    """How captions and views are used, in a few words, for the heading of every table."""
    recipe: str = "frozen"
    """The recipe that all settings start from."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of all runs."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Settings by their dotted names, with the values that every variant is run with."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A list of seeds, or how many."""
    folds: int = 0
    """Cross-validation: the training images are cut into this many parts, and the runs of a seed hold one of them out
    to validate on; 0 for none."""
    fold_of: dict[int, int] = field(default_factory=dict)
    """The fold, from 1 on, of each seed in the file: the seeds take the folds in turn."""
    baseline: str = ""
    """The variant that the others are tested against."""
    equal: str = "steps"
    """steps: all variants have the epochs that are set. passes: variants that encode fewer views per step have more
    epochs, so that all end with the same number of encoder passes."""
    cut: dict[str, float] = field(default_factory=dict)
    """Empty, or `behind` and `after`: after `after` seeds, a variant more than `behind` points of mean recall behind
    the best one at its point of the grid is not run with the remaining seeds."""
    zeroshot: tuple[str, ...] = ()
    """Folders of images by class."""
    classnames: str = ""
    """Names of their classes, as `amclr evaluate --classnames` takes them."""
    templates: str = ""
    """Prompts for their classes, as `amclr evaluate --templates` takes them."""
    paraphrased: str = ""
    """`rules`, or a file or folder of paraphrases: measure every run with paraphrased captions too."""


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys, of which plain YAML silently drops the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if duplicate := next((n for n in names if names.count(n) > 1 and n != "<<"), None):
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{duplicate}'", node.start_mark)
        return super().construct_mapping(node, deep)


def read_experiment(file: Path, *, data: str = "", seeds: str = "", zeroshot: Sequence[str] = ()) -> Experiment:
    """Read an experiment file. Raises UserError that names the key and what to write instead.

    data, seeds, zeroshot: replace what the file says.
    """
    values = _load(file)
    settings = flat(_mapping(file, "settings", values.get("settings", {})))
    if data:
        settings["data"] = data
    grid = flat(_mapping(file, "grid", values.get("grid", {})))
    for name, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"'{file}': grid: {name} must be a list of values, as in {name}: [A, B], got {choices!r}")
    folders = list(zeroshot) or values.get("zeroshot", [])
    if not isinstance(folders, str | list):
        raise UserError(f"'{file}': zeroshot must be a list of folders, as in zeroshot: [FOLDER], got {folders!r}")
    chosen, fold_of = _seeds_and_folds(file, values, seeds)
    experiment = Experiment(
        name=str(values.get("name", file.stem)), regime=str(values.get("regime", "")),
        recipe=str(values.get("recipe", "frozen")), settings=settings,
        variants=_variants(file, values["variants"]), grid=grid,
        seeds=chosen, folds=values.get("folds", 0), fold_of=fold_of,
        baseline=str(values.get("baseline", "")),
        equal=str(values.get("equal", "steps")), cut=_cut(file, values.get("cut", {})),
        zeroshot=tuple(map(str, [folders] if isinstance(folders, str) else folders)),
        **{key: str(values.get(key, "")) for key in ("classnames", "templates", "paraphrased")},
    )  # fmt: skip
    if experiment.equal not in EQUAL:
        raise UserError(f"'{file}': equal: {did_you_mean(experiment.equal, EQUAL)}")
    if experiment.recipe not in RECIPES:
        raise UserError(f"'{file}': unknown recipe '{experiment.recipe}': {did_you_mean(experiment.recipe, RECIPES)}")
    if experiment.baseline and experiment.baseline not in experiment.variants:
        hint = did_you_mean(experiment.baseline, experiment.variants)
        raise UserError(f"'{file}': baseline: there is no variant '{experiment.baseline}': {hint}")
    return experiment


def _load(file: Path) -> dict[str, Any]:
    """The keys of an experiment file that have a value, and variants."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"cannot read the experiment file '{file}': {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' is not valid YAML: {' '.join(str(error).split())}") from None
    known = [f.name for f in fields(Experiment)]
    if not isinstance(values, dict) or "variants" not in values:
        raise UserError(f"'{file}' has no variants: say what to compare, as in variants: [sogclr, amclr]")
    for key in values:
        if key not in known:
            more = " (a setting belongs under settings)" if key in flat(asdict(Config())) else ""
            raise UserError(f"'{file}': unknown key '{key}'{more}: {did_you_mean(key, known)}")
    return {key: value for key, value in values.items() if value is not None or key == "variants"}


def _seeds_and_folds(file: Path, values: Mapping[str, Any], chosen: str) -> tuple[tuple[int, ...], dict[int, int]]:
    """The seeds to run, and the fold of each seed of the file. chosen: `--seeds`."""
    folds = values.get("folds", 0)
    if type(folds) is not int or folds < 0 or folds == 1:
        raise UserError(f"'{file}': folds must be a whole number, at least 2, got {folds!r}")
    seeds = _seeds(values.get("seeds", folds or (0, 1, 2)))
    to_run = _seeds(chosen) if chosen else seeds
    if not folds:
        return to_run, {}
    if len(seeds) % folds:
        raise UserError(f"'{file}': {len(seeds)} seeds for {folds} folds: give the same number for each, or none")
    if not set(to_run) <= set(seeds):
        raise UserError(f"--seeds {chosen}: the seeds of the folds are {', '.join(map(str, seeds))}: choose from those")
    return to_run, {seed: k % folds + 1 for k, seed in enumerate(seeds)}


def _variants(file: Path, value: Any) -> dict[str, dict[str, Any]]:
    """Settings of the variants by name. The names in a list, and those without settings, are objectives."""
    if isinstance(value, list):
        if duplicate := next((v for v in value if value.count(v) > 1), None):
            raise UserError(f"'{file}': variants: '{duplicate}' is given twice: leave one out")
        value = dict.fromkeys(value)
    variants = {}
    for name, settings in _mapping(file, "variants", value).items():
        if settings is None:
            if name not in METHODS:
                raise UserError(
                    f"'{file}': variants: unknown objective '{name}': {did_you_mean(name, METHODS)}; a variant "
                    "with another name needs settings"
                )
            settings = {"objective": name}
        variants[str(name)] = flat(_mapping(file, f"variants: {name}", settings))
    if not variants:
        raise UserError(f"'{file}': variants is empty: say what to compare, as in variants: [sogclr, amclr]")
    return variants


def _seeds(value: Any) -> tuple[int, ...]:
    """Seeds from a list, or from their number; as text, numbers with commas or one number."""
    if isinstance(value, str):
        parts = value.split(",") if "," in value else value
        try:
            value = [int(p) for p in parts if p.strip()] if isinstance(parts, list) else int(parts)
        except ValueError:
            value = None
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(seeds, Sequence) or not all(type(s) is int and s >= 0 for s in seeds) or not seeds:
        raise UserError(
            "seeds must be a list of whole numbers, or how many, at least one: seeds: [0, 1, 2] or --seeds 3"
        )
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {next(s for s in seeds if list(seeds).count(s) > 1)} is given twice: leave one out")
    return tuple(seeds)


def _cut(file: Path, value: Any) -> dict[str, float]:
    """When to stop running a variant: `behind` and `after`, or {} for never."""
    if not (values := _mapping(file, "cut", value)):
        return {}
    for key in values:
        if key not in ("behind", "after"):
            raise UserError(f"'{file}': cut: unknown key '{key}': {did_you_mean(key, ('behind', 'after'))}")
    behind, after = values.get("behind"), values.get("after", 1)
    if isinstance(behind, bool) or not isinstance(behind, int | float) or not behind > 0:
        raise UserError(f"'{file}': cut: behind must be a number of points above 0, as in cut: {{behind: 5}}, "
                        f"got {behind!r}")  # fmt: skip
    if type(after) is not int or after < 1:
        raise UserError(f"'{file}': cut: after must be a number of seeds, at least 1, got {after!r}")
    return {"behind": float(behind), "after": after}


def _mapping(file: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"'{file}': {where} must be names with values, as in {where.split(':')[0]}: {{NAME: VALUE}}, "
                        f"got {value!r}")  # fmt: skip
    return {str(key): item for key, item in value.items()}
