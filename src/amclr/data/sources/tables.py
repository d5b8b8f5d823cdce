"""Reader of tables with one caption per row: CSV, TSV and the like."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from amclr.config.schema import SourceConfig
from amclr.data.sources.rows import (
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    MAX_LINE,
    PARAPHRASE_COLUMNS,
    SPLIT_COLUMNS,
    Reading,
    SourceRow,
    caption_columns,
    cell_captions,
    find_column,
    need_captions,
    need_column,
)
from amclr.utils.errors import UserError


def read_tables(reading: Reading) -> Iterator[SourceRow]:
    """CSV files and the like: a row per caption, with columns image, caption and optionally paraphrase and split.

    The delimiter is the one of comma, tab, semicolon and bar with which the first line is a valid header. A table
    of two columns may lack a header.
    """
    for file in reading.files:
        yield from _read_table(reading, file)


@dataclass
class _Layout:
    """How to read a table: its delimiter, its number of columns, and the index of each column."""

    delimiter: str
    width: int
    image: int
    captions: Sequence[int]
    paraphrase: int | None = None
    split: int | None = None
    header: bool = True


def _layout(file: Path, first: str, source: SourceConfig) -> _Layout:
    """The layout that the first line implies. Raises UserError, listing the columns, if it implies none."""
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    headers = {d: next(csv.reader([first], delimiter=d), []) for d in dict.fromkeys((usual, ",", "\t", ";", "|"))}
    for delimiter, header in headers.items():
        image = find_column(header, source.image_column, IMAGE_COLUMNS)
        captions = caption_columns(header, source.caption_column)
        if image and captions:
            places = {name: header.index(name) for name in header}
            paraphrase, split = (find_column(header, "", known) for known in (PARAPHRASE_COLUMNS, SPLIT_COLUMNS))
            return _Layout(
                delimiter, len(header), places[image], [places[c] for c in captions],
                places[paraphrase] if paraphrase else None, places[split] if split else None,
            )  # fmt: skip
    for delimiter, cells in headers.items():
        images = [k for k, cell in enumerate(cells) if _is_image_name(cell)]
        if len(cells) == 2 and len(images) == 1 and not (source.image_column or source.caption_column):
            return _Layout(delimiter, 2, images[0], [1 - images[0]], header=False)
    header = max(headers.values(), key=len) if len(headers[usual]) < 2 else headers[usual]
    if any("\ufffd" in h for h in header):
        raise UserError(f"'{file}' is not text in the given encoding: try --source.encoding utf-16-le")
    if any(map(_is_image_name, header)):
        raise UserError(
            f"the first line of '{file}' is not a header: add one that names the columns, such as image,caption"
        )
    need_column(file, header, source.image_column, IMAGE_COLUMNS, "image")
    need_captions(file, header, source.caption_column)
    raise AssertionError("a header with both columns is a layout")


def _is_image_name(cell: str) -> bool:
    """Whether a cell names an image. A suffix such as `#0` numbers its captions (Flickr8k.token.txt)."""
    return Path(re.sub(r"#\d+$", "", cell.strip())).suffix.lower() in IMAGE_SUFFIXES


class _Lines:
    """An iterator over the lines of a table that records the lines read since `start`, and can put them back."""

    def __init__(self, lines: Iterator[tuple[int, str | None]]) -> None:
        self.lines = lines
        self.ahead: deque[tuple[int, str | None]] = deque()
        self.taken: list[tuple[int, str | None]] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        number, line = self.ahead.popleft() if self.ahead else next(self.lines)
        self.taken.append((number, line))
        if line is None:
            raise csv.Error(f"longer than {MAX_LINE} characters")
        return line

    def start(self) -> None:
        self.taken = []

    def put_back(self) -> None:
        """Put back all lines read since `start` except the first."""
        self.ahead.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def _read_table(reading: Reading, file: Path) -> Iterator[SourceRow]:
    source = reading.source
    encoding = _encoding(file, source.encoding)
    csv.field_size_limit(MAX_LINE)
    with file.open(encoding=encoding, errors="surrogateescape", newline="") as handle:
        lines = _Lines(enumerate(_decoded(file, handle, encoding), 1))
        first = next(lines, "")
        if not first.strip():
            raise UserError(f"'{file}' is empty: expected a header line image,caption and a row per caption")
        layout = _layout(file, first, source)
        if not layout.header:
            lines.ahead.append((1, first))
        file_split, folder = reading.split_of(file), file.parent if file.parent != reading.root else None
        for line, row, fault in _records(lines, layout):
            if fault is None and len(row) != layout.width:
                fault = f"row has {len(row)} columns: expected {layout.width}"
            elif fault is None and any("\udc80" <= c <= "\udcff" for text in row for c in text):
                hint = ": try --source.encoding latin-1 or cp1252" if source.encoding == "utf-8" else ""
                fault = f"row is not valid {source.encoding}{hint}"
            if fault:
                reading.reject(file, fault, line)
                continue
            paraphrase = row[layout.paraphrase].strip() if layout.paraphrase is not None else ""
            split = row[layout.split] if layout.split is not None else file_split
            cells = [row[k] for k in layout.captions if len(layout.captions) == 1 or row[k].strip()]
            image = row[layout.image].strip()
            image = image if layout.header else re.sub(r"#\d+$", "", image)
            captions = [caption for cell in cells for caption in cell_captions(cell)]
            paraphrases = [[paraphrase]] if paraphrase else ()
            yield SourceRow(image, captions, paraphrases, "", split, reading.name(file), line, folder)


def _records(lines: _Lines, layout: _Layout) -> Iterator[tuple[int, list[str], str | None]]:
    """(line, cells, fault) of each record; the fault is None if the record is sound.

    A stray opening quote would swallow the records after it. So if a later line of a record is a record by itself
    that names an image, the first line is parsed without quoting, and the others are read again.
    """
    reader = csv.reader(lines, delimiter=layout.delimiter)
    while True:
        lines.start()
        fault, row = None, []
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = f"row is not CSV: {error}"
            reader = csv.reader(lines, delimiter=layout.delimiter)
        line = lines.taken[0][0]
        if len(lines.taken) > 1 and any(_is_record(text, layout) for _, text in lines.taken[1:]):
            lines.put_back()
            plain = lines.taken[0][1] or ""
            row, fault = next(csv.reader([plain], delimiter=layout.delimiter, quoting=csv.QUOTE_NONE)), None
            if len(row) != layout.width:
                fault = "row opens a quote and does not close it"
        if row or fault:
            yield line, row, fault


def _is_record(line: str | None, layout: _Layout) -> bool:
    if line is None:
        return False
    try:
        cells = next(csv.reader([line], delimiter=layout.delimiter), [])
    except csv.Error:
        return False
    return len(cells) == layout.width and _is_image_name(cells[layout.image])


def _decoded(file: Path, handle: TextIO, encoding: str) -> Iterator[str | None]:
    """The lines of a table, None for one that is too long. NUL, which CSV readers refuse, becomes U+FFFD."""
    try:
        while line := handle.readline(MAX_LINE):
            if line.endswith("\n") or len(line) < MAX_LINE:
                yield line.replace("\0", "\ufffd")
                continue
            while (rest := handle.readline(MAX_LINE)) and not rest.endswith("\n"):
                pass
            yield None
    except UnicodeError as error:  # surrogateescape cannot mark these bytes, such as half of a UTF-16 unit
        reason = getattr(error, "reason", error)
        raise UserError(f"'{file}' is not {encoding} text ({reason}): give the right --source.encoding") from None


def _encoding(file: Path, encoding: str) -> str:
    try:
        "".encode(encoding)
        b"".decode(encoding, "surrogateescape")
    except (LookupError, UnicodeError):
        raise UserError(f"unknown encoding '{encoding}': try utf-8, latin-1, cp1252 or utf-16") from None
    with file.open("rb") as handle:
        byte_order_mark = handle.read(2)
    if byte_order_mark in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    return "utf-8-sig" if encoding == "utf-8" else encoding
