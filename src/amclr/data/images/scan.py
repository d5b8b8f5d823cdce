"""A scan of a data set's images: finds those that cannot be decoded, and computes perceptual hashes."""

from __future__ import annotations

import io
import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from filelock import FileLock
from tqdm import tqdm

from amclr.data.images.decode import CHUNK, BadImage, Location, in_threads, read_image
from amclr.data.images.duplicates import image_hash


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of decoding an image: the reason why it failed, or empty; and its perceptual hash, if computed."""

    reason: str
    perceptual_hash: bytes | None = None


def scan(
    places: Sequence[Location],
    size: int,
    cache: Path | None = None,
    progress: bool = True,
    decode: bool = True,
    hashes: bool = False,
) -> dict[Location, Verdict]:
    """Decode every image once; return the verdict on each.

    Verdicts are appended to `cache` (JSON lines: place and stamp, reason, hash) as they come, so an interrupted
    scan resumes where it stopped, and a later scan of the same images is fast.
    decode: if false, return only what the cache holds. hashes: compute perceptual hashes too.
    """
    known = _cached(cache) if cache else {}
    keys = {place: f"{place.file}|{place.stamp}" for place in places}

    def missing() -> list[Location]:
        verdicts = ((place, known.get(key)) for place, key in keys.items())
        return [p for p, v in verdicts if v is None or (hashes and not v.reason and v.perceptual_hash is None)]

    def verdict(place: Location) -> Verdict:
        try:
            image = read_image(place, size)
        except BadImage as error:
            return Verdict(str(error))
        return Verdict("", image_hash(image) if hashes else None)

    todo = missing() if decode else []
    # If two runs scan the same images at once, one decodes them and the other waits.
    with FileLock(cache.with_suffix(".lock")) if todo and cache else nullcontext():
        if todo and cache:
            known |= _cached(cache)
            todo = missing()
        if todo:
            bar = tqdm(total=len(todo), desc="Checking images", unit="image", disable=not progress, leave=False)
            verdicts = in_threads(verdict, todo)
            with bar, _appending(cache) as handle:
                for start in range(0, len(todo), CHUNK):
                    chunk = todo[start : start + CHUNK]
                    new = dict(zip((keys[p] for p in chunk), islice(verdicts, len(chunk)), strict=True))
                    rows = ([key, v.reason, b64encode(v.perceptual_hash or b"").decode()] for key, v in new.items())
                    handle.write("".join(json.dumps(row) + "\n" for row in rows))
                    handle.flush()
                    known.update(new)
                    bar.update(len(chunk))
    return {place: known[keys[place]] for place in places if keys[place] in known}


def _cached(file: Path) -> dict[str, Verdict]:
    """Verdicts of earlier scans. A line that a kill cut off is ignored."""
    known: dict[str, Verdict] = {}
    if file.is_file():
        with file.open(encoding="utf-8") as handle:
            for line in handle:
                try:
                    key, reason, encoded = json.loads(line)
                    known[key] = Verdict(reason, b64decode(encoded) or None)
                except (ValueError, TypeError):
                    continue
    return known


@contextmanager
def _appending(file: Path | None) -> Iterator[TextIO]:
    """A file to append lines to, starting on a new line even if the last one was cut off; a dummy if None."""
    if file is None:
        yield io.StringIO()
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as handle:
        handle.write("\n" if handle.tell() else "")
        yield handle
