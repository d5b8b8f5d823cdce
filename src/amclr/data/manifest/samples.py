"""What a manifest is: the samples of a data set, its splits, and what could not be used."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from amclr.data.images.decode import Location
from amclr.data.images.scan import Verdict
from amclr.data.sources.rows import Reject, printable
from amclr.utils.errors import UserError
from amclr.utils.randomness import derive

OUTSIDE, ABSENT = "image path leaves the folder", "no such image"
"""Reasons why an image is not found, for which `--source.images` may be the remedy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its captions. `paraphrases[k]` reword `captions[k]`."""

    name: str
    """Its name in the data set. It alone determines the sample's random draws and its place in the estimators."""
    image: Location
    captions: tuple[str, ...]
    paraphrases: tuple[tuple[str, ...], ...] = ()
    weight: float = 1.0
    """Average visits per epoch."""

    @property
    def id(self) -> int:
        """A 63-bit number that depends on the name alone, not on other samples or the image's path."""
        return derive("sample", self.name)

    @property
    def texts(self) -> tuple[str, ...]:
        """Captions and paraphrases."""
        return (*self.captions, *(p for k in self.paraphrases for p in k))


@dataclass(frozen=True)
class Manifest:
    """The usable samples of a data set, sorted by name, its rejects, and its splits by name."""

    root: Path
    samples: tuple[Sample, ...]
    rejects: tuple[Reject, ...] = ()
    rows: int = 0
    """Rows read, usable or not."""
    splits: dict[str, frozenset[str]] = field(default_factory=dict)
    """Image names by split, from the data set's own lists and columns."""
    zeroshot: Path | None = None
    """A folder of images by class that belongs to the data set."""
    format: str = ""
    """The format it was read as."""
    parts: dict[str, float] = field(default_factory=dict)
    """The weight of each data set of a mix, by its name: the prefix of its samples' names."""
    lost: int = 0
    """Images without a sample because their rows were rejected."""
    bad_images: int = 0
    """The number of rejects that are images that cannot be decoded."""
    notes: tuple[str, ...] = ()
    """Other things that the user should know, a sentence each."""
    paraphrases: tuple[str, ...] = ()
    """Paths of the paraphrase stores that were joined."""
    perceptual_hashes: dict[Location, bytes] = field(default_factory=dict)
    """By image, for the images that were hashed."""
    order: tuple[str, ...] = ()
    """Names in reading order, if a split was read alone or the data set is folded; else empty."""

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of a split (`train`, `val`, `test`, or `all`), in the manifest's order."""
        if name == "all":
            return self.samples
        if name not in self.splits:
            raise UserError(f"{self.root} has no split '{name}': choose from all, {', '.join(sorted(self.splits))}")
        return tuple(s for s in self.samples if s.name in self.splits[name])

    def with_verdicts(self, verdicts: dict[Location, Verdict]) -> Manifest:
        """Turn the samples of bad images into rejects, and keep the perceptual hashes of the others."""
        reasons = {place: v.reason for place, v in verdicts.items() if v.reason}
        hashes = {place: v.perceptual_hash for place, v in verdicts.items() if v.perceptual_hash}
        bad = tuple(Reject(s.image.file, 0, reasons[s.image], s.name) for s in self.samples if s.image in reasons)
        return replace(
            self,
            samples=tuple(s for s in self.samples if s.image not in reasons),
            rejects=self.rejects + bad,
            bad_images=self.bad_images + len(bad),
            perceptual_hashes=hashes,
        )

    def write(self, file: Path) -> None:
        """Write the samples as JSON lines: id, name, splits, file, offset, size, captions, paraphrases, weight."""
        with file.open("w", encoding="utf-8", errors="backslashreplace") as handle:
            for s in self.samples:
                place = s.image
                size = place.size if place.size >= 0 else os.path.getsize(place.file)
                row = {
                    "id": s.id, "name": s.name, "splits": [n for n, names in self.splits.items() if s.name in names],
                    "file": place.file, "offset": place.offset, "size": size, "captions": s.captions,
                    "paraphrases": s.paraphrases, "weight": s.weight,
                }  # fmt: skip
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")

    def enforce_limit(self, max_bad: float) -> None:
        """Raise UserError if a share of more than `max_bad` of the rows, or of the images, is unusable."""
        if not self.samples:
            raise UserError(f"{self.root} has no usable sample; {self._summary()}")
        rows, images = len(self.rejects) - self.bad_images, self.lost + self.bad_images
        for bad, total, what in (
            (rows, max(self.rows, rows), "rows"),
            (images, len(self.samples) + images, "images"),
        ):
            if bad > max_bad * total:
                raise UserError(
                    f"{bad} of {total} {what} cannot be used, over the limit of {max_bad:.1%}; "
                    f"{self._summary()}. Fix them, or raise --source.max_bad"
                )

    def _summary(self) -> str:
        if not self.rejects:
            return "no row was read"
        reasons = Counter(r.reason.split(":")[0] for r in self.rejects)
        most_common = ", ".join(f"{n} x {printable(reason)}" for reason, n in reasons.most_common(3))
        not_found = any(reason.startswith((OUTSIDE, ABSENT)) for reason in reasons)
        hint = " (images elsewhere: --source.images FOLDER)" if not_found else ""
        return f"{most_common}{hint}; the first: {self.rejects[0]}"
