"""Readers of tables and lists beside the images: CSV, TSV, JSON, JSON lines, COCO, Karpathy, folders by class."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from amclr.config.schema import SourceConfig
from amclr.data.sources.rows import (
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    PARAPHRASE_COLUMNS,
    SPLIT_COLUMNS,
    SPLIT_NAMES,
    Reading,
    Row,
    as_captions,
    caption_columns,
    cell_captions,
    find_column,
    need_captions,
    need_column,
    read_json,
    row_of,
)
from amclr.utils.errors import UserError

MAX_LINE = 1 << 24
"""Longer lines are not read: bytes."""
MAX_JSON = 4 << 30
"""Larger JSON files are not read whole: bytes."""


def read_tables(reading: Reading) -> Iterator[Row]:
    """CSV files and their like: a row per caption. Columns image and caption; maybe paraphrase and split.

    Columns are parted by whatever of comma, tab, semicolon and bar makes a header of them. A table of two
    columns may be without one.
    """
    for file in reading.files:
        yield from _read_table(reading, file)


@dataclass
class _Layout:
    """How a table is read: what parts its columns, and which of them hold what."""

    delimiter: str
    width: int
    image: int
    captions: Sequence[int]
    paraphrase: int | None = None
    split: int | None = None
    header: bool = True


def _layout(file: Path, first: str, source: SourceConfig) -> _Layout:
    """The layout that a table's first line tells. Raises UserError, naming the columns that there are."""
    usual = "\t" if file.suffix.lower() == ".tsv" else ","
    headers = {d: next(csv.reader([first], delimiter=d), []) for d in dict.fromkeys((usual, ",", "\t", ";", "|"))}
    for delimiter, header in headers.items():
        image = find_column(header, source.image_column, IMAGE_COLUMNS)
        captions = caption_columns(header, source.caption_column)
        if image and captions:
            places = {name: header.index(name) for name in header}
            again, split = (find_column(header, "", known) for known in (PARAPHRASE_COLUMNS, SPLIT_COLUMNS))
            return _Layout(
                delimiter, len(header), places[image], [places[c] for c in captions],
                places[again] if again else None, places[split] if split else None,
            )  # fmt: skip
    for delimiter, cells in headers.items():
        named = [k for k, cell in enumerate(cells) if _image_name(cell)]
        if len(cells) == 2 and len(named) == 1 and not (source.image_column or source.caption_column):
            return _Layout(delimiter, 2, named[0], [1 - named[0]], header=False)
    header = max(headers.values(), key=len) if len(headers[usual]) < 2 else headers[usual]
    if any("\ufffd" in h for h in header):
        raise UserError(f"'{file}' is not text in the given encoding: try --source.encoding utf-16-le")
    if any(map(_image_name, header)):
        raise UserError(
            f"the first line of '{file}' is no header: add one that names the columns, such as image,caption"
        )
    need_column(file, header, source.image_column, IMAGE_COLUMNS, "image")
    need_captions(file, header, source.caption_column)
    raise AssertionError("a header with both columns is a layout")


def _image_name(cell: str) -> bool:
    """Whether a cell names an image; `#0` and the like behind it number its captions (Flickr8k.token.txt)."""
    return Path(re.sub(r"#\d+$", "", cell.strip())).suffix.lower() in IMAGE_SUFFIXES


class _Lines:
    """The lines of a table, one by one, with those taken since `start`; some of them can be put back."""

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
        """Put back all lines taken since `start` but the first."""
        self.ahead.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def _read_table(reading: Reading, file: Path) -> Iterator[Row]:
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
        of_file, beside = reading.split_of(file), file.parent if file.parent != reading.root else None
        for line, row, fault in _records(lines, layout):
            if fault is None and len(row) != layout.width:
                fault = f"row has {len(row)} columns: expected {layout.width}"
            elif fault is None and any("\udc80" <= c <= "\udcff" for text in row for c in text):
                hint = ": try --source.encoding latin-1 or cp1252" if source.encoding == "utf-8" else ""
                fault = f"row is not valid {source.encoding}{hint}"
            if fault:
                reading.reject(file, fault, line)
                continue
            again = row[layout.paraphrase].strip() if layout.paraphrase is not None else ""
            own = row[layout.split] if layout.split is not None else of_file
            cells = [row[k] for k in layout.captions if len(layout.captions) == 1 or row[k].strip()]
            image = row[layout.image].strip()
            image = image if layout.header else re.sub(r"#\d+$", "", image)
            yield Row(image, [c for cell in cells for c in cell_captions(cell)], [[again]] if again else (), "", own,
                      reading.name(file), line, beside)  # fmt: skip


def _records(lines: _Lines, layout: _Layout) -> Iterator[tuple[int, list[str], str | None]]:
    """(line, cells, what is wrong) of each record.

    A quote that is opened by mistake takes in the records after it. So where a later line of a record is
    one by itself, that names an image, the first is taken as it is written, and the others are read again.
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
    return len(cells) == layout.width and _image_name(cells[layout.image])


def _decoded(file: Path, handle: TextIO, encoding: str) -> Iterator[str | None]:
    """The lines of a table, None for one that is too long. CSV readers refuse NUL: it becomes a mark of its own."""
    try:
        while line := handle.readline(MAX_LINE):
            if line.endswith("\n") or len(line) < MAX_LINE:
                yield line.replace("\0", "\ufffd")
                continue
            while (rest := handle.readline(MAX_LINE)) and not rest.endswith("\n"):
                pass
            yield None
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


def read_json_lines(reading: Reading) -> Iterator[Row]:
    """JSON lines: a mapping a line, with an image's path and one caption or a list of them."""
    for file in reading.files:
        split = reading.split_of(file)
        with file.open("rb") as handle:
            for number, content in enumerate(_lines(handle), 1):
                if content is None:
                    reading.reject(file, f"line is longer than {MAX_LINE} bytes", number)
                    continue
                if not content.strip():
                    continue
                try:
                    entry = read_json(content.removeprefix(b"\xef\xbb\xbf"))
                except ValueError as error:
                    reading.reject(file, f"row is {error}", number)
                    continue
                yield from _entry(reading, file, number, entry, split)


def _lines(handle: BinaryIO) -> Iterator[bytes | None]:
    """Lines of a binary file; None for one beyond MAX_LINE, which is passed over in parts."""
    while line := handle.readline(MAX_LINE):
        if line.endswith(b"\n") or len(line) < MAX_LINE:
            yield line
            continue
        while (rest := handle.readline(MAX_LINE)) and not rest.endswith(b"\n"):
            pass
        yield None


def read_json_files(reading: Reading) -> Iterator[Row]:
    """JSON files: a list of {image, caption} (the paper's), COCO captions, or a Karpathy split."""
    for file in reading.files:
        if file.stat().st_size > MAX_JSON:
            raise UserError(f"'{file}' is larger than {MAX_JSON >> 30} GB: give it as JSON lines, an entry a line")
        try:
            data = read_json(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        except ValueError as error:
            raise UserError(f"cannot read '{file}': {error}") from None
        split = reading.split_of(file)
        if isinstance(data, Mapping) and isinstance(data.get("annotations"), list):
            yield from _coco(reading, file, data, split)
            continue
        if isinstance(data, Mapping):
            data = next((data[k] for k in ("images", "data", "samples") if isinstance(data.get(k), list)), data)
        if not isinstance(data, list):
            raise UserError(
                f"'{file}' is none of the JSON layouts known: a list of {{image, caption}}, COCO's {{images, "
                "annotations}, or Karpathy's {images: [{filename, sentences, split}]}"
            )
        for number, entry in enumerate(data, 1):
            yield from _entry(reading, file, number, entry, split)


def _entry(reading: Reading, file: Path, number: int, entry: Any, split: str) -> Iterator[Row]:
    """The row of one {image, caption} or one image of a Karpathy split."""
    if not isinstance(entry, Mapping):
        reading.reject(file, f"entry is not a mapping but {type(entry).__name__}", number)
        return
    if isinstance(entry.get("sentences"), list) and isinstance(entry.get("filename"), str):
        folder = entry.get("filepath")
        image: Any = f"{folder}/{entry['filename']}" if isinstance(folder, str) and folder else entry["filename"]
    else:
        column = find_column([str(k) for k in entry], reading.source.image_column, IMAGE_COLUMNS)
        image = entry[column] if column else None
    if not isinstance(image, str):
        reading.reject(file, "entry names no image", number)
        return
    row = row_of(entry, reading.source, image.strip())
    row.file, row.line, row.split = reading.name(file), number, row.split or split
    row.beside = _beside(reading, file)
    yield row


def _beside(reading: Reading, file: Path) -> Path | None:
    """Where the images of a captions file lie, if not in the usual folder: beside it; COCO's in one of its name."""
    if named := re.fullmatch(r"captions_(\w+)", file.stem):
        for parent in (file.parent, file.parent.parent):
            if (parent / named[1]).is_dir():
                return parent / named[1]
    return file.parent if file.parent != reading.root and file.parent.name != "annotations" else None


def _coco(reading: Reading, file: Path, data: Mapping[str, Any], split: str) -> Iterator[Row]:
    """COCO captions: annotations name images by number. `line` counts the annotations."""
    names: dict[object, str] = {}
    images, beside, called = data.get("images"), _beside(reading, file), reading.name(file)
    for number, image in enumerate(images if isinstance(images, list) else [], 1):
        if isinstance(image, Mapping) and isinstance(image.get("file_name"), str) and _plain(image.get("id")):
            names[image["id"]] = image["file_name"]
        else:
            reading.reject(file, "entry of images has no id and file_name", number)
    for number, note in enumerate(data["annotations"], 1):
        number_of = note.get("image_id") if isinstance(note, Mapping) else None
        if not _plain(number_of) or number_of not in names:
            reading.reject(file, "annotation of an image that is not in images", number, str(number_of)[:100])
            continue
        captions = as_captions(note.get("caption"))
        yield Row(names[number_of], captions, split=split, file=called, line=number, beside=beside)


def _plain(value: object) -> bool:
    return isinstance(value, (int, str))


def read_class_folders(reading: Reading) -> Iterator[Row]:
    """A folder of images by class, or one of these per split: the caption says what the class is."""
    inside = folders(reading.root)
    by_split = [f for f in inside if f.name.lower() in SPLIT_NAMES]
    if by_split and len(by_split) < len(inside):
        raise UserError(f"'{reading.root}' has both splits and classes, {by_split[0].name} and "
                        f"{next(f.name for f in inside if f not in by_split)}: give one of them")  # fmt: skip
    for root in by_split or [reading.root]:
        paths, labels, names = class_folders(root)
        if all(re.fullmatch(r"\d+", name) for name in names):
            raise UserError(f"the folders of '{root}' are numbers, which say nothing of them: name the classes "
                            f"in '{root / 'classnames.txt'}' (FOLDER<tab>NAME), or add a captions file")  # fmt: skip
        split = SPLIT_NAMES[root.name.lower()] if by_split else ""
        for path, label in zip(paths, labels, strict=True):
            name = path.relative_to(reading.root).as_posix()
            yield Row(name, [reading.source.class_caption.replace("{}", names[label])], split=split, file=name)


def read_sidecars(reading: Reading) -> Iterator[Row]:
    """Images each with a text file of its name beside it, as img2dataset and captioners leave them."""
    for path in images(reading.root):
        name = path.relative_to(reading.root).as_posix()
        text = sidecar(path)
        if text is None:
            reading.reject(path, f"no caption file {path.stem}.txt beside it", key=name)
            continue
        try:
            caption = text.read_text(encoding="utf-8-sig") if text.stat().st_size <= MAX_LINE else "x" * MAX_LINE
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            reading.reject(text, f"caption cannot be read ({what})", key=name)
            continue
        yield Row(name, [caption], file=reading.name(text))


def read_images(reading: Reading) -> Iterator[Row]:
    """Images at any depth in a folder, with or without a text file of their names beside them."""
    for path in images(reading.root):
        text = sidecar(path)
        captions: list[str] = []
        with suppress(OSError, UnicodeDecodeError):
            if text and text.stat().st_size <= MAX_LINE:
                captions = [text.read_text(encoding="utf-8-sig")]
        yield Row(path.relative_to(reading.root).as_posix(), captions, file=reading.name(path))


def sidecar(image: Path) -> Path | None:
    """The text file with an image's caption, if there is one."""
    return next((f for s in (".txt", ".caption") if (f := image.with_suffix(s)).is_file()), None)


def folders(root: Path) -> list[Path]:
    """The folders in a folder, without hidden ones and what archivers leave (__MACOSX)."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def images(root: Path) -> list[Path]:
    """The images at any depth in a folder, without hidden ones."""
    return sorted(
        p for p in root.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and "__MACOSX" not in p.parts
    )  # fmt: skip


def class_folders(root: Path, classnames: Path | None = None) -> tuple[list[Path], list[int], list[str]]:
    """A folder of images by class, for zero-shot classification: image paths, labels, class names.

    Class names come from `classnames` (folder name, tab, name; further names after a comma are
    left out), or from classnames.txt in the folder or beside it, else from the folders' names.
    Raises UserError where there is no such folder or no image in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder '{root}': zero-shot classification needs a folder with one folder per class")
    inside = folders(root)
    if classnames and not classnames.is_file():
        raise UserError(f"no class names file '{classnames}'")
    file = classnames or names_file(root)
    pairs = [text.partition("\t") for text in read_lines(file)] if file else []
    named = {key: name.split(",")[0].strip() for key, _, name in pairs}
    paths: list[Path] = []
    labels: list[int] = []
    names: list[str] = []
    for folder in inside:
        found = images(folder)
        if not found:
            continue
        labels += [len(names)] * len(found)
        paths += found
        names.append(named.get(folder.name) or folder.name.replace("_", " "))
    if not names:
        raise UserError(f"'{root}' holds no folder with images: expected {root}/CLASS/IMAGE.jpg")
    return paths, labels, names


def names_file(root: Path) -> Path | None:
    """The file with names of the classes that a folder of images by class has in it or beside it, if any."""
    return next((f for f in (root / "classnames.txt", root.parent / "classnames.txt") if f.is_file()), None)


def read_lines(file: Path) -> list[str]:
    """The lines of a list that are not blank, without the space around them. Raises UserError if it is not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_split_lists(folder: Path) -> dict[str, frozenset[str]]:
    """Names by split from train.txt, val.txt and test.txt in a folder, where they are no links out of it."""
    files = {split: folder / f"{split}.txt" for split in ("train", "val", "test")}
    return {
        split: frozenset(read_lines(file))
        for split, file in files.items()
        if file.is_file() and file.resolve().is_relative_to(folder.resolve())
    }
