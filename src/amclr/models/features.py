"""Features of frozen towers: computed once per view and cached, so that only the heads train."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from amclr.config.schema import Config
from amclr.data.batches import Batch, BatchPlan, draw_texts, drawn_by, split_views
from amclr.data.images.decode import BadImage
from amclr.data.images.duplicates import Duplicates
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policy, title
from amclr.data.manifest import Sample
from amclr.data.text.views import TextPolicy
from amclr.models.dual_encoder import DualEncoder
from amclr.models.feature_cache import Features, cache_key, cached_features
from amclr.utils.errors import UserError
from amclr.utils.randomness import Key, mixed


def image_features(
    model: DualEncoder,
    samples: Sequence[Sample],
    name: str | list[Any],
    views: int,
    config: Config,
    cache: Path,
    store: ImageStore,
    progress: bool = True,
) -> Features:
    """Features of `views` draws of a policy per image, (N, V, F), from the cache; NaN for undecodable images.

    A row's key has the sample's name, by which the views are drawn, and the image file's path and stamp.
    """
    view_policy = policy(name, config.model.image_size, config.views.flip)
    draws = 1 if name == "none" else views
    seed, size = config.views.cached_seed, config.model.image_size
    shape = (draws, model.image_tower.width)

    def chunk(rows: np.ndarray) -> Tensor:
        out = torch.full((len(rows), *shape), torch.nan)
        images, decoded = [], []
        for k, i in enumerate(rows.tolist()):
            with suppress(BadImage):
                images.append(store[i])
                decoded.append(k)
        if not images:
            return out
        ids = np.array([samples[i].id for i in rows[decoded]])
        batches = []
        for v in range(draws):
            crops, edits = view_policy.draw(images, ids, seed, "cached", v, title(name))
            batches.append(edits(crops.to(model.device)))
        parts = torch.stack(batches, 1).flatten(0, 1).split(model.images_at_once)
        features = [model.image_tower(part).float().cpu() for part in parts]
        out[decoded] = torch.cat(features).view(len(decoded), draws, -1)
        return out

    key = cache_key(_fingerprint(model.image_tower), name, config.views.flip, size, draws, seed)
    real = lru_cache(os.path.realpath)  # of folders, which are few
    keys = [
        cache_key(s.name, real(os.path.dirname(s.image.file)), os.path.basename(s.image.file), s.image.stamp)
        for s in samples
    ]
    what = f"Features of {draws} x '{title(name)}' views"
    return cached_features(cache / f"images-{key}", keys, shape, chunk, what, progress, np.arange(len(samples)))


def caption_features(model: DualEncoder, captions: Sequence[str], cache: Path, progress: bool = True) -> Features:
    """Features of captions, (T, F), from the cache."""

    def chunk(rows: np.ndarray) -> Tensor:
        tokens = model.tokenize([captions[i] for i in rows])
        out: Tensor = model.text_tower(**{k: v.to(model.device) for k, v in tokens.items()})
        return out.float().cpu()

    key = cache_key(_fingerprint(model.text_tower), _tokenizer_digest(model.tokenizer), model.config.max_tokens)
    # Sorted by length, batches need little padding. The longest come first, so that running out of memory shows at
    # once, and the progress bar does not promise too little time.
    order = np.argsort([-len(c) for c in captions], kind="stable")
    shape = (model.text_tower.width,)
    keys = [cache_key(c) for c in captions]
    return cached_features(cache / f"captions-{key}", keys, shape, chunk, "Features of captions", progress, order)


def _fingerprint(tower: nn.Module) -> str:
    """A hash of a tower's class, settings and weights."""
    digest = hashlib.sha256(repr(tower).encode())
    for name, tensor in sorted({**tower.state_dict(), **dict(tower.named_buffers())}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{digest.hexdigest()}-{getattr(tower, 'pooling', '')}"


def _tokenizer_digest(tokenizer: Any) -> str:
    """A hash of a tokenizer: two may have the same size, and their towers the same weights."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return cache_key(type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()))
    # The settings of the last call are not part of the tokenizer.
    return cache_key({k: v for k, v in json.loads(inner.to_str()).items() if k not in ("truncation", "padding")})


class FeatureBatches(Dataset[Batch]):
    """Batches of cached features, in place of the images and captions of `ImageBatches`.

    Each visit draws one of the cached views per image; where both image views share a policy, two different ones.
    """

    def __init__(
        self,
        model: DualEncoder,
        samples: Sequence[Sample],
        store: ImageStore,
        plan: BatchPlan,
        required_views: Sequence[str],
        config: Config,
        cache: Path,
        progress: bool = True,
        duplicates: Duplicates | None = None,
    ) -> None:
        self.samples, self.plan = samples, plan
        self.duplicates = duplicates or Duplicates()
        self.image_views, self.text_views = split_views(required_views)
        self.seed, self.policy = config.seed, TextPolicy.of(config)
        self.word_policy = replace(self.policy, paraphrases=0, other_captions=0, words=0)
        policies = {"image": config.views.image, "image_aug": config.views.image_aug}
        self.cached_views, self.cached_seed = config.views.cached, config.views.cached_seed
        self.shared_policy = policies["image"] == policies["image_aug"]
        views = config.views.cached
        self.features: dict[str, Features] = {}
        for view in self.image_views:
            same = next((v for v in self.features if policies[v] == policies[view]), None)
            self.features[view] = self.features[same] if same else image_features(
                model, samples, policies[view], views, config, cache, store, progress
            )  # fmt: skip
        self.images = store
        self.readable = np.ones(len(samples), dtype=bool)
        for table in self.features.values():
            self.readable &= table.readable()
        if not self.readable.any():
            raise UserError(f"no training image can be read; the first: {self._reason(0)}")
        self.rows: dict[str, int] = {}
        if self.text_views:
            texts = dict.fromkeys(c for s in samples for c in s.captions) | dict.fromkeys(self._second_texts())
            self.rows = {text: row for row, text in enumerate(texts)}
            self.captions = caption_features(model, list(texts), cache, progress)

    def _second_texts(self) -> Iterator[str]:
        """All texts that a second text view may be, besides captions."""
        if "text_aug" not in self.text_views:
            return
        for s in self.samples:
            yield from self.policy.seconds(s.captions, s.paraphrases)
            for index in self.policy.noisy(s.captions, s.paraphrases):
                yield from (self._noisy(s, index, v) for v in range(self.cached_views))

    def _noisy(self, sample: Sample, index: int, v: int) -> str:
        """A caption with word noise, which is drawn once per cached view rather than at each visit."""
        index_key: tuple[Key, ...] = (index,) if index else ()
        key = (self.cached_seed, "cached", v, sample.name, *index_key)
        return self.word_policy.draw(sample.captions[index : index + 1], (), *key)[2]

    def _reason(self, row: int) -> str:
        """Why the image of a sample has no features."""
        try:
            self.images[row]
        except BadImage as error:
            return str(error)
        return f"{self.images.places[row]}: image could not be decoded when its features were computed"

    def _replace_unreadable(self, planned: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        """Rows with those that have no features replaced by the next that has, and the reasons by sample name."""
        if self.readable[planned].all():
            return planned, {}
        good, bad = np.flatnonzero(self.readable), planned[~self.readable[planned]]
        reasons = {self.samples[i].name: self._reason(i) for i in bad.tolist()}
        return good[np.searchsorted(good, planned) % len(good)], reasons

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Features (n, F) of texts that a visit can draw."""
        return self.captions.read(np.array([self.rows[t] for t in texts]))

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step. Samples whose image could not be read are replaced by the next whose could."""
        epoch, planned, copies = self.plan.visits(step)
        ids, replaced = self._replace_unreadable(planned)
        images = None
        if self.image_views:
            keys = drawn_by(self.plan.samples[ids], copies)
            rows, first = [], None
            for view in self.image_views:
                table = self.features[view]
                views = table.shape[1]
                draw = mixed(keys, self.seed, "cached view", view, epoch)
                if first is not None and self.shared_policy and views > 1:
                    pick = (first + 1 + (draw % np.uint64(views - 1)).astype(int)) % views
                else:
                    pick = (draw % np.uint64(views)).astype(int)
                first = pick
                rows.append(table.read(ids, pick))
            images = torch.from_numpy(np.concatenate(rows))
        tokens, texts = None, {}
        if self.text_views:

            def noisy(sample: Sample, copy: int, index: int) -> str:
                return self._noisy(sample, index, (epoch + copy) % self.cached_views)

            visited = [(self.samples[i], copy) for i, copy in zip(ids, copies.tolist(), strict=True)]
            texts = draw_texts(self.policy, visited, self.text_views, self.seed, epoch, noisy)
            tokens = torch.from_numpy(self.text_features([t for view in texts.values() for t in view]))
        groups = self.duplicates.groups(ids, texts)
        rows_of_batch = torch.from_numpy(ids.astype(np.int64))
        return Batch(self.image_views, self.text_views, images, tokens, rows_of_batch, replaced, groups)
