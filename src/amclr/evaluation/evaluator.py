"""Retrieval of a model on a fixed set of samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclr.config.schema import Config
from amclr.data.images.decode import BadImage, ImageSource
from amclr.data.images.scan import scan
from amclr.data.images.store import ImageStore
from amclr.data.manifest import Sample
from amclr.data.sources.rows import Reject
from amclr.distributed.world import World, process, processes, share_of
from amclr.evaluation import metrics
from amclr.evaluation.embedding import image_or_none, model_reads_images, plain_image_features, text_digest
from amclr.models.dual_encoder import DualEncoder
from amclr.models.features import caption_features
from amclr.utils.errors import UserError

CAPTIONS_AT_ONCE = 256


class Evaluator:
    """Retrieval on a fixed set of samples. If both towers are frozen, their features are cached.

    Samples whose images cannot be decoded are dropped with their captions, as soon as decoding fails, and are listed
    in `rejects`. repeated: there will be several evaluations, so keep the decoded images if they fit.
    """

    def __init__(
        self,
        model: DualEncoder,
        samples: Sequence[Sample],
        config: Config,
        cache: Path,
        progress: bool = False,
        repeated: bool = False,
    ) -> None:
        self.model = model
        self.progress = progress and len(samples) > 2000  # a bar that is gone in a moment only distracts
        self.rejects: list[Reject] = []
        sources = [s.image for s in samples]
        self.features: tuple[Tensor, Tensor] | None = None
        if not model_reads_images(model):
            features = plain_image_features(model, samples, config, cache, progress)
            decodable = ~features[:, 0].isnan()
            self._keep(samples, decodable.tolist())
            texts = caption_features(model, self.captions, cache, progress)
            self.features = features[decodable], torch.from_numpy(texts.read())
            return
        self.images: Sequence[ImageSource] = sources
        decoded: list[Tensor | None] = []
        if repeated:
            store = ImageStore.from_config(sources, config, cache, progress)
            if store.kept_in != "none":
                decoded = [image_or_none(store.__getitem__, i) for i in range(len(store))]
                self.images = [image for image in decoded if image is not None]
        # Otherwise `embeddings` finds the images that cannot be decoded.
        self._keep(samples, [image is not None for image in decoded] or [True] * len(samples))

    def _keep(self, samples: Sequence[Sample], decodable: Sequence[bool]) -> None:
        """Evaluate on the decodable samples; list the others as rejects and warn about them."""
        bad = [s for s, good in zip(samples, decodable, strict=True) if not good]
        self.samples = [s for s, good in zip(samples, decodable, strict=True) if good]
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

        With several processes, all call it together: each embeds a share and receives all rows.
        """
        if self.features is not None:
            return self.model.project(self.features[0], None), self.model.project(None, self.features[1])
        try:
            images = self._embed_share(self.images, self.model.images_at_once, self.model.encode_image)
        except BadImage:
            images = None
        if World.of(0 if images is None else 1, self.model.device).sizes.count(0):
            sources = [s.image for s in self.samples]
            verdicts = scan(sources, self.model.config.image_size, progress=self.progress)
            self._keep(self.samples, [not verdicts[source].reason for source in sources])
            self.images = [s.image for s in self.samples]
            images = self._embed_share(self.images, self.model.images_at_once, self.model.encode_image)
        assert images is not None
        captions = self._embed_share(self.captions, CAPTIONS_AT_ONCE, self.model.encode_text)
        return self._gather(images), self._gather(captions)

    def _embed_share(self, items: Sequence[Any], size: int, encode: Callable[..., Tensor]) -> Tensor:
        """Embed this process's share: whole chunks, so that no row depends on the number of processes."""
        chunks, count = -(-len(items) // size), processes()
        share = share_of(chunks, process(), count)
        rows = encode(items[share.start * size : share.stop * size], batch_size=size, progress=self.progress)
        for _ in range(share.stop - share.start, -(-chunks // count)):
            # Where the weights are sharded over processes, all processes take part in every forward pass.
            encode(items[:size], batch_size=size)
        return rows

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes."""
        rows = rows.to(self.model.device)
        return World.of(len(rows), rows.device).gather(rows).cpu()

    def __call__(self) -> dict[str, float]:
        """Recalls in percent, named as by `metrics.retrieval`; empty on all processes but the first."""
        images, texts = self.embeddings()
        return metrics.retrieval(images, texts, self.image_of_text) if process() == 0 else {}

    def measure(self, images: Tensor, texts: Tensor) -> dict[str, Any]:
        """Recalls of given embeddings, and the numbers of images, captions and rejects."""
        sizes = {"images": len(images), "captions": len(texts), "rejects": len(self.rejects)}
        return {**sizes, **metrics.retrieval(images, texts, self.image_of_text)}

    def hits(self, images: Tensor, texts: Tensor) -> dict[str, np.ndarray]:
        """The hits of each query of given embeddings, for comparing runs query by query.

        txt (N, 3), img (T, 3): as `metrics.retrieval_hits`. image_of_text (T,). queries: `queries_digest()`.
        """
        hits = metrics.retrieval_hits(images, texts, self.image_of_text)
        return {
            **{side: rows.numpy().astype(np.float32) for side, rows in hits.items()},
            "image_of_text": self.image_of_text, "queries": np.array(self.queries_digest()),
        }  # fmt: skip

    def queries_digest(self) -> str:
        """A digest of the images and captions: runs can be compared query by query only if it is the same."""
        return text_digest([*(s.name for s in self.samples), *self.captions])

    def in_folds(self, images: Tensor, texts: Tensor, folds: int, names: Sequence[str] = ()) -> dict[str, float]:
        """Mean recalls of given embeddings over folds of the images. names: the images in the order to cut them in."""
        position = {name: i for i, name in enumerate(names)}
        order = sorted(range(len(self.samples)), key=lambda i: position.get(self.samples[i].name, i))
        return metrics.retrieval_in_folds(images, texts, self.image_of_text, folds, order)

    def chance(self) -> float:
        """Mean of R@1, R@5 and R@10 in percent for a random order of the images."""
        return float(np.mean(metrics.chance_recalls(len(self.samples))))
