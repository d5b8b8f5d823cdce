"""Readers of JSON: JSON lines, a list of entries, COCO captions, Karpathy splits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from amclr.data.sources.rows import (
    IMAGE_COLUMNS,
    MAX_LINE,
    Reading,
    SourceRow,
    as_captions,
    find_column,
    read_json,
    row_of,
)
from amclr.utils.errors import UserError

MAX_JSON = 4 << 30
"""Larger JSON files, in bytes, are not read."""


def read_json_lines(reading: Reading) -> Iterator[SourceRow]:
    """JSON lines: a mapping per line, with an image's path and one caption or a list of them."""
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
    """Lines of a binary file; None for one longer than MAX_LINE, which is skipped in pieces."""
    while line := handle.readline(MAX_LINE):
        if line.endswith(b"\n") or len(line) < MAX_LINE:
            yield line
            continue
        while (rest := handle.readline(MAX_LINE)) and not rest.endswith(b"\n"):
            pass
        yield None


def read_json_files(reading: Reading) -> Iterator[SourceRow]:
    """JSON files: a list of {image, caption} (the paper's), COCO captions, or a Karpathy split."""
    for file in reading.files:
        if file.stat().st_size > MAX_JSON:
            raise UserError(f"'{file}' is larger than {MAX_JSON >> 30} GB: convert it to JSON lines, an entry per line")
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
                f"'{file}' has none of the known JSON layouts: a list of {{image, caption}}, COCO's {{images, "
                "annotations}, or Karpathy's {images: [{filename, sentences, split}]}"
            )
        for number, entry in enumerate(data, 1):
            yield from _entry(reading, file, number, entry, split)


def _entry(reading: Reading, file: Path, number: int, entry: Any, split: str) -> Iterator[SourceRow]:
    """The row of one {image, caption} entry or of one image of a Karpathy split."""
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
    row.folder = _image_folder(reading, file)
    yield row


def _image_folder(reading: Reading, file: Path) -> Path | None:
    """Where to look first for the images of a captions file: its folder; for COCO, the folder that its name names."""
    if coco := re.fullmatch(r"captions_(\w+)", file.stem):
        for parent in (file.parent, file.parent.parent):
            if (parent / coco[1]).is_dir():
                return parent / coco[1]
    return file.parent if file.parent != reading.root and file.parent.name != "annotations" else None


def _coco(reading: Reading, file: Path, data: Mapping[str, Any], split: str) -> Iterator[SourceRow]:
    """COCO captions: annotations refer to images by id. `line` counts the annotations."""
    names: dict[object, str] = {}
    images, folder, file_name = data.get("images"), _image_folder(reading, file), reading.name(file)
    for number, image in enumerate(images if isinstance(images, list) else [], 1):
        if isinstance(image, Mapping) and isinstance(image.get("file_name"), str) and _is_id(image.get("id")):
            names[image["id"]] = image["file_name"]
        else:
            reading.reject(file, "entry of images has no id and file_name", number)
    for number, annotation in enumerate(data["annotations"], 1):
        image_id = annotation.get("image_id") if isinstance(annotation, Mapping) else None
        if not _is_id(image_id) or image_id not in names:
            reading.reject(file, "annotation of an image that is not in images", number, str(image_id)[:100])
            continue
        captions = as_captions(annotation.get("caption"))
        yield SourceRow(names[image_id], captions, split=split, file=file_name, line=number, folder=folder)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str))
