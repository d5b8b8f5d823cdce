"""Measure a model on data: retrieval, zero-shot classification, the gallery; and look at a data set."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclr import evaluate, figures
from amclr.averaging import check_start, digest, end_of_line, line_names, mixed
from amclr.config import Config, SourceConfig, problems
from amclr.data import duplicates, tables
from amclr.data import manifest as manifests
from amclr.data.manifest import Manifest, Sample
from amclr.data.pictures import BadPicture, Location, Picture, PictureStore, scan
from amclr.data.rows import Reject, printable, write_rejects
from amclr.data.texts import TextPolicy
from amclr.data.views import policies, title, whole
from amclr.distributed import World, process, processes, share_of
from amclr.errors import UserError
from amclr.features import caption_features, image_features
from amclr.files import write_arrays, write_text
from amclr.model import DualEncoder, build_tokenizer
from amclr.run import Run, begin

GALLERY_QUERIES, GALLERY_PLACES = 6, 6
CAPTIONS_AT_ONCE = 256
MONITORED = 2000
"""Pictures of the zero-shot monitor, at most; one of each class where there are more classes."""


def model_reads_pictures(model: DualEncoder) -> bool:
    """Whether a tower is trained, so that every step needs pictures rather than cached features."""
    return len(model.frozen_towers) < 2


class Evaluator:
    """Retrieval on a fixed set of samples. Where both towers are frozen, their features are cached.

    Samples whose pictures cannot be decoded are left out for good, as soon as it shows, with their captions.
    again: it will be asked more than once, so that decoded pictures are worth keeping.
    """

    def __init__(
        self,
        model: DualEncoder,
        samples: Sequence[Sample],
        config: Config,
        cache: Path,
        progress: bool = False,
        again: bool = False,
    ) -> None:
        self.model = model
        self.progress = progress and len(samples) > 2000  # a bar for a moment is only unrest
        self.rejects: list[Reject] = []
        """Samples that are left out."""
        places = [s.picture for s in samples]
        self.features: tuple[Tensor, Tensor] | None = None
        if not model_reads_pictures(model):
            pictures = _plain_features(model, samples, config, cache, progress)
            self._take(samples, (~pictures[:, 0].isnan()).tolist())
            texts = caption_features(model, self.captions, cache, progress)
            self.features = pictures[~pictures[:, 0].isnan()], torch.from_numpy(texts.copy())
            return
        self.pictures: Sequence[Picture] = places
        decoded: list[Tensor | None] = []
        if again:
            store = PictureStore.as_set(places, config, cache, progress)
            if store.kept != "none":
                decoded = [_or_none(store, i) for i in range(len(store))]
                self.pictures = [d for d in decoded if d is not None]
        # Where they are not kept, it shows when they are first decoded.
        self._take(samples, [d is not None for d in decoded] or [True] * len(samples))

    def _take(self, samples: Sequence[Sample], fine: Sequence[bool]) -> None:
        """Measure on those samples that are fine; list the others, and say how many they are."""
        bad = [s for s, good in zip(samples, fine, strict=True) if not good]
        self.samples = [s for s, good in zip(samples, fine, strict=True) if good]
        self.captions = [c for s in self.samples for c in s.captions]
        self.image_of_text = np.repeat(np.arange(len(self.samples)), [len(s.captions) for s in self.samples])
        if not bad:
            return
        verdicts = scan([s.picture for s in bad], self.model.config.image_size, progress=False)
        reasons = [verdicts[s.picture].reason or "picture could not be decoded" for s in bad]
        self.rejects += [
            Reject(s.picture.file, 0, f"while evaluating: {r}", s.name) for s, r in zip(bad, reasons, strict=True)
        ]
        if not self.samples:
            raise UserError(f"no picture to evaluate on can be decoded; the first: {self.rejects[0]}")
        print(
            f"{len(bad)} of {len(samples)} pictures to evaluate on cannot be decoded, and are left out; the first: "
            f"{self.rejects[-len(bad)]}", file=sys.stderr,
        )  # fmt: skip

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Unit rows of the pictures (N, D) and of all their captions (T, D), on the CPU.

        Of several processes each embeds a share, and all get all: they call it together.
        """
        if self.features is not None:
            return self.model.project(self.features[0], None), self.model.project(None, self.features[1])
        try:
            own = self._own_share(self.pictures, self.model.pictures_at_once, self.model.encode_image)
        except BadPicture:
            own = None
        if World.of(0 if own is None else 1, self.model.device).sizes.count(0):
            places = [s.picture for s in self.samples]
            verdicts = scan(places, self.model.config.image_size, progress=self.progress)
            self._take(self.samples, [not verdicts[p].reason for p in places])
            self.pictures = [s.picture for s in self.samples]
            own = self._own_share(self.pictures, self.model.pictures_at_once, self.model.encode_image)
        assert own is not None
        captions = self._own_share(self.captions, CAPTIONS_AT_ONCE, self.model.encode_text)
        return self._together(own), self._together(captions)

    def _own_share(self, items: Sequence[Any], size: int, encode: Callable[..., Tensor]) -> Tensor:
        """This process's share of the embeddings: of whole chunks, so that no row depends on how many share them."""
        chunks, count = -(-len(items) // size), processes()
        own = share_of(chunks, process(), count)
        rows = encode(items[own.start * size : own.stop * size], batch_size=size, progress=self.progress)
        for _ in range(own.stop - own.start, -(-chunks // count)):
            # Where each process holds a part of the weights, all take part in every forward pass.
            encode(items[:size], batch_size=size)
        return rows

    def _together(self, own: Tensor) -> Tensor:
        """All rows, of this process's own."""
        own = own.to(self.model.device)
        return World.of(len(own), own.device).gather(own).cpu()

    def __call__(self) -> dict[str, float]:
        """Recalls in percent, as `amclr.evaluate.retrieval` names them; of several processes the first one's alone."""
        images, texts = self.embeddings()
        return evaluate.retrieval(images, texts, self.image_of_text) if process() == 0 else {}

    def figures(self, images: Tensor, texts: Tensor) -> dict[str, Any]:
        """Recalls of given embeddings, with the sizes that they belong to."""
        sizes = {"pictures": len(images), "captions": len(texts), "rejects": len(self.rejects)}
        return {**sizes, **evaluate.retrieval(images, texts, self.image_of_text)}

    def hits(self, images: Tensor, texts: Tensor) -> dict[str, np.ndarray]:
        """What each query of given embeddings finds, and whose it is, for comparing runs query by query.

        txt (N, 3), img (T, 3): as of `evaluate.retrieval_hits`. image_of_text (T,). queries: a digest of what is asked.
        """
        found = evaluate.retrieval_hits(images, texts, self.image_of_text)
        asked = hashlib.sha256("\n".join([*(s.name for s in self.samples), *self.captions]).encode("utf-8", "replace"))
        return {
            **{side: rows.numpy().astype(np.float32) for side, rows in found.items()},
            "image_of_text": self.image_of_text, "queries": np.array(asked.hexdigest()),
        }  # fmt: skip

    def chance(self) -> float:
        """Mean of R@1, R@5 and R@10 in percent, for a random order of the pictures."""
        return float(np.mean(_chances(len(self.samples))))


def _or_none(store: PictureStore, index: int) -> Tensor | None:
    """A picture, or None where it cannot be decoded."""
    try:
        return store[index]
    except BadPicture:
        return None


def _plain_features(
    model: DualEncoder, samples: Sequence[Sample], config: Config, cache: Path, progress: bool
) -> Tensor:
    """Cached features (N, F) of pictures as they are evaluated; NaN where one cannot be decoded."""
    store = PictureStore([s.picture for s in samples], config.model.image_size)
    found = image_features(model, samples, "none", 1, config, cache, store, progress)
    return torch.from_numpy(found[:, 0].copy())


def draw_gallery(
    model: DualEncoder, evaluator: Evaluator, images: Tensor, texts: Tensor, file: Path, title: str
) -> None:
    """Draw some captions (the same ones for the same data) and the pictures that they find."""
    pick = np.random.default_rng(0).permutation(len(texts))[:GALLERY_QUERIES]
    places = min(GALLERY_PLACES, len(images))
    top = (texts[torch.from_numpy(pick)] @ images.T).topk(places)

    def shown(index: int) -> Tensor:
        try:
            return model.prepare(evaluator.samples[index].picture)
        except BadPicture:
            return torch.full((3, model.config.image_size, model.config.image_size), 128, dtype=torch.uint8)

    found = [
        [
            (shown(int(i)), float(s), int(i) == int(evaluator.image_of_text[q]))
            for s, i in zip(scores, index, strict=True)
        ]
        for q, scores, index in zip(pick, top.values, top.indices, strict=True)
    ]
    figures.gallery(
        [printable(evaluator.captions[q]) for q in pick], found, file, f"{title}: held-out captions and what they find"
    )


def evaluate_run(
    folder: Path, *, data: str = "", split: str = "val", zeroshot: str = "", classnames: str = "", templates: str = "",
    retrieval: bool = True, wise: Sequence[float] = (), progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Measure a run's best weights on a split of a data set and, where asked for, on a folder of classes.

    wise: measure at these shares of the way from the weights that the run began with to the trained ones
    instead (WiSE-FT), and draw the curves. Returns the figures, and writes them (with a gallery of a data
    set) under `evaluations/` in the run folder. Raises UserError for a folder, split or file that is not there.
    """
    if (classnames or templates) and not zeroshot:
        raise UserError("--classnames and --templates belong to --zeroshot FOLDER: give it too")
    if not (retrieval or zeroshot):
        raise UserError("nothing to measure: leave out --retrieval false, or give --zeroshot FOLDER")
    run = Run.open(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = Line(run, device) if wise else None
    model = line.model if line else run.load_model().to(device)
    config = run.config
    if data:  # columns and folders of the run's own data mean nothing in another set
        kept = {k: getattr(config.source, k) for k in ("captions", "val_fraction", "max_bad", "scan_up_to")}
        config = replace(config, data=data, source=SourceConfig(**kept))
    # Paraphrases are for training alone.
    config = replace(config, source=replace(config.source, paraphrases="none"))
    results: dict[str, Any] = {"run": str(folder), "objective": config.objective}
    out = folder / "evaluations"
    out.mkdir(exist_ok=True)
    name = f"{manifests.label(config.data)}-{split}" if retrieval else f"zeroshot-{Path(zeroshot).resolve().name}"
    classes, evaluator = Path(zeroshot) if zeroshot else None, None
    if retrieval:
        cache = manifests.cache_folder(config)
        manifest = manifests.prepare(config, cache, progress)
        samples = manifest.split(split)
        if not samples:
            raise UserError(f"split '{split}' of {config.data} is empty")
        evaluator = Evaluator(model, samples, config, cache, progress, again=bool(wise))
        classes = classes or manifest.zeroshot
        results |= {"data": config.data, "split": split}

    def measured() -> dict[str, Any]:
        found: dict[str, Any] = {}
        if evaluator:
            images, texts = evaluator.embeddings()
            found |= evaluator.figures(images, texts)
            if not line:
                draw_gallery(model, evaluator, images, texts, out / f"{name}.png", f"{config.objective} on {name}")
        return found | (measure_classes(model, classes, config, classnames, templates, progress) if classes else {})

    if line:
        results["wise"] = [{"wise": share, **measured()} for share in line.visit(wise)]
        name += "-wise"
        figures.wise(results["wise"], out / f"{name}.png", f"{manifests.label(config.data)}: from start to trained")
        results["curves"] = str(out / f"{name}.png")
    else:
        results |= measured()
    write_text(out / f"{name}.json", json.dumps(results, indent=2) + "\n")
    return results


class Line:
    """The weights between those that a run began with and those that it ended with (WiSE-FT).

    Raises UserError where the start was random, or is no longer to be had.
    """

    def __init__(self, run: Run, device: str) -> None:
        state = run.load_best()
        run.refuse_without_tokenizer()
        config = replace(run.config, model=replace(run.config.model, compile=False))
        self.model = begin(config, [], run.folder).to(device).eval()
        own = self.model.state_dict()
        self.start = {k: own[k].cpu().clone() for k in line_names(self.model, config)}
        if not self.start:
            raise UserError(
                f"--wise measures between the weights that a run starts from and those it ends with; '{run.folder}' "
                "trained nothing but what began at random: leave --wise out"
            )
        check_start(digest(self.start.values()), state, config)
        self.end = end_of_line(state)
        self.model.load_saved(self.end)

    def visit(self, shares: Sequence[float]) -> Iterator[float]:
        """Each share of the way in turn, the model having the weights there."""
        for share in shares:
            self.model.load_state_dict(mixed(self.start, self.end, share), strict=False)
            yield share


class Monitor:
    """Zero-shot accuracy of a model that is being trained, on pictures by class that are decoded once and kept.

    At most `MONITORED` pictures, as many of each class as can be, evenly spaced in the order of their
    names. Where the image tower is frozen, its features are kept instead. Pictures that cannot be decoded
    are left out and counted in `rejects`. Raises UserError for a folder without pictures by class.
    """

    start: float
    """Top-1 accuracy, in percent, of the model that the run began with."""

    def __init__(self, model: DualEncoder, root: Path, progress: bool = False) -> None:
        self.model, self.root = model, root
        paths, labels, self.names, self.prompts = _classes(root)
        chosen = evenly(labels, MONITORED)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(self._prepared, (paths[i] for i in chosen)))
        pictures = [p for p in found if p is not None]
        self.labels = [labels[i] for i, p in zip(chosen, found, strict=True) if p is not None]
        self.rejects = len(found) - len(pictures)
        if not pictures:
            raise UserError(f"no picture of --monitor '{root}' can be decoded; the first: {paths[chosen[0]]}")
        self.pictures: list[Tensor] | Tensor = pictures
        self.features: Tensor | None = None
        if model.image_tower in model.frozen_towers:
            with torch.inference_mode():
                parts = torch.stack(pictures).split(model.pictures_at_once)
                self.features = torch.cat([model.image_tower(p.to(model.device)).float().cpu() for p in parts])
            self.pictures = []
        if progress:
            print(
                f"zero-shot monitor: {len(pictures)} of {len(paths)} pictures in {len(self.names)} classes, "
                f"{self.rejects} left out as they cannot be decoded: {root}", file=sys.stderr,
            )  # fmt: skip

    @classmethod
    def of_run(cls, model: DualEncoder, run: Run, config: Config, progress: bool) -> Monitor:
        """The monitor of a run, while the model has the weights that the run begins with.

        They are measured once: a run that is gone on with finds the figure among its metrics.
        """
        monitor = cls(model, Path(config.monitor), progress)
        rows = [r for r in run.metrics() if r["kind"] == "start" and r["monitor"] == config.monitor]
        monitor.start = rows[-1]["zeroshot_top1"] if rows else monitor.top1()
        if not rows and run.speaks:
            run.log({"kind": "start", "step": 0, "epoch": 0.0, "monitor": config.monitor,
                     "zeroshot_top1": monitor.start})  # fmt: skip
        return monitor

    def _prepared(self, path: Path) -> Tensor | None:
        try:
            return self.model.prepare(path)
        except BadPicture:
            return None

    def top1(self) -> float:
        """Accuracy in percent of the model as it is."""
        images = self.pictures if self.features is None else self.model.project(self.features, None)
        try:
            return evaluate.zeroshot(self.model, images, self.labels, self.names, self.prompts)["zeroshot_top1"]
        except ValueError as error:
            raise UserError(f"{self.root}: {error}") from None

    def __call__(self) -> dict[str, float]:
        """Accuracy in percent of the model as it is, and of the one at the start."""
        return {"zeroshot_top1": self.top1(), "zeroshot_top1_start": self.start}

    @staticmethod
    def told(row: dict[str, float]) -> str:
        """The figures of an evaluation, for its line on the terminal; empty where there are none."""
        if "zeroshot_top1_start" not in row:
            return ""
        return f", zero-shot {row['zeroshot_top1']:.1f} (start {row['zeroshot_top1_start']:.1f})"


def evenly(labels: Sequence[int], most: int) -> list[int]:
    """Places of at most `most` samples, as many of each class as can be, evenly spaced; one of each class at least."""
    classes = [np.flatnonzero(np.array(labels) == y) for y in sorted(set(labels))]
    sizes = np.array([len(c) for c in classes])
    each = max((k for k in range(1, sizes.max() + 1) if np.minimum(sizes, k).sum() <= most), default=1)
    return [int(c[i * len(c) // k]) for c in classes for k in [min(len(c), each)] for i in range(k)]


def _classes(
    root: Path, classnames: str = "", templates: str = ""
) -> tuple[list[Path], list[int], list[str], Sequence[str]]:
    """Pictures by class: paths, labels, names of classes, and prompts."""
    paths, labels, names = tables.class_folders(root, Path(classnames) if classnames else None)
    file = Path(templates) if templates else root / "templates.txt"
    if templates and not file.is_file():
        raise UserError(f"no templates file '{file}': one prompt per line, with {{}} for the class name")
    return paths, labels, names, tables.read_lines(file) if file.is_file() else evaluate.TEMPLATES


def measure_classes(
    model: DualEncoder, root: Path, config: Config, classnames: str = "", templates: str = "", progress: bool = True,
    hits: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Zero-shot accuracy on a folder of pictures by class. Pictures that cannot be decoded are left out and counted.

    hits: a file to write each picture's top-1 hit to, (n, 1), for comparing runs picture by picture.
    """
    paths, labels, names, prompts = _classes(root, classnames, templates)
    places = [Location(str(p)) for p in paths]
    verdicts = scan(places, model.config.image_size, progress=progress)
    bad = {place: v.reason for place, v in verdicts.items() if v.reason}
    kept = [(p, y) for p, y in zip(places, labels, strict=True) if p not in bad]
    if not kept:
        raise UserError(f"no picture under '{root}' can be decoded; the first: {next(iter(bad.items()))}")
    if model_reads_pictures(model):
        images = model.encode_image([p for p, _ in kept], progress=progress)
    else:
        samples = [Sample(p.file, p, ()) for p, _ in kept]
        images = model.project(_plain_features(model, samples, config, manifests.cache_folder(config), progress), None)
    try:
        scores, target = evaluate.class_scores(model, images, [y for _, y in kept], names, prompts)
    except ValueError as error:
        raise UserError(f"{templates or root}: {error}") from None
    found = evaluate.classify(scores, target)
    if hits:
        asked = hashlib.sha256("\n".join(os.path.relpath(p.file, root) for p, _ in kept).encode("utf-8", "replace"))
        top1 = evaluate.class_hits(scores, target, (1,)).cpu().numpy().astype(np.float32)
        write_arrays(hits, {"top1": top1, "queries": np.array(asked.hexdigest()), "zeroshot": np.array(str(root))})
    return {"zeroshot": str(root), "zeroshot_classes": len(names), "zeroshot_pictures": len(kept),
            "zeroshot_rejects": len(bad), **found}  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """The figures of a measurement as tables for the terminal."""
    if "wise" in results:
        return _wise_table(results)
    parts = [_retrieval_table(results)] if "r_mean" in results else []
    parts += [_zeroshot_table(results)] if "zeroshot_top1" in results else []
    return "\n\n".join(parts)


def _retrieval_table(results: dict[str, Any]) -> str:
    left_out = f", {results['rejects']} left out" if results.get("rejects") else ""
    lines = [f"{results['split']} split: {results['pictures']} pictures, {results['captions']} captions{left_out}"]
    lines += [f"{'':18}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>8}{'median rank':>14}"]
    for side, name in (("txt", "text retrieval"), ("img", "image retrieval")):
        values = [results[f"{side}_r{k}"] for k in evaluate.RECALLS] + [results[f"{side}_r_mean"]]
        lines.append(f"{name:18}" + "".join(f"{v:8.1f}" for v in values) + f"{results[f'{side}_median_rank']:14.0f}")
    chances = _chances(results["pictures"])
    lines.append(f"{'chance (image)':18}" + "".join(f"{v:8.1f}" for v in (*chances, float(np.mean(chances))))
                 + f"{(results['pictures'] + 1) / 2:14.0f}")  # fmt: skip
    return "\n".join(lines)


def _wise_table(results: dict[str, Any]) -> str:
    shown = [
        ("txt_r_mean", "text retr."),
        ("img_r_mean", "image retr."),
        ("r_mean", "mean"),
        ("zeroshot_top1", "top-1"),
    ]
    columns = [(key, name) for key, name in shown if key in results["wise"][0]]
    lines = [f"{'wise (0 start, 1 trained)':26}" + "".join(f"{name:>13}" for _, name in columns)]
    for row in results["wise"]:
        lines.append(f"{row['wise']:<26g}" + "".join(f"{row[key]:13.1f}" for key, _ in columns))
    return "\n".join([*lines, "", f"curves: {results['curves']}"])


def _zeroshot_table(results: dict[str, Any]) -> str:
    classes, tops = results["zeroshot_classes"], [k for k in evaluate.TOPS if f"zeroshot_top{k}" in results]
    return "\n".join([
        f"zero-shot: {results['zeroshot_pictures']} pictures, {classes} classes",
        f"{'':18}" + "".join(f"{f'top-{k}':>8}" for k in tops),
        f"{'accuracy':18}" + "".join(f"{results[f'zeroshot_top{k}']:8.1f}" for k in tops),
        f"{'chance':18}" + "".join(f"{100 * min(1, k / classes):8.1f}" for k in tops),
    ])  # fmt: skip


def _chances(pictures: int) -> list[float]:
    return [100 * min(1.0, k / max(1, pictures)) for k in evaluate.RECALLS]


def inspect(
    config: Config, sheet: Path, scan_all: bool = False, listing: Path | None = None, progress: bool = True
) -> str:
    """Describe a data set in a few lines; draw a contact sheet of samples with both views, and lengths of captions.

    Bad rows and pictures are listed beside the sheet; no limit on them applies here. scan_all: decode
    every picture, however many there are. listing: also write every sample, as JSON lines.
    """
    if sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise UserError(f"cannot draw a contact sheet as '{sheet}': name a .png, .jpg, .pdf or .svg file")
    if wrong := problems(config):  # a slip in the settings should show before the data is read
        raise UserError("; ".join(wrong))
    policies(config)
    lenient = replace(config, source=replace(config.source, max_bad=1.0, duplicates="positives"))
    manifest = manifests.prepare(lenient, manifests.cache_folder(config), progress, scan_all)
    samples = manifest.samples
    captions = [c for s in samples for c in s.captions]
    lengths = np.array([len(c.split()) for c in captions])
    per_picture = Counter(len(s.captions) for s in samples)
    store = PictureStore([s.picture for s in samples], config.model.image_size)
    looks = [manifest.looks.get(s.picture) for s in samples]
    groups = duplicates.picture_groups(looks) if any(looks) else None
    words = Counter(w for c in captions for w in re.findall(r"\w+", c.lower()))
    counts = np.array(sorted(words.values(), reverse=True) or [0])
    commonest = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 1
    tokens = _token_lengths(config, captions)
    lines = [
        f"{manifest.root}" + (f" ({manifest.format})" if manifest.format else ""),
        f"pictures     {len(samples)}" + "".join(f", {n} {len(manifest.split(n))}" for n in manifest.splits),
        *(
            f"  {name:10} {sum(s.name.startswith(f'{name}/') for s in samples)}, each visited {weight:g} times an epoch"
            for name, weight in manifest.parts.items()
        ),
        f"captions     {len(lengths)}: "
        + ", ".join(f"{n} pictures with {k}" for k, n in sorted(per_picture.items(), key=lambda x: -x[1])[:3]),
        f"words        {len(words)}; {lengths.min()} to {lengths.max()} per caption, median {np.median(lengths):.0f}; "
        f"{np.mean(counts == 1):.0%} of them occur once, the {commonest} commonest are half of all",
        *([_token_line(config, tokens)] if tokens is not None else []),
        *duplicates.report(groups, [s.name for s in samples], [s.captions for s in samples], manifest.splits),
        f"left out     {len(manifest.rejects)} of {manifest.rows} rows",
    ]
    lines += [f"note         {note}" for note in manifest.notes]
    if reworded := sum(1 for s in samples for p in s.paraphrases if p):
        lines.append(f"paraphrases  of {reworded} captions, from {', '.join(manifest.paraphrases) or 'the data set'}")
    if manifest.zeroshot:
        lines.append(f"zero-shot    {manifest.zeroshot}")
    lines += [f"  {reject}" for reject in manifest.rejects[:10]]
    if manifest.rejects:
        listed = sheet.with_name(f"{sheet.stem}-rejects.jsonl")
        write_rejects(manifest.rejects, listed)
        lines.append(f"  {'... ' if len(manifest.rejects) > 10 else ''}all of them listed in {listed}")
    _draw_sheet(samples, config, sheet, manifest)
    plot = sheet.with_name(f"{sheet.stem}-captions{sheet.suffix}")
    figures.caption_statistics(lengths, tokens, config.model.max_tokens, counts, plot, manifests.label(config.data))
    lines += [f"contact sheet: {sheet}", f"caption lengths and words: {plot}"]
    if groups is not None and (sets := duplicates.largest(groups)):
        drawn = sheet.with_name(f"{sheet.stem}-duplicates{sheet.suffix}")
        if _draw_duplicates(samples, sets, store, drawn):
            lines.append(f"pictures that look the same: {drawn}")
    if listing:
        manifest.write(listing)
        lines.append(f"every sample: {listing}")
    return "\n".join(map(printable, lines))


def _token_lengths(config: Config, captions: Sequence[str], most: int = 100_000) -> np.ndarray | None:
    """Tokens of each caption (of `most` of them, evenly chosen) before any are cut; None without the text tower."""
    some = captions[:: -(-len(captions) // most) or 1]
    try:
        tokenizer = build_tokenizer(config.model, some)
    except UserError:
        return None
    return np.array([len(row) for row in tokenizer(list(some), verbose=False)["input_ids"]])


def _token_line(config: Config, tokens: np.ndarray) -> str:
    most, cut = config.model.max_tokens, np.mean(tokens > config.model.max_tokens)
    share = f"{cut:.1%} are cut at --model.max_tokens {most}" if cut else f"none is cut at --model.max_tokens {most}"
    return (
        f"tokens       {tokens.min()} to {tokens.max()} per caption, median {np.median(tokens):.0f}, "
        f"for the text tower '{config.model.text_tower}'; {share}"
    )


def _draw_duplicates(samples: Sequence[Sample], sets: Sequence[np.ndarray], store: PictureStore, file: Path) -> bool:
    """Draw some members of the largest groups of near-duplicate pictures, with a caption of the first two.

    False, with nothing drawn, where none of them can be decoded any more.
    """
    cards = []
    for members in sets[:12]:
        seen = [(samples[i], p) for i in map(int, members[:4]) if (p := _or_none(store, i)) is not None]
        if len(seen) > 1:
            first, second = (printable(s.captions[0]) for s, _ in seen[:2])
            cards.append(([(printable(s.name[-16:]), whole(p, 96)) for s, p in seen], first, second))
    if cards:
        title = f"{sum(map(len, sets))} pictures in {len(sets)} groups look the same"
        figures.contact_sheet(cards, file, title)
    return bool(cards)


def _draw_sheet(samples: Sequence[Sample], config: Config, file: Path, manifest: Manifest) -> None:
    order = np.random.default_rng(config.seed).permutation(len(samples))
    size = config.model.image_size
    store = PictureStore([s.picture for s in samples], size)
    cards = []
    found = ((samples[i], p) for i in map(int, order) if (p := _or_none(store, i)) is not None)
    for s, picture in islice(found, 8):
        key = (config.seed, 0, s.name)
        pictures = [("as evaluated", whole(picture, size))]
        for view, drawn in policies(config).items():
            (shown,) = drawn([picture], np.array([s.id]), config.seed, 0, view)
            pictures.append((f"{view}: {title(getattr(config.views, view))}", shown))
        _, text, second = TextPolicy.of(config).draw(s.captions, s.paraphrases, *key, "text")
        cards.append((pictures, printable(text), printable(second)))
    if not cards:
        raise UserError(f"no picture of '{config.data}' can be decoded: amclr inspect --scan lists them")
    file.parent.mkdir(parents=True, exist_ok=True)
    figures.contact_sheet(
        cards, file, f"{manifests.label(config.data)}: {len(samples)} pictures; text in black, text_aug in blue"
    )
