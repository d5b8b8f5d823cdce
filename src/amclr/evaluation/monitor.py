"""The zero-shot monitor: accuracy on images by class, measured during training (`--monitor FOLDER`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amclr.config.schema import Config
from amclr.evaluation import metrics
from amclr.evaluation.classes import read_classes
from amclr.evaluation.embedding import image_or_none
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.folder import Run
from amclr.utils.errors import UserError

MONITORED_IMAGES = 2000
"""The most images that the monitor looks at; one per class if there are more classes."""


class Monitor:
    """Zero-shot accuracy of a model during training, on images by class that are decoded once and kept.

    Takes at most `MONITORED_IMAGES`, as balanced over the classes as possible. If the image tower is frozen, its
    features are kept instead of the images. Images that cannot be decoded are left out and counted in `rejects`.
    Raises UserError for a folder without images by class.
    """

    start: float
    """Top-1 accuracy in percent of the model that the run started from."""

    def __init__(self, model: DualEncoder, root: Path, progress: bool = False) -> None:
        self.model, self.root = model, root
        # Prompts are embedded at every evaluation, so the many prompts of a known set are not looked up.
        classes = read_classes(root, known=False)
        paths, labels, self.names, self.prompts = classes.paths, classes.labels, classes.names, classes.prompts
        subset = balanced_subset(labels, MONITORED_IMAGES)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            decoded = list(pool.map(lambda i: image_or_none(model.prepare, paths[i]), subset))
        images = [image for image in decoded if image is not None]
        self.labels = [labels[i] for i, image in zip(subset, decoded, strict=True) if image is not None]
        self.rejects = len(decoded) - len(images)
        if not images:
            raise UserError(f"no image of --monitor '{root}' can be decoded; the first: {paths[subset[0]]}")
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
                f"{self.rejects} left out because they cannot be decoded: {root}", file=sys.stderr,
            )  # fmt: skip

    @classmethod
    def of_run(cls, model: DualEncoder, run: Run, config: Config, progress: bool) -> Monitor:
        """The monitor of a run. Call it while the model has the weights that the run starts from.

        Their accuracy is measured once: a resumed run reads it from its metrics.
        """
        monitor = cls(model, Path(config.monitor), progress)
        rows = [r for r in run.metrics() if r["kind"] == "start" and r["monitor"] == config.monitor]
        monitor.start = rows[-1]["zeroshot_top1"] if rows else monitor.top1()
        if not rows and run.verbose:
            run.log({"kind": "start", "step": 0, "epoch": 0.0, "monitor": config.monitor,
                     "zeroshot_top1": monitor.start})  # fmt: skip
        return monitor

    def top1(self) -> float:
        """Top-1 accuracy in percent of the model as it is now."""
        images = self.images if self.features is None else self.model.project(self.features, None)
        try:
            return metrics.zeroshot(self.model, images, self.labels, self.names, self.prompts)["zeroshot_top1"]
        except ValueError as error:
            raise UserError(f"{self.root}: {error}") from None

    def __call__(self) -> dict[str, float]:
        """Top-1 accuracy in percent of the model as it is now, and at the start of the run."""
        return {"zeroshot_top1": self.top1(), "zeroshot_top1_start": self.start}

    @staticmethod
    def summary(row: dict[str, float]) -> str:
        """The accuracies of an evaluation for its line on the terminal; empty if there are none."""
        if "zeroshot_top1_start" not in row:
            return ""
        return f", zero-shot {row['zeroshot_top1']:.1f} (start {row['zeroshot_top1_start']:.1f})"


def balanced_subset(labels: Sequence[int], most: int) -> list[int]:
    """Indices of at most `most` samples, as balanced over the classes as possible, evenly spaced within each.

    Takes at least one sample of each class, even if there are more than `most` classes.
    """
    classes = [np.flatnonzero(np.array(labels) == y) for y in sorted(set(labels))]
    sizes = np.array([len(c) for c in classes])
    each = max((k for k in range(1, sizes.max() + 1) if np.minimum(sizes, k).sum() <= most), default=1)
    return [int(c[i * len(c) // k]) for c in classes for k in [min(len(c), each)] for i in range(k)]
