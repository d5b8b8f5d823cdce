"""Scenes as a data set on disk: images, captions, splits and zero-shot images."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from amclr.config.schema import ScenesConfig
from amclr.data.scenes.captions import describe
from amclr.data.scenes.render import render
from amclr.data.scenes.scene import (
    COLOURS,
    COLUMNS,
    GROUNDS,
    KINDS,
    MATERIALS,
    ROWS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    Thing,
    sample_scenes,
    split_of,
    stable_hash,
)
from amclr.utils.errors import UserError

FORMAT = 2


def write_scenes(folder: Path, settings: ScenesConfig, *, workers: int | None = None, progress: bool = True) -> Path:
    """Write the set in the Kaggle Flickr8k layout, with split lists and a zero-shot folder; return `folder`.

    Files: Images/NAME.png, captions.txt (image,caption), train.txt, val.txt, test.txt, and
    zeroshot/COLOUR_SHAPE/N.png with zeroshot/classnames.txt, templates.txt and shown.tsv (how many training images
    show each kind). With noise, noise.csv lists the wrong captions. The folder appears once it is complete; an
    existing folder with the same set is kept.

    Raises UserError if the folder contains something else, or the settings are impossible.
    """
    record = {"format": FORMAT, **asdict(settings)}
    if folder.exists():
        try:
            if json.loads((folder / "settings.json").read_text()) == record:
                return folder
        except (OSError, ValueError):
            pass
        raise UserError(f"'{folder}' contains something other than these scenes: remove it or choose another folder")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    jobs: list[tuple[Scene, Path]] = []
    try:
        (part / "Images").mkdir(parents=True)
        with (part / "captions.txt").open("w", newline="", encoding="utf-8") as handle:
            table = csv.writer(handle)
            table.writerow(["image", "caption"])
            for split in SPLITS:
                tail, noise = (settings.tail, settings.noise) if split == "train" else (0.0, 0.0)
                scenes = list(
                    itertools.islice(sample_scenes(settings.seed, split, tail=tail), getattr(settings, split))
                )
                names = [f"{split}-{i:06d}.png" for i in range(len(scenes))]
                texts = [describe(scene, settings.captions) for scene in scenes]
                wrong = exchanged(scenes, noise, settings.seed)
                for i, name in enumerate(names):
                    table.writerows([name, text] for text in texts[wrong.get(i, i)])
                if wrong:
                    _write_wrong(part / "noise.csv", names, texts, wrong)
                if split == "train":
                    shown = Counter(kind for scene in scenes for kind in scene.kinds)
                jobs += [(scene, part / "Images" / name) for scene, name in zip(scenes, names, strict=True)]
                (part / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        jobs += _zeroshot_jobs(settings, part / "zeroshot")
        lines = [f"{colour}_{shape}\t{shown[colour, shape]}\n" for colour, shape in KINDS]
        (part / "zeroshot" / "shown.tsv").write_text("".join(lines))
        _render_all(jobs, settings.size, workers or os.cpu_count() or 1, progress)
        (part / "settings.json").write_text(json.dumps(record, indent=2) + "\n")
        try:
            part.rename(folder)
        except OSError:  # another run wrote the same set in the meantime
            if not (folder / "settings.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def exchanged(scenes: Sequence[Scene], noise: float, seed: int) -> dict[int, int]:
    """Scenes that get the captions of another scene, and of which one: a share of `noise` of all scenes, rounded.

    The seed determines their order, so more noise extends the set of less noise. Each scene takes the captions of
    the next one in this order with a thing of a kind that it lacks: captions name all things, so all are false.

    Raises UserError if there is no such scene.
    """
    order = np.random.default_rng(stable_hash(seed, "noise")).permutation(len(scenes)).tolist()
    wrong: dict[int, int] = {}
    for k, scene in enumerate(order[: round(noise * len(scenes))]):
        candidates = (order[(k + step) % len(order)] for step in range(1, len(order)))
        source = next((c for c in candidates if not scenes[c].kinds <= scenes[scene].kinds), None)
        if source is None:
            raise UserError("--scenes.noise needs training images of different things: raise --scenes.train")
        wrong[scene] = source
    return wrong


def _write_wrong(file: Path, names: Sequence[str], texts: Sequence[list[str]], wrong: Mapping[int, int]) -> None:
    """List the images with wrong captions: the image, the source, the first caption, and the true first caption."""
    with file.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["image", "captions_of", "caption", "true_caption"])
        table.writerows([names[i], names[wrong[i]], texts[wrong[i]][0], texts[i][0]] for i in sorted(wrong))


def notes(folder: Path, settings: ScenesConfig) -> tuple[str, ...]:
    """Notes on the tail and the noise of a set that `write_scenes` wrote, a sentence each."""
    sentences = []
    if settings.tail:
        shown = folder / "zeroshot" / "shown.tsv"
        counts = sorted(int(line.split("\t")[1]) for line in shown.read_text().splitlines())
        sentences.append(
            f"of {settings.train} training images {counts[-1]} show the most common of {len(counts)} kinds, "
            f"{counts[0]} the rarest: {shown}"
        )
    if wrong := round(settings.noise * settings.train):
        sentences.append(
            f"{wrong} of {settings.train} training images have the captions of another image: {folder / 'noise.csv'}"
        )
    return tuple(sentences)


TEMPLATES = ("a {}", "there is a {}", "a picture of a {}", "a {} on grass", "a {} on sand", "a {} on tiles")
"""Prompts in the style of the captions."""


def _zeroshot_jobs(settings: ScenesConfig, root: Path) -> list[tuple[Scene, Path]]:
    """Single things of the test split, split as evenly over the classes as the number allows."""
    root.mkdir()
    (root / "templates.txt").write_text("".join(f"{t}\n" for t in TEMPLATES))
    (root / "classnames.txt").write_text("".join(f"{c}_{s}\t{c} {s}\n" for c, s in KINDS))
    share, rest = divmod(settings.zeroshot, len(KINDS))
    wanted = {pair: share + (k < rest) for k, pair in enumerate(KINDS)}
    jobs: list[tuple[Scene, Path]] = []
    if not settings.zeroshot:
        return jobs
    counts = dict.fromkeys(KINDS, 0)
    # There are finitely many symbolic scenes; after all of them, they repeat with other seeds.
    for round_ in range(10_000):
        for scene in _all_singles(settings.seed, round_):
            pair = (scene.things[0].colour, scene.things[0].shape)
            if counts[pair] < wanted[pair]:
                file = root / f"{pair[0]}_{pair[1]}" / f"{counts[pair]:04d}.png"
                file.parent.mkdir(exist_ok=True)
                jobs.append((scene, file))
                counts[pair] += 1
        if len(jobs) == settings.zeroshot:
            break
    return jobs


def _all_singles(seed: int, round_: int) -> list[Scene]:
    """Every scene of one thing in the test split, in random order, with seeds of this round."""
    scenes = [
        Scene(g, (Thing(s, c, z, m, k, row),), stable_hash("single", seed, round_, g, s, c, z, m, k, row) >> 24)
        for g in GROUNDS for s in SHAPES for c in COLOURS for z in SIZES for m in MATERIALS
        for k in range(COLUMNS) for row in range(ROWS)
    ]  # fmt: skip
    test = [s for s in scenes if split_of(s.signature) == "test"]
    return [test[i] for i in np.random.default_rng(stable_hash(seed, "singles", round_)).permutation(len(test))]


def _render_all(jobs: list[tuple[Scene, Path]], size: int, workers: int, progress: bool) -> None:
    save = partial(_render_one, size=size)
    bar = partial(tqdm, total=len(jobs), desc="Rendering scenes", unit="image", disable=not progress, leave=False)
    if workers == 1 or len(jobs) < 64:
        for _ in bar(map(save, jobs)):
            pass
        return
    pool = ProcessPoolExecutor(workers)
    try:
        for _ in bar(pool.map(save, jobs, chunksize=16)):
            pass
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _render_one(job: tuple[Scene, Path], size: int) -> None:
    scene, file = job
    Image.fromarray(render(scene, size)).save(file)
