"""Reading pictures: one decoder for training, evaluation and search, and a scan that finds bad ones."""

from __future__ import annotations

import io
import json
import os
import re
import warnings
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from amclr.data.duplicates import picture_hash
from amclr.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before decoding (decompression bombs)."""

MAX_BYTES = 512 * 2**20
"""Larger files are refused before they are read."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a picture's bytes are: a whole file, or `size` bytes of it from `offset` on."""

    file: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The picture's bytes. Raises OSError where they cannot be read, BadPicture where there are too many."""
        with open(self.file, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size if self.size < 0 else self.size
            if size > MAX_BYTES:
                raise BadPicture(f"picture too large: {size} bytes, over the limit of {MAX_BYTES // 2**20} MB")
            content = os.pread(handle.fileno(), size, self.offset)
        if len(content) < size:
            raise BadPicture(f"picture is cut off: {len(content)} of {size} bytes")
        return content

    @property
    def stamp(self) -> str:
        """What changes with the picture: its place in the file, its length, the file's time of change."""
        try:
            stat = os.stat(self.file)
        except OSError:
            return "absent"
        part = f"{self.offset}+{self.size}" if self.size >= 0 else str(stat.st_size)
        return f"{part}|{stat.st_mtime_ns}"

    def __str__(self) -> str:
        return self.file if self.size < 0 else f"{self.file} at byte {self.offset}"


Picture = str | Path | bytes | Location | Image.Image


class BadPicture(UserError):
    """A picture that cannot be decoded; the message is the reason."""


def read_picture(source: Picture, size: int) -> Tensor:
    """Decode a picture to uint8 RGB (3, H, W), turned upright, its shorter side at most 2 * size.

    Every use of a picture starts here, so training and evaluation see the same pixels. Raises
    BadPicture with a reason for empty, truncated, oversized or unreadable files.
    """
    try:
        with warnings.catch_warnings():
            # We set our own limit on the size, below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = _open(source)
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BadPicture(
                    f"picture too large: {width} x {height} pixels, over the limit of {MAX_PIXELS // 10**6} million"
                )
            target = 2 * size
            picture.draft("RGB", (target, target))
            upright = ImageOps.exif_transpose(picture)
            rgb = _to_rgb(upright)
    except BadPicture:
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture(f"picture too large: {error}") from None
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, ValueError ...
        if isinstance(error, FileNotFoundError):
            raise BadPicture("no such picture") from None
        message = re.sub(r"<_io\.BytesIO object at \w+>", "the file", str(error))
        raise BadPicture(f"picture cannot be decoded: {message or type(error).__name__}") from None
    shorter = min(rgb.size)
    if shorter > target:
        scale = target / shorter
        rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _open(source: Picture) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, (str, Path)):
        source = Location(str(source))
    content = source.read() if isinstance(source, Location) else source
    if not content:
        raise BadPicture("picture is empty (0 bytes)")
    return Image.open(io.BytesIO(content))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        # PIL's own conversion cuts deep grey values off at 255.
        values = np.asarray(picture, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        picture = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA"):
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What decoding a picture told: the reason why it cannot be, or empty; and its perceptual hash, where wanted."""

    reason: str
    looks: bytes | None = None


def scan(
    places: Sequence[Location], size: int, cache: Path | None = None, progress: bool = True, look: bool = True,
    compare: bool = False,
) -> dict[Location, Verdict]:  # fmt: skip
    """Decode every picture once; return the verdict on each.

    Verdicts are appended to `cache` (JSON lines: place and stamp, reason, hash) as they come, so that a
    scan that was stopped goes on where it was, and a later one of the same pictures takes a moment.
    look: false decodes nothing and returns what is known. compare: hash the pictures as well.
    """
    known = _verdicts(cache) if cache else {}
    keys = {place: f"{place.file}|{place.stamp}" for place in places}

    def missing(key: str) -> bool:
        verdict = known.get(key)
        return verdict is None or (compare and not verdict.reason and verdict.looks is None)

    def verdict(place: Location) -> Verdict:
        try:
            picture = read_picture(place, size)
        except BadPicture as error:
            return Verdict(str(error))
        return Verdict("", picture_hash(picture) if compare else None)

    todo = [place for place in keys if missing(keys[place])] if look else []
    if todo:
        workers = min(32, os.cpu_count() or 1)
        bar = tqdm(total=len(todo), desc="Checking pictures", unit="picture", disable=not progress, leave=False)
        with bar, ThreadPoolExecutor(workers) as pool, _appending(cache) as handle:
            for some in (todo[k : k + 256] for k in range(0, len(todo), 256)):
                found = {keys[p]: v for p, v in zip(some, pool.map(verdict, some), strict=True)}
                rows = ([key, v.reason, b64encode(v.looks or b"").decode()] for key, v in found.items())
                handle.write("".join(json.dumps(row) + "\n" for row in rows))
                handle.flush()
                known.update(found)
                bar.update(len(some))
    return {place: known[keys[place]] for place in places if keys[place] in known}


def _verdicts(file: Path) -> dict[str, Verdict]:
    """Verdicts of earlier scans. A line cut off by a kill is left out."""
    known: dict[str, Verdict] = {}
    if file.is_file():
        with file.open(encoding="utf-8") as handle:
            for line in handle:
                try:
                    key, reason, looks = json.loads(line)
                    known[key] = Verdict(reason, b64decode(looks) or None)
                except (ValueError, TypeError):
                    continue
    return known


@contextmanager
def _appending(file: Path | None) -> Iterator[TextIO]:
    """A file to append lines to, each whole whatever the last one was; nowhere if None."""
    if file is None:
        yield io.StringIO()
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as handle:
        handle.write("\n" if handle.tell() else "")
        yield handle


class PictureStore:
    """Decoded pictures by index; held in memory where they fit.

    A picture that cannot be decoded (it passed the scan, and went bad since) raises BadPicture.
    """

    def __init__(
        self, places: Sequence[Location], size: int, ram_gigabytes: float = 0.0, progress: bool = True
    ) -> None:
        self.places = list(places)
        self.size = size
        self.held: list[Tensor] | None = None
        if self.places and self._estimate() <= ram_gigabytes * 1e9:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                decoded = tqdm(pool.map(self._decode, self.places), "Decoding pictures", len(self.places),
                               disable=not progress, leave=False)  # fmt: skip
                self.held = list(decoded)

    def _estimate(self) -> float:
        some = self.places[:: max(1, len(self.places) // 32)]
        return float(np.mean([self._decode(p).numel() for p in some]) * len(self.places))

    def _decode(self, place: Location) -> Tensor:
        try:
            return read_picture(place, self.size)
        except BadPicture as error:
            raise BadPicture(f"{place}: {error}") from None

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        """Picture `index` as uint8 (3, H, W)."""
        return self.held[index] if self.held is not None else self._decode(self.places[index])
