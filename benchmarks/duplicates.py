"""Recall of the search for near-duplicates on altered copies of a data set's images, false pairs, and run time.

    python -m benchmarks.duplicates --data FOLDER [--every 7] [--large 1000000]

Every 7th image is altered in each of the ways below and searched for among all images. Pairs among the unaltered
images may be true or false: view them with `amclr inspect`. The time is that of `--large` hashes: those of the data
set with signs flipped at random, 5 % of them near-copies of others, 10 % near-copies of one image.
"""

from __future__ import annotations

import argparse
import io
import time
import zlib
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance

from amclr.config.schema import Config
from amclr.data import manifest
from amclr.data.images import duplicates
from amclr.data.images.decode import read_image
from amclr.data.images.duplicates import SIGNS

SIZE = 72


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def crop(image: Image.Image, share: float) -> Image.Image:
    draw = np.random.default_rng(zlib.crc32(image.tobytes()))
    width, height = (round(side * (1 - share)) for side in image.size)
    x, y = (int(draw.integers(free + 1)) for free in (image.width - width, image.height - height))
    return image.crop((x, y, x + width, y + height))


def scaled(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG, quality 50": lambda p: jpeg(p, 50),
    "JPEG, quality 20": lambda p: jpeg(p, 20),
    "half the size": lambda p: scaled(p, 0.5),
    "1.7 times the size": lambda p: jpeg(scaled(p, 1.7), 80),
    "brightness 0.7": lambda p: ImageEnhance.Brightness(p).enhance(0.7),
    "brightness 1.2": lambda p: ImageEnhance.Brightness(p).enhance(1.2),
    "contrast 1.3": lambda p: ImageEnhance.Contrast(p).enhance(1.3),
    "2 % cropped": lambda p: crop(p, 0.02),
    "5 % cropped": lambda p: crop(p, 0.05),
    "3 % cropped, brighter, smaller, JPEG 60": lambda p: jpeg(
        scaled(crop(ImageEnhance.Brightness(p).enhance(1.1), 0.03), 0.7), 60
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes")
    parser.add_argument("--every", type=int, default=7)
    parser.add_argument("--large", type=int, default=1_000_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = Config(data=options.data)
    samples = manifest.load(config, manifest.cache_folder(config)).samples
    images = [read_image(s.image, SIZE) for s in samples]
    start = time.perf_counter()
    hashes = duplicates.as_rows(map(duplicates.image_hash, images))
    milliseconds = 1e3 * (time.perf_counter() - start) / len(hashes)
    sets = duplicates.largest(duplicates.near_duplicates(hashes))
    pairs, all_pairs = sum(len(s) * (len(s) - 1) // 2 for s in sets), len(hashes) * (len(hashes) - 1) / 2
    print(f"{len(hashes)} images, {milliseconds:.2f} ms each; unaltered, {sum(map(len, sets))} in {len(sets)} groups: "
          f"{pairs} pairs, {1e6 * pairs / all_pairs:.2f} per million")  # fmt: skip
    chosen = np.arange(0, len(hashes), options.every)
    print("| change | found |\n|---|---|")
    for name, change in CHANGES.items():
        changed = (change(Image.fromarray(images[i].permute(1, 2, 0).numpy())) for i in chosen)
        altered = duplicates.as_rows(duplicates.image_hash(read_image(p, SIZE)) for p in changed)
        groups = duplicates.near_duplicates(np.concatenate([hashes, altered]))
        found = (groups[chosen] == groups[len(hashes) :]) & (groups[chosen] >= 0)
        print(f"| {name} | {100 * found.mean():.1f} % |", flush=True)
    time_of_many(hashes, options.large)


def time_of_many(hashes: np.ndarray, size: int) -> None:
    draw = np.random.default_rng(0)

    def change(rows: np.ndarray, chance: float) -> None:
        for start in range(0, len(rows), 1 << 16):
            part = rows[start : start + (1 << 16), :SIGNS]
            part ^= np.packbits(draw.random((len(part), 8 * SIGNS), dtype=np.float32) < chance, axis=1)

    many = hashes[draw.integers(0, len(hashes), size)]
    change(many, 0.3)
    copies, crowd = many[: size // 20], many[size // 2 : size // 2 + size // 10]
    copies[:] = many[size // 20 : 2 * (size // 20)]
    crowd[:] = crowd[0]
    change(copies, 0.04)
    change(crowd, 0.02)
    start = time.perf_counter()
    groups = duplicates.near_duplicates(many)
    seconds = time.perf_counter() - start
    found = (groups[: size // 20] == groups[size // 20 : 2 * (size // 20)]) & (groups[: size // 20] >= 0)
    print(f"{size:,} hashes in {seconds:.1f} s on one core; of {len(copies):,} copies {100 * found.mean():.2f} % found")


if __name__ == "__main__":
    main()
