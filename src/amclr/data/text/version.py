"""Writing a version of a store of paraphrases, batch by batch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclr.data.sources.rows import clean
from amclr.data.text.store import FORMAT, LATEST, PARTS, ROWS, SETTINGS, dump_json
from amclr.utils.errors import UserError
from amclr.utils.files import write_text

SAMPLED = 20


@dataclass(frozen=True)
class ParaphrasedCaption:
    """A caption, its accepted paraphrases, and how many candidates each filter rejected."""

    caption: str
    paraphrases: tuple[str, ...]
    rejected: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> ParaphrasedCaption:
        """The entry of a row in a store's file."""
        return cls(row["caption"], tuple(row["paraphrases"]), row.get("rejected", {}))

    def line(self) -> str:
        """The entry as a row of a store's file."""
        row = {"caption": self.caption, "paraphrases": list(self.paraphrases)}
        return dump_json(row | ({"rejected": dict(sorted(self.rejected.items()))} if self.rejected else {}))


class Version:
    """A version of a store in the making, written batch by batch by one or several processes.

    Each process has a part file, and a batch is one line of it, synced before the next one starts. A kill can only
    truncate the last line, which is dropped later: a batch is stored completely or not at all.
    """

    def __init__(self, store: Path, settings: Mapping[str, Any], rank: int = 0) -> None:
        """Start or resume the version of these settings. Raises UserError if it cannot be written."""
        digest = hashlib.sha256(dump_json(settings).encode()).hexdigest()[:8]
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
        self._complete = {e.caption: e for e in self._read_complete()}

    def todo(self, captions: Iterable[str]) -> list[str]:
        """The captions that the completed version lacks, each once, longest first.

        The result ignores the part files: until the version is complete, it depends on the captions alone.
        """
        distinct = {key for c in captions if (key := clean(c)) not in self._complete}
        return sorted(distinct, key=lambda c: (-len(c), c))

    def done(self) -> dict[str, ParaphrasedCaption]:
        """The entries of the part files, by caption."""
        entries: dict[str, ParaphrasedCaption] = {}
        for part in sorted((self.folder / PARTS).glob("*.jsonl")):
            for text in _lines_of_part(part):
                for row in json.loads(text):
                    entry = ParaphrasedCaption.of(row)
                    entries.setdefault(entry.caption, entry)
        return entries

    def append(self, batch: Sequence[ParaphrasedCaption]) -> None:
        """Add a batch to this process's part, durably."""
        text = "[" + ",".join(e.line() for e in batch) + "]\n"
        with self._part.open("ab") as handle:
            handle.write(text.encode("utf-8", "backslashreplace"))
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self) -> dict[str, Any]:
        """Merge the parts and the previously completed entries into one file; write and return the report."""
        entries = self.done() | self._complete
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

    def _read_complete(self) -> Iterator[ParaphrasedCaption]:
        file = self.folder / ROWS
        for line in file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []:
            try:
                yield ParaphrasedCaption.of(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"'{file}' is damaged: remove '{self.folder}' and paraphrase again") from None

    def _write_settings(self, captions: int | None) -> None:
        about = {"format": FORMAT, "captions": captions, "settings": self.settings}
        write_text(self.folder / SETTINGS, json.dumps(about, indent=2, sort_keys=True) + "\n")


def summarise(entries: Sequence[ParaphrasedCaption], k: int) -> dict[str, Any]:
    """Counts of captions, of paraphrases, of captions by number of paraphrases, and of rejects by reason."""
    rejected: Counter[str] = Counter()
    for e in entries:
        rejected.update(e.rejected)
    return {
        "captions": len(entries),
        "paraphrases": sum(len(e.paraphrases) for e in entries),
        "captions_with": {str(n): sum(len(e.paraphrases) == n for e in entries) for n in range(k + 1)},
        "rejected": {r: rejected[r] for r in sorted(rejected)},
    }


def sample_sheet(entries: Sequence[ParaphrasedCaption]) -> str:
    """A fixed sample of the captions with their paraphrases, as plain text."""
    shuffled = sorted(entries, key=lambda e: hashlib.sha256(e.caption.encode("utf-8", "surrogatepass")).digest())
    blocks = ["\n".join([e.caption, *(f"    {p}" for p in e.paraphrases or ["(none)"])]) for e in shuffled[:SAMPLED]]
    return "\n\n".join(blocks) + "\n"


def _lines_of_part(part: Path) -> Iterator[str]:
    with part.open(encoding="utf-8") as handle:
        for text in handle:
            if text.endswith("]\n"):  # else it was cut off, and its batch is computed again
                yield text


def _drop_cut_line(part: Path) -> None:
    if not part.is_file():
        part.touch()
        return
    content = part.read_bytes()
    end = content.rfind(b"]\n") + 2 if b"]\n" in content else 0
    if end < len(content):
        with part.open("r+b") as handle:
            handle.truncate(end)
