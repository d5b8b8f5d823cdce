"""Reading images: the one decoder that training, evaluation and search share."""

from __future__ import annotations

import io
import os
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from amclr.utils.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger images are refused before decoding (decompression bombs)."""

MAX_BYTES = 512 * 2**20
"""Larger files are refused before reading."""

MAX_RATIO = 1000
"""Images with a larger aspect ratio are refused: resizing their shorter side would fill the memory."""

LARGE_PIXELS = 8_000_000
"""Larger images are decoded one at a time: all threads together would need tens of GB."""

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
"""The Pillow formats that are read. Pillow passes some others, such as EPS, to external programs."""

MAX_THREADS = 32
"""Threads that decode images, at most."""

CHUNK = 256
"""Images decoded ahead of their use, at most."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where an image's bytes are: a whole file, or `size` bytes of it starting at `offset`."""

    file: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The image's bytes. Raises OSError if they cannot be read, BadImage if the file is unsuitable."""
        with open(self.file, "rb", buffering=0, opener=_open_nonblocking) as handle:
            status = os.fstat(handle.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadImage("not a regular file")
            size = status.st_size if self.size < 0 else self.size
            if size > MAX_BYTES:
                raise BadImage(f"image too large: {size} bytes, over the limit of {MAX_BYTES // 2**20} MB")
            content = os.pread(handle.fileno(), size, self.offset)
        if len(content) < size:
            raise BadImage(f"image is cut off: {len(content)} of {size} bytes")
        return content

    @property
    def stamp(self) -> str:
        """A text that changes when the image does: its offset, its length, the file's modification time."""
        try:
            status = os.stat(self.file)
        except OSError:
            return "absent"
        part = f"{self.offset}+{self.size}" if self.size >= 0 else str(status.st_size)
        return f"{part}|{status.st_mtime_ns}"

    def __str__(self) -> str:
        return self.file if self.size < 0 else f"{self.file} at byte {self.offset}"


def _open_nonblocking(file: str, flags: int) -> int:
    # Opening a named pipe would otherwise wait until something is written to it.
    return os.open(file, flags | os.O_NONBLOCK)


ImageSource = str | Path | bytes | Location | Image.Image | Tensor
"""An image: a path, encoded bytes, a place in a file, a PIL image, or decoded uint8 RGB (3, H, W)."""


class BadImage(UserError):
    """An image that cannot be decoded; the message is the reason."""


def read_image(source: ImageSource, size: int) -> Tensor:
    """Decode an image to uint8 RGB (3, H, W), upright, its shorter side at most 2 * size.

    The memory layout is channels-last, as decoders write it and resampling prefers it. All uses of an image
    start here, so training and evaluation see the same pixels. Raises BadImage, with a reason, for empty,
    truncated, oversized or unreadable files.
    """
    shorter_side = 2 * size
    if isinstance(source, Tensor):
        return _shrunk(source, shorter_side)
    try:
        with warnings.catch_warnings():
            # Our own limit on the size follows.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _open(source)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(
                    f"image too large: {width} x {height} pixels, over the limit of {MAX_PIXELS // 10**6} million"
                )
            if max(width, height) > MAX_RATIO * min(width, height):
                raise BadImage(
                    f"image too narrow: {width} x {height} pixels, one side over {MAX_RATIO} times the other"
                )
            image.draft("RGB", (shorter_side, shorter_side))
            with _one_at_a_time if _is_large(image, width * height) else nullcontext():
                ImageOps.exif_transpose(image, in_place=True)
                pixels = torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"image too large: {error}") from None
    except Exception as error:  # PIL raises many types: OSError, SyntaxError, struct.error, ValueError ...
        if isinstance(error, FileNotFoundError):
            raise BadImage("no such image") from None
        message = re.sub(r"<_io\.BytesIO object at \w+>", "the file", str(error))
        raise BadImage(f"image cannot be decoded: {message or type(error).__name__}") from None
    return _shrunk(pixels, shorter_side)


_one_at_a_time = threading.Lock()


def _is_large(image: Image.Image, pixels: int) -> bool:
    """Whether decoding takes much memory. A draft takes little, except of a progressive JPEG, which is held whole."""
    width, height = image.size
    return (pixels if "progressive" in image.info else width * height) > LARGE_PIXELS


def _shrunk(image: Tensor, shorter_side: int) -> Tensor:
    height, width = image.shape[1:]
    scale = min(1.0, shorter_side / min(height, width))
    return resized(image, round(height * scale), round(width * scale))


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """Resize an image (3, H, W) uint8, bicubic and antialiased: within a grey level of Pillow's result, and faster.

    Fastest in channels-last layout, which the result keeps.
    """
    if image.shape[1:] == (height, width):
        return image
    # The batch dimension is inserted before the height, or torch would not recognise the channels-last layout.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]


def _open(source: str | Path | bytes | Location | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, (str, Path)):
        source = Location(str(source))
    content = source.read() if isinstance(source, Location) else source
    if not content:
        raise BadImage("image is empty (0 bytes)")
    return Image.open(io.BytesIO(content), formats=KINDS)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        # PIL's own conversion clips deep grey values at 255.
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image if image.mode == "RGB" else image.convert("RGB")


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], ahead: int = CHUNK) -> Iterator[Result]:
    """The result of `work` for each item, in order, computed by threads at most `ahead` items before it is asked for.

    For decoding: Pillow and torch release the interpreter lock. The threads end with the iterator.
    """
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1))
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
