"""Reading pictures: one decoder for training, evaluation and search, and a scan that finds bad ones."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from amclr.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before decoding (decompression bombs)."""

Picture = str | Path | bytes | Image.Image


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
        if isinstance(source, (str, Path)) and os.path.exists(source) and os.path.getsize(source) == 0:
            raise BadPicture("picture is empty (0 bytes)") from None
        if isinstance(error, FileNotFoundError):
            raise BadPicture("no such picture") from None
        message = str(error).replace(str(source), "the file") if isinstance(source, (str, Path)) else str(error)
        raise BadPicture(f"picture cannot be decoded: {message or type(error).__name__}") from None
    shorter = min(rgb.size)
    if shorter > target:
        scale = target / shorter
        rgb = rgb.resize((round(rgb.width * scale), round(rgb.height * scale)), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()


def _open(source: Picture) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


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


def scan(paths: Sequence[Path], size: int, cache: Path | None = None, progress: bool = True) -> dict[Path, str]:
    """Decode every picture once; return the reason for each that cannot be decoded.

    Verdicts are remembered in `cache` by path, length and time of change, so that a later scan of
    the same pictures takes a moment.
    """
    known: dict[str, str] = {}
    if cache and cache.is_file():
        try:
            known = json.loads(cache.read_text())
        except ValueError:
            known = {}
    keys = {path: _stamp(path) for path in paths}
    todo = [path for path in paths if keys[path] not in known]

    def verdict(path: Path) -> str:
        try:
            read_picture(path, size)
        except BadPicture as error:
            return str(error)
        return ""

    if todo:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = tqdm(pool.map(verdict, todo), "Checking pictures", len(todo), disable=not progress, leave=False)
            known.update(zip((keys[p] for p in todo), found, strict=True))
        if cache:
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(known))
            os.replace(part, cache)
    return {path: known[keys[path]] for path in paths if known[keys[path]]}


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return f"{path}|absent"
    return f"{path}|{stat.st_size}|{stat.st_mtime_ns}"


class PictureStore:
    """Decoded pictures by index; held in memory where they fit.

    A picture that cannot be decoded (it passed the scan, and went bad since) raises BadPicture.
    """

    def __init__(self, paths: Sequence[Path], size: int, ram_gigabytes: float = 0.0, progress: bool = True) -> None:
        self.paths = list(paths)
        self.size = size
        self.held: list[Tensor] | None = None
        if self.paths and self._estimate() <= ram_gigabytes * 1e9:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                decoded = tqdm(pool.map(self._decode, self.paths), "Decoding pictures", len(self.paths),
                               disable=not progress, leave=False)  # fmt: skip
                self.held = list(decoded)

    def _estimate(self) -> float:
        some = self.paths[:: max(1, len(self.paths) // 32)]
        return float(np.mean([self._decode(p).numel() for p in some]) * len(self.paths))

    def _decode(self, path: Path) -> Tensor:
        try:
            return read_picture(path, self.size)
        except BadPicture as error:
            raise BadPicture(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Picture `index` as uint8 (3, H, W)."""
        return self.held[index] if self.held is not None else self._decode(self.paths[index])
