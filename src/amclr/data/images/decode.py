"""Reading images: one decoder for training, evaluation and search, and a scan that finds bad ones."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import threading
import warnings
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from amclr.config.schema import Config
from amclr.data.images.duplicates import image_hash
from amclr.utils.errors import UserError

MAX_PIXELS = 64_000_000
"""Larger images are refused before decoding (decompression bombs)."""

MAX_BYTES = 512 * 2**20
"""Larger files are refused before they are read."""

MAX_RATIO = 1000
"""Images so many times as long as wide are refused: their shorter side resized, they would fill the memory."""

LARGE_PIXELS = 8_000_000
"""Larger images are decoded one at a time, or all threads together would need tens of GB."""

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")
"""Pillow's formats that are read. It hands others, such as EPS, to programs outside this process."""

CHUNK = 256
"""Decoded images written to disk at a time."""

FORMAT = 1
"""Of files of decoded images; another one where `read_image` gives other pixels."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where an image's bytes are: a whole file, or `size` bytes of it from `offset` on."""

    file: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The image's bytes. Raises OSError where they cannot be read, BadImage where they are none or too many."""
        with open(self.file, "rb", buffering=0, opener=_without_waiting) as handle:
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
        """What changes with the image: its place in the file, its length, the file's time of change."""
        try:
            status = os.stat(self.file)
        except OSError:
            return "absent"
        part = f"{self.offset}+{self.size}" if self.size >= 0 else str(status.st_size)
        return f"{part}|{status.st_mtime_ns}"

    def __str__(self) -> str:
        return self.file if self.size < 0 else f"{self.file} at byte {self.offset}"


def _without_waiting(file: str, flags: int) -> int:
    # A named pipe would otherwise be waited for until something is written to it.
    return os.open(file, flags | os.O_NONBLOCK)


ImageSource = str | Path | bytes | Location | Image.Image | Tensor
"""An image: a path, encoded bytes, a place in a file, a PIL image, or already decoded, uint8 RGB (3, H, W)."""


class BadImage(UserError):
    """An image that cannot be decoded; the message is the reason."""


def read_image(source: ImageSource, size: int) -> Tensor:
    """Decode an image to uint8 RGB (3, H, W), turned upright, its shorter side at most 2 * size.

    In memory a pixel's colours lie side by side, as decoders write and resampling likes them. Every
    use of an image starts here, so training and evaluation see the same pixels. Raises BadImage
    with a reason for empty, truncated, oversized or unreadable files.
    """
    target = 2 * size
    if isinstance(source, Tensor):
        return _at_most(source, target)
    try:
        with warnings.catch_warnings():
            # We set our own limit on the size, below.
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
            image.draft("RGB", (target, target))
            with _one_at_a_time if _is_large(image, width * height) else nullcontext():
                ImageOps.exif_transpose(image, in_place=True)
                pixels = torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"image too large: {error}") from None
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, ValueError ...
        if isinstance(error, FileNotFoundError):
            raise BadImage("no such image") from None
        message = re.sub(r"<_io\.BytesIO object at \w+>", "the file", str(error))
        raise BadImage(f"image cannot be decoded: {message or type(error).__name__}") from None
    return _at_most(pixels, target)


_one_at_a_time = threading.Lock()


def _is_large(image: Image.Image, pixels: int) -> bool:
    """Whether decoding takes much memory: a draft takes little, but of a progressive JPEG, which is held whole."""
    width, height = image.size
    return (pixels if "progressive" in image.info else width * height) > LARGE_PIXELS


def _at_most(image: Tensor, shorter: int) -> Tensor:
    height, width = image.shape[1:]
    scale = min(1.0, shorter / min(height, width))
    return resized(image, round(height * scale), round(width * scale))


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """An image (3, H, W) uint8 at another size, bicubic and antialiased: Pillow's to within a grey level, and faster.

    It is quickest where a pixel's colours lie side by side, and then they do in the result too.
    """
    if image.shape[1:] == (height, width):
        return image
    # The new dimension goes before the height, or torch would not see how the colours lie.
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
        # PIL's own conversion cuts deep grey values off at 255.
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image)
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What decoding an image told: the reason why it cannot be, or empty; and its perceptual hash, where wanted."""

    reason: str
    looks: bytes | None = None


def scan(
    places: Sequence[Location], size: int, cache: Path | None = None, progress: bool = True, look: bool = True,
    compare: bool = False,
) -> dict[Location, Verdict]:  # fmt: skip
    """Decode every image once; return the verdict on each.

    Verdicts are appended to `cache` (JSON lines: place and stamp, reason, hash) as they come, so that a
    scan that was stopped goes on where it was, and a later one of the same images takes a moment.
    look: false decodes nothing and returns what is known. compare: hash the images as well.
    """
    known = _verdicts(cache) if cache else {}
    keys = {place: f"{place.file}|{place.stamp}" for place in places}

    def missing() -> list[Location]:
        verdicts = ((place, known.get(key)) for place, key in keys.items())
        return [p for p, v in verdicts if v is None or (compare and not v.reason and v.looks is None)]

    def verdict(place: Location) -> Verdict:
        try:
            image = read_image(place, size)
        except BadImage as error:
            return Verdict(str(error))
        return Verdict("", image_hash(image) if compare else None)

    todo = missing() if look else []
    # Of two runs that look at the same images at once, one decodes them and the other waits.
    with FileLock(cache.with_suffix(".lock")) if todo and cache else nullcontext():
        if todo and cache:
            known |= _verdicts(cache)
            todo = missing()
        if todo:
            workers = min(32, os.cpu_count() or 1)
            bar = tqdm(total=len(todo), desc="Checking images", unit="image", disable=not progress, leave=False)
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


class ImageStore:
    """Decoded images by index, kept where they fit: in memory, or in a memory-mapped file that later runs find.

    keep: `ram` or `disk`, each up to so many GB; `auto`, the first of a file that is already there,
    memory and disk; `none` decodes at each access. Where they cannot be kept, a line on stderr says why,
    and they are decoded at each access. The file is `folder`/KEY.pixels, with each image's height and width
    in KEY.sizes; KEY is a hash of the size and of the images' places, lengths and times of change. Both grow
    image by image, so that a run which is killed loses at most the last few.

    An image that cannot be decoded (it passed the scan, and went bad since) raises BadImage.
    """

    def __init__(
        self,
        places: Sequence[Location],
        size: int,
        keep: Literal["auto", "ram", "disk", "none"] = "none",
        *,
        folder: Path | None = None,
        ram: float = 4.0,
        disk: float = 32.0,
        progress: bool = True,
    ) -> None:
        self.places = list(places)
        self.size = size
        self.progress = progress
        self._pixels: np.ndarray | None = None
        self._file: Path | None = None
        self._sizes = np.empty((0, 2), dtype=np.int32)
        self._starts = np.empty(0, dtype=np.int64)
        if keep != "none" and self.places:
            self._keep(keep, folder, int(ram * 1e9), int(disk * 1e9))

    @classmethod
    def as_set(cls, places: Sequence[Location], config: Config, cache: Path, progress: bool = True) -> ImageStore:
        """Images kept as the settings say, files in the folder of caches."""
        return cls(
            places, config.model.image_size, config.decoded, folder=cache / "decoded", ram=config.ram_cache,
            disk=config.disk_cache, progress=progress,
        )  # fmt: skip

    @property
    def kept(self) -> str:
        """Where the decoded images are: ram, disk or none."""
        return "disk" if self._file else "none" if self._pixels is None else "ram"

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        """Image `index` as uint8 (3, H, W)."""
        if self._pixels is None and self._file:  # unpickled in another process
            self._pixels = _mapped(self._file)
        if self._pixels is None or not self._sizes[index, 0]:
            return self._decode(self.places[index])
        height, width = self._sizes[index].tolist()
        start = self._starts[index]
        flat = self._pixels[start : start + height * width * 3]
        return torch.from_numpy(flat).view(height, width, 3).permute(2, 0, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None if self._file else self._pixels}

    def _keep(self, keep: str, folder: Path | None, ram: int, disk: int) -> None:
        file = folder / f"{self._key()}.pixels" if folder and keep in ("auto", "disk") else None
        if file and self._open_file(file):
            return
        need = self._estimate()
        if keep in ("auto", "ram"):
            if need <= ram and self._fill_memory(need, ram):
                return
            if not file:
                self._say(f"they need {need / 1e9:.1f} GB of memory: raise --ram_cache, or give --decoded disk")
        if file and need > disk:
            self._say(f"they need {need / 1e9:.1f} GB of disk: raise --disk_cache")
        elif file:
            self._fill_file(file, need, disk)

    def _say(self, reason: str) -> None:
        print(f"decoded images are not kept, and decoded at each visit: {reason}", file=sys.stderr)

    def _estimate(self) -> int:
        """Bytes that the decoded images need, from some of them."""
        some = [p.size for p in self._decoded(self.places[:: max(1, len(self.places) // 32)]) if p is not None]
        return int(np.mean(some or [0]) * len(self.places))

    def _key(self) -> str:
        digest = hashlib.sha256(f"{FORMAT} {self.size}".encode())
        for place in self.places:
            digest.update(f"\n{place.file}|{place.stamp}".encode(errors="surrogateescape"))
        return digest.hexdigest()[:20]

    def _decode(self, place: Location) -> Tensor:
        try:
            return read_image(place, self.size)
        except BadImage as error:
            raise BadImage(f"{place}: {error}") from None

    def _decoded(self, places: Sequence[Location], bar: Any = None) -> Iterator[np.ndarray | None]:
        """Images (H, W, 3) in order, decoded by threads a few ahead; None for one that cannot be."""

        def one(place: Location) -> np.ndarray | None:
            try:
                return read_image(place, self.size).permute(1, 2, 0).contiguous().numpy()
            except BadImage:
                return None

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for k in range(0, len(places), CHUNK):
                yield from pool.map(one, places[k : k + CHUNK])
                if bar:
                    bar.update(len(places[k : k + CHUNK]))

    def _bar(self, done: int = 0) -> Any:
        return tqdm(
            total=len(self.places), initial=done, desc="Decoding images", disable=not self.progress, leave=False
        )

    def _fill_memory(self, need: int, limit: int) -> bool:
        """Decode into memory. False, with nothing held, where more than `limit` bytes turn out to be needed."""
        sizes = np.zeros((len(self.places), 2), dtype=np.int32)
        used = 0
        try:
            pixels = np.empty(need, dtype=np.uint8)  # pages that are never written take no memory
            with self._bar() as bar:
                for k, image in enumerate(self._decoded(self.places, bar)):
                    if image is None:
                        continue
                    end = used + image.size
                    if end > limit:
                        return False
                    if end > len(pixels):
                        pixels.resize(min(limit, end * 5 // 4), refcheck=False)
                    pixels[used:end] = image.reshape(-1)
                    sizes[k], used = image.shape[:2], end
            pixels.resize(used, refcheck=False)
        except MemoryError:
            return False
        self._pixels, self._sizes, self._starts = pixels, sizes, _starts(sizes)
        return True

    def _fill_file(self, file: Path, need: int, limit: int) -> None:
        """Decode into the file, from where an earlier run left off. Says so where it cannot."""
        table = file.with_suffix(".sizes")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Of two runs that need the same images at once, one decodes them and the other waits.
            with FileLock(file.with_suffix(".lock")):
                if self._open_file(file):
                    return
                self._make_room(file, limit - need)
                with file.open("ab") as pixels, table.open("ab") as sizes:
                    done, end = _whole_part(file, table)
                    pixels.truncate(end)
                    sizes.truncate(done * 8)
                    if (free := shutil.disk_usage(file.parent).free) < need - end:
                        raise OSError(errno.ENOSPC, f"{(need - end) / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
                    with self._bar(done) as bar:
                        self._append(pixels, sizes, done, end, limit, bar)
                self._open_file(file)
        except OSError as error:
            for part in (file, table):  # a disk that is full should not stay so because of us
                with suppress(OSError):
                    part.unlink()
            self._say(f"'{file.parent}': {error.strerror or error}. Give another --cache, or --decoded none")

    def _append(self, pixels: IO[bytes], sizes: IO[bytes], done: int, end: int, limit: int, bar: Any) -> None:
        for start in range(done, len(self.places), CHUNK):
            found = list(self._decoded(self.places[start : start + CHUNK], bar))
            end += sum(p.size for p in found if p is not None)
            if end > limit:
                raise OSError(errno.EFBIG, f"more than {limit / 1e9:.1f} GB needed: raise --disk_cache")
            pixels.writelines(p.data for p in found if p is not None)
            pixels.flush()
            os.fsync(pixels.fileno())  # what the table speaks of must be there, even after a power cut
            shapes = [(0, 0) if p is None else p.shape[:2] for p in found]
            sizes.write(np.array(shapes, dtype=np.int32).tobytes())
            sizes.flush()

    def _open_file(self, file: Path) -> bool:
        """Map a file that holds all the images; False where it does not."""
        table = file.with_suffix(".sizes")
        done, end = _whole_part(file, table)
        if done < len(self.places) or not end:
            return False
        with suppress(OSError):
            os.utime(file)  # the least recently used are the first to go
        self._sizes = np.fromfile(table, dtype=np.int32).reshape(-1, 2)
        self._file, self._starts = file, _starts(self._sizes)
        self._pixels = _mapped(file)
        return True

    def _make_room(self, file: Path, limit: int) -> None:
        """Remove what other data sets left in the folder, the least recently used first, down to `limit` bytes."""
        others = sorted((p for p in file.parent.glob("*.pixels") if p != file), key=lambda p: p.stat().st_mtime)
        held = sum(p.stat().st_size for p in others)
        for other in others:
            if held <= limit:
                return
            with suppress(Timeout), FileLock(other.with_suffix(".lock"), timeout=0):  # not one that is being written
                held -= other.stat().st_size
                other.with_suffix(".sizes").unlink(missing_ok=True)
                other.unlink()


def _whole_part(file: Path, table: Path) -> tuple[int, int]:
    """How many images a file and its table both hold whole, and the bytes that they take."""
    if not (file.is_file() and table.is_file()):
        return 0, 0
    shapes = np.frombuffer(table.read_bytes()[: table.stat().st_size // 8 * 8], dtype=np.int32).reshape(-1, 2)
    ends = shapes.astype(np.int64).prod(axis=1).cumsum() * 3
    done = int(np.searchsorted(ends, file.stat().st_size, side="right"))
    return done, int(ends[done - 1]) if done else 0


def _mapped(file: Path) -> np.ndarray:
    # A private map, so that torch may hold it as if it could be written; slices of plain arrays are cheaper.
    return np.memmap(file, dtype=np.uint8, mode="c").view(np.ndarray)


def _starts(sizes: np.ndarray) -> np.ndarray:
    ends = sizes.astype(np.int64).prod(axis=1).cumsum() * 3
    return np.concatenate([[0], ends[:-1]])
