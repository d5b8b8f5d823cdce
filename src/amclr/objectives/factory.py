"""`build`: an objective by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

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
        _require(0 <= weight < math.inf, f"weights[{kind!r}] must not be negative or infinite", weight)
    overrides |= {f"{kind}_weight": weight for kind, weight in (weights or {}).items()}
    settings = method.resolved(replace(settings or LossConfig(), **overrides))
    _choose("backend", backend, BACKENDS)
    _check(name, method, settings)
    if settings.storage == "auto":
        settings = replace(settings, storage=_storage(method, settings, sum(samples.values())))
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
    hints = get_type_hints(LossConfig)
    for choice in ("gamma_schedule", "temperature_mode", "estimator", "storage", "matmul_dtype"):
        _choose(choice, getattr(s, choice), _choices(hints[choice]))
    bounds = s.temperature_min, s.temperature_max
    _require(0 < bounds[0] <= bounds[1] < math.inf, "bounds must be 0 < temperature_min <= temperature_max", bounds)
    _require(s.temperature > 0 and math.isfinite(s.temperature), "temperature must be positive", s.temperature)
    if s.temperature_mode != "fixed":
        inside = bounds[0] <= s.temperature <= bounds[1]
        _require(inside, f"temperature must lie in [temperature_min, temperature_max] = {bounds}", s.temperature)
    _require(0 < s.gamma <= 1, "gamma must lie in (0, 1]", s.gamma)
    _require(0 <= s.temperature_momentum < 1, "temperature_momentum must lie in [0, 1)", s.temperature_momentum)
    _require(s.temperature_lr > 0, "temperature_lr must be positive", s.temperature_lr)
    _require(math.isfinite(s.rho) and s.rho >= 0, "rho must not be negative", s.rho)
    for weight in ("cyclic_weight", *(f"{kind}_weight" for kind in KINDS)):
        _require(0 <= getattr(s, weight) < math.inf, f"{weight} must not be negative or infinite", getattr(s, weight))
    _require(isinstance(s.queue, int) and s.queue >= 0, "queue must be a whole number, 0 for none", s.queue)
    if method.pairs == "none":
        for setting in ("cyclic_weight", "pairs"):
            if value := getattr(s, setting):
                raise ValueError(f"'{name}' aligns no image-text pairs: leave out {setting}={value!r}")
    if s.pairs is not None:
        _choose("pairs", s.pairs, _choices(hints["pairs"]))
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


def _choices(hint: Any) -> tuple[str, ...]:
    """The strings of a Literal, optional or not."""
    return tuple(c for part in get_args(hint) for c in (get_args(part) or (part,)) if isinstance(c, str))


def _require(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}, got {got!r}")


def _choose(what: str, got: object, among: tuple[str, ...]) -> None:
    if got not in among:
        raise ValueError(f"{what} must be one of {', '.join(among)}, got {got!r}")
