"""Splits: those of the data set, a held-out validation split, and folds for cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from amclr.data.manifest.samples import Manifest, Sample
from amclr.data.sources.rows import printable
from amclr.utils.errors import UserError
from amclr.utils.randomness import derive


def with_splits(manifest: Manifest, val_fraction: float, only: str) -> Manifest:
    """The manifest with a train and a val split, held out where it brings none of its own."""
    given = only in manifest.splits or (only == "all" and manifest.splits)
    if given and (only != "train" or "val" in manifest.splits):
        return manifest
    splits = dict(manifest.splits)
    apart = frozenset().union(*(names for split, names in splits.items() if split != "train"))
    rest = splits.get("train", frozenset(s.name for s in manifest.samples) - apart)
    if manifest.samples and not rest:
        found = ", ".join(f"{printable(split)} ({len(names)})" for split, names in list(splits.items())[:8])
        raise UserError(f"'{manifest.root}' has no training images: its splits are {found}; call one of them train")
    splits["train"] = rest
    notes = list(manifest.notes)
    if without := len(manifest.samples) - len(rest | apart):
        notes.append(f"{without} images are in no split, and not used")
    if "val" not in splits:
        own = rest - apart
        splits |= _hold_out([s for s in manifest.samples if s.name in own], val_fraction)
    for one, other in combinations(splits, 2):
        if shared := splits[one] & splits[other]:
            notes.append(f"{len(shared)} images are in both {one} and {other}, such as {printable(min(shared))}")
    return replace(manifest, splits=splits, notes=tuple(notes))


def _hold_out(samples: Sequence[Sample], fraction: float) -> dict[str, frozenset[str]]:
    """Hold out a share by a hash of the name, so that adding images moves no other between the splits."""
    held = frozenset(s.name for s in samples if derive("val", s.name) < fraction * 2**63)
    if not held and len(samples) > 1:
        held = frozenset([min(samples, key=lambda s: derive("val", s.name)).name])
    return {"train": frozenset(s.name for s in samples) - held, "val": held}


def with_fold(manifest: Manifest, k: int, n: int) -> Manifest:
    """The manifest with the k-th of n parts of its training images as what is validated on."""
    names = sorted(manifest.splits["train"], key=lambda name: derive("fold", name))
    if n > len(names):
        raise UserError(f"'{manifest.root}' has {len(names)} training images: they cannot be cut into {n} parts")
    held = frozenset(names[(k - 1) * len(names) // n : k * len(names) // n])
    resting = len(manifest.splits["val"] - manifest.splits["train"])
    note = f"fold {k} of {n}: {len(held)} training images are validated on, and {resting} of val rest"
    splits = manifest.splits | {"train": manifest.splits["train"] - held, "val": held}
    return replace(manifest, splits=splits, notes=(*manifest.notes, note))
