"""What is asked of settings: problems to report, differences that forbid resuming, and reading them from a mapping."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from amclr.config.schema import Config, ParaphraseConfig, ServeConfig


def problems(settings: Any, prefix: str = "--") -> list[str]:
    """Everything that is wrong with a dataclass of settings, each as a sentence that names the option.

    The values are compared with the bounds of their fields, in nested dataclasses too, and those of `Config`,
    `ParaphraseConfig` and `ServeConfig` with one another.
    """
    check = _CONFLICTS.get(type(settings))
    return [*_out_of_bounds(settings, prefix), *(check(settings) if check else ())]


def _out_of_bounds(settings: Any, prefix: str) -> Iterator[str]:
    for field in fields(settings):
        value, bounds = getattr(settings, field.name), field.metadata.get("bounds")
        if is_dataclass(value):
            yield from _out_of_bounds(value, f"{prefix}{field.name}.")
        elif bounds and value is not None and value not in bounds:
            yield f"{prefix}{field.name} must {bounds}, got {value:g}"


def _conflicts(config: Config) -> Iterator[str]:
    model = config.model
    try:
        fold_of(config.source.fold)
    except ValueError as error:
        yield str(error)
    for tower, lr, rank in (
        ("image", model.image_lr, model.image_adapters),
        ("text", model.text_lr, model.text_adapters),
    ):
        if rank and not lr:
            yield (
                f"--model.{tower}_adapters {rank} trains the {tower} tower, but --model.{tower}_lr 0 freezes it: "
                f"give --model.{tower}_lr 1"
            )
    if model.freeze_norms and not config.init_from and (model.image_tower == "small" or not model.image_pretrained):
        yield (
            "--model.freeze_norms keeps the statistics of pretrained norms, but this image tower starts from random "
            "weights: give --model.freeze_norms false, a pretrained --model.image_tower, or --init_from RUN"
        )
    if model.compile and model.activation_checkpointing:
        yield "--model.compile decides itself what to recompute: leave out --model.activation_checkpointing"


def _paraphrase_conflicts(config: ParaphraseConfig) -> Iterator[str]:
    if 0 < config.candidates < config.k:
        yield f"--candidates must be at least k, which is {config.k}, got {config.candidates}"
    if config.prompt and "{}" not in config.prompt:
        yield "--prompt must hold {} where the caption goes"


def _serve_conflicts(config: ServeConfig) -> Iterator[str]:
    token = config.token
    if token and (len(token) < 16 or not token.isascii() or not token.isprintable()):
        yield "--token must have 16 characters or more, of ASCII"


_CONFLICTS: dict[type, Callable[[Any], Iterator[str]]] = {
    Config: _conflicts,
    ParaphraseConfig: _paraphrase_conflicts,
    ServeConfig: _serve_conflicts,
}


def fixed_differences(before: Any, now: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings that differ and may not when a run is resumed, by dotted name: their old and new values."""
    differences: dict[str, tuple[Any, Any]] = {}
    for field in fields(now):
        name, old, new = f"{prefix}{field.name}", getattr(before, field.name), getattr(now, field.name)
        if is_dataclass(new):
            differences |= fixed_differences(old, new, f"{name}.")
        elif old != new and not field.metadata.get("resumable"):
            differences[name] = (old, new)
    return differences


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, as on the command line. The input may be nested, dotted already, or both."""
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        settings |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return settings


def fold_of(text: str) -> tuple[int, int] | None:
    """(K, N) of `source.fold` "K/N", or None where it is empty. Raises ValueError for anything else."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    k, n = map(int, match.groups()) if match else (0, 0)
    if not (1 <= k <= n and n > 1):
        raise ValueError(f"--source.fold is K/N, such as 1/6 for the first of six, got {text!r}")
    return k, n


def from_dict(values: Mapping[str, Any], cls: type[Any] = Config) -> Any:
    """A dataclass of settings from what `dataclasses.asdict` wrote; missing settings keep their defaults.

    Raises ValueError, naming the setting, for one that does not exist or has the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be a mapping of settings, got {values!r}")
    hints = get_type_hints(cls)
    unknown = [str(name) for name in values if name not in hints]
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}")
    settings: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint):
            settings[name] = from_dict(value, hint)  # type: ignore[arg-type]
        elif _fits(value, hint):
            settings[name] = value
        else:
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{name} must be {kind}, got {value!r}")
    return cls(**settings)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has a field's type. An int is also a float."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is NoneType:
        return value is None
    if hint is Any:
        return True
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)
