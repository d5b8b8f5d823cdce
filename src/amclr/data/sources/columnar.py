"""Readers of Parquet files and Hugging Face datasets, whose images may be bytes in a column.

Such bytes are copied once into a file of the cache, from which single images can be read; identical images are
stored once. An image is named by the first of these that its row has: a column of FILE_COLUMNS, the path stored
with its bytes, a column of NUMBER_COLUMNS, a hash of its content. If several images share a name, a hash of the
content is appended (`image.png#3f0a...`); an image with several numbers is named by its hash. So no image is lost,
and adding or removing a row renames only the images that share its name or its bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from filelock import FileLock
from tqdm import tqdm

from amclr.data.images.decode import MAX_BYTES, Location
from amclr.data.sources.rows import (
    IMAGE_COLUMNS,
    PARAPHRASE_COLUMNS,
    SPLIT_COLUMNS,
    SPLIT_NAMES,
    Reading,
    SourceRow,
    find_column,
    need_captions,
    need_column,
    printable,
    read_json,
    row_of,
)
from amclr.utils.errors import UserError, first_line, require
from amclr.utils.files import read_packed, write_packed, written
from amclr.utils.randomness import derive

FORMAT = 2
NAMELESS = "blake2b-"
ROWS_AT_ONCE = 16
"""Text rows read at once. Images are read one by one: a cell of several MB may repeat often in a small file."""
MAX_NAME = 1024
"""Texts of more characters are not taken as names."""
FILE_COLUMNS = ("file_name", "filename", "image_name")
"""Columns that name an image whose bytes are in the table; they precede the path stored with the bytes."""
NUMBER_COLUMNS = ("key", "__key__", "image_id", "img_id", "imgid", "id", "name")
"""Columns that may identify images; they follow that path, as `id` may number captions and `name` be a species."""
USED = {*PARAPHRASE_COLUMNS, *SPLIT_COLUMNS}


@dataclass
class Table:
    """A table to read.

    label: its name in messages. origin: where it lies. stamp: changes with its content. types: the Arrow type of
    each column. read: (columns, rows at once) -> record batches.
    """

    label: str
    origin: str
    stamp: str
    types: Mapping[str, Any]
    rows: int
    read: Callable[[Sequence[str], int], Iterator[Any]]
    split: str = ""


class ImageEntry(NamedTuple):
    """The image of a row: its name, and the place of its bytes in the copy, or its path, or what is wrong with it."""

    name: str = ""
    number: str = ""
    path: str = ""
    offset: int = 0
    size: int = -1
    digest: str = ""
    fault: str = ""


def read_parquet(reading: Reading) -> Iterator[SourceRow]:
    """Parquet files: an image's path or bytes (or Hugging Face's {bytes, path}) and one caption or a list of them."""
    require("reading Parquet files", "data", "pyarrow")
    import pyarrow.parquet as parquet

    yield from _rows(reading, [_parquet(reading, file, parquet) for file in reading.files])


def _parquet(reading: Reading, file: Path, parquet: Any) -> Table:
    try:
        handle = parquet.ParquetFile(file, memory_map=True)
        types = {f.name: f.type for f in handle.schema_arrow}
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are subclasses of these
        raise UserError(f"cannot read '{file}' as Parquet: {printable(str(error))}") from None
    stat, path, rows = file.stat(), str(file.resolve()), handle.metadata.num_rows
    handle.close()  # there may be more files than a process may open

    def batches(columns: Sequence[str], at_once: int) -> Iterator[Any]:
        with parquet.ParquetFile(file, memory_map=True) as handle:
            yield from handle.iter_batches(at_once, columns=list(columns))

    stamp = f"{stat.st_size}|{stat.st_mtime_ns}"
    return Table(reading.name(file), path, stamp, types, rows, batches, reading.split_of(file))


def read_saved_dataset(reading: Reading) -> Iterator[SourceRow]:
    """A dataset saved by Hugging Face's `save_to_disk`, with or without splits. Only files in its folder are read."""
    datasets = _datasets()
    _check_inside(reading.root)
    try:
        dataset = datasets.load_from_disk(str(reading.root))
    except Exception as error:  # a damaged folder raises many types
        raise UserError(f"cannot read '{reading.root}' as a saved dataset: {printable(str(error))}") from None
    yield from _dataset_rows(reading, dataset, str(reading.root.resolve()))


def _check_inside(root: Path) -> None:
    """Raise UserError if the lists of a saved dataset name a file outside its folder."""
    parts = [root]
    if (listing := root / "dataset_dict.json").is_file():
        parts += [root / _inside(root, root, split, listing) for split in _listed(listing, "splits")]
    for part in parts:
        for name in ("state.json", "dataset_info.json"):
            _inside(root, part, name, part)
        if (listing := part / "state.json").is_file():
            for entry in _listed(listing, "_data_files"):
                _inside(root, part, entry.get("filename") if isinstance(entry, Mapping) else None, listing)


def _listed(file: Path, key: str) -> list[Any]:
    try:
        content = read_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{file}': {error}; save the dataset again") from None
    if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
        raise UserError(f"'{file}' has no list '{key}'; save the dataset again")
    return list(content[key])


def _inside(root: Path, folder: Path, name: object, listing: Path) -> str:
    # With a colon, it could be a URL or a chain of URLs, which datasets would open.
    if isinstance(name, str) and name and ":" not in name and "\0" not in name and ".." not in Path(name).parts:
        path = folder / name
        if not Path(name).is_absolute() and path.resolve().is_relative_to(root.resolve()):
            return name
    raise UserError(
        f"'{listing}' names '{printable(str(name))}', which lies outside the folder: save the dataset again, "
        "with its files inside the folder"
    )


def read_hub_dataset(reading: Reading, name: str) -> Iterator[SourceRow]:
    """A dataset of the Hugging Face Hub, `NAME` or `NAME:CONFIGURATION`."""
    datasets = _datasets()
    repository, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # no connection, no such name, a script that would have to run ...
        raise UserError(
            f"cannot load the dataset '{name}': {printable(first_line(error))}. If offline, "
            "give a folder written by dataset.save_to_disk(FOLDER)"
        ) from None
    yield from _dataset_rows(reading, dataset, f"hf:{name}")


def _datasets() -> Any:
    require("reading Hugging Face datasets", "data", "datasets")
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _dataset_rows(reading: Reading, dataset: Any, origin: str) -> Iterator[SourceRow]:
    parts = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
    yield from _rows(reading, [_part(reading, split, part, f"{origin}/{split}") for split, part in parts.items()])


def _part(reading: Reading, split: str, part: Any, origin: str) -> Table:
    def batches(columns: Sequence[str], at_once: int) -> Iterator[Any]:
        for table in part.select_columns(list(columns)).with_format("arrow").iter(256):  # maps the file without copying
            yield from table.to_batches()

    label = f"{reading.root.name}{f'/{split}' if split else ''}"
    types = {f.name: f.type for f in part.features.arrow_schema}
    stamp = f"{part._fingerprint}|{len(part)}"
    return Table(label, origin, stamp, types, len(part), batches, SPLIT_NAMES.get(split.lower(), split))


def _rows(reading: Reading, tables: Sequence[Table]) -> Iterator[SourceRow]:
    source = reading.source
    tables = [t for t in tables if t.rows]  # an empty one may have no columns
    images = [need_column(t.label, list(t.types), source.image_column, IMAGE_COLUMNS, "image") for t in tables]
    have_bytes = [_may_hold_bytes(table.types[image]) for table, image in zip(tables, images, strict=True)]
    names = _Names()
    for table, image, copied in zip(tables, images, have_bytes, strict=True):
        for entry, place in _copied(reading, table, image) if copied else ():
            if place:
                names.add(entry, place)
    for table, image, copied in zip(tables, images, have_bytes, strict=True):
        columns = [c for c in table.types if c != image]
        captions = need_captions(table.label, list(table.types), source.caption_column)
        wanted = [c for c in columns if c in captions or c.strip().lower() in USED]
        places = _copied(reading, table, image) if copied else None
        for number, row in enumerate(_read(table, wanted if places else [*wanted, image]), 1):
            entry = next(places)[0] if places else ImageEntry(path=row[image] if isinstance(row[image], str) else "")
            image_place = names.places[entry.digest] if entry.digest else entry.path
            if entry.fault or not image_place:
                reading.reject(table.label, entry.fault or "row has no image", number, entry.name or entry.number)
                continue
            source_row = row_of({c: v for c, v in row.items() if c != image}, source, image_place)
            if entry.digest:
                source_row.name = names.of(entry)
            source_row.file, source_row.line, source_row.split = table.label, number, source_row.split or table.split
            yield source_row


def _may_hold_bytes(column: Any) -> bool:
    """Whether a column of an Arrow type may hold bytes, alone or as Hugging Face's {bytes, path}."""
    from pyarrow import types

    column = column.value_type if types.is_dictionary(column) else column
    checks = (types.is_struct, types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(check(column) for check in checks)


class _Names:
    """The names of images over all tables of a data set, by the rule in this module's docstring."""

    def __init__(self) -> None:
        self.places: dict[str, Location] = {}
        """The place of each content. Each table has its own copy; the first one is used."""
        self._contents: dict[str, str] = {}
        self._numbers: dict[str, str] = {}
        self._shared: set[str] = set()
        self._renumbered: set[str] = set()

    def add(self, entry: ImageEntry, place: Location) -> None:
        """Record an image. All must be recorded before any is named."""
        self.places.setdefault(entry.digest, place)
        name = entry.name or entry.number
        if name and self._contents.setdefault(name, entry.digest) != entry.digest:
            self._shared.add(name)
        if not entry.name and self._numbers.setdefault(entry.digest, entry.number) != entry.number:
            self._renumbered.add(entry.digest)

    def of(self, entry: ImageEntry) -> str:
        """The name of an image."""
        name = entry.name or ("" if entry.digest in self._renumbered else entry.number)
        if not name:
            return NAMELESS + entry.digest
        return f"{name}#{entry.digest[:16]}" if name in self._shared else name


def _read(table: Table, columns: Sequence[str], at_once: int = ROWS_AT_ONCE) -> Iterator[dict[str, Any]]:
    """Rows of some columns. Cells are converted row by row, so that dictionary-encoded texts are not multiplied."""
    try:
        for batch in table.read(columns, at_once):
            cells = dict(zip(batch.schema.names, batch.columns, strict=True))
            for k in range(batch.num_rows):
                yield {name: column[k].as_py() for name, column in cells.items()}
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are subclasses of these
        raise UserError(
            f"'{table.label}' is damaged: {printable(str(error))}; repair it, or remove it from the folder"
        ) from None


def _copied(reading: Reading, table: Table, image: str) -> Iterator[tuple[ImageEntry, Location | None]]:
    """The image of each row, and its place if the row has bytes.

    The copy and its index are written to temporary names first, so a kill leaves a complete one or none. A damaged
    copy is made again, and copies of earlier versions of the table are deleted.
    """
    folder, key = reading.cache / "images", f"{derive(FORMAT, table.origin, image):016x}"
    stem = folder / f"{key}-{derive(table.stamp):016x}"
    index, content = stem.with_suffix(".json.gz"), stem.with_suffix(".bin").absolute()
    entries = _entries(index, content)
    if entries is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(stem.with_suffix(".lock")):
                entries = _entries(index, content)
                if entries is None:
                    entries = _copy(reading, table, image, index, content)
            for old in folder.glob(f"{key}-*"):
                if not old.name.startswith(stem.name):
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot copy the images of '{table.label}' into the cache '{reading.cache}' "
                f"({error.strerror or error}): free some space there, or give another --cache"
            ) from None
    for entry in entries:
        yield entry, Location(str(content), entry.offset, entry.size) if entry.digest else None


def _entries(index: Path, content: Path) -> list[ImageEntry] | None:
    """The entries of an index, or None if it or its copy is missing or incomplete."""
    try:
        entries = [ImageEntry(*e) for e in read_packed(index)]
        end = max((e.offset + e.size for e in entries if e.digest), default=0)
        return entries if content.stat().st_size == end else None
    except (OSError, ValueError, TypeError):
        return None


def _copy(reading: Reading, table: Table, image: str, index: Path, content: Path) -> list[ImageEntry]:
    others = [c for c in table.types if c != image]
    file_column, number_column = find_column(others, "", FILE_COLUMNS), find_column(others, "", NUMBER_COLUMNS)
    wanted = list(dict.fromkeys(c for c in (image, file_column, number_column) if c))
    entries: list[ImageEntry] = []
    known: dict[str, tuple[int, int]] = {}
    end = 0
    bar = tqdm(total=table.rows, desc="Copying images into the cache", unit="row", leave=False,
               disable=not reading.progress)  # fmt: skip
    with bar, written(content) as handle:
        for row in _read(table, wanted, at_once=1):
            bar.update()
            cell = row[image]
            raw, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, "")
            name = _name(row[file_column] if file_column else "") or _name(path)
            number = _name(row[number_column] if number_column else "")
            if not isinstance(raw, bytes):
                path = raw if isinstance(raw, str) else path if isinstance(path, str) else ""
                entries.append(ImageEntry(name, number, path))
            elif not raw or len(raw) > MAX_BYTES:
                size = "is empty (0 bytes)" if not raw else f"too large: {len(raw)} bytes"
                entries.append(ImageEntry(name, number, fault=f"image {size}"))
            else:
                digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
                if digest not in known:
                    handle.write(raw)
                    known[digest] = (end, len(raw))
                    end += len(raw)
                entries.append(ImageEntry(name, number, "", *known[digest], digest))
    write_packed(index, entries)
    return entries


def _name(value: object) -> str:
    """An image's name from a cell: a path inside the data set as it is; of any other path, the last part."""
    if value is None or isinstance(value, (Mapping, list, bytes)):
        return ""
    text = str(value)
    if not text.strip() or len(text) > MAX_NAME:
        return ""
    path = PurePosixPath(text)
    return path.name if path.is_absolute() or ".." in path.parts or "://" in text else str(path)
