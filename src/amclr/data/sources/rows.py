"""The common form of every source format: rows of an image and its captions, and rejects with a reason.

A reader is a function that takes a `Reading` and yields `SourceRow`s. It rejects what it cannot make a row of.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclr.config.schema import SourceConfig
from amclr.data.images.decode import Location
from amclr.utils.errors import UserError

IMAGE_COLUMNS = (
    "image", "image_name", "file_name", "filename", "filepath", "image_path", "path", "file", "img", "picture",
)  # fmt: skip
CAPTION_COLUMNS = (
    "caption", "captions", "comment", "text", "texts", "title", "description", "sentences", "raw", "txt",
)  # fmt: skip
PARAPHRASE_COLUMNS = ("paraphrase", "paraphrases")
SPLIT_COLUMNS = ("split",)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_CAPTION_CHARACTERS = 20_000
MAX_LINE = 1 << 24
"""Longer lines are rejected unread: bytes, or characters of a table."""
MAX_REJECTS = 1_000_000
"""Reading stops beyond this number, so that the list of rejects does not fill the memory."""
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True, slots=True)
class Reject:
    """A row or image that cannot be used, and why. `line` is 0 and `key` empty if there is none."""

    file: str
    line: int
    reason: str
    key: str = ""

    def __str__(self) -> str:
        place = f"{self.file}{f':{self.line}' if self.line else ''}{f' [{self.key}]' if self.key else ''}"
        return printable(f"{place}: {self.reason}")


@dataclass(slots=True)
class SourceRow:
    """An image and its captions, as the source has them.

    image: a path as the source writes it, or the location of the bytes. captions, and paraphrases[k] of
    captions[k], are not checked yet. name: the image's name in the source; if empty, its path.
    folder: a folder to search for the path first.
    """

    image: str | Location
    captions: Sequence[object]
    paraphrases: Sequence[Sequence[object]] = ()
    name: str = ""
    split: str = ""
    file: str = ""
    line: int = 0
    folder: Path | None = None


@dataclass
class Reading:
    """The input of a reader: what to read and how; it collects the rejects.

    root: the data set's folder. files: the files to read. cache: a folder for results that later runs reuse.
    """

    root: Path
    files: Sequence[Path]
    source: SourceConfig
    cache: Path
    progress: bool = False
    bare: bool = False
    """Whether to include images without a caption."""
    rejects: list[Reject] = field(default_factory=list)
    rows: int = 0
    """Rows, members and entries read, usable or not."""
    lost: set[str] = field(default_factory=set)
    """Keys of the rejects, or FILE:LINE for rejects without a key."""
    notes: list[str] = field(default_factory=list)
    """Other things that the user should know, a sentence each."""

    def reject(self, file: Path | str, reason: str, line: int = 0, key: str = "") -> None:
        """Record that a row, member or entry cannot be used, and count it as read."""
        self.rows += 1
        self.refuse(Reject(self.name(file), line, reason, key[:500]))

    def refuse(self, reject: Reject) -> None:
        """Record a reject of a row that was already counted. Raises UserError beyond MAX_REJECTS."""
        self.rejects.append(reject)
        self.lost.add(reject.key or f"{reject.file}:{reject.line}")
        if len(self.rejects) > MAX_REJECTS:
            raise UserError(f"more than {MAX_REJECTS:,} rows of '{self.root}' cannot be used; the last: {reject}")

    def name(self, file: Path | str) -> str:
        """The name of a file in messages: relative to the data set's folder if it lies there."""
        path = Path(file)
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(file)

    def split_of(self, file: Path) -> str:
        """The split that the name of a file or of its folder says; empty if neither does.

        A file that is read alone is the whole data set, whatever its name.
        """
        if len(self.files) < 2:
            return ""
        for part in reversed(Path(self.name(file)).with_suffix("").parts):
            for word in re.split(r"[^a-z]+", part.lower()):
                if word in SPLIT_NAMES:
                    return SPLIT_NAMES[word]
        return ""


def find_column(names: Sequence[str], wanted: str, known: Sequence[str]) -> str | None:
    """The column called `wanted`, or else the first of the `known` names that exists; case is ignored."""
    lowered = {n.strip().lower(): n for n in reversed(names)}
    return next((lowered[n] for n in ((wanted.lower(),) if wanted else known) if n in lowered), None)


def need_column(file: Path | str, names: Sequence[str], wanted: str, known: Sequence[str], option: str) -> str:
    """Like `find_column`, but raises UserError, listing the columns, if there is none."""
    column = find_column(names, wanted, known)
    if column is None:
        raise UserError(
            f"'{file}' has no column '{wanted or option}': it has {', '.join(repr(printable(n)) for n in names[:8])}. "
            f"Name the right one with --source.{option}_column"
        )
    return column


def caption_columns(names: Sequence[str], wanted: str) -> list[str]:
    """The column with the captions, or the columns caption_0, caption_1 ...; empty if there are none."""
    column = find_column(names, wanted, CAPTION_COLUMNS)
    if column or wanted:
        return [column] if column else []
    return [n for n in names if re.fullmatch(r"(caption|comment|text)[ _-]?\d+", n.strip().lower())]


def need_captions(file: Path | str, names: Sequence[str], wanted: str) -> list[str]:
    """Like `caption_columns`, but raises UserError, listing the columns, if there is none."""
    return caption_columns(names, wanted) or [need_column(file, names, wanted, CAPTION_COLUMNS, "caption")]


def as_captions(value: object, depth: int = 3) -> list[object]:
    """The captions in a cell: a text, a list of texts, or a list of mappings that contain them (Karpathy's)."""
    if isinstance(value, Mapping):
        key = find_column([str(k) for k in value], "", ("raw", *CAPTION_COLUMNS))
        return [value[key]] if key else [None]
    if isinstance(value, (list, tuple)) and depth:
        return [c for v in value for c in as_captions(v, depth - 1)]
    return [value]


def cell_captions(cell: str) -> list[object]:
    """The captions in a cell of a CSV file: its text, or the texts in it if it is a JSON list."""
    if cell.startswith("[") and cell.endswith("]"):
        try:
            texts = read_json(cell)
        except ValueError:
            return [cell]
        if isinstance(texts, list) and texts and all(isinstance(c, str) for c in texts):
            return list(texts)
    return [cell]


def as_paraphrases(value: object, captions: int) -> list[list[object]]:
    """Paraphrases by caption: a list per caption if the source has one; otherwise all belong to the first caption."""
    if value is None or value == "":
        return []
    if isinstance(value, (list, tuple)):
        if len(value) == captions and all(isinstance(v, (list, tuple)) for v in value):
            return [list(v) for v in value]
        return [[p for v in value for p in (v if isinstance(v, (list, tuple)) else [v])]]
    return [[value]]


def row_of(entry: Mapping[str, Any], source: SourceConfig, image: str | Location) -> SourceRow:
    """A row from a mapping with captions and, optionally, paraphrases and a split."""
    names = [str(k) for k in entry]
    columns = caption_columns(names, source.caption_column)
    captions = [c for name in columns for c in as_captions(entry[name])] or [None]
    if len(columns) > 1:  # some rows have fewer captions than columns
        captions = [c for c in captions if c] or [None]
    paraphrases = find_column(names, "", PARAPHRASE_COLUMNS)
    split = find_column(names, "", SPLIT_COLUMNS)
    return SourceRow(
        image,
        captions,
        as_paraphrases(entry[paraphrases], len(captions)) if paraphrases else (),
        split=str(entry[split]) if split and entry[split] else "",
    )


def clean(text: object) -> str:
    """A text without control characters and with single spaces. Empty if it is not a string."""
    if not isinstance(text, str):
        return ""
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text)
    return " ".join(text.split())


def caption_fault(raw: object, caption: str) -> str | None:
    """Why a caption (given as read, and cleaned) cannot be used, or None."""
    if raw is not None and not isinstance(raw, str):
        return f"caption is not a text but {type(raw).__name__}"
    if not caption:
        return "empty caption"
    if len(caption) > MAX_CAPTION_CHARACTERS:
        return f"caption of {len(caption)} characters: over the limit of {MAX_CAPTION_CHARACTERS}"
    try:
        caption.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON may contain
        return "caption is not valid Unicode"
    return None


def printable(text: str) -> str:
    """A text made safe to print to a terminal, and cut to a length that fits an error message."""
    text = re.sub(r"[\t-\r]+", " ", text[:2000])
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 500 else f"{text[:499]}…"


def read_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError with a short reason if it cannot be parsed."""
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid utf-8 ({error.reason})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({printable(str(error))})") from None


def write_rejects(rejects: Iterable[Reject], file: Path) -> None:
    """Write rejects as JSON lines: file, line, key, reason."""
    file.unlink(missing_ok=True)
    file.touch()
    append_rejects(rejects, file)


def append_rejects(rejects: Iterable[Reject], file: Path) -> None:
    """Append rejects to a file of `write_rejects`."""
    with file.open("a", encoding="utf-8", errors="backslashreplace") as handle:
        for r in rejects:
            row = {"file": r.file, "line": r.line, "key": r.key, "reason": r.reason}
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
