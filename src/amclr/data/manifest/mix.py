"""Several data sets as one: a YAML file lists them, each with a weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from amclr.config.checks import from_dict
from amclr.config.schema import Config, SourceConfig
from amclr.data.manifest.samples import Manifest, Sample
from amclr.data.sources.formats import label
from amclr.data.sources.rows import Reject, printable
from amclr.utils.errors import UserError


@dataclass(frozen=True)
class MixEntry:
    """A data set of a mix, as its YAML file lists it."""

    data: str
    """As --data; relative to the file's folder."""
    name: str = ""
    """Prefix of its samples' names: NAME/IMAGE. If empty, derived from `data`."""
    weight: float = 1.0
    """Average visits of each sample per epoch: 2 shows it twice, 0.5 every other epoch."""
    source: dict[str, Any] = field(default_factory=dict)
    """Settings of `source` that differ from the run's."""


def read_mix(file: Path, config: Config) -> list[tuple[MixEntry, Config]]:
    """The data sets of a mix, named, each with the settings to load it with.

    Raises UserError if the file cannot be read or an entry is not valid.
    """
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no mix of data sets at '{file}' ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read '{file}': {printable(str(error))}") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"'{file}' must be a list of data sets: '- data: FOLDER', and maybe name, weight, source")
    settings = {f.name: getattr(config.source, f.name) for f in fields(SourceConfig)}
    parts: list[tuple[MixEntry, Config]] = []
    for raw in listed:
        try:
            entry = from_dict({"data": None, **raw} if isinstance(raw, dict) else raw, MixEntry)
            source = from_dict({**settings, **entry.source}, SourceConfig)
            if "fold" in entry.source:
                raise ValueError("fold applies to the whole mix: give --source.fold")
        except ValueError as error:
            reason = str(error).replace("MixEntry", "a data set").replace("SourceConfig", "source")
            raise UserError(f"'{file}': {reason}") from None
        if not 0 < entry.weight <= 1000:
            raise UserError(f"'{file}': weight must lie between 0 and 1000, got {entry.weight:g}")
        if entry.data.endswith((".yaml", ".yml")):
            raise UserError(f"'{file}': a mix cannot contain another mix, '{entry.data}'")
        name = entry.name or label(entry.data)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UserError(f"'{file}': a name may contain letters, digits, '-', '_' and '.', not '{printable(name)}'")
        if name in {part.name for part, _ in parts}:
            raise UserError(f"'{file}' has two data sets called '{name}': give one of them another name")
        is_path = entry.data != "scenes" and not entry.data.startswith(("hf:", "pipe:")) and "://" not in entry.data
        data = str(file.parent / Path(entry.data).expanduser()) if is_path else entry.data
        parts.append((replace(entry, name=name), replace(config, data=data, source=source)))
    return parts


def merged(file: Path, parts: Sequence[tuple[MixEntry, Manifest]]) -> Manifest:
    """One manifest of several; the name of each data set and a slash precede the names of its samples."""
    samples: list[Sample] = []
    rejects: list[Reject] = []
    splits: dict[str, frozenset[str]] = {}
    for entry, part in parts:
        name, weight = entry.name, float(entry.weight)
        samples += [replace(s, name=f"{name}/{s.name}", weight=weight) for s in part.samples]
        rejects += [replace(r, file=f"{name}/{r.file}") for r in part.rejects]
        for split, names in part.splits.items():
            splits[split] = splits.get(split, frozenset()) | {f"{name}/{n}" for n in names}
    manifests = [part for _, part in parts]
    return Manifest(
        file,
        tuple(sorted(samples, key=lambda s: s.name)),
        tuple(rejects),
        sum(m.rows for m in manifests),
        splits,
        next((m.zeroshot for m in manifests if m.zeroshot), None),
        "mix",
        {entry.name: float(entry.weight) for entry, _ in parts},
        sum(m.lost for m in manifests),
        notes=tuple(f"{entry.name}: {note}" for entry, part in parts for note in part.notes),
        paraphrases=tuple(path for m in manifests for path in m.paraphrases),
        order=tuple(f"{entry.name}/{n}" for entry, part in parts for n in part.order),
    )
