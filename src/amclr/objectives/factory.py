"""`build`: an objective by name."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from amclr.config.checks import problems
from amclr.config.schema import LossConfig
from amclr.objectives.backends import BACKENDS
from amclr.objectives.contrasts import CONTRASTS
from amclr.objectives.estimators import ESTIMATORS
from amclr.objectives.methods import METHODS, Method
from amclr.objectives.objective import Objective
from amclr.objectives.tables import choose_storage
from amclr.utils.errors import did_you_mean

KINDS = ("cross", "image", "text")


def build(
    name: str,
    num_samples: int | Mapping[str, int],
    settings: LossConfig | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    validate: bool | None = None,
    distributed: bool = True,
    averaged: bool = False,
    folder: str | Path | None = None,
    backend: str = "auto",
    **overrides: Any,
) -> Objective:
    """Make an objective by name.

    Args:
        name: one of `amclr.objectives.METHODS`.
        num_samples: how many samples the training set has (the estimators have a row each), or {"image": n, "text": m}
            if images and captions have ids of their own.
        settings: temperature, gamma, estimator and the like; by default `LossConfig()`, whose empty settings follow the
            method.
        weights: factors on the terms by kind: "cross", "image" (image-image), "text" (text-text). Short for the
            settings `cross_weight`, `image_weight` and `text_weight`.
        validate: check unit length, NaN and the range of ids at every call. Default: on the CPU only, since on an
            accelerator it costs a synchronisation.
        distributed: if torch.distributed is initialised, take the batches of all processes as one.
        averaged: gradients are averaged over the processes afterwards, as DDP and FSDP do. They are then multiplied by
            the number of processes, so that the average is the gradient of the whole.
        folder: where storage "disk" puts its files, which have no name and are deleted with the process; None is the
            system's temporary folder. `Objective.save_tables` keeps them.
        backend: "eager", "triton", or "auto": Triton on a GPU where it is installed.
        overrides: single settings by name, such as `temperature=0.01, gamma=0.8`: fields of `LossConfig`.

    Raises:
        ValueError: for an unknown name or a setting out of range; the message names the argument.
    """
    if name not in METHODS:
        raise ValueError(f"unknown objective '{name}': {did_you_mean(name, METHODS)}")
    method, samples = METHODS[name], _samples(num_samples)
    known = [f.name for f in fields(LossConfig)]
    for setting in overrides:
        if setting not in known:
            raise ValueError(f"unknown setting '{setting}': {did_you_mean(setting, known)}")
    for kind, weight in (weights or {}).items():
        _choose("weights", kind, KINDS)
        overrides[f"{kind}_weight"] = weight
    settings = method.resolved(replace(settings or LossConfig(), **overrides))
    _choose("backend", backend, BACKENDS)
    _check(name, method, settings)
    if settings.storage == "auto":
        storage: Any = _storage(method, settings, sum(samples.values()))
        settings = replace(settings, storage=storage)
    return Objective(
        name, method, samples, settings, validate=validate, distributed=distributed, averaged=averaged,
        folder=Path(folder) if folder else None, backend=backend,
    )  # fmt: skip


def _storage(method: Method, settings: LossConfig, rows: int) -> str:
    """Where the tables of an objective go."""
    if not CONTRASTS[method.contrast].has_estimates:
        return "device"
    columns = len(method.terms(settings)) // 2
    estimates = columns if ESTIMATORS[settings.estimator].columns_per_term else 1
    temperatures = 2 * columns if settings.temperature_mode == "individual" else 0
    return choose_storage(4 * (estimates + temperatures) * rows)


def _samples(num_samples: int | Mapping[str, int]) -> dict[str, int]:
    try:
        if isinstance(num_samples, Mapping):
            counts = {of: operator.index(n) for of, n in num_samples.items()}
        else:
            counts = dict.fromkeys(("image", "text"), operator.index(num_samples))
    except TypeError:
        counts = {}
    if set(counts) != {"image", "text"} or min(counts.values()) < 1:
        raise ValueError(
            f"num_samples must be a positive int or a dict of them for 'image' and 'text', got {num_samples!r}"
        )
    return counts


def _check(name: str, method: Method, s: LossConfig) -> None:
    """Raise ValueError for settings out of range, or that do not go together."""
    contrast = CONTRASTS[method.contrast]
    assert s.temperature is not None and s.cyclic_weight is not None
    for setting, hint in get_type_hints(LossConfig).items():
        choices = tuple(c for part in get_args(hint) for c in (get_args(part) or (part,)) if isinstance(c, str))
        if choices and getattr(s, setting) is not None:
            _choose(setting, getattr(s, setting), choices)
    if not isinstance(s.queue, int):
        raise ValueError(f"queue must be a whole number, 0 for none, got {s.queue!r}")
    if wrong := problems(s, prefix=""):
        raise ValueError("; ".join(wrong))
    bounds = s.temperature_min, s.temperature_max
    if bounds[0] > bounds[1]:
        raise ValueError(f"temperature_min must not exceed temperature_max, got {bounds}")
    if s.temperature_mode != "fixed" and not bounds[0] <= s.temperature <= bounds[1]:
        raise ValueError(f"temperature must lie in [temperature_min, temperature_max] = {bounds}, got {s.temperature}")
    if method.pairs == "none":
        for setting in ("cyclic_weight", "pairs"):
            if value := getattr(s, setting):
                raise ValueError(f"'{name}' aligns no image-text pairs: leave out {setting}={value!r}")
    if not contrast.has_estimates:
        if s.temperature_mode == "individual":
            raise ValueError(
                f"temperature_mode 'individual' needs a global objective, and '{name}' is a mini-batch one"
            )
        if s.estimator == "reference":
            raise ValueError(f"estimator 'reference' needs a global objective, and '{name}' is a mini-batch one")
    if s.estimator == "reference" and s.gamma_schedule == "adaptive":
        raise ValueError("gamma_schedule 'adaptive' needs estimator 'per-term', which tells the terms apart")
    if s.queue and (not contrast.has_anchors or method.pool_negatives):
        raise ValueError(f"'{name}' has no anchors to contrast with a queue: leave out queue={s.queue!r}")
    if s.queue and s.estimator == "reference":
        raise ValueError("a queue needs estimator 'per-term': the public AmCLR code has none")
    if not method.terms(s):
        weights = {kind: getattr(s, f"{kind}_weight") for kind in KINDS}
        raise ValueError(f"weights {weights} leave '{name}' without a term")


def _choose(what: str, got: object, among: tuple[str, ...]) -> None:
    if got not in among:
        raise ValueError(f"{what} must be one of {', '.join(among)}, got {got!r}")
