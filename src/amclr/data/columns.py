"""Readers of Parquet files and Hugging Face datasets, whose pictures may be bytes in a column.

Such bytes are copied once into a file of the cache, where any of them can be read at its place;
pictures that are the same bytes are kept once.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from amclr.data.pictures import MAX_BYTES, Location
from amclr.data.rows import (
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
    row_of,
)
from amclr.errors import UserError
from amclr.randomness import derive

FORMAT = 1
NAMELESS = "blake2b-"
ROWS_AT_ONCE = 256
"""Rows read together: pictures of some MB each must fit the memory."""
FILE_COLUMNS = ("file_name", "filename", "image_name", "key", "__key__", "name")
"""Columns that name a picture whose bytes are in the table, before the name that goes with the bytes."""
USED = {*PARAPHRASE_COLUMNS, *SPLIT_COLUMNS}
ID_COLUMNS = ("image_id", "img_id", "imgid", "id")
"""Columns that number it, after that name."""


@dataclass
class Table:
    """A table to read: what it is called, what changes with it, its columns, and how to read some of them."""

    called: str
    stamp: str
    columns: Sequence[str]
    rows: int
    read: Callable[[Sequence[str]], Iterator[list[dict[str, Any]]]]
    split: str = ""


def read_parquet(reading: Reading) -> Iterator[Row]:
    """Parquet files: a picture's path or bytes (or Hugging Face's {bytes, path}) and one caption or a list of them."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("Parquet files need pyarrow: pip install 'amclr[data]'") from None

    for file in reading.files:
        try:
            handle = parquet.ParquetFile(file, memory_map=True)
        except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
            raise UserError(f"cannot read '{file}' as Parquet: {printable(str(error))}") from None

        def batches(columns: Sequence[str], handle: Any = handle) -> Iterator[list[dict[str, Any]]]:
            for batch in handle.iter_batches(ROWS_AT_ONCE, columns=list(columns)):
                yield batch.to_pylist()

        stat = file.stat()
        names = [f.name for f in handle.schema_arrow]
        yield from _rows(reading, Table(
            reading.name(file), f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}", names,
            handle.metadata.num_rows, batches, reading.split_of(file),
        ))  # fmt: skip


def read_saved_dataset(reading: Reading) -> Iterator[Row]:
    """A dataset saved by Hugging Face's `save_to_disk`, with or without splits."""
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(reading.root))
    except Exception as error:  # a damaged folder raises many kinds
        raise UserError(f"cannot read '{reading.root}' as a saved dataset: {printable(str(error))}") from None
    yield from _dataset_rows(reading, found)


def read_hub_dataset(reading: Reading, name: str) -> Iterator[Row]:
    """A dataset of the Hugging Face Hub, `NAME` or `NAME:CONFIGURATION`."""
    datasets = _datasets()
    repository, _, configuration = name.partition(":")
    try:
        found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # no connection, no such name, a script that would have to run ...
        raise UserError(
            f"cannot load the dataset '{name}': {printable(str(error).strip().splitlines()[0])}. Without a connection "
            "give the folder that dataset.save_to_disk(FOLDER) made"
        ) from None
    yield from _dataset_rows(reading, found)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("Hugging Face datasets need their package: pip install 'amclr[data]'") from None
    datasets.disable_progress_bars()
    return datasets


def _dataset_rows(reading: Reading, found: Any) -> Iterator[Row]:
    parts = dict(found) if isinstance(found, Mapping) else {"": found}
    for split, part in parts.items():
        for name, feature in part.features.items():
            if type(feature).__name__ == "Image":
                part = part.cast_column(name, type(feature)(decode=False))  # bytes as they are, not decoded

        def batches(columns: Sequence[str], part: Any = part) -> Iterator[list[dict[str, Any]]]:
            for batch in part.select_columns(list(columns)).iter(ROWS_AT_ONCE):
                yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

        yield from _rows(reading, Table(
            f"{reading.root.name}{f'/{split}' if split else ''}", f"{part._fingerprint}|{len(part)}",
            list(part.features), len(part), batches, SPLIT_NAMES.get(split.lower(), split),
        ))  # fmt: skip


def _rows(reading: Reading, table: Table) -> Iterator[Row]:
    source, columns = reading.source, table.columns
    image = need_column(table.called, columns, source.image_column, IMAGE_COLUMNS, "image")
    texts = need_captions(table.called, columns, source.caption_column)
    others = [c for c in columns if c != image]
    file_column, id_column = find_column(others, "", FILE_COLUMNS), find_column(others, "", ID_COLUMNS)
    wanted = [c for c in others if c in (file_column, id_column) or c in texts or c.strip().lower() in USED]
    first = next(_read(table, [image]), [])
    held = any(isinstance(row[image], (bytes, Mapping)) for row in first)
    places = iter(_copied(reading, table, image)) if held else None
    number = 0
    for rows in _read(table, wanted if held else [*wanted, image]):
        for row in rows:
            number += 1
            place, called, fault = next(places) if places else (row[image], "", "")
            file_name, number_of = (row[c] if c else None for c in (file_column, id_column))
            named = "" if called.startswith(NAMELESS) else called
            own = str(next((n for n in (file_name, named, number_of, called) if n not in (None, "")), ""))
            if fault or not isinstance(place, (str, Location)):
                reading.reject(table.called, fault or "row has no picture", number, own)
                continue
            made = row_of({c: v for c, v in row.items() if c != image}, source, place)
            if isinstance(place, Location):
                made.name = own
            made.file, made.line, made.split = table.called, number, made.split or table.split
            yield made


def _read(table: Table, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    try:
        yield from table.read(columns)
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise UserError(
            f"'{table.called}' is damaged: {printable(str(error))}; mend it, or take it out of the folder"
        ) from None


def _copied(reading: Reading, table: Table, image: str) -> Iterator[tuple[Location | str | None, str, str]]:
    """For the picture of each row: its place (or, where a row has no bytes, its path), its name, or what is wrong.

    The copy and its index are made under other names, so that a kill leaves none or a whole one.
    """
    stem = reading.cache / "pictures" / f"{derive(FORMAT, table.stamp, image):016x}"
    index, content = stem.with_suffix(".json.gz"), stem.with_suffix(".bin").absolute()
    if not (index.is_file() and content.is_file()):
        stem.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(stem.with_suffix(".lock")):
            if not index.is_file():
                _copy(reading, table, image, index, content)
    for offset, size, name, fault in json.loads(gzip.decompress(index.read_bytes())):
        place = Location(str(content), offset, size) if size >= 0 else (name or None)
        yield place, Path(name).name if size >= 0 and name else "", fault


def _copy(reading: Reading, table: Table, image: str, index: Path, content: Path) -> None:
    entries: list[tuple[int, int, str, str]] = []
    known: dict[bytes, tuple[int, int]] = {}
    end = 0
    part = content.with_suffix(".part")
    bar = tqdm(total=table.rows, desc="Copying pictures into the cache", unit="row", leave=False,
               disable=not reading.progress)  # fmt: skip
    with bar, part.open("wb") as handle:
        for rows in _read(table, [image]):
            for row in rows:
                cell = row[image]
                raw, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, "")
                name = name if isinstance(name, str) else ""
                if not isinstance(raw, bytes):
                    entries.append((0, -1, raw if isinstance(raw, str) else name, ""))
                elif not raw or len(raw) > MAX_BYTES:
                    size = "is empty (0 bytes)" if not raw else f"too large: {len(raw)} bytes"
                    entries.append((0, -1, name, f"picture {size}"))
                else:
                    digest = hashlib.blake2b(raw, digest_size=16).digest()
                    if digest not in known:
                        handle.write(raw)
                        known[digest] = (end, len(raw))
                        end += len(raw)
                    # A picture that has no name is called by its content: other rows do not change it.
                    entries.append((*known[digest], name or NAMELESS + digest.hex(), ""))
            bar.update(len(rows))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, content)
    part = index.with_suffix(".part")
    part.write_bytes(gzip.compress(json.dumps(entries).encode(), 1))
    os.replace(part, index)
