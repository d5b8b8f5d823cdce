"""Batches as a function of (seed, step): `BatchPlan` chooses the samples, `ImageBatches` loads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amclr.config.schema import Config
from amclr.data.images.decode import BadImage
from amclr.data.images.duplicates import Duplicates
from amclr.data.images.edits import Edits
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policies
from amclr.data.manifest import Sample
from amclr.data.text.views import TextPolicy
from amclr.distributed.world import share_of
from amclr.utils.errors import UserError
from amclr.utils.randomness import mixed

Tokenize = Callable[[list[str]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The samples of each step: an order per epoch, cut into whole batches.

    samples: their ids (N,) int64. weights: average visits of each sample per epoch (N,); 1 if None.
    process: (rank, number of processes). Each process has a share of every batch; B is then the size of the share.
    `plan[step]` is (epoch, rows (B,) of the samples), a pure function, so step k needs no earlier step. Each epoch
    sorts the samples by a hash of their ids, so the relative order of two samples does not depend on the others.
    An epoch leaves out up to B - 1 visits, different ones each time.
    """

    samples: np.ndarray
    batch_size: int
    seed: int
    weights: np.ndarray | None = None
    process: tuple[int, int] = (0, 1)
    _orders: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self._visits < self.batch_size:
            raise UserError(
                f"{self._visits} training images are fewer than one batch of {self.batch_size}: "
                f"lower --batch_size (at most {self._visits})"
            )
        if self.batch_size < self.process[1]:
            raise UserError(
                f"a batch of {self.batch_size} is too small for {self.process[1]} processes: raise --batch_size, "
                "which counts the images of all of them"
            )

    @property
    def share(self) -> slice:
        """The part of each batch that belongs to this process."""
        return share_of(self.batch_size, *self.process)

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch."""
        return self._visits // self.batch_size

    @property
    def _visits(self) -> int:
        """The minimum number of visits in an epoch; fractional weights let it vary by one between epochs."""
        if self.weights is None:
            return len(self.samples)
        return sum(int(w * n) for w, n in zip(*np.unique(self.weights, return_counts=True), strict=True))

    def __getitem__(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and rows (B,) of a step's samples."""
        return self.visits(step)[:2]

    def visits(self, step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Epoch, rows (B,) of a step's samples, and the number of earlier visits of each in this epoch, (B,)."""
        epoch, k = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._order(epoch)
        batch = slice(k * self.batch_size, (k + 1) * self.batch_size)
        rows, copies = (column[batch][self.share] for column in self._orders[epoch])
        return epoch, rows, copies

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the samples in the order of an epoch's visits, and for each the visit's number, from 0."""
        if self.weights is None:
            order = np.argsort(mixed(self.samples, self.seed, "order", epoch, 0), kind="stable")
            return order, np.zeros_like(order)
        visits = np.empty(len(self.samples), dtype=np.int64)
        for weight in np.unique(self.weights):
            # Samples of the same weight take turns, spread evenly over the epochs.
            members = np.flatnonzero(self.weights == weight)
            turn = np.argsort(np.argsort(mixed(self.samples[members], self.seed, "turn"), kind="stable"))
            phase = (turn + 0.5) / len(members)
            visits[members] = np.floor(weight * (epoch + 1) + phase) - np.floor(weight * epoch + phase)
        rows = [np.flatnonzero(visits > copy) for copy in range(int(visits.max(initial=0)))]
        keys = [mixed(self.samples[r], self.seed, "order", epoch, copy) for copy, r in enumerate(rows)]
        order = np.argsort(np.concatenate(keys), kind="stable")
        copies = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        return np.concatenate(rows)[order], copies[order]


def drawn_by(samples: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """The ids (B,) int64 that views are drawn by: the sample's id at the first visit in an epoch, others later."""
    return np.where(copies > 0, mixed(samples, "copy").view(np.int64) + copies, samples)


@dataclass
class Batch:
    """The input of the model and the objective for one step.

    images: uint8 (V_i * B, 3, S, S), or cached tower features (V_i * B, F), view by view.
    tokens: token tensors of V_t * B captions, or cached features (V_t * B, F), view by view.
    ids: (B,) int64, the samples. replaced: names of samples that could not be read, and why.
    groups: view -> (B,) int64, equal for samples with duplicate content, as an objective takes them. They stay on
    the CPU, where checking that a batch has no match costs nothing.
    edits: operations that remain to be applied to the V_i * B images, on their device.
    """

    image_views: tuple[str, ...]
    text_views: tuple[str, ...]
    images: Tensor | None
    tokens: dict[str, Tensor] | Tensor | None
    ids: Tensor
    replaced: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Tensor] = field(default_factory=dict)
    edits: Edits | None = None

    def chunks(self, size: int, count: int = 0) -> list[Batch]:
        """The batch in parts of at most `size` samples with all their views, or in `count` parts of similar size."""

        def part(value: Any, views: int, rows: slice) -> Any:
            if isinstance(value, dict):
                return {k: part(v, views, rows) for k, v in value.items()}
            if value is None:
                return None
            return value.unflatten(0, (views, -1))[:, rows].flatten(0, 1)

        shares = [share_of(len(self.ids), k, count) for k in range(count)]
        shares = shares or [slice(start, start + size) for start in range(0, len(self.ids), size)]
        image_rows = np.arange(len(self.image_views) * len(self.ids)).reshape(len(self.image_views), -1)
        return [
            replace(
                self,
                images=part(self.images, len(self.image_views), rows),
                tokens=part(self.tokens, len(self.text_views), rows),
                ids=self.ids[rows],
                replaced={},
                groups={v: g[rows] for v, g in self.groups.items()},
                edits=self.edits[image_rows[:, rows].ravel()] if self.edits else None,
            )
            for rows in shares
        ]

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device, and its edits applied there."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        if self.edits is None or moved.images is None:
            return moved
        # Edits are applied in place, and this batch may be used again.
        images = moved.images.clone() if moved.images is self.images else moved.images
        return replace(moved, images=self.edits(images), edits=None)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for asynchronous copies to a GPU; called by the data loader."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: changed(v) for k, v in value.items()}
            return None if value is None else change(value)

        return replace(self, images=changed(self.images), tokens=changed(self.tokens), ids=changed(self.ids))


def draw_texts(
    policy: TextPolicy, visited: Sequence[tuple[Sample, int]], views: Sequence[str], seed: int, epoch: int,
    words: Callable[[Sample, int, int], str] | None = None,
) -> dict[str, list[str]]:  # fmt: skip
    """The texts of a step by view. visited: samples, each with the number of its earlier visits in the epoch.

    words: (sample, earlier visits, caption's index) -> text for word noise; None draws it.
    """
    both: dict[str, list[str]] = {"text": [], "text_aug": []}
    for s, copy in visited:
        key = (seed, epoch, s.name, "text", *((copy,) if copy else ()))
        _, text, second = policy.draw(s.captions, s.paraphrases, *key, words=words and partial(words, s, copy))
        both["text"].append(text)
        both["text_aug"].append(second)
    return {view: both[view] for view in views}


def split_views(required: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The image views and the text views that an objective requires, in order."""
    image, text = (tuple(v for v in (m, f"{m}_aug") if v in required) for m in ("image", "text"))
    return image, text


class ImageBatches(Dataset[Batch]):
    """Batches of image views and tokenised captions: `self[step]` is a whole batch.

    edited: apply edits here; otherwise they are left to the device that the batch is moved to.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        store: ImageStore,
        plan: BatchPlan,
        required_views: Sequence[str],
        tokenize: Tokenize,
        config: Config,
        duplicates: Duplicates | None = None,
        edited: bool = True,
    ) -> None:
        self.edited = edited
        self.samples, self.store, self.plan, self.tokenize = samples, store, plan, tokenize
        self.duplicates = duplicates or Duplicates()
        self.image_views, self.text_views = split_views(required_views)
        self.seed, self.texts = config.seed, TextPolicy.of(config)
        self.policies = policies(config)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step. A sample whose image cannot be read is replaced by the next one that can."""
        epoch, planned, copies = self.plan.visits(step)
        decoded, ids, replaced = self._decoded([int(i) for i in planned])
        images, edits = None, None
        if self.image_views:
            images, edits = self._image_views(decoded, drawn_by(self.plan.samples[ids], copies), epoch)
        tokens, texts = None, {}
        if self.text_views:
            visited = [(self.samples[i], copy) for i, copy in zip(ids, copies.tolist(), strict=True)]
            texts = draw_texts(self.texts, visited, self.text_views, self.seed, epoch)
            tokens = self.tokenize([t for drawn_texts in texts.values() for t in drawn_texts])
        groups = self.duplicates.groups(ids, texts)
        return Batch(self.image_views, self.text_views, images, tokens, torch.tensor(ids), replaced, groups, edits)

    def _image_views(self, decoded: list[Tensor], draws: np.ndarray, epoch: int) -> tuple[Tensor, Edits | None]:
        """All image views (V_i * B, 3, S, S), view by view, and the edits that remain for the device."""
        drawn = [self.policies[view].draw(decoded, draws, self.seed, epoch, view) for view in self.image_views]
        if self.edited:
            drawn = [(edits(views), edits) for views, edits in drawn]
        images = torch.cat([views for views, _ in drawn]) if len(drawn) > 1 else drawn[0][0]
        return images, None if self.edited else Edits.joined([edits for _, edits in drawn])

    def _decoded(self, ids: list[int]) -> tuple[list[Tensor], list[int], dict[str, str]]:
        if not self.image_views:
            return [], ids, {}
        decoded: list[Tensor] = []
        used: list[int] = []
        replaced: dict[str, str] = {}
        for wanted in ids:
            for offset in range(len(self.store)):
                i = (wanted + offset) % len(self.store)
                try:
                    decoded.append(self.store[i])
                    used.append(i)
                    break
                except BadImage as error:
                    replaced[self.samples[i].name] = str(error)
            else:
                raise UserError(f"no image can be read any more; the last: {next(reversed(replaced.values()))}")
        return decoded, used, replaced
