"""A store of paraphrases: computed once, read by every run, joined to captions by their text.

`amclr paraphrase` writes a store as a folder, `DATA/paraphrases/`, with a folder per version of the settings:

    latest                    the name of the version that was completed last, which is used
    rules-k3-1f2e3d4c/        a version, named by its settings
        store.json            the settings and, once complete, the number of captions
        paraphrases.jsonl     a row per caption, sorted by caption
        report.json           how many candidates were kept, and how many each filter rejected
        sample.txt            some captions and their paraphrases, for reading
        parts/                finished batches of an incomplete version

A store written by hand is a CSV, TSV or JSONL file with a caption and a paraphrase (or a list of them) per row.
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
    """Paraphrases by caption. Captions match if they are equal after `clean`, which normalises white space."""

    path: Path
    texts: Mapping[str, tuple[str, ...]]
    rows: int
    rejects: tuple[Reject, ...] = ()
    """Rows that cannot be used."""
    version: str = ""
    """Name of the version; empty for a file written by hand."""

    def of(self, caption: str) -> tuple[str, ...]:
        """The paraphrases of a caption."""
        return self.texts.get(clean(caption), ())


class Captioned(Protocol):
    """The fields of a sample that this module needs: `paraphrases[k]` reword `captions[k]`."""

    @property
    def captions(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def paraphrases(self) -> tuple[tuple[str, ...], ...]: ...  # noqa: D102


S = TypeVar("S", bound=Captioned)


def attach(samples: Sequence[S], store: Store | None) -> tuple[S, ...]:
    """The samples with the store's paraphrases appended to their own, without repetitions."""
    if store is None:
        return tuple(samples)

    def joined(sample: S) -> S:
        existing = sample.paraphrases or ((),) * len(sample.captions)
        both = tuple(
            tuple(dict.fromkeys((*paraphrases, *store.of(caption))))
            for caption, paraphrases in zip(sample.captions, existing, strict=True)
        )
        return sample if both == existing else replace(sample, paraphrases=both)  # type: ignore[type-var]

    return tuple(joined(s) for s in samples)


def find_store(root: Path, setting: str) -> Store | None:
    """The store that a setting names: a file, the folder of a store or of a version, or a version of `root`'s store.

    Empty means the latest version in `root/paraphrases`, if that exists; `none` means no store. Raises UserError,
    saying what to type, for a store that is missing, incomplete or unreadable.
    """
    if setting == "none":
        return None
    default = root / FOLDER
    if not setting:
        return read_store(default) if _versions(default) else None
    for path in (Path(setting).expanduser(), default / setting):
        if path.exists():
            return read_store(path)
    raise UserError(
        f"no paraphrases at '{setting}': give a file or a folder that `amclr paraphrase` wrote, or "
        "--source.paraphrases none"
    )


def read_store(path: Path) -> Store:
    """Read a store: a file written by hand, the folder of a version, or the latest of a folder of versions.

    Unusable rows of a file are listed in `rejects`. Raises UserError if there is nothing to read, columns are
    missing, or the version is incomplete.
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
    store = _read_table(file)
    # An update that was interrupted after writing its rows leaves more rows than this number, never fewer.
    if store.rows < about["captions"] or store.rejects:
        reason = str(store.rejects[0]) if store.rejects else f"{store.rows} rows are left of {about['captions']}"
        raise UserError(f"'{file}' is damaged ({reason}): remove '{folder}' and paraphrase again")
    return replace(store, path=folder, version=folder.name)


def _incomplete(folder: Path) -> UserError:
    return UserError(
        f"the paraphrases in '{folder}' are not complete: give the same `amclr paraphrase` command again to resume, "
        "or --source.paraphrases none"
    )


def _load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"'{file}' cannot be read ({error}): remove it and paraphrase again") from None
    return content if isinstance(content, dict) else {}


def _read_table(file: Path) -> Store:
    if file.suffix.lower() not in TABLES:
        raise UserError(f"'{file}' is not a table of paraphrases: expected a .csv, .tsv or .jsonl file")
    parse = _json_rows if file.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows
    texts: dict[str, dict[str, None]] = {}
    rejects: list[Reject] = []
    total = 0
    for line, caption, paraphrases in parse(file):
        total += 1
        cleaned = [] if isinstance(paraphrases, str) else [clean(p) for p in paraphrases]
        reason = paraphrases if isinstance(paraphrases, str) else _row_fault(clean(caption), cleaned)
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


ParsedRow = tuple[int, str, "list[str] | str"]
"""Line, caption, and its paraphrases or the reason why the row is unusable."""


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file; overlong ones come in pieces, so that memory stays bounded."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        while line := handle.readline(MAX_LINE):
            yield line


def _json_rows(file: Path) -> Iterator[ParsedRow]:
    any_valid, number, continues = False, 0, False
    for text in _lines(file):
        is_start, continues = not continues, not text.endswith("\n")
        number += is_start
        if not is_start or not text.strip():  # the rest of an overlong row, or a blank line
            continue
        try:
            row = read_json(text)
        except ValueError as error:
            overlong = len(text) == MAX_LINE
            yield number, "", f"row of more than {MAX_LINE} characters" if overlong else f"row is {error}"
            continue
        texts = row.get("paraphrases", row.get("paraphrase")) if isinstance(row, dict) else None
        texts = [texts] if isinstance(texts, str) else texts
        caption = row.get("caption") if isinstance(row, dict) else None
        if isinstance(caption, str) and isinstance(texts, list) and all(isinstance(p, str) for p in texts):
            any_valid = True
            yield number, caption, texts
        elif not any_valid:
            keys = ", ".join(map(repr, list(row)[:8])) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"'{file}':{number} has no caption and paraphrase: it has {keys}. Rename them")
        else:
            yield number, "", "row without a caption and a paraphrase"


def _csv_rows(file: Path) -> Iterator[ParsedRow]:
    csv.field_size_limit(1 << 24)
    lines = (text.replace("\0", "\ufffd") for text in _lines(file))
    reader = csv.reader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    header = [h.strip().lower() for h in next(reader, [])]
    if "caption" not in header or not {"paraphrase", "paraphrases"} & set(header):
        columns = ", ".join(repr(h[:40]) for h in header[:8]) or "nothing"
        raise UserError(f"'{file}' needs a header line with the columns caption,paraphrase: it has {columns}")
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
    """Compact JSON, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
