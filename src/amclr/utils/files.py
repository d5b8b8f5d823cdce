"""Files that are whole or absent at any moment, whatever stops the writing; how much memory there is for them."""

from __future__ import annotations

import gzip
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextmanager
def written(file: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write, there under its name once it is whole and on the disk; what was there before stays until then.

    shared: several processes may write it at once, each beside the others; the last one counts.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}.part" if shared else f"{file.name}.part")
    try:
        with part.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, file)
    except Exception:  # a disk that is full should not stay so because of it
        with suppress(OSError):  # a process forked meanwhile holds the file open, and its room with it
            os.truncate(part, 0)
        part.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(file: Path, text: str) -> None:
    """Write a text file, in UTF-8, so that it is whole or absent at any moment."""
    with written(file) as handle:
        handle.write(text.encode("utf-8", "backslashreplace"))


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays, compressed, as `read_arrays` reads them."""
    with written(file) as handle:
        np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]


def read_arrays(file: Path) -> dict[str, np.ndarray] | None:
    """The arrays in a file; None where there is none, or it is damaged. Runs nothing that a file may hold."""
    try:
        with np.load(file, allow_pickle=False) as found:
            return dict(found)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def write_packed(file: Path, value: Any) -> None:
    """Write a value as compressed JSON, which several processes may do at once."""
    with written(file, shared=True) as handle:
        handle.write(gzip.compress(json.dumps(value).encode(), 1, mtime=0))  # the same value, the same bytes


def read_packed(file: Path) -> Any:
    """The value in a file of compressed JSON; None where there is none, or it is damaged."""
    try:
        return json.loads(gzip.decompress(file.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None


def free_memory() -> int:
    """Bytes of memory that this process could still take, as far as the system says."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) << 10 if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return 1 << 33
    return min(free, *_limits())


def _limits() -> Iterator[int]:
    """What is left of the limits on the memory of this process's group and those around it (Linux, version 2)."""
    yield 1 << 62
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = Path("/sys/fs/cgroup") / next(line[3:] for line in lines if line.startswith("0::")).lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # without a limit it is "max"
                limit = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                # Pages of files are given up where memory is wanted.
                cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
                yield max(0, limit - used + (int(cached[1]) if cached else 0))
