"""WebDataset tars, read by an index: an image is a place in its tar, so that order and losses are exact.

Members that share the name before the first dot make a sample: `key.jpg` with `key.txt` or
`key.json`. Members are never unpacked and other kinds never looked at. A corrupt header or a cut-off
end loses only what it hits, and is named.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from tqdm import tqdm

from amclr.config.schema import SourceConfig
from amclr.data.images.decode import Location
from amclr.data.sources.rows import IMAGE_SUFFIXES, Reading, Row, clean, read_json, row_of
from amclr.utils.errors import UserError
from amclr.utils.files import read_packed, write_packed
from amclr.utils.randomness import derive

FORMAT = 1
BLOCK = 512
MAX_TEXT = 4 << 20
"""Larger members of text are not read: bytes."""
MAX_HEADER = 1 << 20
"""Longer names and extended headers are taken for damage: bytes."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7z", b"(\xb5")
SUFFIXES = [s.removeprefix(".") for s in dict.fromkeys((".jpg", ".jpeg", ".png", *sorted(IMAGE_SUFFIXES)))]


@dataclass(slots=True)
class Member:
    """A regular file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class Damage:
    """A stretch of a tar that is no tar, and what is lost by it. blamed: whether a sample's reject names it."""

    reason: str
    blamed: bool = False


def members(handle: BinaryIO, end: int) -> Iterator[Member | Damage]:
    """The regular files in a tar of `end` bytes and, between them, what is damaged.

    After a damaged header the next whole one is looked for, block by block. A member that claims
    more bytes than there are is damage; nothing is ever set aside for what a header claims.
    """
    offset, name, size, ended = 0, "", -1, False
    while offset < end:
        handle.seek(offset)
        block = handle.read(BLOCK)
        if len(block) < BLOCK:
            if any(block):
                yield Damage(f"tar is cut off in a header at byte {offset}")
            return
        if not any(block):  # the end of an archive, after which another may have been appended
            ended = True
            zeros = handle.read(1 << 20)
            offset += BLOCK + (len(zeros) - len(zeros.lstrip(b"\0"))) // BLOCK * BLOCK
            continue
        ended = False
        header = _header(block)
        if header is None:
            start = offset
            while header is None and offset < end:
                offset += BLOCK
                header = _header(handle.read(BLOCK))
            yield Damage(f"corrupt tar header at byte {start}, {offset - start} bytes passed over")
            name, size = "", -1
            if header is None:
                return
        kind, length = header.type, header.size if size < 0 else size
        after = offset + BLOCK + -(-length // BLOCK) * BLOCK
        if length < 0 or offset + BLOCK + length > end:
            yield Damage(f"tar is cut off at byte {end}: '{name or header.name}' would end at byte "
                         f"{offset + BLOCK + length}")  # fmt: skip
            return
        if kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if length > MAX_HEADER:
                yield Damage(f"tar header at byte {offset} claims {length} bytes")
            elif kind == tarfile.GNUTYPE_LONGNAME:
                name = handle.read(length).rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                fields = _extended(handle.read(length))
                name, size = fields.get("path", name), int(fields.get("size", size))
        else:
            if kind in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and not header.name.endswith("/"):
                yield Member(name or header.name, offset + BLOCK, length)
            name, size = "", -1
        offset = after
    if not ended:
        yield Damage(f"tar has no end: it may be cut off at byte {end}")


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _extended(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE` of an extended header that matter here."""
    found: dict[str, str] = {}
    while content:
        digits, _, rest = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 7 or not len(digits) < int(digits) <= len(content):
            break
        key, _, value = rest[: int(digits) - len(digits) - 2].partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) < 20):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[int(digits) :]
    return found


@dataclass
class _Index:
    """What a tar holds: rows as (name, offset, size, captions, paraphrases, split), and rejects as (key, reason).

    fault: why nothing in it can be read.
    """

    rows: list[list[Any]] = field(default_factory=list)
    rejects: list[list[str]] = field(default_factory=list)
    fault: str = ""


def read_tars(reading: Reading) -> Iterator[Row]:
    """WebDataset tars: key.jpg (or .png ...) with key.txt (a caption) or key.json (caption, captions, text ...)."""
    work = partial(_indexed, source=reading.source, cache=reading.cache / "tars", bare=reading.bare)
    workers = min(os.cpu_count() or 1, 16)
    bar = partial(tqdm, total=len(reading.files), desc="Indexing tars", unit="tar", leave=False,
                  disable=not reading.progress or len(reading.files) < 8)  # fmt: skip
    if len(reading.files) < 8 or workers == 1:
        yield from _rows(reading, bar(map(work, reading.files)))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from _rows(reading, bar(pool.map(work, reading.files)))


def _rows(reading: Reading, indices: Iterable[_Index]) -> Iterator[Row]:
    faults = 0
    for file, index in zip(reading.files, indices, strict=True):
        of_file, called, path = reading.split_of(file), reading.name(file), str(file.absolute())
        if index.fault:
            reading.reject(file, index.fault)
            reading.notes.append(f"{called} cannot be read at all: {index.fault}")
            faults += 1
            if faults == len(reading.files):
                raise UserError(f"'{file}' {index.fault}")
        for key, reason in index.rejects:
            reading.reject(file, reason, key=key)
        for name, offset, size, captions, paraphrases, split in index.rows:
            place = Location(path, offset, size)
            yield Row(place, captions, paraphrases, name=name, split=split or of_file, file=called)


def _indexed(file: Path, source: SourceConfig, cache: Path, bare: bool) -> _Index:
    """The index of a tar; kept between runs, and made anew where the tar has changed."""
    stat = file.stat()
    settings = (source.image_column, source.caption_column, *(["bare"] if bare else []))
    what = derive(FORMAT, str(file.resolve()), stat.st_size, stat.st_mtime_ns, *settings)
    kept = cache / f"{what:016x}.json.gz"
    try:
        return _Index(**read_packed(kept))
    except TypeError:  # there is none, or not such a one
        index = index_tar(file, source, bare)
    cache.mkdir(parents=True, exist_ok=True)
    write_packed(kept, vars(index))
    return index


def index_tar(file: Path, source: SourceConfig, bare: bool = False) -> _Index:
    """Group a tar's members into samples; bare: those without a caption too."""
    index = _Index()
    with file.open("rb") as handle:
        start = handle.read(BLOCK)
        if start.startswith(COMPRESSED):
            index.fault = "is compressed, so that its members cannot be read at their places: unpack it (gunzip ...)"
            return index
        if not start:
            index.fault = "is empty (0 bytes)"
            return index
        group: list[Member] = []
        damage: list[Damage] = []
        near: list[Damage] = []  # damage in front of the group, inside it, or behind it
        behind: list[Damage] = []
        for member in members(handle, file.stat().st_size):
            if isinstance(member, Damage):
                for some in (damage, near, behind):
                    some.append(member)
                continue
            called = PurePosixPath(member.name).name
            if not called or called.startswith("."):
                continue
            if group and (_key(member) != _key(group[0]) or _field(member) in map(_field, group)):
                _finish(handle, group, near, index, source, bare)
                group, near = [], behind
            group.append(member)
            behind = []
        if group:
            _finish(handle, group, near, index, source, bare)
        index.rejects += [["", d.reason] for d in damage if not d.blamed]
        if damage and not index.rows and len(damage) == len(index.rejects):
            return _Index(fault=f"is no tar: {damage[0].reason}")
    return index


def _key(member: Member) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.partition(".")[0]))


def _field(member: Member) -> str:
    return PurePosixPath(member.name).name.partition(".")[2].lower()


def _finish(
    handle: BinaryIO, group: list[Member], near: list[Damage], index: _Index, source: SourceConfig, bare: bool
) -> None:
    """Make a row of the members of a sample, or a reject that says what it lacks."""
    key, fields = _key(group[0]), {_field(m): m for m in group}
    wanted = [source.image_column.lower()] if source.image_column else SUFFIXES
    suffix = next((s for s in wanted if s in fields), None)
    row, fault = _captions(handle, fields, source)
    if bare and row is None:
        row, fault = Row("", []), None
    if suffix is None:
        fault = f"no image beside {', '.join(sorted(fields))[:80]}"
    if fault is None and row and suffix:
        place = fields[suffix]
        index.rows.append(
            [f"{key}.{suffix}", place.offset, place.size, list(row.captions), [list(p) for p in row.paraphrases],
             row.split]
        )  # fmt: skip
        return
    cause = next((d for d in near if not d.blamed), None)
    if cause:
        cause.blamed = True
        fault = f"{fault} ({cause.reason})"
    index.rejects.append([key, str(fault)])


def _captions(handle: BinaryIO, fields: dict[str, Member], source: SourceConfig) -> tuple[Row | None, str | None]:
    """The captions of a sample, from its json where that has some, else from its texts; or what is wrong."""
    texts = sorted(f for f in fields if f == "txt" or f.endswith(".txt") or f in ("text", "caption"))
    row, fault = None, "no caption"
    for name in (["json"] if "json" in fields else []) + texts:
        member = fields[name]
        if member.size > MAX_TEXT:
            fault = f"{name} of {member.size} bytes: over the limit of {MAX_TEXT}"
            continue
        handle.seek(member.offset)
        content = handle.read(member.size)
        try:
            entry = read_json(content) if name == "json" else {"caption": content.decode("utf-8")}
        except UnicodeDecodeError as error:
            fault = f"{name} is not valid utf-8 ({error.reason})"
            continue
        except ValueError as error:
            fault = f"{name} is {error}"
            continue
        found = row_of(entry, source, "") if isinstance(entry, dict) else None
        if found is None or not any(map(clean, found.captions)):
            if name != "json":
                row = row or found  # its reject says that it is empty
            continue
        if row is None:
            row = found
        elif name != "json":
            row.captions = [*row.captions, *found.captions]
        if name == "json":
            break
    return (row, None) if row else (None, fault)
