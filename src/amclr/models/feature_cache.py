"""A cache of tower features on disk, shared by all runs and commands with the same tower.

    CACHE/images-KEY/00000.npy         features (n, V, F) of one policy's views of images, in the order of computing
    CACHE/images-KEY/00000.keys.npy    the key of each row's image
    CACHE/images-KEY/00000.json        how many rows are written
    CACHE/captions-KEY/...             the same for captions, (n, F)

KEY hashes what all rows have in common: the tower's weights, the policy, the seed of the views. A row's own key
identifies its image or caption. So any split, fold or version of the data reuses rows computed before, and only the
others are computed, into the next file. Rows count as soon as they are written: an interruption loses less than a
chunk.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from amclr.utils.files import write_text, written

CHUNK = 128
"""Rows that are computed and written at a time."""
READ_ROWS = 8192
"""Rows that are copied at a time, so that a large part is not in memory twice."""
FORMAT = 3


class Features:
    """Rows of features (N, ...), float32, memory-mapped from the files of the cache."""

    def __init__(self, parts: Sequence[np.ndarray], part: np.ndarray, row: np.ndarray) -> None:
        """parts: arrays of rows of one shape. part, row (N,): which part each row is in, and which of its rows."""
        self.parts, self.part, self.row = parts, part, row
        self.shape: tuple[int, ...] = (len(part), *parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self.part)

    def read(self, rows: np.ndarray | None = None, views: np.ndarray | None = None) -> np.ndarray:
        """The given rows (by default all), (n, ...); with `views` (n,), that view of each, (n, F)."""
        rows = np.arange(len(self)) if rows is None else rows
        out = np.empty((len(rows), *self.shape[1 if views is None else 2 :]), np.float32)
        for positions, part_rows, part in self._by_part(rows):
            for start in range(0, len(positions), READ_ROWS):
                to = positions[start : start + READ_ROWS]
                source = part_rows[start : start + READ_ROWS]
                out[to] = part[source] if views is None else part[source, views[to]]
        return out

    def readable(self) -> np.ndarray:
        """Whether each row's image could be read, (N,) bool; the rows of others are NaN."""
        out = np.empty(len(self), bool)
        for positions, part_rows, part in self._by_part(np.arange(len(self))):
            out[positions] = ~np.isnan(part[(part_rows, *[0] * (part.ndim - 1))])
        return out

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each part: the positions in `rows` that it holds, its own rows for them, and its array."""
        numbers = self.part[rows]
        for number in np.unique(numbers):
            positions = np.flatnonzero(numbers == number)
            yield positions, self.row[rows[positions]], self.parts[number]


def cached_features(
    folder: Path,
    keys: Sequence[str],
    shape: tuple[int, ...],
    compute: Callable[[np.ndarray], Tensor],
    what: str,
    progress: bool,
    order: np.ndarray,
) -> Features:
    """The features with these keys, each of the given shape; those that the folder does not have are computed.

    compute: indices into `keys` -> their features. order: the indices in the order to compute them in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Repeated keys are computed once; `first` is a key's first position in the order.
    unique, first, inverse = np.unique(np.array(keys, dtype="S24")[order], return_index=True, return_inverse=True)
    index = np.empty(len(keys), np.int64)
    index[order] = inverse
    parts, part, row = _find(folder, unique)
    if (part < 0).any():
        # Of two runs that need the same features at once, one computes; the other waits and looks again.
        with _locked(folder, what, progress):
            parts, part, row = _find(folder, unique)
            if (missing := np.flatnonzero(part < 0)).size:
                missing = missing[np.argsort(first[missing])]
                _compute(folder, unique[missing], order[first[missing]], shape, compute, what, progress)
                parts, part, row = _find(folder, unique)
    return Features(parts or [np.empty((0, *shape), np.float32)], part[index], row[index])


@contextmanager
def _locked(folder: Path, what: str, progress: bool) -> Iterator[None]:
    """A block during which no other process adds to the folder; prints a message if it has to wait."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            tqdm.write(f"{what}: waiting for another run that computes features of this tower", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _find(folder: Path, keys: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The arrays of a folder that hold any of these keys; for each key, which array (-1 for none) and which row.

    keys: sorted and unique.
    """
    parts = list[np.ndarray]()
    part, row = np.full(len(keys), -1), np.zeros(len(keys), np.int64)
    for marker in sorted(folder.glob("*.json")) if len(keys) else ():
        done = int(json.loads(marker.read_text())["done"])
        part_keys = np.load(marker.with_suffix(".keys.npy"), mmap_mode="r", allow_pickle=False)[:done]
        index = np.searchsorted(keys, part_keys).clip(max=len(keys) - 1)
        if (hits := np.flatnonzero(keys[index] == part_keys)).size:
            part[index[hits]], row[index[hits]] = len(parts), hits
            parts.append(np.load(marker.with_suffix(".npy"), mmap_mode="r", allow_pickle=False))
    return parts, part, row


def _compute(
    folder: Path,
    keys: np.ndarray,
    rows: np.ndarray,
    shape: tuple[int, ...],
    compute: Callable[[np.ndarray], Tensor],
    what: str,
    progress: bool,
) -> None:
    """Compute rows and write them with their keys chunk by chunk, with a marker of how many are written."""
    number = max((int(marker.stem) for marker in folder.glob("*.json")), default=-1) + 1
    file = folder / f"{number:05}.npy"
    with written(file.with_suffix(".keys.npy")) as handle:
        np.save(handle, keys)
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(len(rows), *shape))
    with torch.inference_mode(), tqdm(total=len(rows), desc=what, disable=not progress, leave=False, unit="row") as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            array[start : start + len(chunk)] = compute(chunk).numpy()
            array.flush()
            write_text(file.with_suffix(".json"), json.dumps({"done": start + len(chunk)}))
            bar.update(len(chunk))


def cache_key(*parts: object) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:24]
