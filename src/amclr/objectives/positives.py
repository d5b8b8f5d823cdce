"""Which samples of a batch are positives of each other, from their ids and groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amclr.distributed.world import World
from amclr.objectives.methods import modality

SORT_FROM = 512
"""Above this many labels, sorting finds a repeated one faster than a set does."""

Part = slice | Tensor
"""Some samples of a batch: a range of them, or their indices."""


@dataclass(frozen=True)
class Labels:
    """What identifies the rows of a batch of B: ids by modality, and groups by view, each (B,) int64.

    shared: whether one tensor of ids serves all modalities, so that work on it is done once.
    """

    ids: Mapping[str, Tensor]
    groups: Mapping[str, Tensor]
    shared: bool

    @property
    def distinct_ids(self) -> list[Tensor]:
        """The ids of each modality; one tensor where all share it."""
        return list(self.ids.values())[: 1 if self.shared else None]

    def map(self, function: object) -> Labels:
        """The labels with a function applied to every tensor, once to shared ids."""
        assert callable(function)
        ids = [function(i) for i in self.distinct_ids] * (len(self.ids) if self.shared else 1)
        groups = {view: function(g) for view, g in self.groups.items()}
        return Labels(dict(zip(self.ids, ids, strict=True)), groups, self.shared)

    def to(self, device: torch.device) -> Labels:
        """The labels on a device."""
        return self.map(lambda labels: labels.to(device, non_blocking=True))

    def rows(self, part: slice) -> Labels:
        """The labels of some rows of the batch."""
        return self.map(lambda labels: labels[part])

    def gather(self, world: World, device: torch.device) -> Labels:
        """The labels of the whole batch, from all processes."""
        return self if world.alone else self.map(lambda labels: world.gather(labels.to(device)))

    def positives(self, device: torch.device) -> Positives:
        """Which rows are positives of each other, for use on a device."""
        by_modality = ([g for view, g in self.groups.items() if modality(view) == of] for of in self.ids)
        return Positives.of(self.distinct_ids, device, [views for views in by_modality if views])


@dataclass(frozen=True)
class Positives:
    """Which samples of a batch are positives of each other: those that share an id, or a group.

    matches: pairs of labels (N,): i and j are positives where i's in the first equals j's in the second, for
    any of the pairs. None where nothing matches, so that only a sample itself is its positive.
    unique: whether it is known that no id occurs twice.
    """

    size: int
    matches: tuple[tuple[Tensor, Tensor], ...] | None
    unique: bool

    @classmethod
    def of(cls, ids: Sequence[Tensor], device: torch.device, groups: Sequence[Sequence[Tensor]] = ()) -> Positives:
        """From the (N,) ids of each modality (one tensor if shared) and the (N,) groups of its views.

        Ids match those of the same modality; groups, where not negative, those of any view of the same
        modality. Looks for matches only where that needs no synchronisation: in labels on the CPU.
        """
        unique = not any(_may_repeat(i) for i in ids)
        comparable = [] if unique else [[i] for i in ids]
        comparable += [views for views in map(_disjoint, groups) if _may_repeat(torch.cat(views))]
        on_device = [[x.to(device, non_blocking=True) for x in views] for views in comparable]
        matches = tuple((x, y) for views in on_device for x in views for y in views)
        return cls(len(ids[0]), matches or None, unique)

    def mask(self, rows: Part, columns: Part) -> Tensor | None:
        """(rows, columns) bool, True at positives; None where that is the diagonal alone."""
        if self.matches is None:
            return None
        mask = None
        for first, second in self.matches:
            equal = first[rows][:, None] == second[columns][None, :]
            mask = equal if mask is None else mask.logical_or_(equal)
        return mask

    def negatives(self, like: Tensor) -> Tensor:
        """How many negatives each sample has, (N,) in the type and on the device of `like`."""
        if self.matches is None:
            return like.new_full((self.size,), self.size - 1)
        step = max(1, (1 << 22) // self.size)
        counts = []
        for start in range(0, self.size, step):
            mask = self.mask(slice(start, start + step), slice(None))
            assert mask is not None
            counts.append(self.size - mask.sum(1))
        return torch.cat(counts).to(like)


def _disjoint(views: Sequence[Tensor]) -> list[Tensor]:
    """Groups (N,) of a modality's views, with a unique number in place of one below 0 or one that the row has already.

    So a label that occurs twice, in whichever views, belongs to different rows.
    """
    disjoint: list[Tensor] = []
    for groups in views:
        alone = groups < 0
        for earlier in disjoint:
            alone |= groups == earlier
        unique = -1 - torch.arange(len(groups), device=groups.device) - len(disjoint) * len(groups)
        disjoint.append(torch.where(alone, unique, groups))
    return disjoint


def _may_repeat(labels: Tensor) -> bool:
    """Whether a label may occur twice: always, unless it is on the CPU and seen to be unique."""
    if labels.device.type != "cpu":
        return True
    if len(labels) <= SORT_FROM:
        return len(set(labels.tolist())) < len(labels)
    ordered = np.sort(labels.numpy())
    return bool((ordered[1:] == ordered[:-1]).any())
