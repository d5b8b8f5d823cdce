"""Zero-shot classification of a folder of images by class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.data.images.decode import Location
from amclr.data.images.scan import scan
from amclr.data.manifest import Sample
from amclr.evaluation import metrics
from amclr.evaluation.classes import ClassSet
from amclr.evaluation.embedding import CachedEncoder, model_reads_images, plain_image_features, text_digest
from amclr.models.dual_encoder import DualEncoder
from amclr.utils.errors import UserError
from amclr.utils.files import write_arrays


def measure_classes(
    model: DualEncoder, classes: ClassSet, config: Config, progress: bool = True, hits: Path | None = None
) -> dict[str, Any]:
    """Measure zero-shot accuracy on a folder of images by class, in percent.

    Images that cannot be decoded are left out and counted. hits: a file to write the top-1 hit of each image to,
    (n, 1), for comparing runs image by image. Raises UserError if no image can be decoded.
    """
    root = classes.root
    sources = [Location(str(p)) for p in classes.paths]
    verdicts = scan(sources, model.config.image_size, progress=progress)
    bad = {source: v.reason for source, v in verdicts.items() if v.reason}
    labelled = [(source, label) for source, label in zip(sources, classes.labels, strict=True) if source not in bad]
    if not labelled:
        raise UserError(f"no image under '{root}' can be decoded; the first: {next(iter(bad.items()))}")
    if model_reads_images(model):
        images = model.encode_image([source for source, _ in labelled], progress=progress)
    else:
        samples = [Sample(source.file, source, ()) for source, _ in labelled]
        features = plain_image_features(model, samples, config, manifests.cache_folder(config), progress)
        images = model.project(features, None)
    try:
        scores, labels = metrics.class_scores(
            CachedEncoder(model, config, progress), images, [label for _, label in labelled], classes.names,
            classes.prompts,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{root}: {error}") from None
    if hits:
        queries = text_digest(os.path.relpath(source.file, root) for source, _ in labelled)
        top1 = metrics.class_hits(scores, labels, (1,)).cpu().numpy().astype(np.float32)
        write_arrays(hits, {"top1": top1, "queries": np.array(queries), "zeroshot": np.array(classes.digest)})
    return {
        "zeroshot": str(root), "zeroshot_classes": len(classes.names), "zeroshot_images": len(labelled),
        "zeroshot_rejects": len(bad), "zeroshot_about": classes.about, "zeroshot_advice": classes.advice,
        **metrics.classify(scores, labels), "zeroshot_class_recall": metrics.mean_class_recall(scores, labels),
    }  # fmt: skip
