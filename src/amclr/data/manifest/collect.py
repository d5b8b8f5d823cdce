"""From the rows that a reader yields to samples: rows of one image are joined, unusable ones rejected."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from unicodedata import normalize

from tqdm import tqdm

from amclr.data.images.decode import Location
from amclr.data.manifest.samples import ABSENT, OUTSIDE, Manifest, Sample
from amclr.data.sources import folders
from amclr.data.sources.formats import IMAGE_FOLDERS
from amclr.data.sources.rows import SPLIT_NAMES, Reading, Reject, Row, caption_fault, clean, printable
from amclr.utils.errors import UserError


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Millions of rows are no garbage: looking for some among them takes longer than reading them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(slots=True)
class _Entry:
    """A sample in the making: its captions, each with its paraphrases, or None without any."""

    image: Location
    file: str
    captions: dict[str, dict[str, None] | None] = field(default_factory=dict)

    def sample(self, name: str) -> Sample:
        again = tuple(tuple(p or ()) for p in self.captions.values()) if any(self.captions.values()) else ()
        return Sample(name, self.image, tuple(self.captions), again)


@_no_garbage()
def collect(reading: Reading, rows: Iterable[Row], called: str, only: str) -> Manifest:
    """Group rows by image; reject what cannot be used, of one split where `only` names it."""
    images = _Images(reading.root, reading.source.images)
    entries: dict[str, _Entry] = {}
    splits: dict[str, set[str]] = {}
    for row in tqdm(rows, "Reading captions", unit="row", delay=2, leave=False, disable=not reading.progress):
        split = row.split.strip().lower()
        split = SPLIT_NAMES.get(split, split)
        if only and split:
            splits.setdefault(split, set())
            if only not in (split, "all"):
                continue
        reading.rows += max(1, len(row.captions))

        def reject(reason: str, row: Row = row) -> None:
            key = row.name or (row.image if isinstance(row.image, str) else "")
            reading.refuse(Reject(row.file, row.line, reason, key[:500]))

        name, place = row.name, row.image
        if isinstance(place, str):
            name, place, fault = images.find(place, row.beside)
            if fault:
                reject(fault)
                continue
        assert isinstance(place, Location)
        entry = entries.get(name)
        if entry and entry.image != place:
            reject(f"duplicate key: {name} is in {entry.file} already")
            continue
        cleaned = [clean(raw) for raw in row.captions]
        texts = []
        for raw, caption in zip(row.captions, cleaned, strict=True):
            if fault := caption_fault(raw, caption):
                reject(fault)
            else:
                texts.append(caption)
        if not texts and not reading.bare:
            if not row.captions:
                reject("no caption")
            continue
        if entry is None:
            entry = entries[name] = _Entry(place, row.file)
        for caption in texts:
            entry.captions.setdefault(caption)
        for caption, again in zip(cleaned, row.paraphrases, strict=False):
            if caption not in entry.captions:
                continue
            for raw in again:
                text = clean(raw)
                fault = caption_fault(raw, text)
                if fault and fault != "empty caption":
                    reject(f"paraphrase: {fault}")
                elif not fault:
                    entry.captions[caption] = {**(entry.captions[caption] or {}), text: None}
        if row.split:
            splits.setdefault(split, set()).add(name)
    order = tuple(entries) if only or reading.source.fold else ()
    lost = len(reading.lost - entries.keys())
    samples = tuple(entries.pop(name).sample(name) for name in sorted(entries))
    named = {split: frozenset(names) for split, names in splits.items()}
    named |= _listed_splits(reading, images, {s.name for s in samples})
    return Manifest(reading.root, samples, tuple(reading.rejects), reading.rows, named, format=called, lost=lost,
                    notes=tuple(reading.notes), order=order)  # fmt: skip


def _listed_splits(reading: Reading, images: _Images, samples: set[str]) -> dict[str, frozenset[str]]:
    """The splits that train.txt, val.txt and test.txt list, under the names of the samples."""
    found: dict[str, frozenset[str]] = {}
    for split, listed in folders.read_split_lists(reading.root).items():
        own = {n: n if n in samples else images.find(n, None)[0] for n in listed}
        absent = sorted(n for n, name in own.items() if name not in samples)
        if samples and listed and len(absent) == len(listed):
            raise UserError(
                f"none of the {len(listed)} names in '{reading.root / split}.txt' has a usable caption, such as "
                f"'{printable(absent[0])}': it must list the images as '{printable(min(samples))}' is named"
            )
        if absent:
            reading.notes.append(f"{split}.txt lists {len(absent)} of {len(listed)} names without a sample, such as "
                                 f"{printable(absent[0])}")  # fmt: skip
        found[split] = frozenset(name for name in own.values() if name in samples)
    return found


class _Images:
    """The folders that images of a table lie in. Nothing outside them is ever opened."""

    def __init__(self, root: Path, images: str) -> None:
        self.apart = bool(images)
        usual = next((root / f for f in IMAGE_FOLDERS if (root / f).is_dir()), root)
        folder = root / Path(images).expanduser() if images else usual
        if images and not folder.is_dir():
            raise UserError(f"no folder '{images}' for --source.images")
        if not images and not usual.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"'{usual}' is a link out of the data set: if that is meant, give --source.images {usual.name}"
            )
        self.bases = (folder.resolve(),) if images else tuple(dict.fromkeys((folder.resolve(), root.resolve())))
        self.real = lru_cache(4096)(os.path.realpath)
        self.find = lru_cache(4096)(self._find)

    def _base(self, path: str) -> Path | None:
        return next((base for base in self.bases if Path(path).is_relative_to(base)), None)

    def _find(self, text: str, beside: Path | None) -> tuple[str, Location | str, str | None]:
        """(name, place, None) of an image, or why it cannot be used: no such file, or one outside the folders.

        It is looked for in `beside`, if given, and then in the folders. The name is its path from the
        folder on, however the table writes it.
        """
        if not text:
            return text, "", "empty image name"
        if "://" in text or text.startswith("pipe:"):
            return text, "", f"image is a URL: {printable(text[:200])}; fetch it first"
        if PureWindowsPath(text).drive or ".." in re.split(r"[/\\\\]", text):
            return text, "", f"{OUTSIDE}: {text[:200]}"
        folders = [beside.resolve()] if beside and not self.apart else []
        outside = False
        try:
            # As it is written; as Windows writes it; as the other normal form of Unicode has it.
            for form in dict.fromkeys((text, text.replace("\\", "/"), *(normalize(f, text) for f in ("NFC", "NFD")))):
                for base in (*folders, *self.bases):
                    file = str(base / form)
                    file = os.path.join(self.real(os.path.dirname(file)), os.path.basename(file))
                    inside = self._base(file)
                    if inside is None:
                        outside = True
                    elif os.path.islink(file) and self._base(os.path.realpath(file)) is None:
                        return text, "", f"{OUTSIDE}: {text[:200]} is a link out of it"
                    elif os.path.isfile(file):
                        return os.path.relpath(file, inside).replace(os.sep, "/"), Location(file), None
        except (OSError, ValueError) as error:  # names that are too long, or hold NUL
            what = getattr(error, "strerror", None) or error
            return text, "", f"image cannot be reached: {text[:80]} ({what})"
        return text, "", f"{OUTSIDE if outside else ABSENT}: {text[:200]}"
