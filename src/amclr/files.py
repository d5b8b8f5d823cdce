"""Files that are whole or absent at any moment, whatever stops the writing."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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
        part.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text file, in UTF-8, so that it is whole or absent at any moment."""
    with written(file) as handle:
        handle.write(text.encode("utf-8", "backslashreplace"))


def write_packed(file: Path, value: Any) -> None:
    """Write a value as compressed JSON, which several processes may do at once."""
    with written(file, shared=True) as handle:
        handle.write(gzip.compress(json.dumps(value).encode(), 1))


def read_packed(file: Path) -> Any:
    """The value in a file of compressed JSON; None where there is none, or it is damaged."""
    try:
        return json.loads(gzip.decompress(file.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error):
        return None
