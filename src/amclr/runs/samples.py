"""The images that a run trains and validates on, recorded in its samples.json."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_NAMES = 1_000_000
"""Longer lists of names are not recorded: a changed data set is then detected, but not listed."""


@dataclass(frozen=True)
class Pinned:
    """The images of a run, which determine the order of its batches and the rows of its estimator tables.

    train, val: their names. weights: how often an epoch visits each training image; empty means once.
    """

    train: Sequence[str]
    val: Sequence[str]
    weights: Sequence[float] = ()

    @property
    def val_digest(self) -> str:
        """A hash of the validation images' names."""
        return _digest(self.val)

    def record(self) -> dict[str, Any]:
        """The content of samples.json: counts, hashes, and the names of at most MAX_NAMES images."""
        return {
            "training images": len(self.train), "sha256 of their names": _digest(self.train),
            "sha256 of their weights": _digest(map(str, self.weights)),
            "validation images": len(self.val), "sha256 of validation names": self.val_digest,
            "names": {k: v if len(v) <= MAX_NAMES else [] for k, v in (("train", self.train), ("val", self.val))},
        }  # fmt: skip

    def difference(self, recorded: dict[str, Any]) -> str:
        """How the images differ from recorded ones, in a few words; empty where they are the same."""
        current = self.record()
        # Records of earlier versions have fewer entries.
        changed = {key for key, value in current.items() if key in recorded and recorded[key] != value}
        for split, count, digest in (
            ("train", "training images", "sha256 of their names"),
            ("val", "validation images", "sha256 of validation names"),
        ):
            if digest in changed:
                old, new = recorded.get("names", {}).get(split, []), current["names"][split]
                changes = [
                    f"{what}: {_first_names(sorted(names))}"
                    for what, names in (("removed", {*old} - {*new}), ("added", {*new} - {*old}))
                    if names and old and new
                ]
                details = "; ".join([f"{current[count]} now, {recorded[count]} before", *changes])
                return f"the {count} have changed ({details})"
        return "the weights of the mix have changed" if "sha256 of their weights" in changed else ""


def _digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogatepass")).hexdigest()


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
