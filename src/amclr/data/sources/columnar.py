"""Readers of Parquet files and Hugging Face datasets, whose images may be bytes in a column.

Such bytes are copied once into a file of the cache, where any of them can be read at its place;
images that are the same bytes are kept once. An image is called by the first of these that its
row has: a column of FILE_COLUMNS, the path beside its bytes, a column of NUMBER_COLUMNS, its
content. A name that stands for several images is followed by each one's content
(`image.png#3f0a...`), and an image with several numbers is called by its content. So no image is
lost, and a row that comes or goes renames only the images that share its name or its bytes.
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
    Row,
    find_column,
    need_captions,
    need_column,
    printable,
    read_json,
    row_of,
)
from amclr.utils.errors import UserError, first_line
from amclr.utils.files import read_packed, write_packed, written
from amclr.utils.randomness import derive

FORMAT = 2
NAMELESS = "blake2b-"
ROWS_AT_ONCE = 16
"""Rows of text read together. Images are read one by one: a cell of some MB may stand in a small file often."""
MAX_NAME = 1024
"""Longer texts are no names: characters."""
FILE_COLUMNS = ("file_name", "filename", "image_name")
"""Columns that name an image whose bytes are in the table, before the path that goes with the bytes."""
NUMBER_COLUMNS = ("key", "__key__", "image_id", "img_id", "imgid", "id", "name")
"""Columns that may tell images apart, after that path; `id` may number captions, `name` be a species."""
USED = {*PARAPHRASE_COLUMNS, *SPLIT_COLUMNS}


@dataclass
class Table:
    """A table to read.

    called: its name in messages. origin: where it lies. stamp: what changes with its content. kinds:
    the Arrow type of each column. read: some of its columns, so many rows at a time, as record batches.
    """

    called: str
    origin: str
    stamp: str
    kinds: Mapping[str, Any]
    rows: int
    read: Callable[[Sequence[str], int], Iterator[Any]]
    split: str = ""


class Entry(NamedTuple):
    """The image of a row: what it is called, and where its bytes are in the copy, or its path, or what is wrong."""

    name: str = ""
    number: str = ""
    path: str = ""
    offset: int = 0
    size: int = -1
    digest: str = ""
    fault: str = ""


def read_parquet(reading: Reading) -> Iterator[Row]:
    """Parquet files: an image's path or bytes (or Hugging Face's {bytes, path}) and one caption or a list of them."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'amclr[data]'") from None

    yield from _rows(reading, [_parquet(reading, file, parquet) for file in reading.files])


def _parquet(reading: Reading, file: Path, parquet: Any) -> Table:
    try:
        handle = parquet.ParquetFile(file, memory_map=True)
        kinds = {f.name: f.type for f in handle.schema_arrow}
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are kinds of these
        raise UserError(f"cannot read '{file}' as Parquet: {printable(str(error))}") from None
    stat, path, rows = file.stat(), str(file.resolve()), handle.metadata.num_rows
    handle.close()  # there may be more files than can be open at once

    def batches(columns: Sequence[str], together: int) -> Iterator[Any]:
        with parquet.ParquetFile(file, memory_map=True) as handle:
            yield from handle.iter_batches(together, columns=list(columns))

    stamp = f"{stat.st_size}|{stat.st_mtime_ns}"
    return Table(reading.name(file), path, stamp, kinds, rows, batches, reading.split_of(file))


def read_saved_dataset(reading: Reading) -> Iterator[Row]:
    """A dataset saved by Hugging Face's `save_to_disk`, with or without splits. Only files in its folder are read."""
    datasets = _datasets()
    _check_inside(reading.root)
    try:
        found = datasets.load_from_disk(str(reading.root))
    except Exception as error:  # a damaged folder raises many kinds
        raise UserError(f"cannot read '{reading.root}' as a saved dataset: {printable(str(error))}") from None
    yield from _dataset_rows(reading, found, str(reading.root.resolve()))


def _check_inside(root: Path) -> None:
    """Raise UserError where a saved dataset's own lists name a file outside its folder."""
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
        found = read_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read '{file}': {error}; save the dataset again") from None
    if not isinstance(found, Mapping) or not isinstance(found.get(key), list):
        raise UserError(f"'{file}' has no list '{key}'; save the dataset again")
    return list(found[key])


def _inside(root: Path, folder: Path, name: object, listing: Path) -> str:
    # A colon could make a URL of it, or a chain of them: datasets opens all of these.
    if isinstance(name, str) and name and ":" not in name and "\0" not in name and ".." not in Path(name).parts:
        path = folder / name
        if not Path(name).is_absolute() and path.resolve().is_relative_to(root.resolve()):
            return name
    raise UserError(
        f"'{listing}' names '{printable(str(name))}', which lies outside the folder: save the dataset again, "
        "so that its files are in it"
    )


def read_hub_dataset(reading: Reading, name: str) -> Iterator[Row]:
    """A dataset of the Hugging Face Hub, `NAME` or `NAME:CONFIGURATION`."""
    datasets = _datasets()
    repository, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # no connection, no such name, a script that would have to run ...
        raise UserError(
            f"cannot load the dataset '{name}': {printable(first_line(error))}. Without a connection "
            "give the folder that dataset.save_to_disk(FOLDER) made"
        ) from None
    yield from _dataset_rows(reading, found, f"hf:{name}")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("Hugging Face datasets need their package: pip install 'amclr[data]'") from None
    datasets.disable_progress_bars()
    return datasets


def _dataset_rows(reading: Reading, found: Any, origin: str) -> Iterator[Row]:
    parts = dict(found) if isinstance(found, Mapping) else {"": found}
    yield from _rows(reading, [_part(reading, split, part, f"{origin}/{split}") for split, part in parts.items()])


def _part(reading: Reading, split: str, part: Any, origin: str) -> Table:
    def batches(columns: Sequence[str], together: int) -> Iterator[Any]:
        for table in part.select_columns(list(columns)).with_format("arrow").iter(256):  # maps the file, copies nothing
            yield from table.to_batches()

    called = f"{reading.root.name}{f'/{split}' if split else ''}"
    kinds = {f.name: f.type for f in part.features.arrow_schema}
    stamp = f"{part._fingerprint}|{len(part)}"
    return Table(called, origin, stamp, kinds, len(part), batches, SPLIT_NAMES.get(split.lower(), split))


def _rows(reading: Reading, tables: Sequence[Table]) -> Iterator[Row]:
    source = reading.source
    tables = [t for t in tables if t.rows]  # an empty one may have no columns either
    images = [need_column(t.called, list(t.kinds), source.image_column, IMAGE_COLUMNS, "image") for t in tables]
    held = [_holds_bytes(table.kinds[image]) for table, image in zip(tables, images, strict=True)]
    names = _Names()
    for table, image, copied in zip(tables, images, held, strict=True):
        for entry, where in _copied(reading, table, image) if copied else ():
            if where:
                names.add(entry, where)
    for table, image, copied in zip(tables, images, held, strict=True):
        others = [c for c in table.kinds if c != image]
        texts = need_captions(table.called, list(table.kinds), source.caption_column)
        wanted = [c for c in others if c in texts or c.strip().lower() in USED]
        places = _copied(reading, table, image) if copied else None
        for number, row in enumerate(_read(table, wanted if places else [*wanted, image]), 1):
            entry = next(places)[0] if places else Entry(path=row[image] if isinstance(row[image], str) else "")
            place = names.places[entry.digest] if entry.digest else entry.path
            if entry.fault or not place:
                reading.reject(table.called, entry.fault or "row has no image", number, entry.name or entry.number)
                continue
            made = row_of({c: v for c, v in row.items() if c != image}, source, place)
            if entry.digest:
                made.name = names.of(entry)
            made.file, made.line, made.split = table.called, number, made.split or table.split
            yield made


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of an Arrow type may hold bytes, alone or as Hugging Face's {bytes, path}."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    kinds = (types.is_struct, types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(is_kind(kind) for is_kind in kinds)


class _Names:
    """What images are called, over all tables of a data set; the rule stands at the top of this file."""

    def __init__(self) -> None:
        self.places: dict[str, Location] = {}
        """Where a content lies. Tables have copies of their own; the first's stands for all."""
        self._contents: dict[str, str] = {}
        self._numbers: dict[str, str] = {}
        self._shared: set[str] = set()
        self._renumbered: set[str] = set()

    def add(self, entry: Entry, place: Location) -> None:
        """Take note of an image. All must be noted before any is named."""
        self.places.setdefault(entry.digest, place)
        name = entry.name or entry.number
        if name and self._contents.setdefault(name, entry.digest) != entry.digest:
            self._shared.add(name)
        if not entry.name and self._numbers.setdefault(entry.digest, entry.number) != entry.number:
            self._renumbered.add(entry.digest)

    def of(self, entry: Entry) -> str:
        """An image's name."""
        name = entry.name or ("" if entry.digest in self._renumbered else entry.number)
        if not name:
            return NAMELESS + entry.digest
        return f"{name}#{entry.digest[:16]}" if name in self._shared else name


def _read(table: Table, columns: Sequence[str], together: int = ROWS_AT_ONCE) -> Iterator[dict[str, Any]]:
    """Rows of some columns, each cell made only when its row is: a dictionary's texts are not multiplied."""
    try:
        for batch in table.read(columns, together):
            cells = dict(zip(batch.schema.names, batch.columns, strict=True))
            for k in range(batch.num_rows):
                yield {name: column[k].as_py() for name, column in cells.items()}
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are kinds of these
        raise UserError(
            f"'{table.called}' is damaged: {printable(str(error))}; mend it, or take it out of the folder"
        ) from None


def _copied(reading: Reading, table: Table, image: str) -> Iterator[tuple[Entry, Location | None]]:
    """The image of each row, and its place where it has bytes.

    The copy and its index are made under other names, so that a kill leaves none or a whole one. What is
    damaged all the same is made anew, and copies of what the table was before are deleted.
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
                f"cannot copy the images of '{table.called}' into the cache '{reading.cache}' "
                f"({error.strerror or error}): free some space there, or give another --cache"
            ) from None
    for entry in entries:
        yield entry, Location(str(content), entry.offset, entry.size) if entry.digest else None


def _entries(index: Path, content: Path) -> list[Entry] | None:
    """The entries of an index, or None where it, or the copy that it is of, is absent or not whole."""
    try:
        entries = [Entry(*e) for e in read_packed(index)]
        end = max((e.offset + e.size for e in entries if e.digest), default=0)
        return entries if content.stat().st_size == end else None
    except (OSError, ValueError, TypeError):
        return None


def _copy(reading: Reading, table: Table, image: str, index: Path, content: Path) -> list[Entry]:
    others = [c for c in table.kinds if c != image]
    file_column, number_column = find_column(others, "", FILE_COLUMNS), find_column(others, "", NUMBER_COLUMNS)
    wanted = list(dict.fromkeys(c for c in (image, file_column, number_column) if c))
    entries: list[Entry] = []
    known: dict[str, tuple[int, int]] = {}
    end = 0
    bar = tqdm(total=table.rows, desc="Copying images into the cache", unit="row", leave=False,
               disable=not reading.progress)  # fmt: skip
    with bar, written(content) as handle:
        for row in _read(table, wanted, together=1):
            bar.update()
            cell = row[image]
            raw, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, "")
            name = _name(row[file_column] if file_column else "") or _name(path)
            number = _name(row[number_column] if number_column else "")
            if not isinstance(raw, bytes):
                path = raw if isinstance(raw, str) else path if isinstance(path, str) else ""
                entries.append(Entry(name, number, path))
            elif not raw or len(raw) > MAX_BYTES:
                size = "is empty (0 bytes)" if not raw else f"too large: {len(raw)} bytes"
                entries.append(Entry(name, number, fault=f"image {size}"))
            else:
                digest = hashlib.blake2b(raw, digest_size=16).hexdigest()
                if digest not in known:
                    handle.write(raw)
                    known[digest] = (end, len(raw))
                    end += len(raw)
                entries.append(Entry(name, number, "", *known[digest], digest))
    write_packed(index, entries)
    return entries


def _name(value: object) -> str:
    """An image's name from a cell: its path from the data set's folder on; its last part where it leads elsewhere."""
    if value is None or isinstance(value, (Mapping, list, bytes)):
        return ""
    text = str(value)
    if not text.strip() or len(text) > MAX_NAME:
        return ""
    path = PurePosixPath(text)
    return path.name if path.is_absolute() or ".." in path.parts or "://" in text else str(path)
