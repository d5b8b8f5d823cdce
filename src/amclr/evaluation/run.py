"""`amclr evaluate`: a run's best weights, measured on a split of a data set and on images by class."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.text.rewording import Rewording
from amclr.evaluation.classes import ClassSet, read_classes, short_names
from amclr.evaluation.evaluator import Evaluator
from amclr.evaluation.gallery import draw_gallery
from amclr.evaluation.interpolation import WeightInterpolation
from amclr.evaluation.paraphrased import measure_paraphrased
from amclr.evaluation.zeroshot import measure_classes
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.folder import Run
from amclr.utils import figures
from amclr.utils.errors import UserError
from amclr.utils.files import write_text


def evaluate_run(
    folder: Path, *, data: str = "", source: SourceConfig | None = None, split: str = "val", captions: int = 0,
    folds: int = 1, paraphrased: str = "", zeroshot: str | Sequence[str] = (), classnames: str = "",
    templates: str = "", retrieval: bool = True, wise: Sequence[float] = (), progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Measure a run's best weights on a split of a data set and, if given, on folders of images by class.

    Args:
        folder: the run.
        data: a data set instead of the run's own.
        source: settings of the data set; those that are not the default replace the run's.
        split: train, val, test, all, or another split of the data set. If its rows name their splits, the images of
            the other splits need not exist.
        captions: how many captions of each image to use, the first ones; 0 for all.
        folds: if more than 1, also report means over this many folds of the images, in the data set's order.
        paraphrased: also measure with paraphrased captions, by `rules`, or a file or folder of paraphrases.
        zeroshot: folders of images by class.
        classnames: names of the classes, as for `amclr.evaluation.classes.read_classes`.
        templates: prompts, likewise.
        retrieval: whether to measure retrieval on the split.
        wise: instead of the best weights, measure at these shares of the way from the weights that the run started
            from to the trained ones (WiSE-FT), and draw the curves.
        progress: show progress bars.

    Returns the results, and writes them under `evaluations/` in the run folder, with a gallery of the data set.
    Raises UserError for a folder, split or file that does not exist, and for options that exclude each other.
    """
    roots = [zeroshot] if isinstance(zeroshot, str) and zeroshot else list(zeroshot)
    _check_options(roots, bool(classnames or templates), retrieval, paraphrased, wise, captions, folds)
    run = Run.open(folder)
    # Mistakes in these should show before anything is measured.
    rewording = Rewording.find(paraphrased) if paraphrased else None
    named_roots = short_names([Path(r) for r in roots])
    class_sets = {label: read_classes(root, classnames, templates) for label, root in named_roots.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    interpolation = WeightInterpolation(run, device) if wise else None
    model = interpolation.model if interpolation else run.load_model().to(device)
    config = evaluation_config(run.config, data, source or SourceConfig())
    results: dict[str, Any] = {"run": str(folder), "objective": config.objective}
    out = folder / "evaluations"
    out.mkdir(exist_ok=True)
    measurement = _Measurement(model, config, class_sets, rewording, folds, progress)
    if retrieval:
        name = f"{manifests.label(config.data)}-{split}"
        measurement.add_retrieval(split, captions, repeated=bool(wise))
        if measurement.own_classes and not class_sets:
            measurement.class_sets = {"own classes": read_classes(measurement.own_classes, classnames, templates)}
        results |= {"data": config.data, "split": split}
    else:
        name = f"zeroshot-{Path(roots[0]).resolve().name if len(named_roots) == 1 else '-'.join(named_roots)}"
    if interpolation:
        results["wise"] = [{"wise": share, **measurement.run()} for share in interpolation.visit(wise)]
        name += "-wise"
        title = f"{manifests.label(config.data)}: from start to trained"
        figures.interpolation(results["wise"], out / f"{name}.png", title)
        results["curves"] = str(out / f"{name}.png")
    else:
        results |= measurement.run(gallery=out / f"{name}.png", title=f"{config.objective} on {name}")
    write_text(out / f"{name}.json", json.dumps(results, indent=2) + "\n")
    return results


def _check_options(
    roots: Sequence[str], names_classes: bool, retrieval: bool, paraphrased: str, wise: Sequence[float],
    captions: int, folds: int,
) -> None:  # fmt: skip
    """Raise UserError for options that exclude each other or are out of range."""
    if names_classes and not roots:
        raise UserError("--classnames and --templates belong to --zeroshot FOLDER: give it too")
    if not (retrieval or roots):
        raise UserError("nothing to measure: leave out --retrieval false, or give --zeroshot FOLDER")
    if paraphrased and not retrieval:
        raise UserError("--paraphrased belongs to retrieval: leave out --retrieval false")
    if wise and len(roots) > 1:
        raise UserError("--wise draws the curve of one folder of classes: give one --zeroshot FOLDER")
    if captions < 0 or folds < 1:
        raise UserError("--captions must be 0 (all of them) or more, and --folds 1 or more")


@dataclass
class _Measurement:
    """All that is measured of a model, once for each set of weights."""

    model: DualEncoder
    config: Config
    class_sets: Mapping[str, ClassSet]
    rewording: Rewording | None
    folds: int
    progress: bool
    evaluator: Evaluator | None = None
    order: Sequence[str] = ()
    """Names of the images in the data set's order."""
    own_classes: Path | None = None
    """Images by class that come with the data set."""

    def add_retrieval(self, split: str, captions: int, repeated: bool) -> None:
        """Measure retrieval too, on a split of the data set."""
        cache = manifests.cache_folder(self.config)
        manifest = manifests.prepare(self.config, cache, self.progress, only=split)
        samples = [replace(s, captions=s.captions[:captions]) if captions else s for s in manifest.samples]
        if self.folds > len(samples):
            raise UserError(f"--folds must be at most {len(samples)}, the number of images, got {self.folds}")
        self.evaluator = Evaluator(self.model, samples, self.config, cache, self.progress, repeated)
        self.order, self.own_classes = manifest.order, manifest.zeroshot

    def run(self, gallery: Path | None = None, title: str = "") -> dict[str, Any]:
        """The results of the model as it is now. gallery: a file to draw one to."""
        results: dict[str, Any] = {}
        if evaluator := self.evaluator:
            images, texts = evaluator.embeddings()
            results |= evaluator.measure(images, texts)
            if self.folds > 1:
                recalls = evaluator.in_folds(images, texts, self.folds, self.order)
                results["folds"] = {"count": self.folds, **recalls}
            if self.rewording:
                results["paraphrased"] = measure_paraphrased(
                    evaluator, images, texts, self.rewording, self.config, self.progress
                )
            if gallery:
                draw_gallery(self.model, evaluator, images, texts, gallery, title)
        by_set = {
            label: measure_classes(self.model, classes, self.config, self.progress)
            for label, classes in self.class_sets.items()
        }
        return results | ({"zeroshot_sets": by_set} if len(by_set) > 1 else next(iter(by_set.values()), {}))


def measure_run_paraphrased(
    model: DualEncoder, config: Config, rewording: Rewording, hits: Path, progress: bool = True
) -> dict[str, Any]:
    """As `measure_paraphrased`, on the validation split that a run with this configuration is measured on."""
    config = evaluation_config(config, "", SourceConfig())
    cache = manifests.cache_folder(config)
    samples = manifests.prepare(config, cache, progress, only="val").samples
    evaluator = Evaluator(model, samples, config, cache, progress)
    return measure_paraphrased(evaluator, *evaluator.embeddings(), rewording, config, progress, hits)


def evaluation_config(config: Config, data: str, source: SourceConfig) -> Config:
    """A run's configuration with the data set to evaluate on, without paraphrases, which only training uses.

    data: a data set instead of the run's own; source: its settings, of which those that are not the default count.
    """
    base = config.source
    if data:  # columns and folders of the run's own data mean nothing in another data set
        base = SourceConfig(**{k: getattr(base, k) for k in ("captions", "val_fraction", "max_bad", "scan_up_to")})
    changed = {f.name: value for f in fields(source) if (value := getattr(source, f.name)) != f.default}
    return replace(config, data=data or config.data, source=replace(base, **{**changed, "paraphrases": "none"}))
