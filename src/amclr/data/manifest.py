"""A data set as a list of samples: what there is, where it lies, and what could not be used.

A new source format is a reader (a function that yields rows) and its line in `layouts.FORMATS`.
"""

from __future__ import annotations

import gc
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path, PureWindowsPath
from typing import Any
from unicodedata import normalize

import yaml
from tqdm import tqdm

from amclr.config.checks import fold_of, from_dict
from amclr.config.schema import Config, SourceConfig
from amclr.data import scenes
from amclr.data.images.decode import Location, Verdict, scan
from amclr.data.sources import columnar, remote, tables
from amclr.data.sources.formats import IMAGE_FOLDERS, find, label
from amclr.data.sources.rows import SPLIT_NAMES, Reading, Reject, Row, caption_fault, clean, printable
from amclr.data.text.store import attach, find_store
from amclr.utils.errors import UserError
from amclr.utils.randomness import derive

OUTSIDE, ABSENT = "image path leaves the folder", "no such image"


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its captions. `paraphrases[k]` reword `captions[k]`."""

    name: str
    """What the data set calls it. Its draws and its place in the estimators follow from it alone."""
    image: Location
    captions: tuple[str, ...]
    paraphrases: tuple[tuple[str, ...], ...] = ()
    weight: float = 1.0
    """Visits an epoch, on average."""

    @property
    def id(self) -> int:
        """A 63-bit number that stays the same whatever other samples there are, and wherever the image lies."""
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
    """What it was read as."""
    parts: dict[str, float] = field(default_factory=dict)
    """Of a mix: the weight of each data set, whose name and a slash precede the names of its samples."""
    lost: int = 0
    """Images that rejects of rows name and that are no samples."""
    bad_images: int = 0
    """How many of the rejects are images that cannot be decoded."""
    notes: tuple[str, ...] = ()
    """What is no reject and yet should be known, a sentence each."""
    paraphrases: tuple[str, ...] = ()
    """The stores that paraphrases came from."""
    looks: dict[Location, bytes] = field(default_factory=dict)
    """Perceptual hashes of the images that were compared."""
    order: tuple[str, ...] = ()
    """Names in the order in which they were read, where a split was read alone, or is a fold of another."""

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of a split (`train`, `val`, `test`, or `all`), in the manifest's order."""
        if name == "all":
            return self.samples
        if name not in self.splits:
            raise UserError(f"{self.root} has no split '{name}': choose from all, {', '.join(sorted(self.splits))}")
        return tuple(s for s in self.samples if s.name in self.splits[name])

    def judged(self, verdicts: dict[Location, Verdict]) -> Manifest:
        """Drop the samples of bad images, record them as rejects, and keep what the others look like."""
        bad = {place: v.reason for place, v in verdicts.items() if v.reason}
        looks = {place: v.looks for place, v in verdicts.items() if v.looks}
        rejects = tuple(
            Reject(s.image.file, 0, bad[s.image], s.name) for s in self.samples if s.image in bad
        )  # fmt: skip
        kept = tuple(s for s in self.samples if s.image not in bad)
        bad_images = self.bad_images + len(rejects)
        return replace(self, samples=kept, rejects=self.rejects + rejects, bad_images=bad_images, looks=looks)

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
        """Raise UserError if more than a share of `max_bad` of the rows, or of the images, cannot be used."""
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
                    f"{self._summary()}. Mend them, or raise --source.max_bad"
                )

    def _summary(self) -> str:
        if not self.rejects:
            return "no row was read"
        reasons = Counter(r.reason.split(":")[0] for r in self.rejects)
        commonest = ", ".join(f"{n} x {printable(reason)}" for reason, n in reasons.most_common(3))
        elsewhere = any(reason.startswith((OUTSIDE, ABSENT)) for reason in reasons)
        hint = " (images elsewhere: --source.images FOLDER)" if elsewhere else ""
        return f"{commonest}{hint}; the first: {self.rejects[0]}"


# -- reading -----------------------------------------------------------------------------------


def load(config: Config, cache: Path, progress: bool = True, only: str = "", bare: bool = False) -> Manifest:
    """Read the data set that `config.data` names (see its help), without looking into its images.

    only: a split that is wanted alone; rows that say that they are of another one are passed over, whatever is
    wrong with them, and there need be no training images. bare: images are wanted whether they have a usable
    caption or none; a folder without captions is then its images at any depth.
    Raises UserError where there is none, or nothing in it that can be read.
    """
    data = config.data
    try:
        fold = fold_of(config.source.fold)
    except ValueError as error:
        raise UserError(str(error)) from None
    if only in folded_splits(config.source):
        only = ""
    if data == "scenes":
        where = cache / f"scenes-{derive(scenes.FORMAT, repr(config.scenes)):016x}"
        scenes.write_scenes(where, config.scenes, progress=progress)
        found = replace(
            _read(where, config, cache, progress, only, bare), zeroshot=where / "zeroshot", format="scenes",
            notes=scenes.notes(where, config.scenes),
        )  # fmt: skip
    elif data.startswith("pipe:"):
        raise UserError(f"'{printable(data)}' would run a command: save what it prints as a file and give that")
    elif data.startswith("hf:"):
        name = data.removeprefix("hf:")
        reading = Reading(Path(name), [], config.source, cache, progress, bare)
        found = _collect(reading, columnar.read_hub_dataset(reading, name), "Hugging Face dataset", only)
    elif "://" in data:
        found = _read(remote.fetch(data, cache, progress), config, cache, progress, only, bare)
    elif data.endswith((".yaml", ".yml")):
        return _mix(Path(data).expanduser(), config, cache, progress, only, bare)
    else:
        found = _read(Path(data).expanduser(), config, cache, progress, only, bare)
    if only == "val" and "val" not in found.splits and "train" in found.splits:
        return load(config, cache, progress)  # it is held out of the training images, which were passed over
    found = _with_paraphrases(found, config.source.paraphrases)
    found = _with_splits(found, config.source.val_fraction, only)
    return _with_fold(found, *fold) if fold and not only else found


def folded_splits(source: SourceConfig) -> tuple[str, ...]:
    """The splits that only reading all rows tells: those that a fold makes of the training images."""
    return ("train", "val") if source.fold else ()


def _with_paraphrases(manifest: Manifest, setting: str) -> Manifest:
    """The manifest with the paraphrases that `setting` names; rows of theirs that cannot be used are rejects too."""
    store = find_store(manifest.root, setting)
    if store is None:
        return manifest
    return replace(
        manifest,
        samples=attach(manifest.samples, store),
        rejects=manifest.rejects + store.rejects,
        rows=manifest.rows + (0 if store.version else store.rows),
        paraphrases=(str(store.path),),
    )


def _read(path: Path, config: Config, cache: Path, progress: bool, only: str, bare: bool) -> Manifest:
    root, files, kind = find(path, config.source, bare)
    reading = Reading(root, files, config.source, cache, progress, bare)
    return _collect(reading, kind.read(reading), kind.name, only)


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


# -- from rows to samples -------------------------------------------------------------------------


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
def _collect(reading: Reading, rows: Iterable[Row], called: str, only: str) -> Manifest:
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
    for split, listed in tables.read_split_lists(reading.root).items():
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


def _with_splits(manifest: Manifest, val_fraction: float, only: str) -> Manifest:
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


def _with_fold(manifest: Manifest, k: int, n: int) -> Manifest:
    """The manifest with the k-th of n parts of its training images as what is validated on."""
    names = sorted(manifest.splits["train"], key=lambda name: derive("fold", name))
    if n > len(names):
        raise UserError(f"'{manifest.root}' has {len(names)} training images: they cannot be cut into {n} parts")
    held = frozenset(names[(k - 1) * len(names) // n : k * len(names) // n])
    resting = len(manifest.splits["val"] - manifest.splits["train"])
    note = f"fold {k} of {n}: {len(held)} training images are validated on, and {resting} of val rest"
    splits = manifest.splits | {"train": manifest.splits["train"] - held, "val": held}
    return replace(manifest, splits=splits, notes=(*manifest.notes, note))


# -- several data sets as one ---------------------------------------------------------------------


@dataclass(frozen=True)
class MixEntry:
    """A data set of a mix, as its YAML file lists it."""

    data: str
    """As --data; relative to the file's folder."""
    name: str = ""
    """What its samples are called by: NAME/IMAGE. Empty is taken from `data`."""
    weight: float = 1.0
    """Visits of each sample an epoch, on average: 2 shows it twice, 0.5 every other epoch."""
    source: dict[str, Any] = field(default_factory=dict)
    """Settings of `source` that differ from the run's."""


def _mix(file: Path, config: Config, cache: Path, progress: bool, only: str, bare: bool) -> Manifest:
    """Data sets that a YAML file lists, each with a weight, as one."""
    try:
        listed = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no mix of data sets at '{file}' ({error.strerror})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read '{file}': {printable(str(error))}") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(f"'{file}' must be a list of data sets: '- data: FOLDER', and maybe name, weight, source")
    settings = {f.name: getattr(config.source, f.name) for f in fields(SourceConfig)}
    samples: list[Sample] = []
    rejects: list[Reject] = []
    splits: dict[str, frozenset[str]] = {}
    parts: dict[str, float] = {}
    rows, lost, zeroshot = 0, 0, None
    notes: list[str] = []
    stores: tuple[str, ...] = ()
    order: list[str] = []
    for entry in listed:
        try:
            wanted = from_dict({"data": None, **entry} if isinstance(entry, dict) else entry, MixEntry)
            source = from_dict({**settings, **wanted.source}, SourceConfig)
            if "fold" in wanted.source:
                raise ValueError("fold is one of the whole mix: give --source.fold")
        except ValueError as error:
            what = str(error).replace("MixEntry", "a data set").replace("SourceConfig", "source")
            raise UserError(f"'{file}': {what}") from None
        if not 0 < wanted.weight <= 1000:
            raise UserError(f"'{file}': weight must lie between 0 and 1000, got {wanted.weight:g}")
        if wanted.data.endswith((".yaml", ".yml")):
            raise UserError(f"'{file}': a mix cannot hold another mix, '{wanted.data}'")
        name = wanted.name or label(wanted.data)
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise UserError(f"'{file}': a name is of letters, digits, '-', '_' and '.', not '{printable(name)}'")
        if name in parts:
            raise UserError(f"'{file}' has two data sets called '{name}': give one another name")
        named = wanted.data == "scenes" or wanted.data.startswith(("hf:", "pipe:")) or "://" in wanted.data
        data = wanted.data if named else str(file.parent / Path(wanted.data).expanduser())
        part = load(replace(config, data=data, source=source), cache, progress, only, bare)
        parts[name] = float(wanted.weight)
        rows, lost = rows + part.rows, lost + part.lost
        notes += [f"{name}: {note}" for note in part.notes]
        rejects += [replace(r, file=f"{name}/{r.file}") for r in part.rejects]
        samples += [replace(s, name=f"{name}/{s.name}", weight=parts[name]) for s in part.samples]
        for split, names in part.splits.items():
            splits[split] = splits.get(split, frozenset()) | {f"{name}/{n}" for n in names}
        zeroshot = zeroshot or part.zeroshot
        stores += part.paraphrases
        order += [f"{name}/{n}" for n in part.order]
    samples.sort(key=lambda s: s.name)
    return Manifest(file, tuple(samples), tuple(rejects), rows, splits, zeroshot, "mix", parts, lost,
                    notes=tuple(notes), paraphrases=stores, order=tuple(order))  # fmt: skip


# -- ready to train on ----------------------------------------------------------------------------


def cache_folder(config: Config) -> Path:
    """Where generated data, copies, verdicts and cached features are kept."""
    return Path(config.cache or os.environ.get("AMCLR_CACHE") or "~/.cache/amclr").expanduser()


def prepare(config: Config, cache: Path, progress: bool = True, scan_all: bool = False, only: str = "") -> Manifest:
    """Load the data set, decode every image once, and leave out what cannot be used, up to the limit.

    The images of a set beyond `source.scan_up_to` are decoded only with `scan_all`; what an
    earlier scan found is left out all the same, and training passes over the rest.
    only: as for `load`; the manifest then holds the samples of that split alone. It is for measuring, which
    decodes every image anyway, and leaves out and counts what cannot be: nothing is decoded here.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder '{cache}' ({error.strerror}): give another --cache, or set AMCLR_CACHE"
        ) from None
    manifest = load(config, cache, progress, only)
    if only in folded_splits(config.source):  # all rows were read, and the limit is a share of them
        manifest.enforce_limit(config.source.max_bad)
        return replace(manifest, samples=manifest.split(only))
    if only:
        manifest = replace(manifest, samples=manifest.split(only))
        if not (manifest.samples or manifest.rejects):
            raise UserError(f"split '{only}' of {config.data} is empty")
    manifest.enforce_limit(config.source.max_bad)
    if only:
        return manifest
    verdicts = cache / f"scan-{derive(str(manifest.root.resolve())):016x}.jsonl"
    look = scan_all or len(manifest.samples) <= config.source.scan_up_to
    compare = config.source.duplicates == "positives"
    places = [s.image for s in manifest.samples]
    manifest = manifest.judged(scan(places, config.model.image_size, verdicts, progress, look, compare))
    manifest.enforce_limit(config.source.max_bad)
    return manifest
