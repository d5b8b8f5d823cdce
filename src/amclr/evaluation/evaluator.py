"""Measure a model on data: retrieval, zero-shot, paraphrased queries, the gallery; and look at a data set."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclr.config.schema import Config, SourceConfig, problems
from amclr.data import manifest as manifests
from amclr.data.images import duplicates
from amclr.data.images.decode import BadImage, ImageSource, ImageStore, Location, scan
from amclr.data.images.views import policies, title, whole
from amclr.data.manifest import Manifest, Sample
from amclr.data.sources.rows import Reject, printable, write_rejects
from amclr.data.text.store import Rewording
from amclr.data.text.views import TextPolicy
from amclr.distributed.world import World, process, processes, share_of
from amclr.evaluation import metrics as evaluate
from amclr.evaluation.classes import ClassSet, read_classes, short_names
from amclr.models.averaging import (
    check_initial_weights,
    fine_tuned_weights,
    interpolate,
    interpolated_names,
    weights_digest,
)
from amclr.models.dual_encoder import DualEncoder
from amclr.models.features import caption_features, image_features
from amclr.models.tokenizer import build_tokenizer
from amclr.runs.folder import Run
from amclr.runs.loading import initial_model
from amclr.utils import figures
from amclr.utils.errors import UserError
from amclr.utils.files import write_arrays, write_text

GALLERY_QUERIES, GALLERY_PLACES = 6, 6
CAPTIONS_AT_ONCE = 256
MONITORED = 2000
"""Images of the zero-shot monitor, at most; one of each class where there are more classes."""


def model_reads_images(model: DualEncoder) -> bool:
    """Whether a tower is trained, so that every step needs images rather than cached features."""
    return len(model.frozen_towers) < 2


class Evaluator:
    """Retrieval on a fixed set of samples. Where both towers are frozen, their features are cached.

    Samples whose images cannot be decoded are left out for good, as soon as it shows, with their captions.
    again: it will be asked more than once, so that decoded images are worth keeping.
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
        places = [s.image for s in samples]
        self.features: tuple[Tensor, Tensor] | None = None
        if not model_reads_images(model):
            images = _plain_features(model, samples, config, cache, progress)
            self._take(samples, (~images[:, 0].isnan()).tolist())
            texts = caption_features(model, self.captions, cache, progress)
            self.features = images[~images[:, 0].isnan()], torch.from_numpy(texts.read())
            return
        self.images: Sequence[ImageSource] = places
        decoded: list[Tensor | None] = []
        if again:
            store = ImageStore.as_set(places, config, cache, progress)
            if store.kept != "none":
                decoded = [_or_none(store, i) for i in range(len(store))]
                self.images = [d for d in decoded if d is not None]
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
        verdicts = scan([s.image for s in bad], self.model.config.image_size, progress=False)
        reasons = [verdicts[s.image].reason or "image could not be decoded" for s in bad]
        self.rejects += [
            Reject(s.image.file, 0, f"while evaluating: {r}", s.name) for s, r in zip(bad, reasons, strict=True)
        ]
        if not self.samples:
            raise UserError(f"no image to evaluate on can be decoded; the first: {self.rejects[0]}")
        print(
            f"{len(bad)} of {len(samples)} images to evaluate on cannot be decoded, and are left out; the first: "
            f"{self.rejects[-len(bad)]}", file=sys.stderr,
        )  # fmt: skip

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """Unit rows of the images (N, D) and of all their captions (T, D), on the CPU.

        Of several processes each embeds a share, and all get all: they call it together.
        """
        if self.features is not None:
            return self.model.project(self.features[0], None), self.model.project(None, self.features[1])
        try:
            own = self._own_share(self.images, self.model.images_at_once, self.model.encode_image)
        except BadImage:
            own = None
        if World.of(0 if own is None else 1, self.model.device).sizes.count(0):
            places = [s.image for s in self.samples]
            verdicts = scan(places, self.model.config.image_size, progress=self.progress)
            self._take(self.samples, [not verdicts[p].reason for p in places])
            self.images = [s.image for s in self.samples]
            own = self._own_share(self.images, self.model.images_at_once, self.model.encode_image)
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
        sizes = {"images": len(images), "captions": len(texts), "rejects": len(self.rejects)}
        return {**sizes, **evaluate.retrieval(images, texts, self.image_of_text)}

    def hits(self, images: Tensor, texts: Tensor) -> dict[str, np.ndarray]:
        """What each query of given embeddings finds, and whose it is, for comparing runs query by query.

        txt (N, 3), img (T, 3): as of `evaluate.retrieval_hits`. image_of_text (T,). queries: a digest of what is asked.
        """
        found = evaluate.retrieval_hits(images, texts, self.image_of_text)
        return {
            **{side: rows.numpy().astype(np.float32) for side, rows in found.items()},
            "image_of_text": self.image_of_text, "queries": np.array(self.asked()),
        }  # fmt: skip

    def asked(self) -> str:
        """A digest of the images and captions that it measures on."""
        return _digest([*(s.name for s in self.samples), *self.captions])

    def in_folds(self, images: Tensor, texts: Tensor, folds: int, names: Sequence[str] = ()) -> dict[str, float]:
        """Means over folds of the images of the recalls of given embeddings. names: the images in their order."""
        place = {name: i for i, name in enumerate(names)}
        order = sorted(range(len(self.samples)), key=lambda i: place.get(self.samples[i].name, i))
        return evaluate.retrieval_in_folds(images, texts, self.image_of_text, folds, order)

    def chance(self) -> float:
        """Mean of R@1, R@5 and R@10 in percent, for a random order of the images."""
        return float(np.mean(_chances(len(self.samples))))


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()


def _or_none(store: ImageStore, index: int) -> Tensor | None:
    """An image, or None where it cannot be decoded."""
    try:
        return store[index]
    except BadImage:
        return None


def _plain_features(
    model: DualEncoder, samples: Sequence[Sample], config: Config, cache: Path, progress: bool
) -> Tensor:
    """Cached features (N, F) of images as they are evaluated; NaN where one cannot be decoded."""
    store = ImageStore([s.image for s in samples], config.model.image_size)
    found = image_features(model, samples, "none", 1, config, cache, store, progress)
    return torch.from_numpy(found.read()[:, 0])


def draw_gallery(
    model: DualEncoder, evaluator: Evaluator, images: Tensor, texts: Tensor, file: Path, title: str
) -> None:
    """Draw some captions (the same ones for the same data) and the images that they find."""
    pick = np.random.default_rng(0).permutation(len(texts))[:GALLERY_QUERIES]
    places = min(GALLERY_PLACES, len(images))
    top = (texts[torch.from_numpy(pick)] @ images.T).topk(places)

    def shown(index: int) -> Tensor:
        try:
            return model.prepare(evaluator.samples[index].image)
        except BadImage:
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
    folder: Path, *, data: str = "", source: SourceConfig | None = None, split: str = "val", captions: int = 0,
    folds: int = 1, paraphrased: str = "", zeroshot: str | Sequence[str] = (), classnames: str = "",
    templates: str = "", retrieval: bool = True, wise: Sequence[float] = (), progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Measure a run's best weights on a split of a data set and, where asked for, on folders of images by class.

    Args:
        folder: the run.
        data: a data set instead of the run's own.
        source: settings of the data set that count, where they are not the defaults, instead of the run's.
        split: train, val, test, all, or another that the set has. Where its rows name their splits, the images of
            others need not be there.
        captions: take so many of each image, the first ones; 0 takes all.
        folds: if more than 1, also the means over so many folds of the images, in the data set's own order.
        paraphrased: also paraphrase the captions, by `rules`, a file or a folder of paraphrases.
        zeroshot: folders of images by class.
        classnames: what they are called, as for `amclr.evaluation.classes.read_classes`.
        templates: prompts, likewise.
        retrieval: whether to measure on the split.
        wise: measure at these shares of the way from the weights that the run began with to the trained ones
            instead (WiSE-FT), and draw the curves.
        progress: show how far it is.

    Returns the figures, and writes them (with a gallery of a data set) under `evaluations/` in the run folder.
    Raises UserError for a folder, split or file that is not there, and for options that do not go together.
    """
    roots = [zeroshot] if isinstance(zeroshot, str) and zeroshot else list(zeroshot)
    if (classnames or templates) and not roots:
        raise UserError("--classnames and --templates belong to --zeroshot FOLDER: give it too")
    if not (retrieval or roots):
        raise UserError("nothing to measure: leave out --retrieval false, or give --zeroshot FOLDER")
    if paraphrased and not retrieval:
        raise UserError("--paraphrased belongs to retrieval: leave out --retrieval false")
    if wise and len(roots) > 1:
        raise UserError("--wise draws the curve of one folder of classes: give one --zeroshot FOLDER")
    if captions < 0 or folds < 1:
        raise UserError("--captions must be 0 (all of them) or more, and --folds 1 or more")
    run = Run.open(folder)
    rewording = Rewording.find(paraphrased) if paraphrased else None
    sets = short_names([Path(r) for r in roots])
    # A slip should show before anything is measured.
    classes = {label: read_classes(root, classnames, templates) for label, root in sets.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = Line(run, device) if wise else None
    model = line.model if line else run.load_model().to(device)
    config = measured_on(run.config, data, source or SourceConfig())
    results: dict[str, Any] = {"run": str(folder), "objective": config.objective}
    out = folder / "evaluations"
    out.mkdir(exist_ok=True)
    evaluator = None
    if retrieval:
        name = f"{manifests.label(config.data)}-{split}"
        cache = manifests.cache_folder(config)
        manifest = manifests.prepare(config, cache, progress, only=split)
        samples = [replace(s, captions=s.captions[:captions]) if captions else s for s in manifest.samples]
        if folds > len(samples):
            raise UserError(f"--folds must be {len(samples)} at the most, as many as there are images, got {folds}")
        evaluator = Evaluator(model, samples, config, cache, progress, again=bool(wise))
        if manifest.zeroshot and not classes:
            classes = {"own classes": read_classes(manifest.zeroshot, classnames, templates)}
        results |= {"data": config.data, "split": split}
    else:
        name = f"zeroshot-{roots[0] and Path(roots[0]).resolve().name if len(sets) == 1 else '-'.join(sets)}"

    def measured() -> dict[str, Any]:
        found: dict[str, Any] = {}
        if evaluator:
            images, texts = evaluator.embeddings()
            found |= evaluator.figures(images, texts)
            if folds > 1:
                found["folds"] = {"count": folds, **evaluator.in_folds(images, texts, folds, manifest.order)}
            if rewording:
                found["paraphrased"] = measure_paraphrased(evaluator, images, texts, rewording, config, progress)
            if not line:
                draw_gallery(model, evaluator, images, texts, out / f"{name}.png", f"{config.objective} on {name}")
        by_set = {label: measure_classes(model, own, config, progress) for label, own in classes.items()}
        return found | ({"zeroshot_sets": by_set} if len(by_set) > 1 else next(iter(by_set.values()), {}))

    if line:
        results["wise"] = [{"wise": share, **measured()} for share in line.visit(wise)]
        name += "-wise"
        figures.wise(results["wise"], out / f"{name}.png", f"{manifests.label(config.data)}: from start to trained")
        results["curves"] = str(out / f"{name}.png")
    else:
        results |= measured()
    write_text(out / f"{name}.json", json.dumps(results, indent=2) + "\n")
    return results


def measured_on(config: Config, data: str, source: SourceConfig) -> Config:
    """A run's settings, with those of the data set to measure on; without paraphrases, which are for training alone."""
    base = config.source
    if data:  # columns and folders of the run's own data mean nothing in another set
        base = SourceConfig(**{k: getattr(base, k) for k in ("captions", "val_fraction", "max_bad", "scan_up_to")})
    given = {f.name: value for f in fields(source) if (value := getattr(source, f.name)) != f.default}
    return replace(config, data=data or config.data, source=replace(base, **{**given, "paraphrases": "none"}))


def measure_paraphrased(
    evaluator: Evaluator, images: Tensor, texts: Tensor, rewording: Rewording, config: Config, progress: bool = True,
    hits: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What other words for the same captions change: recalls with each, and how alike the images are that both find.

    images (N, D), texts (T, D): the evaluator's embeddings. Captions without a paraphrase are left out, as queries and
    as candidates, and counted. hits: a file to write each caption's hits and agreement to, for comparing runs query by
    query. Raises UserError where no caption has a paraphrase.

    Returns by, captions, without; as_is and paraphrased, each as of `evaluate.retrieval` (text retrieval: among the
    captions as they are, or among the paraphrases); overlap in percent, rbo in [0, 1].
    """
    found = [rewording.of(caption) for caption in evaluator.captions]
    kept = np.flatnonzero([p is not None for p in found])
    paraphrases = [p for p in found if p is not None]
    if not paraphrases:
        raise UserError(
            f"none of the {len(found)} captions has a paraphrase by '{rewording.by}': give --paraphrased rules (for "
            "English), or a store of these captions: amclr paraphrase DATA"
        )
    owner = evaluator.image_of_text[kept]
    sides = texts[torch.from_numpy(kept)], Texts(evaluator.model, config, progress).encode_text(paraphrases)
    alike = evaluate.agreement(*sides, images)
    if hits:
        own, again = (evaluate.retrieval_hits(images, side, owner)["img"] for side in sides)
        rows = {"as_is": own, "paraphrased": again, **alike}
        write_arrays(hits, {
            **{name: row.cpu().numpy().astype(np.float32) for name, row in rows.items()}, "image_of_text": owner,
            "by": np.array(rewording.digest), "of": np.array(evaluator.asked()),
            "queries": np.array(_digest([evaluator.asked(), *(p or "" for p in found)])),
        })  # fmt: skip
    as_is, reworded = (evaluate.retrieval(images, side, owner) for side in sides)
    return {
        "by": rewording.by, "captions": len(paraphrases), "without": len(found) - len(paraphrases),
        "as_is": as_is, "paraphrased": reworded, "places": min(evaluate.COMMON, len(images)),
        "overlap": 100 * float(alike["overlap"].mean()), "rbo": float(alike["rbo"].mean()),
    }  # fmt: skip


def measure_run_paraphrased(
    model: DualEncoder, config: Config, rewording: Rewording, hits: Path, progress: bool = True
) -> dict[str, Any]:
    """As `measure_paraphrased`, on the validation split that a run of this configuration is measured on."""
    config = measured_on(config, "", SourceConfig())
    cache = manifests.cache_folder(config)
    samples = manifests.prepare(config, cache, progress, only="val").samples
    evaluator = Evaluator(model, samples, config, cache, progress)
    return measure_paraphrased(evaluator, *evaluator.embeddings(), rewording, config, progress, hits)


class Texts:
    """A model as what embeds texts; where its text tower is frozen, it sees a text once, and its features are kept."""

    def __init__(self, model: DualEncoder, config: Config, progress: bool = False) -> None:
        self.model, self.cache, self.progress = model, manifests.cache_folder(config), progress

    def encode_image(self, images: Iterable[Any]) -> Tensor:
        """Images -> (n, D) unit rows."""
        return self.model.encode_image(images, progress=self.progress)

    def encode_text(self, texts: Iterable[str]) -> Tensor:
        """Texts -> (n, D) unit rows."""
        if self.model.text_tower not in self.model.frozen_towers:
            return self.model.encode_text(texts, progress=self.progress)
        features = caption_features(self.model, list(texts), self.cache, self.progress)
        return self.model.project(None, torch.from_numpy(features.read()))


class Line:
    """The weights between those that a run began with and those that it ended with (WiSE-FT).

    Raises UserError where the start was random, or is no longer to be had.
    """

    def __init__(self, run: Run, device: str) -> None:
        state = run.load_best()
        run.check_tokenizer()
        config = replace(run.config, model=replace(run.config.model, compile=False))
        self.model = initial_model(config, [], run.folder).to(device).eval()
        own = self.model.state_dict()
        self.start = {k: own[k].cpu().clone() for k in interpolated_names(self.model, config)}
        if not self.start:
            raise UserError(
                f"--wise measures between the weights that a run starts from and those it ends with; '{run.folder}' "
                "trained nothing but what began at random: leave --wise out"
            )
        check_initial_weights(weights_digest(self.start.values()), state, config)
        self.end = fine_tuned_weights(state)
        self.model.load_saved(self.end)

    def visit(self, shares: Sequence[float]) -> Iterator[float]:
        """Each share of the way in turn, the model having the weights there."""
        for share in shares:
            self.model.load_state_dict(interpolate(self.start, self.end, share), strict=False)
            yield share


class Monitor:
    """Zero-shot accuracy of a model that is being trained, on images by class that are decoded once and kept.

    At most `MONITORED` images, as many of each class as can be, evenly spaced in the order of their
    names. Where the image tower is frozen, its features are kept instead. Images that cannot be decoded
    are left out and counted in `rejects`. Raises UserError for a folder without images by class.
    """

    start: float
    """Top-1 accuracy, in percent, of the model that the run began with."""

    def __init__(self, model: DualEncoder, root: Path, progress: bool = False) -> None:
        self.model, self.root = model, root
        # Prompts are embedded at every evaluation, so the many of a known set are not looked for.
        classes = read_classes(root, known=False)
        paths, labels, self.names, self.prompts = classes.paths, classes.labels, classes.names, classes.prompts
        chosen = evenly(labels, MONITORED)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            found = list(pool.map(self._prepared, (paths[i] for i in chosen)))
        images = [p for p in found if p is not None]
        self.labels = [labels[i] for i, p in zip(chosen, found, strict=True) if p is not None]
        self.rejects = len(found) - len(images)
        if not images:
            raise UserError(f"no image of --monitor '{root}' can be decoded; the first: {paths[chosen[0]]}")
        self.images: list[Tensor] | Tensor = images
        self.features: Tensor | None = None
        if model.image_tower in model.frozen_towers:
            with torch.inference_mode():
                parts = torch.stack(images).split(model.images_at_once)
                self.features = torch.cat([model.image_tower(p.to(model.device)).float().cpu() for p in parts])
            self.images = []
        if progress:
            print(
                f"zero-shot monitor: {len(images)} of {len(paths)} images in {len(self.names)} classes, "
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
        if not rows and run.verbose:
            run.log({"kind": "start", "step": 0, "epoch": 0.0, "monitor": config.monitor,
                     "zeroshot_top1": monitor.start})  # fmt: skip
        return monitor

    def _prepared(self, path: Path) -> Tensor | None:
        try:
            return self.model.prepare(path)
        except BadImage:
            return None

    def top1(self) -> float:
        """Accuracy in percent of the model as it is."""
        images = self.images if self.features is None else self.model.project(self.features, None)
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


def measure_classes(
    model: DualEncoder, classes: ClassSet, config: Config, progress: bool = True, hits: Path | None = None
) -> dict[str, Any]:
    """Zero-shot accuracy on a folder of images by class. Images that cannot be decoded are left out and counted.

    hits: a file to write each image's top-1 hit to, (n, 1), for comparing runs image by image.
    """
    root = classes.root
    places = [Location(str(p)) for p in classes.paths]
    verdicts = scan(places, model.config.image_size, progress=progress)
    bad = {place: v.reason for place, v in verdicts.items() if v.reason}
    kept = [(p, y) for p, y in zip(places, classes.labels, strict=True) if p not in bad]
    if not kept:
        raise UserError(f"no image under '{root}' can be decoded; the first: {next(iter(bad.items()))}")
    if model_reads_images(model):
        images = model.encode_image([p for p, _ in kept], progress=progress)
    else:
        samples = [Sample(p.file, p, ()) for p, _ in kept]
        images = model.project(_plain_features(model, samples, config, manifests.cache_folder(config), progress), None)
    try:
        scores, target = evaluate.class_scores(
            Texts(model, config, progress), images, [y for _, y in kept], classes.names, classes.prompts
        )
    except ValueError as error:
        raise UserError(f"{root}: {error}") from None
    found = evaluate.classify(scores, target)
    if hits:
        asked = _digest(os.path.relpath(p.file, root) for p, _ in kept)
        top1 = evaluate.class_hits(scores, target, (1,)).cpu().numpy().astype(np.float32)
        write_arrays(hits, {"top1": top1, "queries": np.array(asked), "zeroshot": np.array(classes.digest)})
    return {
        "zeroshot": str(root), "zeroshot_classes": len(classes.names), "zeroshot_images": len(kept),
        "zeroshot_rejects": len(bad), "zeroshot_about": classes.about, "zeroshot_advice": classes.advice, **found,
        "zeroshot_class_recall": evaluate.mean_class_recall(scores, target),
    }  # fmt: skip


def report(results: dict[str, Any]) -> str:
    """The figures of a measurement as tables for the terminal."""
    if "wise" in results:
        return _wise_table(results)
    parts = [_retrieval_table(results)] if "r_mean" in results else []
    parts += [_paraphrased_table(results["paraphrased"])] if "paraphrased" in results else []
    parts += [_zeroshot_table(results)] if "zeroshot_top1" in results else []
    parts += [_zeroshot_sets_table(results["zeroshot_sets"])] if "zeroshot_sets" in results else []
    return "\n\n".join(parts)


def _retrieval_table(results: dict[str, Any]) -> str:
    left_out = f", {results['rejects']} left out" if results.get("rejects") else ""
    lines = [f"{results['split']} split: {results['images']} images, {results['captions']} captions{left_out}"]
    lines += [RECALL_HEADER, *(_recall_line(results, side, name) for side, name in SIDES.items())]
    chances = _chances(results["images"])
    lines.append(f"{'chance (image)':18}" + "".join(f"{v:8.1f}" for v in (*chances, float(np.mean(chances))))
                 + f"{(results['images'] + 1) / 2:14.0f}")  # fmt: skip
    if folds := results.get("folds"):
        size = results["images"] / folds["count"]
        lines += ["", f"means over {folds['count']} folds of {size:g} images"]
        lines += [RECALL_HEADER, *(_recall_line(folds, side, name) for side, name in SIDES.items())]
    return "\n".join(lines)


SIDES = {"txt": "text retrieval", "img": "image retrieval"}
RECALL_HEADER = f"{'':18}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>8}{'median rank':>14}"


def _recall_line(found: dict[str, Any], side: str, name: str) -> str:
    values = [found[f"{side}_r{k}"] for k in evaluate.RECALLS] + [found[f"{side}_r_mean"]]
    return f"{name:18}" + "".join(f"{v:8.1f}" for v in values) + f"{found[f'{side}_median_rank']:14.0f}"


def _paraphrased_table(found: dict[str, Any]) -> str:
    total = found["captions"] + found["without"]
    left_out = f", {found['without']} without one left out" if found["without"] else ""
    lines = [f"paraphrased by {printable(found['by'])}: {found['captions']} of {total} captions{left_out}"]
    lines += [RECALL_HEADER]
    own, again = found["as_is"], found["paraphrased"]
    drop = {name: own[name] - again[name] for name in own}
    for side, name in SIDES.items():
        lines += [_recall_line(own, side, name), _recall_line(again, side, "  paraphrased")]
        lines += [_recall_line(drop, side, "  drop")]
    lines.append(
        f"images that a caption and its paraphrase find: {found['overlap']:.1f} % of the first {found['places']} in "
        f"common, rank-biased overlap {found['rbo']:.3f} (p = {evaluate.PERSISTENCE})"
    )
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
        f"zero-shot: {results['zeroshot_images']} images, {classes} classes",
        f"{'':18}" + "".join(f"{f'top-{k}':>8}" for k in tops) + f"{'per class':>12}",
        f"{'accuracy':18}" + "".join(f"{results[f'zeroshot_top{k}']:8.1f}" for k in tops)
        + f"{results['zeroshot_class_recall']:12.1f}",
        f"{'chance':18}" + "".join(f"{100 * min(1, k / classes):8.1f}" for k in tops) + f"{100 / classes:12.1f}",
        *_about(results),
    ])  # fmt: skip


def _zeroshot_sets_table(sets: dict[str, dict[str, Any]]) -> str:
    width = max(18, *(len(printable(label)) + 2 for label in sets))
    header = "".join(f"{f'top-{k}':>8}" for k in evaluate.TOPS)
    lines = [f"{'zero-shot':{width}}{'images':>10}{'classes':>9}{header}{'per class':>12}"]
    for label, found in sets.items():
        tops = [f"{found[k]:.1f}" if k in found else "–" for k in (f"zeroshot_top{k}" for k in evaluate.TOPS)]
        lines.append(
            f"{printable(label):{width}}{found['zeroshot_images']:10}{found['zeroshot_classes']:9}"
            + "".join(f"{top:>8}" for top in tops) + f"{found['zeroshot_class_recall']:12.1f}"
        )  # fmt: skip
    return "\n".join(
        [*lines, *(f"{printable(label)}: {line}" for label, found in sets.items() for line in _about(found))]
    )


def _about(found: dict[str, Any]) -> list[str]:
    """Which names and prompts were used, images left out, and what to install for others."""
    left_out = f"; {found['zeroshot_rejects']} images left out" if found["zeroshot_rejects"] else ""
    lines = [f"{found['zeroshot_about']}{left_out}", found["zeroshot_advice"]]
    return [printable(line) for line in lines if line]


def _chances(images: int) -> list[float]:
    return [100 * min(1.0, k / max(1, images)) for k in evaluate.RECALLS]


def inspect(
    config: Config, sheet: Path, scan_all: bool = False, listing: Path | None = None, progress: bool = True
) -> str:
    """Describe a data set in a few lines; draw a contact sheet of samples with both views, and lengths of captions.

    Bad rows and images are listed beside the sheet; no limit on them applies here. scan_all: decode
    every image, however many there are. listing: also write every sample, as JSON lines.
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
    per_image = Counter(len(s.captions) for s in samples)
    store = ImageStore([s.image for s in samples], config.model.image_size)
    looks = [manifest.looks.get(s.image) for s in samples]
    groups = duplicates.image_groups(looks) if any(looks) else None
    words = Counter(w for c in captions for w in re.findall(r"\w+", c.lower()))
    counts = np.array(sorted(words.values(), reverse=True) or [0])
    commonest = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 1
    tokens = _token_lengths(config, captions)
    lines = [
        f"{manifest.root}" + (f" ({manifest.format})" if manifest.format else ""),
        f"images     {len(samples)}" + "".join(f", {n} {len(manifest.split(n))}" for n in manifest.splits),
        *(
            f"  {name:10} {sum(s.name.startswith(f'{name}/') for s in samples)}, each visited {weight:g} times an epoch"
            for name, weight in manifest.parts.items()
        ),
        f"captions     {len(lengths)}: "
        + ", ".join(f"{n} images with {k}" for k, n in sorted(per_image.items(), key=lambda x: -x[1])[:3]),
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

        def look(i: int) -> tuple[str, Tensor, str] | None:
            image = _or_none(store, i)
            return None if image is None else (samples[i].name, image, samples[i].captions[0])

        if draw_look_alikes(sets, look, drawn):
            lines.append(f"images that look the same: {drawn}")
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


def draw_look_alikes(
    groups: Sequence[np.ndarray], look: Callable[[int], tuple[str, Tensor, str] | None], file: Path
) -> bool:
    """Draw some members of the largest groups of images that look the same, with a caption of the first two.

    look: name, image and caption of a member; None where it cannot be decoded any more. False, with nothing drawn,
    where no two of a group can.
    """
    cards = []
    for members in groups[:12]:
        seen = [found for i in map(int, members[:4]) if (found := look(i)) is not None]
        if len(seen) > 1:
            first, second = (printable(caption) for _, _, caption in seen[:2])
            cards.append(([(printable(name[-16:]), whole(p, 96)) for name, p, _ in seen], first, second))
    if cards:
        title = f"{sum(map(len, groups))} images in {len(groups)} groups look the same"
        figures.contact_sheet(cards, file, title)
    return bool(cards)


def _draw_sheet(samples: Sequence[Sample], config: Config, file: Path, manifest: Manifest) -> None:
    order = np.random.default_rng(config.seed).permutation(len(samples))
    size = config.model.image_size
    store = ImageStore([s.image for s in samples], size)
    cards = []
    found = ((samples[i], p) for i in map(int, order) if (p := _or_none(store, i)) is not None)
    for s, image in islice(found, 8):
        key = (config.seed, 0, s.name)
        images = [("as evaluated", whole(image, size))]
        for view, drawn in policies(config).items():
            (shown,) = drawn([image], np.array([s.id]), config.seed, 0, view)
            images.append((f"{view}: {title(getattr(config.views, view))}", shown))
        _, text, second = TextPolicy.of(config).draw(s.captions, s.paraphrases, *key, "text")
        cards.append((images, printable(text), printable(second)))
    if not cards:
        raise UserError(f"no image of '{config.data}' can be decoded: amclr inspect --scan lists them")
    file.parent.mkdir(parents=True, exist_ok=True)
    figures.contact_sheet(
        cards, file, f"{manifests.label(config.data)}: {len(samples)} images; text in black, text_aug in blue"
    )
