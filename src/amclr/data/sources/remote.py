"""Data sets behind a URL: copied once into the cache, with fsspec."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache as remembered
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from filelock import FileLock
from tqdm import tqdm

from amclr.data.sources.rows import printable
from amclr.utils.errors import UserError
from amclr.utils.files import write_text
from amclr.utils.randomness import derive

STAMPS = (
    "ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "modified", "modify", "updated",
    "created", "last_write_time", "server_modified", "checksum", "Content-MD5", "md5Hash", "Digest", "content_hash",
    "sha", "sha256", "blob_id",
)  # fmt: skip
"""Keys under which file systems report something that changes with a file."""
REFUSED = ("dask", "dvc", "jlab", "jupyter", "pyscript", "reference")
"""URL schemes that run code, or whose listing may point to any file of this machine."""
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def fetch(url: str, cache: Path, progress: bool = True) -> Path:
    """The local copy of a file or folder behind a URL such as s3://bucket/folder; only changed files are copied again.

    A URL with `*` or braces, such as https://host/{000..012}.tar, gives a folder of all matches. Raises UserError
    for a scheme that is unknown, refused or not installed, and if nothing is there or it cannot be reached.
    """
    import fsspec

    scheme = url.partition("://")[0].lower()
    if scheme in REFUSED or "::" in url:
        what = "a chain of URLs" if "::" in url else f"{scheme}:// may run code"
        raise UserError(f"'{printable(url)}': {what}; save the files in a folder and give that")
    with _explained("read", url):
        system, path = fsspec.core.url_to_fs(url)
    target = cache / "remote" / f"{derive(url):016x}"
    with _explained("fetch", url):
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            return _fetch(url, system, path, target, progress)


def braces(text: str) -> list[str]:
    """The patterns that `{000..012}` and `{a,b}` in a text stand for."""
    group = re.search(r"\{([^{}]*)\}", text)
    if not group:
        return [text]
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        low, high = int(limits[1]), int(limits[2])
        if high - low > 1_000_000:
            raise UserError(f"'{printable(text)}' stands for {high - low:,} files")
        parts = [f"{k:0{len(limits[1])}d}" for k in range(low, high + 1)]
    else:
        parts = group[1].split(",")
    return [p for part in parts for p in braces(text[: group.start()] + part + text[group.end() :])]


@contextmanager
def _explained(action: str, url: str) -> Iterator[None]:
    """Turn whatever a file system raises, which differs between them, into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # HTTP raises "not found" for every failure, with the real one as its cause.
        cause = error.__cause__ or error
        status = getattr(cause, "status", 404 if cause is error else 0)
        if isinstance(error, FileNotFoundError) and status in (404, 410):
            raise UserError(f"there is nothing at '{printable(url)}'") from None
        reason = " ".join(str(cause).split()) or type(cause).__name__
        hint = ": free some space, or give another --cache" if getattr(cause, "errno", 0) in DISK_FULL else ""
        raise UserError(f"cannot {action} '{printable(url)}': {printable(reason)}{hint}") from None


def _fetch(url: str, system: Any, path: str, target: Path, progress: bool) -> Path:
    with _explained("list", url):
        info = remembered(system.info)  # a request each, over HTTP
        names = _list(url, system, info, path)
        stamps = {f: _stamp(info(f)) for f in names}
    record = target.with_suffix(".json")
    try:
        known: dict[str, str] = dict(json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    for name in names.values():
        if not name or not (target / name).resolve().is_relative_to(target.resolve()):
            raise UserError(f"'{printable(url)}' lists a name that leaves its folder: '{printable(name)}'")
    todo = [
        f for f, name in names.items() if not (stamps[f] and known.get(name) == stamps[f] and (target / name).is_file())
    ]
    bar = tqdm(todo, f"Fetching {printable(url)}", unit="file", leave=False, disable=not progress)
    for done, f in enumerate(bar, 1):
        file = target / names[f]
        part = file.with_name(f"{file.name}.part")
        try:
            with _explained("fetch", f):
                file.parent.mkdir(parents=True, exist_ok=True)
                system.get_file(f, str(part))
                os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
        known[names[f]] = stamps[f]
        if done % 100 == 0 or done == len(todo):
            write_text(record, json.dumps(known))
    for name in known.keys() - set(names.values()):  # removed at the source
        (target / name).unlink(missing_ok=True)
    return target / names[path] if path in names else target


def _list(url: str, system: Any, info: Callable[[str], dict[str, Any]], path: str) -> dict[str, str]:
    """The files behind a path or pattern, each with its name relative to their common folder."""
    web = url.lower().startswith("http")
    files: list[str] = []
    folders: list[str] = []
    for pattern in braces(path):
        # In a web address, a question mark starts the query, such as a signature.
        matches = sorted(system.glob(pattern)) if set(pattern) & set("*" if web else "*?[") else [pattern]
        for match in matches:
            details = info(match)
            if details["type"] == "directory" or (web and str(details.get("url", match)).endswith("/")):
                folders.append(_plain(match, web).rstrip("/"))
                files += system.find(match)
            else:
                folders.append(_plain(match, web).rpartition("/")[0])
                files.append(match)
    if not files:
        raise UserError(f"there is nothing at '{printable(url)}'")
    base = os.path.commonpath(folders)
    names = {f: str(PurePosixPath(_plain(f, web)).relative_to(base)) for f in files if not f.endswith("/")}
    names = {f: name for f, name in names.items() if name != "."}  # a web page links to itself, for sorting
    if len(set(names.values())) < len(names):
        raise UserError(f"'{printable(url)}' has several files of the same name: fetch them, and give the folder")
    return names


def _plain(path: str, web: bool) -> str:
    """The local name of a path: without the query of a web address, such as a signature."""
    return unquote(path.partition("?")[0].partition("#")[0]) if web else path


def _stamp(info: Mapping[str, Any]) -> str:
    """A text that changes with a file; empty if its file system reports only a length, so that it is copied again."""
    stamps = [f"{k}={info[k]}" for k in STAMPS if info.get(k)]
    return "|".join([str(info.get("size")), *stamps]) if stamps else ""
