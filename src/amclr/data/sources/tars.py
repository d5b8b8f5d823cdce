"""Reader of WebDataset tars. An index gives each image's place in its tar, so samples can be read in any order.

Members that share the name before the first dot form a sample: `key.jpg` with `key.txt` or `key.json`. Members are
never unpacked, and other suffixes are ignored. A corrupt header or a truncated end loses only the samples it
affects, and is reported.
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
from amclr.data.sources.rows import IMAGE_SUFFIXES, Reading, SourceRow, clean, read_json, row_of
from amclr.utils.errors import UserError
from amclr.utils.files import read_packed, write_packed
from amclr.utils.randomness import derive

FORMAT = 1
BLOCK = 512
MAX_TEXT = 4 << 20
"""Larger text members, in bytes, are not read."""
MAX_HEADER = 1 << 20
"""Longer names and extended headers, in bytes, count as damage."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7z", b"(\xb5")
SUFFIXES = [s.removeprefix(".") for s in dict.fromkeys((".jpg", ".jpeg", ".png", *sorted(IMAGE_SUFFIXES)))]


@dataclass(slots=True)
class Member:
    """A regular file in a tar: its name and the place of its bytes."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class Damage:
    """A damaged stretch of a tar. blamed: whether the reject of a sample names it."""

    reason: str
    blamed: bool = False


def members(handle: BinaryIO, end: int) -> Iterator[Member | Damage]:
    """The regular files in a tar of `end` bytes and, between them, damaged stretches.

    After a damaged header, the next valid one is searched for, block by block. A member that claims more bytes
    than remain is damage; memory is never allocated by what a header claims.
    """
    offset, name, size, ended = 0, "", -1, False
    while offset < end:
        handle.seek(offset)
        block = handle.read(BLOCK)
        if len(block) < BLOCK:
            if any(block):
                yield Damage(f"tar is cut off in a header at byte {offset}")
            return
        if not any(block):  # the end of an archive; another may be appended to it
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
            yield Damage(f"corrupt tar header at byte {start}, {offset - start} bytes skipped")
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
        yield Damage(f"tar has no end marker: it may be cut off at byte {end}")


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _extended(content: bytes) -> dict[str, str]:
    """The path and size records (`LENGTH KEY=VALUE`) of an extended header."""
    records: dict[str, str] = {}
    while content:
        digits, _, rest = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 7 or not len(digits) < int(digits) <= len(content):
            break
        key, _, value = rest[: int(digits) - len(digits) - 2].partition(b"=")
        if key == b"path" or (key == b"size" and value.isdigit() and len(value) < 20):
            records[key.decode()] = value.decode("utf-8", "surrogateescape")
        content = content[int(digits) :]
    return records


@dataclass
class _Index:
    """The content of a tar: rows (name, offset, size, captions, paraphrases, split) and rejects (key, reason).

    fault: why the tar as a whole cannot be read.
    """

    rows: list[list[Any]] = field(default_factory=list)
    rejects: list[list[str]] = field(default_factory=list)
    fault: str = ""


def read_tars(reading: Reading) -> Iterator[SourceRow]:
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


def _rows(reading: Reading, indices: Iterable[_Index]) -> Iterator[SourceRow]:
    unreadable = 0
    for file, index in zip(reading.files, indices, strict=True):
        file_split, file_name, path = reading.split_of(file), reading.name(file), str(file.absolute())
        if index.fault:
            reading.reject(file, index.fault)
            reading.notes.append(f"{file_name} cannot be read at all: {index.fault}")
            unreadable += 1
            if unreadable == len(reading.files):
                raise UserError(f"'{file}' {index.fault}")
        for key, reason in index.rejects:
            reading.reject(file, reason, key=key)
        for name, offset, size, captions, paraphrases, split in index.rows:
            place = Location(path, offset, size)
            yield SourceRow(place, captions, paraphrases, name=name, split=split or file_split, file=file_name)


def _indexed(file: Path, source: SourceConfig, cache: Path, bare: bool) -> _Index:
    """The index of a tar, from the cache unless the tar or the settings have changed."""
    stat = file.stat()
    settings = (source.image_column, source.caption_column, *(["bare"] if bare else []))
    key = derive(FORMAT, str(file.resolve()), stat.st_size, stat.st_mtime_ns, *settings)
    cached = cache / f"{key:016x}.json.gz"
    try:
        return _Index(**read_packed(cached))
    except TypeError:  # there is none, or it is damaged
        index = index_tar(file, source, bare)
    cache.mkdir(parents=True, exist_ok=True)
    write_packed(cached, vars(index))
    return index


def index_tar(file: Path, source: SourceConfig, bare: bool = False) -> _Index:
    """Group the members of a tar into samples. bare: include images without a caption."""
    index = _Index()
    with file.open("rb") as handle:
        start = handle.read(BLOCK)
        if start.startswith(COMPRESSED):
            index.fault = "is compressed, so single members cannot be read from it: unpack it (gunzip ...)"
            return index
        if not start:
            index.fault = "is empty (0 bytes)"
            return index
        group: list[Member] = []
        damage: list[Damage] = []
        near: list[Damage] = []  # damage before the group, inside it, or after it
        after: list[Damage] = []
        for member in members(handle, file.stat().st_size):
            if isinstance(member, Damage):
                for damages in (damage, near, after):
                    damages.append(member)
                continue
            base_name = PurePosixPath(member.name).name
            if not base_name or base_name.startswith("."):
                continue
            if group and (_key(member) != _key(group[0]) or _field(member) in map(_field, group)):
                _finish(handle, group, near, index, source, bare)
                group, near = [], after
            group.append(member)
            after = []
        if group:
            _finish(handle, group, near, index, source, bare)
        index.rejects += [["", d.reason] for d in damage if not d.blamed]
        if damage and not index.rows and len(damage) == len(index.rejects):
            return _Index(fault=f"is not a tar: {damage[0].reason}")
    return index


def _key(member: Member) -> str:
    path = PurePosixPath(member.name)
    return str(path.with_name(path.name.partition(".")[0]))


def _field(member: Member) -> str:
    return PurePosixPath(member.name).name.partition(".")[2].lower()


def _finish(
    handle: BinaryIO, group: list[Member], near: list[Damage], index: _Index, source: SourceConfig, bare: bool
) -> None:
    """Turn the members of a sample into a row, or into a reject that says what is missing."""
    key, fields = _key(group[0]), {_field(m): m for m in group}
    wanted = [source.image_column.lower()] if source.image_column else SUFFIXES
    suffix = next((s for s in wanted if s in fields), None)
    row, fault = _captions(handle, fields, source)
    if bare and row is None:
        row, fault = SourceRow("", []), None
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


def _captions(handle: BinaryIO, fields: dict[str, Member], source: SourceConfig) -> tuple[SourceRow | None, str | None]:
    """The captions of a sample from its json, or else from its text members; or what is wrong with them."""
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
        new = row_of(entry, source, "") if isinstance(entry, dict) else None
        if new is None or not any(map(clean, new.captions)):
            if name != "json":
                row = row or new  # its reject says that it is empty
            continue
        if row is None:
            row = new
        elif name != "json":
            row.captions = [*row.captions, *new.captions]
        if name == "json":
            break
    return (row, None) if row else (None, fault)
