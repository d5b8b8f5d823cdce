"""Paraphrases of captions, kept in a store: computed once, read by every run, joined by the caption's text.

A store that `amclr paraphrase` writes is a folder, `DATA/paraphrases/`, with a folder per version of the settings:

    latest                    the name of the version that was completed last: the one that is used
    rules-k3-1f2e3d4c/        a version, named by its settings
        store.json            the settings, and how many captions it holds once it is complete
        paraphrases.jsonl     a row per caption, in the order of the captions' text
        report.json           how many candidates were kept, and how many each filter rejected
        sample.txt            some captions and their paraphrases, to be read
        parts/                what is done of a version that is still being made

A store that people write is a CSV, TSV or JSONL file with a caption and a paraphrase (or a list of them) a row.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from amclr.data.sources.rows import Reject, caption_fault, clean, read_json
from amclr.utils.errors import UserError

FORMAT = 1
FOLDER, LATEST, SETTINGS, ROWS, PARTS = "paraphrases", "latest", "store.json", "paraphrases.jsonl", "parts"
TABLES = frozenset({".csv", ".tsv", ".txt", ".jsonl", ".ndjson"})
MAX_LINE = 1 << 22


@dataclass(frozen=True)
class Store:
    """Paraphrases by caption. Captions are compared by their text, runs of space counted as one."""

    path: Path
    texts: Mapping[str, tuple[str, ...]]
    rows: int
    rejects: tuple[Reject, ...] = ()
    """Rows of a file that cannot be used."""
    version: str = ""
    """Name of the version; empty for a file that people wrote."""

    def of(self, caption: str) -> tuple[str, ...]:
        """The paraphrases of a caption."""
        return self.texts.get(clean(caption), ())


class Captioned(Protocol):
    """A sample as far as this module knows it: `paraphrases[k]` reword `captions[k]`."""

    @property
    def captions(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def paraphrases(self) -> tuple[tuple[str, ...], ...]: ...  # noqa: D102


S = TypeVar("S", bound=Captioned)


def attach(samples: Sequence[S], store: Store | None) -> tuple[S, ...]:
    """The samples with the store's paraphrases after those that they had already, none of them twice."""
    if store is None:
        return tuple(samples)

    def joined(sample: S) -> S:
        own = sample.paraphrases or ((),) * len(sample.captions)
        both = tuple(
            tuple(dict.fromkeys((*had, *store.of(caption)))) for caption, had in zip(sample.captions, own, strict=True)
        )
        return sample if both == own else replace(sample, paraphrases=both)  # type: ignore[type-var]

    return tuple(joined(s) for s in samples)


def find_store(root: Path, setting: str) -> Store | None:
    """The store that a setting names: a file, a store's folder, a version's folder or its name in `root`'s store.

    Empty finds `root/paraphrases` (its latest complete version), if it is there; `none` is no store.
    Raises UserError for one that is not there, not complete or not readable, and says what to type.
    """
    if setting == "none":
        return None
    beside = root / FOLDER
    if not setting:
        return read_store(beside) if _versions(beside) else None
    for path in (Path(setting).expanduser(), beside / setting):
        if path.exists():
            return read_store(path)
    raise UserError(
        f"no paraphrases at '{setting}': give a file or a folder that `amclr paraphrase` wrote, or "
        "--source.paraphrases none"
    )


def read_store(path: Path) -> Store:
    """Read a store: a file that people wrote, a version's folder, or a folder of versions with its latest one.

    Rows of a file that cannot be used are listed in `rejects`. Raises UserError where there is nothing to
    read, where columns are missing, and for a version that is not complete.
    """
    if path.is_file():
        return _read_table(path)
    if (path / SETTINGS).is_file():
        return _read_version(path)
    names = _versions(path)
    if not names:
        raise UserError(f"'{path}' holds no paraphrases: make some with: amclr paraphrase DATA --out {path}")
    complete = [name for name in names if (path / name / ROWS).is_file()]
    if not complete:
        raise _incomplete(path / names[0])
    latest = path / LATEST
    name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    if name in names:
        return _read_version(path / name)
    if len(complete) > 1 or name:
        raise UserError(
            f"'{path}' does not say which version is the latest: name one of {', '.join(complete)} with "
            "--source.paraphrases"
        )
    return _read_version(path / complete[0])


def _versions(folder: Path) -> list[str]:
    return sorted(p.parent.name for p in folder.glob(f"*/{SETTINGS}")) if folder.is_dir() else []


def _read_version(folder: Path) -> Store:
    about = _load_json(folder / SETTINGS)
    if about.get("format") != FORMAT:
        raise UserError(f"'{folder}' was written by another version of amclr (format {about.get('format')})")
    file = folder / ROWS
    if not file.is_file() or about.get("captions") is None:
        raise _incomplete(folder)
    found = _read_table(file)
    # An update may have been stopped between its rows and this number; it never leaves fewer rows.
    if found.rows < about["captions"] or found.rejects:
        what = str(found.rejects[0]) if found.rejects else f"{found.rows} rows are left of {about['captions']}"
        raise UserError(f"'{file}' is damaged ({what}): remove '{folder}' and paraphrase again")
    return replace(found, path=folder, version=folder.name)


def _incomplete(folder: Path) -> UserError:
    return UserError(
        f"the paraphrases in '{folder}' are not complete: give the same `amclr paraphrase` command again, which goes "
        "on, or --source.paraphrases none"
    )


def _load_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"'{file}' cannot be read ({error}): remove it and paraphrase again") from None
    return found if isinstance(found, dict) else {}


def _read_table(file: Path) -> Store:
    if file.suffix.lower() not in TABLES:
        raise UserError(f"'{file}' is no table of paraphrases: expected a .csv, .tsv or .jsonl file")
    rows = _json_rows if file.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows
    texts: dict[str, dict[str, None]] = {}
    rejects: list[Reject] = []
    total = 0
    for line, caption, found in rows(file):
        total += 1
        cleaned = [] if isinstance(found, str) else [clean(p) for p in found]
        reason = found if isinstance(found, str) else _row_fault(clean(caption), cleaned)
        if reason:
            rejects.append(Reject(file.name, line, reason))
        else:
            texts.setdefault(clean(caption), {}).update(dict.fromkeys(cleaned))
    return Store(file, {c: tuple(p) for c, p in texts.items()}, total, tuple(rejects))


def _row_fault(caption: str, paraphrases: Sequence[str]) -> str | None:
    for what, text in (("caption", caption), *(("paraphrase", p) for p in paraphrases)):
        if fault := caption_fault(text, text):
            return fault.replace("caption", what)
    return None


Row = tuple[int, str, "list[str] | str"]
"""Line, caption, and its paraphrases or why there are none."""


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file; one that is far too long comes in pieces, so that memory stays bounded."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        while line := handle.readline(MAX_LINE):
            yield line


def _json_rows(file: Path) -> Iterator[Row]:
    known, number, inside = False, 0, False
    for text in _lines(file):
        begins, inside = not inside, not text.endswith("\n")
        number += begins
        if not begins or not text.strip():  # the rest of a row that was too long, or a blank line
            continue
        try:
            row = read_json(text)
        except ValueError as error:
            cut = len(text) == MAX_LINE
            yield number, "", f"row of more than {MAX_LINE} characters" if cut else f"row is {error}"
            continue
        found = row.get("paraphrases", row.get("paraphrase")) if isinstance(row, dict) else None
        found = [found] if isinstance(found, str) else found
        caption = row.get("caption") if isinstance(row, dict) else None
        if isinstance(caption, str) and isinstance(found, list) and all(isinstance(p, str) for p in found):
            known = True
            yield number, caption, found
        elif not known:
            keys = ", ".join(map(repr, list(row)[:8])) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"'{file}':{number} has no caption and paraphrase: it has {keys}. Name the keys so")
        else:
            yield number, "", "row without a caption and a paraphrase"


def _csv_rows(file: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 24)
    lines = (text.replace("\0", "\ufffd") for text in _lines(file))
    reader = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    header = [h.strip().lower() for h in next(reader, [])]
    if "caption" not in header or not {"paraphrase", "paraphrases"} & set(header):
        shown = ", ".join(repr(h[:40]) for h in header[:8]) or "nothing"
        raise UserError(f"'{file}' needs a header line with the columns caption,paraphrase: it has {shown}")
    caption = header.index("caption")
    paraphrase = header.index("paraphrase" if "paraphrase" in header else "paraphrases")
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, "", f"row is not CSV: {error}"
            continue
        if row and len(row) != len(header):
            yield number, "", f"row has {len(row)} columns: expected {len(header)}"
        elif row:
            yield number, row[caption], [row[paraphrase]]


def dump_json(value: Any) -> str:
    """JSON that is the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
