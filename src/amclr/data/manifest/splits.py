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
    """The manifest with a train and a val split; val is held out of train if the data set has none."""
    has_wanted = only in manifest.splits or (only == "all" and manifest.splits)
    if has_wanted and (only != "train" or "val" in manifest.splits):
        return manifest
    splits = dict(manifest.splits)
    other_splits = frozenset().union(*(names for split, names in splits.items() if split != "train"))
    train = splits.get("train", frozenset(s.name for s in manifest.samples) - other_splits)
    if manifest.samples and not train:
        sizes = ", ".join(f"{printable(split)} ({len(names)})" for split, names in list(splits.items())[:8])
        raise UserError(f"'{manifest.root}' has no training images: its splits are {sizes}; call one of them train")
    splits["train"] = train
    notes = list(manifest.notes)
    if unused := len(manifest.samples) - len(train | other_splits):
        notes.append(f"{unused} images are in no split, and not used")
    if "val" not in splits:
        splits |= _hold_out([s for s in manifest.samples if s.name in train - other_splits], val_fraction)
    for first, second in combinations(splits, 2):
        if shared := splits[first] & splits[second]:
            notes.append(f"{len(shared)} images are in both {first} and {second}, such as {printable(min(shared))}")
    return replace(manifest, splits=splits, notes=tuple(notes))


def _hold_out(samples: Sequence[Sample], fraction: float) -> dict[str, frozenset[str]]:
    """Hold out a share by a hash of the name, so that adding images moves no other image between the splits."""
    held_out = frozenset(s.name for s in samples if derive("val", s.name) < fraction * 2**63)
    if not held_out and len(samples) > 1:
        held_out = frozenset([min(samples, key=lambda s: derive("val", s.name)).name])
    return {"train": frozenset(s.name for s in samples) - held_out, "val": held_out}


def with_fold(manifest: Manifest, k: int, n: int) -> Manifest:
    """The manifest with the k-th of n parts of its training images as its validation split."""
    names = sorted(manifest.splits["train"], key=lambda name: derive("fold", name))
    if n > len(names):
        raise UserError(f"'{manifest.root}' has {len(names)} training images: they cannot be cut into {n} parts")
    held_out = frozenset(names[(k - 1) * len(names) // n : k * len(names) // n])
    unused = len(manifest.splits["val"] - manifest.splits["train"])
    note = f"fold {k} of {n}: validation on {len(held_out)} training images; {unused} images of val are not used"
    splits = manifest.splits | {"train": manifest.splits["train"] - held_out, "val": held_out}
    return replace(manifest, splits=splits, notes=(*manifest.notes, note))
