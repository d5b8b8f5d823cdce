"""Images per second of data loaders: amclr's from files, tars and the decoded cache, and open_clip's two.

    python -m benchmarks.loader --data flickr8k [--images 3000] [--size 128] [--repeats 5]

The same JPEG files, once in a folder and once in tars; the same random crop (0.9 to 1 of the area, ratio
3/4 to 4/3, bicubic: open_clip's training transform) to the same size, in batches of 128, with the same
number of worker processes, one thread each. Neither side tokenises captions. All loaders take turns, several
times; a figure is the median of its runs, from the first batch to the last, and a ratio the median of the
ratios within each turn, with the smallest and largest. open_clip's batches are normalised float32; amclr's are
uint8, which the image tower normalises on its device: rows "as float32" add that step. The last tables compare
views of decoded images on one core with the same policy in torchvision, image by image.
Needs amclr[bench].
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from amclr.config.schema import Config, ModelConfig, ViewsConfig
from amclr.data.batches import BatchPlan, ImageBatches
from amclr.data.images.decode import Location
from amclr.data.images.store import ImageStore
from amclr.data.images.views import POLICIES, Drawn, boxes, policy
from amclr.data.manifest import Sample, load

BATCH = 128
SHARDS = 8
EPOCHS = 3
"""Epochs of one amclr loader, as in training; open_clip creates a new loader for each epoch."""

# open_clip's crop as an amclr policy, for this comparison only.
POLICIES["open_clip"] = lambda draw, sides, size, flip: Drawn(
    boxes(draw, sides, 0.9, ratio=4 / 3), np.zeros(len(sides), dtype=bool)
)

Loader = Callable[[int], Iterable[Any]]
"""Number of workers -> batches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k, or another captioned folder of JPEG files")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        samples = list(load(Config(data=str(options.data)), Path(folder), progress=False).samples[: options.images])
        loaders = prepare(samples, options.size, Path(folder))
        print(f"{len(samples)} images, size {options.size}, batch {BATCH}; {machine()}", flush=True)
        for workers in options.workers:
            speeds = measure(loaders, workers, options.repeats)
            table(speeds, f"{workers} workers", list(speeds)[:2])
        views(samples, options.size, options.repeats)


def prepare(samples: list[Sample], size: int, folder: Path) -> dict[str, Loader]:
    """All loaders, open_clip's first. Writes the tars and the list of files."""
    shards, packed = write_tars(samples, folder)
    csv = folder / "captions.tsv"
    csv.write_text("filepath\ttitle\n" + "".join(f"{s.image.file}\t{s.captions[0]}\n" for s in samples))
    places = [s.image for s in samples]
    stores = {
        "amclr, folder": ImageStore(places, size),
        "amclr, tars": ImageStore(packed, size),
        "amclr, decoded in memory": ImageStore(places, size, "ram", progress=False),
        "amclr, decoded on disk": ImageStore(places, size, "disk", folder=folder / "decoded", progress=False),
    }
    loaders = {"open_clip, CSV": theirs("csv", str(csv), len(samples), size)}
    loaders["open_clip, WebDataset"] = theirs("webdataset", shards, len(samples), size)
    for name, store in stores.items():
        loaders[name] = ours(samples, store, size)
    loaders["the same, as float32"] = ours(samples, stores["amclr, decoded on disk"], size, normalise)
    return loaders


def write_tars(samples: list[Sample], folder: Path) -> tuple[str, list[Location]]:
    """Write the images and first captions as WebDataset shards; return their pattern and each image's location."""
    for k in range(SHARDS):
        with tarfile.open(folder / f"{k:02}.tar", "w") as tar:
            for s in samples[k::SHARDS]:
                stem, text = Path(s.name).stem, folder / "caption.txt"
                text.write_text(s.captions[0])
                tar.add(s.image.file, f"{stem}.jpg")
                tar.add(text, f"{stem}.txt")
    locations: dict[str, Location] = {}
    for k in range(SHARDS):
        file = folder / f"{k:02}.tar"
        with tarfile.open(file) as tar:
            locations |= {
                Path(m.name).stem: Location(str(file), m.offset_data, m.size) for m in tar if m.name[-3:] == "jpg"
            }
    return f"{folder}/{{00..{SHARDS - 1:02}}}.tar", [locations[Path(s.name).stem] for s in samples]


def no_tokens(texts: list[str]) -> Tensor:
    """Placeholder for the tokens of captions, on both sides."""
    return torch.zeros(len(texts), 77, dtype=torch.long)


def ours(samples: list[Sample], store: ImageStore, size: int, then: Callable[[Tensor], Any] = id) -> Loader:
    """Batches of `ImageBatches`, loaded as in training; `then` is applied to the images of each."""
    config = Config(batch_size=BATCH, model=ModelConfig(image_size=size), views=ViewsConfig(image="open_clip"))  # type: ignore[arg-type]
    plan = BatchPlan(np.array([s.id for s in samples]), BATCH, 0)
    batches = ImageBatches(samples, store, plan, ("image", "text"), lambda t: {"input_ids": no_tokens(t)}, config)

    def epoch(workers: int) -> Iterable[Any]:
        steps = range(EPOCHS * plan.steps_per_epoch)
        loader = DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers)
        for batch in loader:
            then(batch.images)
            yield batch.images

    return epoch


def normalise(images: Tensor) -> Tensor:
    """The first step of the image tower."""
    return images.float().sub_(120.0).div_(70.0)


def theirs(kind: str, source: str, count: int, size: int) -> Loader:
    """open_clip's loader of CSV files or of WebDataset tars, with its own training transform."""
    from open_clip.transform import image_transform
    from open_clip_train.data import get_csv_dataset, get_wds_dataset

    transform = image_transform(size, is_train=True)
    get = {"csv": get_csv_dataset, "webdataset": get_wds_dataset}[kind]

    def epoch(workers: int) -> Iterable[Any]:
        settings = SimpleNamespace(
            train_data=source, train_num_samples=count, train_data_upsampling_factors=None, dataset_resampled=False,
            seed=0, batch_size=BATCH, workers=workers, world_size=1, distributed=False,
            csv_img_key="filepath", csv_caption_key="title", csv_separator="\t",
        )  # fmt: skip
        floor = {"floor": True} if kind == "webdataset" else {}
        loader = get(settings, transform, True, tokenizer=no_tokens, **floor).dataloader
        for images, _ in loader:
            yield images

    return epoch


def measure(loaders: dict[str, Loader], workers: int, repeats: int) -> dict[str, list[float]]:
    """Images per second of each loader, turn by turn, after a warm-up turn."""
    speeds: dict[str, list[float]] = {name: [] for name in loaders}
    for turn in range(repeats + 1):
        for name, loader in loaders.items():
            count, begin, end = 0, 0.0, 0.0
            for images in loader(workers):
                end = time.perf_counter()
                begin = begin or end  # starting and stopping workers is not measured
                count += len(images)
            if turn:
                speeds[name].append((count - BATCH) / (end - begin))
    return speeds


def views(samples: list[Sample], size: int, repeats: int) -> None:
    """Views of decoded images per second on one core: batch-wise, and image by image with torchvision."""
    store = ImageStore([s.image for s in samples[:BATCH]], size, "ram", progress=False)
    images, ids = [store[i] for i in range(BATCH)], np.array([s.id for s in samples[:BATCH]])
    kernel = max(3, int(0.1 * size) // 2 * 2 + 1)
    colours = [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=0.5),
    ]
    augment = v2.RandAugment(2, 7, interpolation=v2.InterpolationMode.BILINEAR)
    for name, low, more in (("weak", 0.6, []), ("paper", 0.5, [augment]), ("strong", 0.2, colours)):
        crop = v2.RandomResizedCrop(size, (low, 1.0), (0.8, 1.25), v2.InterpolationMode.BICUBIC, antialias=True)
        theirs, ours = v2.Compose([crop, v2.RandomHorizontalFlip(), *more]), policy(name, size)
        speeds: dict[str, list[float]] = {"torchvision, one by one": [], "amclr, a batch at once": []}
        for turn in range(repeats + 1):
            for way, values in speeds.items():
                begin = time.perf_counter()
                for _ in range(3):
                    if way.startswith("amclr"):
                        ours(images, ids, turn)
                    else:
                        torch.stack([theirs(p) for p in images])
                if turn:
                    values.append(3 * BATCH / (time.perf_counter() - begin))
        table(speeds, f"views '{name}'", list(speeds)[:1])


def table(speeds: dict[str, list[float]], what: str, bases: list[str]) -> None:
    """Print a Markdown table of speeds and of their ratios to those of `bases`."""
    print(f"\n| {what} | images/s | {' | '.join(f'x {base}' for base in bases)} |\n|---{'|---' * (1 + len(bases))}|")
    for name, values in speeds.items():
        cells = [f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"]
        for base in bases:
            ratios = [a / b for a, b in zip(values, speeds[base], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def machine() -> str:
    """Cores, processor and library versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor())
    packages = ("torch", "torchvision", "pillow", "open_clip_torch", "webdataset")
    return f"{os.cpu_count()} cores of {model}; " + ", ".join(f"{p} {version(p)}" for p in packages)


if __name__ == "__main__":
    main()
