"""Data sets behind a URL: copied once into the cache, through fsspec."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from amclr.data.rows import printable
from amclr.errors import UserError
from amclr.randomness import derive


def fetch(url: str, cache: Path, progress: bool = True) -> Path:
    """The local copy of a file or folder behind a URL such as s3://bucket/folder; only what changed is copied again.

    Raises UserError for a scheme that is unknown or not installed, and where there is nothing.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise UserError(f"cannot read '{printable(url)}': {printable(str(error))}") from None
    target = cache / "remote" / f"{derive(url):016x}"
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        return _fetch(url, system, path, target, progress)


def _fetch(url: str, system: Any, path: str, target: Path, progress: bool) -> Path:
    try:
        if system.isfile(path):
            found = {path: Path(path).name}
        else:
            found = {f: f[len(path.rstrip("/")) :].lstrip("/") for f in system.find(path)}
        if not found:
            raise UserError(f"there is nothing at '{url}'")
        stamps = {f: _stamp(system.info(f)) for f in found}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot list '{url}': {printable(str(error))}") from None
    record = target.with_suffix(".json")
    try:
        known: dict[str, str] = json.loads(record.read_text())
    except (OSError, ValueError):
        known = {}
    for name in found.values():
        if not name or not (target / name).resolve().is_relative_to(target.resolve()):
            raise UserError(f"'{url}' lists a name that leaves its folder: '{printable(name)}'")
    todo = [f for f, name in found.items() if known.get(name) != stamps[f] or not (target / name).is_file()]
    bar = tqdm(todo, f"Fetching {printable(url)}", unit="file", leave=False, disable=not progress)
    for done, f in enumerate(bar, 1):
        file = target / found[f]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        try:
            system.get_file(f, str(part))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot fetch '{printable(f)}': {printable(str(error))}") from None
        os.replace(part, file)
        known[found[f]] = stamps[f]
        if done % 100 == 0 or done == len(todo):
            fresh = record.with_suffix(".part")
            fresh.write_text(json.dumps(known))
            os.replace(fresh, record)
    for name in known.keys() - set(found.values()):  # what is gone there must not stay here
        (target / name).unlink(missing_ok=True)
    return target / next(iter(found.values())) if system.isfile(path) else target


def _stamp(info: dict[str, Any]) -> str:
    """What changes with a file: whichever of these its file system tells."""
    keys = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created", "checksum", "sha256")
    return "|".join(str(info.get(k, "")) for k in keys)
