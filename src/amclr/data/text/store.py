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
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from amclr.data.sources.rows import Reject, caption_fault, clean, read_json
from amclr.data.text.wording import RULES, changed, reword, words
from amclr.utils.errors import UserError
from amclr.utils.files import write_text

FORMAT = 1
FOLDER, LATEST, SETTINGS, ROWS, PARTS = "paraphrases", "latest", "store.json", "paraphrases.jsonl", "parts"
TABLES = frozenset({".csv", ".tsv", ".txt", ".jsonl", ".ndjson"})
MAX_CHARACTERS = 20_000
MAX_LINE = 1 << 22
SAMPLED = 20

# -- filters --------------------------------------------------------------------------------------

REASONS = {
    "unfinished": "cut off before its end",
    "garbled": "unreadable characters",
    "same": "the caption itself, or a paraphrase that is there already",
    "short": "too short",
    "long": "too long",
    "numbers": "other numbers",
    "colours": "other colours",
    "negation": "other negation",
    "sides": "other sides, left and right",
    "similarity": "too far from the caption's meaning",
}
"""Why a candidate is rejected, in the order in which the filters look."""


@dataclass(frozen=True)
class Filters:
    """What a candidate must meet to be a paraphrase of its caption."""

    shortest: float = 0.5
    """Words of a paraphrase, as a share of its caption's."""
    longest: float = 2.0
    """The same, from above; four words more than the caption are always allowed."""
    keep_facts: bool = True
    """Reject what changes numbers, colours, negation, or left and right."""

    def fault(self, caption: str, candidate: str) -> str | None:
        """Why a candidate is no paraphrase of the caption, one of `REASONS`; None if it may be one."""
        if "\ufffd" in candidate or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in candidate):
            return "garbled"
        had, has = words(caption[:MAX_CHARACTERS]), words(candidate[:MAX_CHARACTERS])
        if had == has:
            return "same"
        if not has or len(has) < self.shortest * len(had):
            return "short"
        if len(has) > max(self.longest * len(had), len(had) + 4) or len(candidate) > MAX_CHARACTERS:
            return "long"
        return changed(caption, candidate) if self.keep_facts else None


def choose(
    caption: str,
    candidates: Sequence[str | None],
    k: int,
    filters: Filters,
    similar: Callable[[str, str], bool] = lambda caption, candidate: True,
) -> tuple[list[str], Counter[str]]:
    """The first k candidates that pass the filters and differ from each other, and why others were rejected.

    A candidate that is None was cut off before its end. similar: whether a candidate means what its
    caption means, of (caption, candidate). Candidates after the k-th that passes are not looked at.
    """
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    rejected: Counter[str] = Counter()
    for candidate in candidates:
        if len(kept) == k:
            break
        text = " ".join((candidate or "").split())
        reason = "unfinished" if candidate is None else filters.fault(caption, text)
        if reason is None and tuple(words(text)) in seen:
            reason = "same"
        if reason is None and not similar(caption, text):
            reason = "similarity"
        if reason:
            rejected[reason] += 1
            continue
        seen.add(tuple(words(text)))
        kept.append(text)
    return kept, rejected


# -- reading --------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Rewording:
    """One paraphrase of a caption, always the same one, for queries in other words."""

    by: str
    """`rules`, or the file or folder of a store."""
    digest: str
    """Of what it says: the same where every caption has the same paraphrase."""
    of: Callable[[str], str | None]
    """The paraphrase of a caption, or None where there is none."""

    @classmethod
    def find(cls, setting: str) -> Rewording:
        """By `rules`, the first that `amclr paraphrase --model rules` keeps; else the first in a store.

        setting: `rules`, a file, or a folder that `amclr paraphrase` wrote. Raises UserError for a store that
        cannot be read, and says what to type.
        """
        if setting == "rules":
            filters = Filters()
            return cls(
                setting, f"rules {RULES}",
                lambda caption: next(iter(choose(caption, reword(caption, 1, 0), 1, filters)[0]), None),
            )  # fmt: skip
        path = Path(setting).expanduser()
        if not path.exists():
            raise UserError(
                f"no paraphrases at '{setting}': give rules, a file with the columns caption,paraphrase, or a folder "
                "that `amclr paraphrase` wrote"
            )
        try:
            store = read_store(path)
        except UserError as error:  # it knows the options of training
            told = str(error).replace("--source.paraphrases none", "give rules")
            raise UserError(told.replace("with --source.paraphrases", "by its folder")) from None
        asked = hashlib.sha256(_dump(sorted(store.texts.items())).encode("utf-8", "backslashreplace"))
        return cls(
            setting, asked.hexdigest(),
            lambda caption: next((p for p in store.of(caption) if words(p) != words(caption)), None),
        )  # fmt: skip


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


# -- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A caption, the paraphrases kept, and how many candidates each filter rejected."""

    caption: str
    paraphrases: tuple[str, ...]
    rejected: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Entry:
        """The entry that a row of a store's file holds."""
        return cls(row["caption"], tuple(row["paraphrases"]), row.get("rejected", {}))

    def line(self) -> str:
        """The entry as a row of a store's file."""
        row = {"caption": self.caption, "paraphrases": list(self.paraphrases)}
        return _dump(row | ({"rejected": dict(sorted(self.rejected.items()))} if self.rejected else {}))


class Version:
    """A version of a store that is being made: what is done of it, batch by batch, by one process or several.

    A batch is a line of a part file of its process, synced before the next is begun. A kill leaves
    at most a last line that is cut off, which is dropped; so a batch is there as a whole or not at all.
    """

    def __init__(self, store: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        """Begin or go on with the version of these settings. Raises UserError where it cannot be written."""
        digest = hashlib.sha256(_dump(settings).encode()).hexdigest()[:8]
        plain = re.sub(r"[^A-Za-z0-9]+", "-", Path(str(settings["model"])).name).strip("-").lower()[:40] or "model"
        self.store, self.name = store, f"{plain}-k{settings['k']}-{digest}"
        self.folder = store / self.name
        self.settings = dict(settings)
        self._part = self.folder / PARTS / f"{rank:05d}.jsonl"
        try:
            self._part.parent.mkdir(parents=True, exist_ok=True)
            if rank == 0 and not (self.folder / SETTINGS).is_file():
                self._write_settings(None)
            _drop_cut_line(self._part)
        except OSError as error:
            raise UserError(
                f"cannot write paraphrases in '{store}' ({error.strerror}): give a folder with --out, and later "
                "--source.paraphrases with the same folder"
            ) from None
        self._base = {e.caption: e for e in self._finished()}

    def todo(self, captions: Iterable[str]) -> list[str]:
        """The captions that the finished part of the version lacks, each once, the longest first.

        A function of the captions alone until the version is complete: what parts hold is not looked at.
        """
        distinct = {key for c in captions if (key := clean(c)) not in self._base}
        return sorted(distinct, key=lambda c: (-len(c), c))

    def done(self) -> dict[str, Entry]:
        """What the parts hold, by caption."""
        found: dict[str, Entry] = {}
        for part in sorted((self.folder / PARTS).glob("*.jsonl")):
            for text in _lines_of_part(part):
                for row in json.loads(text):
                    entry = Entry.of(row)
                    found.setdefault(entry.caption, entry)
        return found

    def append(self, batch: Sequence[Entry]) -> None:
        """Add a batch to this process's part, durably."""
        text = "[" + ",".join(e.line() for e in batch) + "]\n"
        with self._part.open("ab") as handle:
            handle.write(text.encode("utf-8", "backslashreplace"))
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self) -> dict[str, Any]:
        """Join the parts with what was finished before into one file, and write the report. Returns the report."""
        entries = self.done() | self._base
        ordered = [entries[c] for c in sorted(entries)]
        write_text(self.folder / ROWS, "".join(f"{e.line()}\n" for e in ordered))
        report = summarise(ordered, int(self.settings["k"]))
        write_text(self.folder / "report.json", json.dumps(report, indent=2) + "\n")
        write_text(self.folder / "sample.txt", sample_sheet(ordered))
        self._write_settings(len(ordered))
        write_text(self.store / LATEST, f"{self.name}\n")
        for part in (self.folder / PARTS).glob("*.jsonl"):
            part.unlink()
        (self.folder / PARTS).rmdir()
        return report

    def _finished(self) -> Iterator[Entry]:
        file = self.folder / ROWS
        for line in file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []:
            try:
                yield Entry.of(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"'{file}' is damaged: remove '{self.folder}' and paraphrase again") from None

    def _write_settings(self, captions: int | None) -> None:
        about = {"format": FORMAT, "captions": captions, "settings": self.settings}
        write_text(self.folder / SETTINGS, json.dumps(about, indent=2, sort_keys=True) + "\n")


def summarise(entries: Sequence[Entry], k: int) -> dict[str, Any]:
    """What a store holds: captions, paraphrases, captions with fewer than k, and rejects by reason."""
    rejected: Counter[str] = Counter()
    for e in entries:
        rejected.update(e.rejected)
    return {
        "captions": len(entries),
        "paraphrases": sum(len(e.paraphrases) for e in entries),
        "captions_with": {str(n): sum(len(e.paraphrases) == n for e in entries) for n in range(k + 1)},
        "rejected": {r: rejected[r] for r in sorted(rejected)},
    }


def sample_sheet(entries: Sequence[Entry]) -> str:
    """Some captions, always the same ones of the same store, with their paraphrases, as plain text."""
    picked = sorted(entries, key=lambda e: hashlib.sha256(e.caption.encode("utf-8", "surrogatepass")).digest())
    blocks = ["\n".join([e.caption, *(f"    {p}" for p in e.paraphrases or ["(none)"])]) for e in picked[:SAMPLED]]
    return "\n\n".join(blocks) + "\n"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def _lines_of_part(part: Path) -> Iterator[str]:
    with part.open(encoding="utf-8") as handle:
        for text in handle:
            if text.endswith("]\n"):  # else it was cut off, and its batch is done again
                yield text


def _drop_cut_line(part: Path) -> None:
    if not part.is_file():
        part.touch()
        return
    whole = part.read_bytes()
    end = whole.rfind(b"]\n") + 2 if b"]\n" in whole else 0
    if end < len(whole):
        with part.open("r+b") as handle:
            handle.truncate(end)
