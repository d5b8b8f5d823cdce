"""A data set as a list of samples: what there is, where it lies, and what could not be used.

A new source format is one function that returns a `Manifest`, entered in `load`.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from amclr.config import Config, SourceConfig
from amclr.data import scenes
from amclr.data.paraphrases import attach, find_store
from amclr.data.pictures import scan
from amclr.errors import UserError
from amclr.randomness import derive

CAPTION_FILES = ("captions.txt", "captions.csv", "captions.tsv")
IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename", "filepath", "image_path", "path", "file")
CAPTION_COLUMNS = ("caption", "comment", "text", "title", "description")
PARAPHRASE_COLUMN = "paraphrase"
PICTURE_FOLDERS = ("Images", "images", "Flicker8k_Dataset", ".")
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_CAPTION_CHARACTERS = 20_000


@dataclass(frozen=True)
class Sample:
    """One picture and its captions. `paraphrases[k]` reword `captions[k]`."""

    name: str
    path: Path
    captions: tuple[str, ...]
    paraphrases: tuple[tuple[str, ...], ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """Captions and paraphrases."""
        return (*self.captions, *(p for k in self.paraphrases for p in k))


@dataclass(frozen=True)
class Reject:
    """A row or picture that cannot be used, and why. `line` is 0 where the reason is the picture itself."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{f':{self.line}' if self.line else ''}: {self.reason}"


@dataclass(frozen=True)
class Manifest:
    """The usable samples of a data set, its rejects, and its splits by name."""

    root: Path
    samples: tuple[Sample, ...]
    rejects: tuple[Reject, ...] = ()
    rows: int = 0
    """Rows read from the captions file, usable or not."""
    splits: dict[str, frozenset[str]] = field(default_factory=dict)
    """Picture names by split, from the data set's own lists."""
    zeroshot: Path | None = None
    """A folder of pictures by class that belongs to the data set."""

    def split(self, name: str) -> tuple[Sample, ...]:
        """The samples of a split (`train`, `val`, `test`, or `all`), in the manifest's order."""
        if name == "all":
            return self.samples
        if name not in self.splits:
            raise UserError(f"{self.root} has no split '{name}': choose from all, {', '.join(sorted(self.splits))}")
        return tuple(s for s in self.samples if s.name in self.splits[name])

    def without(self, bad: dict[str, str]) -> Manifest:
        """Drop the samples named in `bad` (name -> reason), and record them as rejects."""
        rejects = tuple(Reject(str(s.path), 0, bad[s.name]) for s in self.samples if s.name in bad)
        kept = tuple(s for s in self.samples if s.name not in bad)
        return replace(self, samples=kept, rejects=self.rejects + rejects)

    def enforce_limit(self, max_bad: float) -> None:
        """Raise UserError if more than a share of `max_bad` of the rows and pictures was rejected."""
        total = max(self.rows, len(self.samples) + len(self.rejects))
        if not self.samples:
            raise UserError(f"{self.root} has no usable sample; {self._summary()}")
        if len(self.rejects) > max_bad * total:
            raise UserError(
                f"{len(self.rejects)} of {total} rows cannot be used, over the limit of {max_bad:.1%}; "
                f"{self._summary()}. Mend them, or raise --source.max_bad"
            )

    def _summary(self) -> str:
        if not self.rejects:
            return "no row was read"
        reasons = Counter(r.reason.split(":")[0] for r in self.rejects)
        commonest = ", ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
        return f"{commonest}; the first: {self.rejects[0]}"


def load(config: Config, cache: Path, progress: bool = True) -> Manifest:
    """Read the data set that `config.data` names: `scenes`, or a folder with a captions file."""
    return _with_paraphrases(_load(config, cache, progress), config.source)


def _load(config: Config, cache: Path, progress: bool) -> Manifest:
    if config.data == "scenes":
        where = cache / f"scenes-{derive(scenes.FORMAT, repr(config.scenes)):016x}"
        scenes.write_scenes(where, config.scenes, progress=progress)
        return replace(read_folder(where, config.source), zeroshot=where / "zeroshot")
    root = Path(config.data).expanduser()
    if not root.exists():
        raise UserError(f"no data set at '{root}': give a folder with pictures and a captions file, or --data scenes")
    if not root.is_dir():
        raise UserError(f"'{root}' is a file: give the folder that holds the pictures and the captions file")
    manifest = read_folder(root, config.source)
    if "val" not in manifest.splits:
        manifest = replace(manifest, splits=_hold_out(manifest.samples, config.source.val_fraction))
    elif "train" not in manifest.splits:
        others = frozenset().union(*manifest.splits.values())
        rest = frozenset(s.name for s in manifest.samples) - others
        manifest = replace(manifest, splits={**manifest.splits, "train": rest})
    return manifest


def _with_paraphrases(manifest: Manifest, source: SourceConfig) -> Manifest:
    """The manifest with the paraphrases that the settings name; rows of them that cannot be used are rejects too."""
    store = find_store(manifest.root, source.paraphrases)
    if store is None:
        return manifest
    faults = tuple(Reject(store.path.name, line, reason) for line, reason in store.faults)
    return replace(
        manifest,
        samples=attach(manifest.samples, store),
        rejects=manifest.rejects + faults,
        rows=manifest.rows + (0 if store.version else store.rows),
    )


def cache_folder(config: Config) -> Path:
    """Where generated data and cached features are kept."""
    return Path(config.cache or os.environ.get("AMCLR_CACHE") or "~/.cache/amclr").expanduser()


def prepare(config: Config, cache: Path, progress: bool = True) -> Manifest:
    """Load the data set, decode every picture once, and leave out what cannot be used, up to the limit."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder '{cache}' ({error.strerror}): give another --cache, or set AMCLR_CACHE"
        ) from None
    manifest = load(config, cache, progress)
    manifest.enforce_limit(config.source.max_bad)
    verdicts = cache / f"scan-{derive(str(manifest.root.resolve())):016x}.json"
    bad = scan([s.path for s in manifest.samples], config.model.image_size, verdicts, progress)
    manifest = manifest.without({s.name: bad[s.path] for s in manifest.samples if s.path in bad})
    manifest.enforce_limit(config.source.max_bad)
    return manifest


def read_folder(root: Path, source: SourceConfig) -> Manifest:
    """A folder of pictures with a captions file: a row per caption, columns image and caption (Kaggle's Flickr8k).

    An optional column `paraphrase` holds a rewording of the caption. Optional lists train.txt,
    val.txt and test.txt name the pictures of each split, one a line.
    """
    file = _captions_file(root, source)
    folder = next((root / f for f in PICTURE_FOLDERS if (root / f).is_dir()), root)
    captions: dict[str, list[str]] = {}
    paraphrases: dict[str, list[list[str]]] = {}
    rejects: list[Reject] = []
    bad_paths: dict[str, str] = {}
    rows = 0
    for line, row in _rows(file, source, rejects):
        rows += 1
        name, caption, paraphrase = row
        reason = _caption_fault(caption)
        if name not in captions and name not in bad_paths and (fault := _path_fault(folder, name)):
            bad_paths[name] = fault
        reason = bad_paths.get(name) or reason
        if reason:
            rejects.append(Reject(file.name, line, reason))
            continue
        texts = captions.setdefault(name, [])
        rewordings = paraphrases.setdefault(name, [])
        if caption not in texts:
            texts.append(caption)
            rewordings.append([])
        if paraphrase:
            rewordings[texts.index(caption)].append(paraphrase)
    rows += sum(1 for r in rejects if r.reason.startswith("row "))
    samples = tuple(
        Sample(name, folder / name, tuple(texts), tuple(map(tuple, paraphrases[name])))
        for name, texts in sorted(captions.items())
    )
    splits = {
        p.stem: frozenset(read_lines(p)) for p in (root / f"{s}.txt" for s in ("train", "val", "test")) if p.is_file()
    }
    for name in ("train", "val"):
        listed = splits.get(name)
        if captions and listed and listed.isdisjoint(captions):
            raise UserError(
                f"none of the {len(listed)} names in '{root / name}.txt' has a usable caption, such as "
                f"'{min(listed)}': it must list the pictures as '{file.name}' names them"
            )
    return Manifest(root, samples, tuple(rejects), rows, splits)


def class_folders(root: Path, classnames: Path | None = None) -> tuple[list[Path], list[int], list[str]]:
    """A folder of pictures by class, for zero-shot classification: picture paths, labels, class names.

    Class names come from `classnames` (folder name, tab, name; further names after a comma are
    left out), or from classnames.txt in the folder or beside it, else from the folders' names.
    Raises UserError where there is no such folder or no picture in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder '{root}': zero-shot classification needs a folder with one folder per class")
    folders = sorted(p for p in root.iterdir() if p.is_dir())
    named: dict[str, str] = {}
    for file in (classnames,) if classnames else (root / "classnames.txt", root.parent / "classnames.txt"):
        if file.is_file():
            for text in read_lines(file):
                key, _, name = text.partition("\t")
                named[key] = name.split(",")[0].strip()
            break
        if classnames:
            raise UserError(f"no class names file '{classnames}'")
    paths: list[Path] = []
    labels: list[int] = []
    names: list[str] = []
    for folder in folders:
        pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES)
        if not pictures:
            continue
        labels += [len(names)] * len(pictures)
        paths += pictures
        names.append(named.get(folder.name) or folder.name.replace("_", " "))
    if not names:
        raise UserError(f"'{root}' holds no folder with pictures: expected {root}/CLASS/PICTURE.jpg")
    return paths, labels, names


def write_rejects(rejects: Iterable[Reject], file: Path) -> None:
    """Write rejects as JSON lines: file, line, reason."""
    file.write_text("".join(json.dumps(vars(r), ensure_ascii=False) + "\n" for r in rejects), encoding="utf-8")


def _captions_file(root: Path, source: SourceConfig) -> Path:
    if source.captions_file:
        file = root / source.captions_file
        if not file.is_file():
            raise UserError(f"no captions file '{file}'")
        return file
    for name in CAPTION_FILES:
        if (root / name).is_file():
            return root / name
    raise UserError(
        f"'{root}' has no captions file: expected {', '.join(CAPTION_FILES)} with the columns image,caption, "
        "or name one with --source.captions_file"
    )


def _rows(file: Path, source: SourceConfig, rejects: list[Reject]) -> Iterator[tuple[int, tuple[str, str, str]]]:
    """Yield (line, (image, caption, paraphrase)); rows that are not such rows go to `rejects`."""
    encoding = _encoding(file, source.encoding)
    delimiter = "\t" if file.suffix == ".tsv" else ","
    csv.field_size_limit(1 << 24)
    with file.open(encoding=encoding, errors="surrogateescape", newline="") as handle:
        reader = csv.reader(_decoded(file, handle, encoding), delimiter=delimiter)
        header = next(reader, None)
        if header is None:
            raise UserError(f"'{file}' is empty: expected a header line image,caption and a row per caption")
        image = _column(file, header, source.image_column, IMAGE_COLUMNS, "image")
        caption = _column(file, header, source.caption_column, CAPTION_COLUMNS, "caption")
        lowered = [h.strip().lower() for h in header]
        paraphrase = lowered.index(PARAPHRASE_COLUMN) if PARAPHRASE_COLUMN in lowered else None
        line = reader.line_num
        while True:
            line += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                rejects.append(Reject(file.name, line, f"row is not CSV: {error}"))
                line = reader.line_num
                continue
            first, line = line, reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                rejects.append(Reject(file.name, first, f"row has {len(row)} columns: expected {len(header)}"))
            elif any("\udc80" <= c <= "\udcff" for text in row for c in text):
                hint = ": try --source.encoding latin-1 or cp1252" if source.encoding == "utf-8" else ""
                rejects.append(Reject(file.name, first, f"row is not valid {source.encoding}{hint}"))
            else:
                extra = row[paraphrase].strip() if paraphrase is not None else ""
                yield first, (row[image].strip(), " ".join(row[caption].split()), extra)


def _decoded(file: Path, handle: Iterable[str], encoding: str) -> Iterator[str]:
    """The lines of a captions file. CSV readers refuse NUL, so it becomes the mark of an unreadable character."""
    try:
        for line in handle:
            yield line.replace("\0", "\ufffd")
    except UnicodeError as error:  # bytes that the encoding cannot even mark as wrong, such as half of a UTF-16 unit
        what = getattr(error, "reason", error)
        raise UserError(f"'{file}' is not {encoding} text ({what}): give the right --source.encoding") from None


def _encoding(file: Path, encoding: str) -> str:
    try:
        "".encode(encoding)
        b"".decode(encoding, "surrogateescape")
    except (LookupError, UnicodeError):
        raise UserError(f"unknown encoding '{encoding}': try utf-8, latin-1, cp1252 or utf-16") from None
    with file.open("rb") as handle:
        mark = handle.read(3)
    if mark[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    return "utf-8-sig" if encoding == "utf-8" else encoding


def _column(file: Path, header: Sequence[str], wanted: str, known: Sequence[str], option: str) -> int:
    lowered = [h.strip().lower() for h in header]
    for name in (wanted.lower(),) if wanted else known:
        if name in lowered:
            return lowered.index(name)
    if any("\ufffd" in h for h in header):
        raise UserError(f"'{file}' is not text in the given encoding: try --source.encoding utf-16-le")
    raise UserError(
        f"'{file}' has no column '{wanted or option}': it has {', '.join(map(repr, header[:8]))}. "
        f"Name the right one with --source.{option}_column"
    )


def _caption_fault(caption: str) -> str | None:
    if not caption:
        return "empty caption"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"caption of {len(caption)} characters: over the limit of {MAX_CAPTION_CHARACTERS}"
    return None


def _path_fault(folder: Path, name: str) -> str | None:
    if not name:
        return "empty picture name"
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return f"picture path leaves the folder: {name}"
    path = folder / name
    try:
        if not path.is_file():
            return f"no such picture: {name}"
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"picture path leaves the folder: {name} is a link out of it"
    except OSError as error:
        return f"picture cannot be reached: {name[:80]} ({error.strerror})"
    return None


def read_lines(file: Path) -> list[str]:
    """The lines of a list that are not blank, without the space around them. Raises UserError if it is not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _hold_out(samples: Sequence[Sample], fraction: float) -> dict[str, frozenset[str]]:
    """Hold out a share by a hash of the name, so that adding pictures moves no other between the splits."""
    held = frozenset(s.name for s in samples if derive("val", s.name) < fraction * 2**63)
    if not held and len(samples) > 1:
        held = frozenset([min(samples, key=lambda s: derive("val", s.name)).name])
    return {"train": frozenset(s.name for s in samples) - held, "val": held}
