"""Decoded images, kept in memory or in a memory-mapped file that later runs reuse."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from amclr.config.schema import Config
from amclr.data.images import decode
from amclr.data.images.decode import BadImage, Location, in_threads, read_image

FORMAT = 1
"""Format of files of decoded images. Increase it when the pixels that `read_image` returns change."""


class ImageStore:
    """Decoded images by index, kept where they fit: in memory, or in a memory-mapped file that later runs reuse.

    keep: `ram` or `disk`, each up to a limit in GB; `auto`, an existing file, else memory, else disk; `none`
    decodes at each access. If the images cannot be kept, a line on stderr says why, and they are decoded at each
    access. The file is `folder`/KEY.pixels, with each image's height and width in KEY.sizes; KEY is a hash of the
    size and of the images' paths, lengths and modification times. Both files are written chunk by chunk, so a
    killed run loses at most the last chunk.

    Indexing raises BadImage for an image that cannot be decoded (it became unreadable after the scan).
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
    def from_config(cls, places: Sequence[Location], config: Config, cache: Path, progress: bool = True) -> ImageStore:
        """A store as the settings say, with its file in the cache folder."""
        return cls(
            places, config.model.image_size, config.decoded, folder=cache / "decoded", ram=config.ram_cache,
            disk=config.disk_cache, progress=progress,
        )  # fmt: skip

    @property
    def kept_in(self) -> str:
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
        print(f"decoded images are not kept, but decoded at each visit: {reason}", file=sys.stderr)

    def _estimate(self) -> int:
        """Bytes that the decoded images need, estimated from about 32 of them."""
        sizes = [p.size for p in self._decoded(self.places[:: max(1, len(self.places) // 32)]) if p is not None]
        return int(np.mean(sizes or [0]) * len(self.places))

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

    def _decoded(self, places: Iterable[Location]) -> Iterator[np.ndarray | None]:
        """Images (H, W, 3) in order, decoded by threads; None for one that cannot be decoded."""

        def pixels(place: Location) -> np.ndarray | None:
            try:
                return read_image(place, self.size).permute(1, 2, 0).contiguous().numpy()
            except BadImage:
                return None

        return in_threads(pixels, places, decode.CHUNK)

    def _bar(self, done: int = 0) -> Any:
        return tqdm(
            total=len(self.places), initial=done, desc="Decoding images", disable=not self.progress, leave=False
        )

    def _fill_memory(self, need: int, limit: int) -> bool:
        """Decode into memory. Returns False, and keeps nothing, if that takes more than `limit` bytes."""
        sizes = np.zeros((len(self.places), 2), dtype=np.int32)
        used = 0
        try:
            pixels = np.empty(need, dtype=np.uint8)  # pages that are never written take no memory
            with self._bar() as bar:
                for k, image in enumerate(self._decoded(self.places)):
                    bar.update()
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
        """Decode into the file, resuming where an earlier run stopped. On failure, remove it and say why."""
        table = file.with_suffix(".sizes")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # If two runs need the same images at once, one decodes them and the other waits.
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
            for part in (file, table):  # do not leave a full disk behind
                with suppress(OSError):
                    part.unlink()
            self._say(f"'{file.parent}': {error.strerror or error}. Give another --cache, or --decoded none")

    def _append(self, pixels: IO[bytes], sizes: IO[bytes], done: int, end: int, limit: int, bar: Any) -> None:
        decoded = self._decoded(islice(self.places, done, None))
        while images := list(islice(decoded, decode.CHUNK)):
            end += sum(image.size for image in images if image is not None)
            if end > limit:
                raise OSError(errno.EFBIG, f"more than {limit / 1e9:.1f} GB needed: raise --disk_cache")
            pixels.writelines(image.data for image in images if image is not None)
            pixels.flush()
            os.fsync(pixels.fileno())  # pixels must be on disk before the table lists them, even after a power cut
            shapes = [(0, 0) if image is None else image.shape[:2] for image in images]
            sizes.write(np.array(shapes, dtype=np.int32).tobytes())
            sizes.flush()
            bar.update(len(images))

    def _open_file(self, file: Path) -> bool:
        """Map the file if it holds all images; else return False."""
        table = file.with_suffix(".sizes")
        done, end = _whole_part(file, table)
        if done < len(self.places) or not end:
            return False
        with suppress(OSError):
            os.utime(file)  # the least recently used files are removed first
        self._sizes = np.fromfile(table, dtype=np.int32).reshape(-1, 2)
        self._file, self._starts = file, _starts(self._sizes)
        self._pixels = _mapped(file)
        return True

    def _make_room(self, file: Path, limit: int) -> None:
        """Remove the files of other data sets, least recently used first, until they take at most `limit` bytes."""
        others = sorted((p for p in file.parent.glob("*.pixels") if p != file), key=lambda p: p.stat().st_mtime)
        used = sum(p.stat().st_size for p in others)
        for other in others:
            if used <= limit:
                return
            with suppress(Timeout), FileLock(other.with_suffix(".lock"), timeout=0):  # skip files being written
                used -= other.stat().st_size
                other.with_suffix(".sizes").unlink(missing_ok=True)
                other.unlink()


def _whole_part(file: Path, table: Path) -> tuple[int, int]:
    """The number of images that are complete in both the file and its table, and their bytes."""
    if not (file.is_file() and table.is_file()):
        return 0, 0
    shapes = np.frombuffer(table.read_bytes()[: table.stat().st_size // 8 * 8], dtype=np.int32).reshape(-1, 2)
    ends = shapes.astype(np.int64).prod(axis=1).cumsum() * 3
    done = int(np.searchsorted(ends, file.stat().st_size, side="right"))
    return done, int(ends[done - 1]) if done else 0


def _mapped(file: Path) -> np.ndarray:
    # torch wants a writable array, so the map is copy-on-write. Slices of plain arrays are cheaper than of a memmap.
    return np.memmap(file, dtype=np.uint8, mode="c").view(np.ndarray)


def _starts(sizes: np.ndarray) -> np.ndarray:
    ends = sizes.astype(np.int64).prod(axis=1).cumsum() * 3
    return np.concatenate([[0], ends[:-1]])
