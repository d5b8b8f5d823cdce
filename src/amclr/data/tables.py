"""Readers of tables and lists beside the pictures: CSV, TSV, JSON, JSON lines, COCO, Karpathy, folders by class."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from amclr.data.rows import (
    IMAGE_COLUMNS,
    PARAPHRASE_COLUMNS,
    PICTURE_SUFFIXES,
    SPLIT_COLUMNS,
    Reading,
    Row,
    as_captions,
    find_column,
    need_captions,
    need_column,
    read_json,
    row_of,
)
from amclr.errors import UserError

MAX_LINE = 1 << 24
"""Longer lines are not read: bytes."""
MAX_JSON = 4 << 30
"""Larger JSON files are not read whole: bytes."""


def read_tables(reading: Reading) -> Iterator[Row]:
    """CSV and TSV files: a row per caption. Columns image and caption; maybe paraphrase and split."""
    for file in reading.files:
        yield from _read_table(reading, file)


def _read_table(reading: Reading, file: Path) -> Iterator[Row]:
    source = reading.source
    encoding = _encoding(file, source.encoding)
    csv.field_size_limit(MAX_LINE)
    with file.open(encoding=encoding, errors="surrogateescape", newline="") as handle:
        reader = csv.reader(_decoded(file, handle, encoding), delimiter="\t" if file.suffix == ".tsv" else ",")
        header = next(reader, None)
        if header is None:
            raise UserError(f"'{file}' is empty: expected a header line image,caption and a row per caption")
        if any("\ufffd" in h for h in header):
            raise UserError(f"'{file}' is not text in the given encoding: try --source.encoding utf-16-le")
        image = header.index(need_column(file, header, source.image_column, IMAGE_COLUMNS, "image"))
        named = need_captions(file, header, source.caption_column)
        captions = [header.index(name) for name in named]
        again, split = (
            header.index(found) if (found := find_column(header, "", known)) else None
            for known in (PARAPHRASE_COLUMNS, SPLIT_COLUMNS)
        )  # fmt: skip
        of_file, line = reading.split_of(file), reader.line_num
        while True:
            line += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reading.reject(file, f"row is not CSV: {error}", line)
                line = reader.line_num
                continue
            first, line = line, reader.line_num
            if not row:
                continue
            if len(row) != len(header):
                reading.reject(file, f"row has {len(row)} columns: expected {len(header)}", first)
            elif any("\udc80" <= c <= "\udcff" for text in row for c in text):
                hint = ": try --source.encoding latin-1 or cp1252" if source.encoding == "utf-8" else ""
                reading.reject(file, f"row is not valid {source.encoding}{hint}", first)
            else:
                rewording = [[row[again]]] if again is not None and row[again].strip() else ()
                own = row[split] if split is not None else of_file
                texts = [row[k] for k in captions if len(captions) == 1 or row[k].strip()]
                yield Row(row[image].strip(), texts, rewording, "", own, reading.name(file), first)


def _decoded(file: Path, handle: Iterable[str], encoding: str) -> Iterator[str]:
    """The lines of a table. CSV readers refuse NUL, so it becomes the mark of an unreadable character."""
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


def read_json_lines(reading: Reading) -> Iterator[Row]:
    """JSON lines: a mapping a line, with a picture's path and one caption or a list of them."""
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
    """The row of one {image, caption} or one picture of a Karpathy split."""
    if not isinstance(entry, Mapping):
        reading.reject(file, f"entry is not a mapping but {type(entry).__name__}", number)
        return
    if isinstance(entry.get("sentences"), list) and isinstance(entry.get("filename"), str):
        folder = entry.get("filepath")
        picture: Any = f"{folder}/{entry['filename']}" if isinstance(folder, str) and folder else entry["filename"]
    else:
        column = find_column([str(k) for k in entry], reading.source.image_column, IMAGE_COLUMNS)
        picture = entry[column] if column else None
    if not isinstance(picture, str):
        reading.reject(file, "entry names no picture", number)
        return
    row = row_of(entry, reading.source, picture.strip())
    row.file, row.line, row.split = reading.name(file), number, row.split or split
    yield row


def _coco(reading: Reading, file: Path, data: Mapping[str, Any], split: str) -> Iterator[Row]:
    """COCO captions: annotations name pictures by number. `line` counts the annotations."""
    names: dict[object, str] = {}
    for number, image in enumerate(data.get("images") or [], 1):
        if isinstance(image, Mapping) and isinstance(image.get("file_name"), str) and _plain(image.get("id")):
            names[image["id"]] = image["file_name"]
        else:
            reading.reject(file, "entry of images has no id and file_name", number)
    for number, note in enumerate(data["annotations"], 1):
        number_of = note.get("image_id") if isinstance(note, Mapping) else None
        if not _plain(number_of) or number_of not in names:
            reading.reject(file, "annotation of a picture that is not in images", number, str(number_of)[:100])
            continue
        yield Row(names[number_of], as_captions(note.get("caption")), split=split, file=reading.name(file), line=number)


def _plain(value: object) -> bool:
    return isinstance(value, (int, str))


def read_class_folders(reading: Reading) -> Iterator[Row]:
    """A folder of pictures by class: the caption says what the class is."""
    paths, labels, names = class_folders(reading.root)
    for path, label in zip(paths, labels, strict=True):
        name = path.relative_to(reading.root).as_posix()
        yield Row(name, [reading.source.class_caption.replace("{}", names[label])], file=name)


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


def read_lines(file: Path) -> list[str]:
    """The lines of a list that are not blank, without the space around them. Raises UserError if it is not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_split_lists(folders: Sequence[Path]) -> dict[str, frozenset[str]]:
    """Names by split from train.txt, val.txt and test.txt, each in the first of the folders that has it."""
    found: dict[str, frozenset[str]] = {}
    for split in ("train", "val", "test"):
        file = next((f / f"{split}.txt" for f in folders if (f / f"{split}.txt").is_file()), None)
        if file:
            found[split] = frozenset(read_lines(file))
    return found
