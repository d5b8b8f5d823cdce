"""From source rows to samples: rows of the same image are joined, and unusable rows are rejected."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from amclr.data.sources.rows import SPLIT_NAMES, Reading, Reject, SourceRow, caption_fault, clean, printable
from amclr.utils.errors import UserError


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Switch the garbage collector off: searching millions of live rows takes longer than reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(slots=True)
class _SampleBuilder:
    """A sample in the making: its captions, each with its paraphrases, or None if it has none."""

    image: Location
    file: str
    captions: dict[str, dict[str, None] | None] = field(default_factory=dict)

    def add(self, captions: Sequence[str]) -> None:
        for caption in captions:
            self.captions.setdefault(caption)

    def add_paraphrases(self, caption: str, paraphrases: Sequence[object], reject: Callable[[str], None]) -> None:
        """Add paraphrases of a caption. Faulty ones are rejected, empty ones ignored."""
        if caption not in self.captions:
            return
        for raw in paraphrases:
            text = clean(raw)
            fault = caption_fault(raw, text)
            if not fault:
                self.captions[caption] = {**(self.captions[caption] or {}), text: None}
            elif fault != "empty caption":
                reject(f"paraphrase: {fault}")

    def sample(self, name: str) -> Sample:
        paraphrases = tuple(tuple(p or ()) for p in self.captions.values()) if any(self.captions.values()) else ()
        return Sample(name, self.image, tuple(self.captions), paraphrases)


@_without_garbage_collection()
def collect(reading: Reading, rows: Iterable[SourceRow], format_name: str, only: str) -> Manifest:
    """Group rows by image, and reject unusable rows. only: skip the rows of other splits; empty reads all."""
    images = _ImageFinder(reading.root, reading.source.images)
    builders: dict[str, _SampleBuilder] = {}
    splits: dict[str, set[str]] = {}
    for row in tqdm(rows, "Reading captions", unit="row", delay=2, leave=False, disable=not reading.progress):
        split = row.split.strip().lower()
        split = SPLIT_NAMES.get(split, split)
        if only and split:
            splits.setdefault(split, set())
            if only not in (split, "all"):
                continue
        reading.rows += max(1, len(row.captions))

        def reject(reason: str, row: SourceRow = row) -> None:
            key = row.name or (row.image if isinstance(row.image, str) else "")
            reading.refuse(Reject(row.file, row.line, reason, key[:500]))

        name, place = row.name, row.image
        if isinstance(place, str):
            name, place, fault = images.find(place, row.folder)
            if fault:
                reject(fault)
                continue
        assert isinstance(place, Location)
        builder = builders.get(name)
        if builder and builder.image != place:
            reject(f"duplicate key: {name} is in {builder.file} already")
            continue
        cleaned = [clean(raw) for raw in row.captions]
        captions = []
        for raw, caption in zip(row.captions, cleaned, strict=True):
            if fault := caption_fault(raw, caption):
                reject(fault)
            else:
                captions.append(caption)
        if not captions and not reading.bare:
            if not row.captions:
                reject("no caption")
            continue
        if builder is None:
            builder = builders[name] = _SampleBuilder(place, row.file)
        builder.add(captions)
        for caption, paraphrases in zip(cleaned, row.paraphrases, strict=False):
            builder.add_paraphrases(caption, paraphrases, reject)
        if row.split:
            splits.setdefault(split, set()).add(name)
    order = tuple(builders) if only or reading.source.fold else ()
    lost = len(reading.lost - builders.keys())
    samples = tuple(builders.pop(name).sample(name) for name in sorted(builders))
    names_by_split = {split: frozenset(names) for split, names in splits.items()}
    names_by_split |= _listed_splits(reading, images, {s.name for s in samples})
    return Manifest(
        reading.root,
        samples,
        tuple(reading.rejects),
        reading.rows,
        names_by_split,
        format=format_name,
        lost=lost,
        notes=tuple(reading.notes),
        order=order,
    )


def _listed_splits(reading: Reading, images: _ImageFinder, samples: set[str]) -> dict[str, frozenset[str]]:
    """The splits that train.txt, val.txt and test.txt list, translated to the names of the samples."""
    splits: dict[str, frozenset[str]] = {}
    for split, listed in folders.read_split_lists(reading.root).items():
        names = {n: n if n in samples else images.find(n, None)[0] for n in listed}
        missing = sorted(n for n, name in names.items() if name not in samples)
        if samples and listed and len(missing) == len(listed):
            raise UserError(
                f"none of the {len(listed)} names in '{reading.root / split}.txt' has a usable caption, such as "
                f"'{printable(missing[0])}': write the names as the captions file does, such as "
                f"'{printable(min(samples))}'"
            )
        if missing:
            reading.notes.append(
                f"{split}.txt lists {len(missing)} of {len(listed)} names without a sample, such as "
                f"{printable(missing[0])}"
            )
        splits[split] = frozenset(name for name in names.values() if name in samples)
    return splits


class _ImageFinder:
    """Finds the images that a table names, in the folders they may lie in. It opens nothing outside of them."""

    def __init__(self, root: Path, images: str) -> None:
        self.only_given_folder = bool(images)
        usual = next((root / f for f in IMAGE_FOLDERS if (root / f).is_dir()), root)
        folder = root / Path(images).expanduser() if images else usual
        if images and not folder.is_dir():
            raise UserError(f"no folder '{images}' for --source.images")
        if not images and not usual.resolve().is_relative_to(root.resolve()):
            raise UserError(f"'{usual}' is a link out of the data set: to follow it, give --source.images {usual.name}")
        self.bases = (folder.resolve(),) if images else tuple(dict.fromkeys((folder.resolve(), root.resolve())))
        self.real = lru_cache(4096)(os.path.realpath)
        self.find = lru_cache(4096)(self._find)

    def _base(self, path: str) -> Path | None:
        return next((base for base in self.bases if Path(path).is_relative_to(base)), None)

    def _find(self, text: str, folder: Path | None) -> tuple[str, Location | str, str | None]:
        """(name, place, None) of an image, or (text, "", reason) if there is no such file inside the folders.

        `folder`, if given, is searched first. The name is the path relative to the base folder, however the table
        writes it.
        """
        if not text:
            return text, "", "empty image name"
        if "://" in text or text.startswith("pipe:"):
            return text, "", f"image is a URL: {printable(text[:200])}; fetch it first"
        if PureWindowsPath(text).drive or ".." in re.split(r"[/\\\\]", text):
            return text, "", f"{OUTSIDE}: {text[:200]}"
        bases = [folder.resolve()] if folder and not self.only_given_folder else []
        outside = False
        try:
            # Try the text as written, with Windows separators replaced, and in both normal forms of Unicode.
            for form in dict.fromkeys((text, text.replace("\\", "/"), *(normalize(f, text) for f in ("NFC", "NFD")))):
                for base in (*bases, *self.bases):
                    file = str(base / form)
                    file = os.path.join(self.real(os.path.dirname(file)), os.path.basename(file))
                    inside = self._base(file)
                    if inside is None:
                        outside = True
                    elif os.path.islink(file) and self._base(os.path.realpath(file)) is None:
                        return text, "", f"{OUTSIDE}: {text[:200]} is a link out of it"
                    elif os.path.isfile(file):
                        return os.path.relpath(file, inside).replace(os.sep, "/"), Location(file), None
        except (OSError, ValueError) as error:  # a name that is too long or contains NUL
            reason = getattr(error, "strerror", None) or error
            return text, "", f"image cannot be reached: {text[:80]} ({reason})"
        return text, "", f"{OUTSIDE if outside else ABSENT}: {text[:200]}"
