"""What evaluations embed images and texts with. The features of frozen towers are cached, so that only heads run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.data.images.decode import BadImage
from amclr.data.images.store import ImageStore
from amclr.data.manifest import Sample
from amclr.models.dual_encoder import DualEncoder
from amclr.models.features import caption_features, image_features


def model_reads_images(model: DualEncoder) -> bool:
    """Whether a tower is trained, so that every step needs images rather than cached features."""
    return len(model.frozen_towers) < 2


def plain_image_features(
    model: DualEncoder, samples: Sequence[Sample], config: Config, cache: Path, progress: bool
) -> Tensor:
    """Cached features (N, F) of images without augmentation; a row of NaN where an image cannot be decoded."""
    store = ImageStore([s.image for s in samples], config.model.image_size)
    features = image_features(model, samples, "none", 1, config, cache, store, progress)
    return torch.from_numpy(features.read()[:, 0])


class CachedEncoder:
    """A model as an `amclr.evaluation.metrics.Encoder` that caches the text features of a frozen tower."""

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


def image_or_none(read: Callable[[Any], Tensor], image: Any) -> Tensor | None:
    """`read(image)`, or None if the image cannot be decoded."""
    try:
        return read(image)
    except BadImage:
        return None


def text_digest(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text: equal digests mean the same queries in the same order."""
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()
