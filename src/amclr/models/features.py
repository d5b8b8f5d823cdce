"""Frozen towers with cached views: tower features computed once, so that only the heads train.

    CACHE/images-KEY/00000.npy         features (n, V, F) of one policy's views of images, in the order of computing
    CACHE/images-KEY/00000.keys.npy    which images these are
    CACHE/images-KEY/00000.json        how many of them are there
    CACHE/captions-KEY/...             the same of captions, (n, F)

KEY is a hash of what holds for all rows: the tower's weights, the policy, the seed of the views. A row's own key says
of what it is. So whoever asks for images or captions gets those that anybody has asked for before, be it in another
split, fold or version of the data, and only the others are computed, into the next file. Rows count as soon as
they are written: what is interrupted loses less than a chunk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from amclr.config.schema import Config
from amclr.data.batches import Batch, BatchPlan, draw_texts, drawn_by, split_views
from amclr.data.images.decode import BadImage
from amclr.data.images.duplicates import Duplicates
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policy, title
from amclr.data.manifest import Sample
from amclr.data.text.views import TextPolicy
from amclr.models.dual_encoder import DualEncoder
from amclr.utils.errors import UserError
from amclr.utils.files import write_text, written
from amclr.utils.randomness import Key, mixed

CHUNK = 128
COPIED = 8192
"""Rows that are copied at a time, so that a large part is not in memory twice."""
FORMAT = 3


class Features:
    """Rows of features (N, ...), float32, memory-mapped from the files of the cache that they lie in."""

    def __init__(self, parts: Sequence[np.ndarray], part: np.ndarray, row: np.ndarray) -> None:
        """parts: arrays of rows of one shape. part, row (N,): where each row is."""
        self.parts, self.part, self.row = parts, part, row
        self.shape: tuple[int, ...] = (len(part), *parts[0].shape[1:])

    def __len__(self) -> int:
        return len(self.part)

    def read(self, rows: np.ndarray | None = None, views: np.ndarray | None = None) -> np.ndarray:
        """Some rows (all of them by default), (n, ...); with `views` (n,), that view of each, (n, F)."""
        rows = np.arange(len(self)) if rows is None else rows
        out = np.empty((len(rows), *self.shape[1 if views is None else 2 :]), np.float32)
        for here, place, part in self._by_part(rows):
            for start in range(0, len(here), COPIED):
                some = slice(start, start + COPIED)
                out[here[some]] = part[place[some]] if views is None else part[place[some], views[here[some]]]
        return out

    def readable(self) -> np.ndarray:
        """Whether a row is of something that could be read, (N,) bool: the others are NaN."""
        out = np.empty(len(self), bool)
        for here, place, part in self._by_part(np.arange(len(self))):
            out[here] = ~np.isnan(part[(place, *[0] * (part.ndim - 1))])
        return out

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The places among `rows` whose features lie in a file, their rows there, and its array, file by file."""
        of = self.part[rows]
        for number in np.unique(of):
            here = np.flatnonzero(of == number)
            yield here, self.row[rows[here]], self.parts[number]


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
    """Features of `views` draws of a policy per image, (N, V, F), from the cache.

    Those of an image that cannot be decoded are NaN.
    """
    drawn = policy(name, config.model.image_size, config.views.flip)
    draws = 1 if name == "none" else views
    seed, size = config.views.cached_seed, config.model.image_size
    shape = (draws, model.image_tower.width)

    def chunk(rows: np.ndarray) -> Tensor:
        out = torch.full((len(rows), *shape), torch.nan)
        images, kept = [], []
        for k, i in enumerate(rows.tolist()):
            with suppress(BadImage):
                images.append(store[i])
                kept.append(k)
        if not images:
            return out
        ids = np.array([samples[i].id for i in rows[kept]])
        each = []
        for v in range(draws):
            cut, edits = drawn.draw(images, ids, seed, "cached", v, title(name))
            each.append(edits(cut.to(model.device)))
        parts = torch.stack(each, 1).flatten(0, 1).split(model.images_at_once)
        found = [model.image_tower(part).float().cpu() for part in parts]
        out[kept] = torch.cat(found).view(len(kept), draws, -1)
        return out

    key = _key(_fingerprint(model.image_tower), name, config.views.flip, size, draws, seed)
    real = lru_cache(os.path.realpath)  # of folders, which are few
    # The views are drawn by the sample's name.
    keys = [
        _key(s.name, real(os.path.dirname(s.image.file)), os.path.basename(s.image.file), s.image.stamp)
        for s in samples
    ]
    what = f"Features of {draws} x '{title(name)}' views"
    return _cached(cache / f"images-{key}", keys, shape, chunk, what, progress, np.arange(len(samples)))


def caption_features(model: DualEncoder, captions: Sequence[str], cache: Path, progress: bool = True) -> Features:
    """Features of captions, (T, F), from the cache."""

    def chunk(rows: np.ndarray) -> Tensor:
        tokens = model.tokenize([captions[i] for i in rows])
        out: Tensor = model.text_tower(**{k: v.to(model.device) for k, v in tokens.items()})
        return out.float().cpu()

    key = _key(_fingerprint(model.text_tower), _rules(model.tokenizer), model.config.max_tokens)
    # Batches of like length pad little. The longest come first: what needs most memory shows at once, and the time left
    # is no surprise.
    order = np.argsort([-len(c) for c in captions], kind="stable")
    shape = (model.text_tower.width,)
    keys = [_key(c) for c in captions]
    return _cached(cache / f"captions-{key}", keys, shape, chunk, "Features of captions", progress, order)


def _cached(
    folder: Path,
    keys: Sequence[str],
    shape: tuple[int, ...],
    compute: Callable[[np.ndarray], Tensor],
    what: str,
    progress: bool,
    order: np.ndarray,
) -> Features:
    """The rows with these keys, of that shape each; those that the folder does not have are computed.

    compute: numbers of rows -> their features. order: of the numbers, the one to compute them in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # What is asked for twice is computed once; `first` is a row's place in the order.
    own, first, inverse = np.unique(np.array(keys, dtype="S24")[order], return_index=True, return_inverse=True)
    place = np.empty(len(keys), np.int64)
    place[order] = inverse
    parts, part, row = _find(folder, own)
    if (part < 0).any():
        # Of two runs that need the same features at once, one computes and the other waits; then it looks again.
        with _alone(folder, what, progress):
            parts, part, row = _find(folder, own)
            if (missing := np.flatnonzero(part < 0)).size:
                missing = missing[np.argsort(first[missing])]
                _compute(folder, own[missing], order[first[missing]], shape, compute, what, progress)
                parts, part, row = _find(folder, own)
    return Features(parts or [np.empty((0, *shape), np.float32)], part[place], row[place])


@contextmanager
def _alone(folder: Path, what: str, progress: bool) -> Iterator[None]:
    """While no other process adds to the folder; having to wait for that is told."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            tqdm.write(f"{what}: waiting for another run that computes some with this tower", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _find(folder: Path, keys: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The files of a folder that have some of these rows; in which of them each row is, -1 for none; and at which row.

    keys: sorted, each once.
    """
    parts = list[np.ndarray]()
    part, row = np.full(len(keys), -1), np.zeros(len(keys), np.int64)
    for marker in sorted(folder.glob("*.json")) if len(keys) else ():
        done = int(json.loads(marker.read_text())["done"])
        own = np.load(marker.with_suffix(".keys.npy"), mmap_mode="r", allow_pickle=False)[:done]
        place = np.searchsorted(keys, own).clip(max=len(keys) - 1)
        if (hit := np.flatnonzero(keys[place] == own)).size:
            part[place[hit]], row[place[hit]] = len(parts), hit
            parts.append(np.load(marker.with_suffix(".npy"), mmap_mode="r", allow_pickle=False))
    return parts, part, row


def _compute(
    folder: Path,
    keys: np.ndarray,
    rows: np.ndarray,
    shape: tuple[int, ...],
    compute: Callable[[np.ndarray], Tensor],
    what: str,
    progress: bool,
) -> None:
    """Write the rows of these numbers and keys chunk by chunk, with a marker of how many are there."""
    number = max((int(marker.stem) for marker in folder.glob("*.json")), default=-1) + 1
    file = folder / f"{number:05}.npy"
    with written(file.with_suffix(".keys.npy")) as handle:
        np.save(handle, keys)
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(len(rows), *shape))
    with torch.inference_mode(), tqdm(total=len(rows), desc=what, disable=not progress, leave=False, unit="row") as bar:
        for start in range(0, len(rows), CHUNK):
            some = rows[start : start + CHUNK]
            array[start : start + len(some)] = compute(some).numpy()
            array.flush()
            write_text(file.with_suffix(".json"), json.dumps({"done": start + len(some)}))
            bar.update(len(some))


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:24]


def _fingerprint(tower: nn.Module) -> str:
    """A hash of a tower's class, settings and weights."""
    digest = hashlib.sha256(repr(tower).encode())
    for name, tensor in sorted({**tower.state_dict(), **dict(tower.named_buffers())}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"{digest.hexdigest()}-{getattr(tower, 'pooling', '')}"


def _rules(tokenizer: Any) -> str:
    """A hash of what a tokenizer makes of texts: two may be of one size, and their towers of the same weights."""
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return _key(type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()))
    # How the last batch was cut and filled up is no rule of it.
    return _key({k: v for k, v in json.loads(inner.to_str()).items() if k not in ("truncation", "padding")})


class FeatureBatches(Dataset[Batch]):
    """Batches of cached features: what `ImageBatches` gives, with the towers already behind it.

    Each visit draws a cached view of the policy per image; where both image views share a policy,
    the second is another one than the first.
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
        self.shared = policies["image"] == policies["image_aug"]
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
            raise UserError(f"no training image can be read; the first: {self._fault(0)}")
        self.rows: dict[str, int] = {}
        if self.text_views:
            texts = dict.fromkeys(c for s in samples for c in s.captions) | dict.fromkeys(self._second_texts())
            self.rows = {text: row for row, text in enumerate(texts)}
            self.captions = caption_features(model, list(texts), cache, progress)

    def _second_texts(self) -> Iterator[str]:
        """What a second text view may be, besides captions."""
        if "text_aug" not in self.text_views:
            return
        for s in self.samples:
            yield from self.policy.seconds(s.captions, s.paraphrases)
            for index in self.policy.noisy(s.captions, s.paraphrases):
                yield from (self._noisy(s, index, v) for v in range(self.cached_views))

    def _noisy(self, sample: Sample, index: int, v: int) -> str:
        """Word noise is drawn once per cached view rather than at each visit."""
        later: tuple[Key, ...] = (index,) if index else ()
        key = (self.cached_seed, "cached", v, sample.name, *later)
        return self.word_policy.draw(sample.captions[index : index + 1], (), *key)[2]

    def _fault(self, row: int) -> str:
        """Why the image of a sample has no features."""
        try:
            self.images[row]
        except BadImage as error:
            return str(error)
        return f"{self.images.places[row]}: image could not be decoded when its features were computed"

    def _replaced(self, planned: np.ndarray) -> tuple[np.ndarray, dict[str, str]]:
        """Rows with each that has no features replaced by the next that has, and what is wrong with those."""
        if self.readable[planned].all():
            return planned, {}
        good, bad = np.flatnonzero(self.readable), planned[~self.readable[planned]]
        faults = {self.samples[i].name: self._fault(i) for i in bad.tolist()}
        return good[np.searchsorted(good, planned) % len(good)], faults

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Features (n, F) of texts that a visit can draw."""
        return self.captions.read(np.array([self.rows[t] for t in texts]))

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step. An image that could not be read is replaced by the next sample that could."""
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
                rows.append(table.read(ids, pick))
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
