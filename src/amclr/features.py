"""Frozen towers with cached views: tower features computed once, so that only the heads train.

A cache file holds the features of one policy's views of some pictures, or of some captions. Its
name is a hash of all that matters: the tower's weights, the pictures or captions, the policy, the
seed of the views. It is written in chunks, so an interrupted computation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from amclr.config import Config
from amclr.data.batches import Batch, BatchPlan, draw_texts, drawn_by, split_views
from amclr.data.duplicates import Duplicates
from amclr.data.manifest import Sample
from amclr.data.pictures import BadPicture, PictureStore
from amclr.data.texts import TextPolicy
from amclr.data.views import policy, title
from amclr.errors import UserError
from amclr.files import write_text
from amclr.model import DualEncoder
from amclr.randomness import Key, mixed

CHUNK = 128
FORMAT = 2


def image_features(
    model: DualEncoder,
    samples: Sequence[Sample],
    name: str | list[Any],
    views: int,
    config: Config,
    cache: Path,
    store: PictureStore,
    progress: bool = True,
) -> np.ndarray:
    """Features of `views` draws of a policy per picture, (N, V, F) float32, memory-mapped from the cache.

    Those of a picture that cannot be decoded are NaN.
    """
    drawn = policy(name, config.model.image_size, config.views.flip)
    draws = 1 if name == "none" else views
    seed, size = config.views.cached_seed, config.model.image_size
    stamps = [_stamp(s) for s in samples]
    shape = (len(samples), draws, model.image_tower.width)
    key = _key("images", _fingerprint(model.image_tower), name, config.views.flip, size, draws, seed, stamps)

    def chunk(start: int, stop: int) -> Tensor:
        out = torch.full((stop - start, *shape[1:]), torch.nan)
        pictures, kept = [], []
        for i in range(start, stop):
            with suppress(BadPicture):
                pictures.append(store[i])
                kept.append(i)
        if not pictures:
            return out
        ids = np.array([samples[i].id for i in kept])
        each = []
        for v in range(draws):
            cut, edits = drawn.draw(pictures, ids, seed, "cached", v, title(name))
            each.append(edits(cut.to(model.device)))
        parts = torch.stack(each, 1).flatten(0, 1).split(model.pictures_at_once)
        rows = [model.image_tower(part).float().cpu() for part in parts]
        out[np.array(kept) - start] = torch.cat(rows).view(len(kept), draws, -1)
        return out

    return _cached(cache / f"images-{key}.npy", shape, chunk, f"Features of {draws} x '{title(name)}' views", progress)


def caption_features(model: DualEncoder, captions: Sequence[str], cache: Path, progress: bool = True) -> np.ndarray:
    """Features of captions, (T, F) float32, memory-mapped from the cache."""
    key = _key("captions", _fingerprint(model.text_tower), model.config.max_tokens, list(captions))
    # Batches of like length pad little; the file keeps the captions' own order.
    # The longest come first: what needs most memory shows at once, and the time left is no surprise.
    order = np.argsort([-len(c) for c in captions], kind="stable")

    def chunk(start: int, stop: int) -> Tensor:
        tokens = model.tokenize([captions[i] for i in order[start:stop]])
        out: Tensor = model.text_tower(**{k: v.to(model.device) for k, v in tokens.items()})
        return out.float().cpu()

    shape = (len(captions), model.text_tower.width)
    return _cached(cache / f"captions-{key}.npy", shape, chunk, "Features of captions", progress, order)


def _cached(
    file: Path,
    shape: tuple[int, ...],
    compute: Callable[[int, int], Tensor],
    what: str,
    progress: bool,
    order: np.ndarray | None = None,
) -> np.ndarray:
    """The array in `file`, computed chunk by chunk where it is not there yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Of two runs that need the same features at once, one computes and the other waits.
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            _compute(file, shape, compute, what, progress, order)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _compute(
    file: Path,
    shape: tuple[int, ...],
    compute: Callable[[int, int], Tensor],
    what: str,
    progress: bool,
    order: np.ndarray | None,
) -> None:
    """Write the array chunk by chunk, with a marker of how far it is; go on from an earlier marker."""
    part, marker = file.with_suffix(".part.npy"), file.with_suffix(".part.json")
    done = 0
    if part.is_file() and marker.is_file():
        done = int(json.loads(marker.read_text())["done"])
    mode = "r+" if done else "w+"
    array = np.lib.format.open_memmap(part, mode=mode, dtype=np.float32, shape=None if done else shape)
    bar = tqdm(total=shape[0], initial=done, desc=what, disable=not progress, leave=False, unit="row")
    with torch.inference_mode(), bar:
        while done < shape[0]:
            stop = min(done + CHUNK, shape[0])
            rows = compute(done, stop).numpy()
            array[slice(done, stop) if order is None else order[done:stop]] = rows
            array.flush()
            write_text(marker, json.dumps({"done": stop}))
            bar.update(stop - done)
            done = stop
    del array
    os.replace(part, file)
    marker.unlink(missing_ok=True)


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:20]


def _fingerprint(tower: nn.Module) -> str:
    """A hash of a tower's class, settings and weights."""
    digest = hashlib.sha256(repr(tower).encode())
    for name, tensor in sorted({**tower.state_dict(), **dict(tower.named_buffers())}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{digest.hexdigest()}-{getattr(tower, 'pooling', '')}"


def _stamp(sample: Sample) -> list[object]:
    return [sample.name, sample.picture.stamp]


class FeatureBatches(Dataset[Batch]):
    """Batches of cached features: what `PictureBatches` gives, with the towers already behind it.

    Each visit draws a cached view of the policy per picture; where both image views share a policy,
    the second is another one than the first.
    """

    def __init__(
        self,
        model: DualEncoder,
        samples: Sequence[Sample],
        store: PictureStore,
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
        self.shared = policies["image"] == policies["image_aug"]
        self.features = {
            view: image_features(model, samples, policies[view], config.views.cached, config, cache, store, progress)
            for view in self.image_views
        }
        self.pictures = store
        self.readable = np.ones(len(samples), dtype=bool)
        for table in self.features.values():
            self.readable &= ~np.isnan(table[:, 0, 0])
        if not self.readable.any():
            raise UserError(f"no training picture can be read; the first: {self._fault(0)}")
        self.rows: dict[str, int] = {}
        self.tables: list[np.ndarray] = []
        # Captions have a file of their own: another store of paraphrases, or none, leaves it as it is.
        for texts in (c for s in samples for c in s.captions), self._second_texts():
            new = list(dict.fromkeys(t for t in texts if t not in self.rows))
            if self.text_views and new:
                self.rows |= {t: row for row, t in enumerate(new, len(self.rows))}
                self.tables.append(caption_features(model, new, cache, progress))

    def _second_texts(self) -> Iterator[str]:
        """What a second text view may be, besides captions."""
        if "text_aug" not in self.text_views:
            return
        for s in self.samples:
            yield from s.texts
            for index in self.policy.noisy(s.captions, s.paraphrases):
                yield from (self._noisy(s, index, v) for v in range(self.cached_views))

    def _noisy(self, sample: Sample, index: int, v: int) -> str:
        """Word noise is drawn once per cached view rather than at each visit."""
        later: tuple[Key, ...] = (index,) if index else ()
        key = (self.cached_seed, "cached", v, sample.name, *later)
        return self.word_policy.draw(sample.captions[index : index + 1], (), *key)[2]

    def _fault(self, row: int) -> str:
        """Why the picture of a sample has no features."""
        try:
            self.pictures[row]
        except BadPicture as error:
            return str(error)
        return f"{self.pictures.places[row]}: picture could not be decoded when its features were computed"

    def _replaced(self, planned: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        """Rows with each that has no features replaced by the next that has, and what is wrong with those."""
        if self.readable[planned].all():
            return planned, {}
        good, bad = np.flatnonzero(self.readable), planned[~self.readable[planned]]
        faults = {self.samples[i].name: self._fault(i) for i in bad.tolist()}
        return good[np.searchsorted(good, planned) % len(good)], faults

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Features (n, F) of texts that a visit can draw."""
        wanted = np.array([self.rows[t] for t in texts])
        out = np.empty((len(wanted), self.tables[0].shape[1]), np.float32)
        start = 0
        for table in self.tables:
            here = (wanted >= start) & (wanted < start + len(table))
            out[here] = table[wanted[here] - start]
            start += len(table)
        return out

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step. A picture that could not be read is replaced by the next sample that could."""
        epoch, planned, copies = self.plan.visits(step)
        ids, replaced = self._replaced(planned)
        images = None
        if self.image_views:
            keys = drawn_by(self.plan.samples[ids], copies)
            rows, drawn = [], None
            for view in self.image_views:
                table = self.features[view]
                views = table.shape[1]
                draw = mixed(keys, self.seed, "cached view", view, epoch)
                if drawn is not None and self.shared and views > 1:
                    pick = (drawn + 1 + (draw % np.uint64(views - 1)).astype(int)) % views
                else:
                    pick = (draw % np.uint64(views)).astype(int)
                drawn = pick
                rows.append(table[ids, pick])
            images = torch.from_numpy(np.concatenate(rows))
        tokens, texts = None, {}
        if self.text_views:

            def noisy(sample: Sample, copy: int, index: int) -> str:
                return self._noisy(sample, index, (epoch + copy) % self.cached_views)

            visited = [(self.samples[i], copy) for i, copy in zip(ids, copies.tolist(), strict=True)]
            texts = draw_texts(self.policy, visited, self.text_views, self.seed, epoch, noisy)
            tokens = torch.from_numpy(self.text_features([t for drawn in texts.values() for t in drawn]))
        groups = self.duplicates.groups(ids, texts)
        places = torch.from_numpy(ids.astype(np.int64))
        return Batch(self.image_views, self.text_views, images, tokens, places, replaced, groups)
