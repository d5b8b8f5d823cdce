"""A queue of embeddings of recent batches, as further, constant negatives: cross-batch memory.

A running estimate remembers one number per anchor, which is an epoch old at the anchor's next visit. A queue remembers
the embeddings of the last samples, which are a few steps old: the anchors of a batch are contrasted with them as well
as with each other. No gradient flows into queued embeddings.

Sources: Wang et al. 2020 (arXiv 1912.06798), for samples of the same encoder a few steps ago; He et al. 2020 (arXiv
1911.05722), with an averaged encoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amclr.objectives.backends.torch_tiles import ACCELERATOR_TILE_BYTES
from amclr.objectives.methods import modality
from amclr.objectives.positives import Labels

TILE = 1 << 20
"""Similarities computed at once on a CPU: 4 MiB of float32."""


class Queue(nn.Module):
    """The last `size` samples of an objective: their views and labels. Starts empty; `len` is how many it holds.

    views: names of the objective's views, in the order of the tensors given to `push`.
    """

    rows: Tensor
    """(V, K, D), of the K samples held."""
    ids: Tensor
    """(2, K) int64, of image and text; -1 where embeddings were not finite: such a sample is no negative."""
    groups: Tensor
    """(V, K) int64, as given to the objective; -1 for none."""

    def __init__(self, size: int, views: Sequence[str]) -> None:
        super().__init__()
        self.size, self.views = size, tuple(views)
        self.register_buffer("rows", torch.empty(len(views), 0, 0))
        self.register_buffer("ids", torch.empty(2, 0, dtype=torch.int64))
        self.register_buffer("groups", torch.empty(len(views), 0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.ids.shape[1]

    def check(self, width: int) -> int:
        """How many samples are queued. Raises ValueError if their dimensions are not `width`."""
        if len(self) and self.rows.shape[2] != width:
            raise ValueError(
                f"views have {width} dimensions, and those of the batches before had {self.rows.shape[2]}: "
                "build a new objective, or objective.queue.clear()"
            )
        return len(self)

    def push(self, every: Sequence[Tensor], labels: Labels) -> None:
        """Add a whole batch, V views (N, D) and its labels on the same device, and drop the oldest samples.

        Copies what stays: 4 V K D bytes.
        """
        ids, groups = labels.ids, labels.groups
        new = torch.stack([v.detach()[-self.size :] for v in every])
        finite = torch.isfinite(new).all(2).all(0)
        first = next(iter(ids.values()))
        none = torch.full_like(first, -1)
        new_ids = torch.stack([ids.get(of, first) for of in ("image", "text")])[:, -self.size :]
        new_groups = torch.stack([groups.get(v, none) for v in self.views])[:, -self.size :].clamp(min=-1)
        kept = min(len(self), self.size - new.shape[1])
        places = slice(len(self) - kept, None)

        def joined(before: Tensor, now: Tensor) -> Tensor:
            return torch.cat([before[:, places].to(now), now], 1) if kept else now

        # New tensors rather than overwritten ones: a saved `state` refers to the old ones.
        self.rows = joined(self.rows, torch.where(finite[:, None], new, 0.0))
        self.ids = joined(self.ids, torch.where(finite, new_ids, -1))
        self.groups = joined(self.groups, new_groups)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is queued; assign it to return to it."""
        return self.rows, self.ids, self.groups

    @state.setter
    def state(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        self.rows, self.ids, self.groups = state

    def clear(self) -> None:
        """Drop all samples."""
        views = len(self.views)
        self.state = self.rows.new_empty(views, 0, 0), self.ids.new_empty(2, 0), self.groups.new_empty(views, 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The queue grows in training, so it takes the saved size, but not another number of views.
        for name in ("rows", "ids", "groups"):
            saved, current = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.dim() == current.dim() and len(saved) == len(current):
                state_dict[prefix + name] = saved = saved[:, -self.size :]
                setattr(self, name, torch.empty_like(saved, device=current.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class QueuedNegatives:
    """The queued samples as negatives of a batch's anchors, in two passes like `SimilarityBlocks`, without gradients.

    anchors: V views (M, D). labels: the anchors', (M,), on the same device.
    """

    def __init__(self, queue: Queue, anchors: Sequence[Tensor], labels: Labels) -> None:
        ids, groups = labels.ids, labels.groups
        self.anchors = anchors
        self.rows, self.known = queue.rows.to(anchors[0]), queue.ids[0] >= 0
        # Pairs of labels, of the anchors and of the queue: positives of each other if any is equal.
        self.labels = [(ids[of], queue.ids[k]) for k, of in enumerate(("image", "text")) if of in ids]
        for v, g in groups.items():
            grouped = torch.where(g >= 0, g, -2)  # -2 occurs in no queue
            same_modality = [k for k, w in enumerate(queue.views) if modality(v) == modality(w)]
            self.labels += [(grouped, queue.groups[k]) for k in same_modality]
        like = anchors[0]
        tile = TILE if like.device.type == "cpu" else ACCELERATOR_TILE_BYTES // like.element_size()
        self.step = max(1, tile // len(self.known))
        # Every pass needs the masks: computed once if they take no more than a tile.
        self.kept = list(self._masks()) if self.step >= len(like) else None

    def _tiles(self) -> Iterable[tuple[slice, Tensor]]:
        """Some anchors at a time, and which queued samples are their negatives, (m, K)."""
        return self._masks() if self.kept is None else self.kept

    def _masks(self) -> Iterator[tuple[slice, Tensor]]:
        size = len(self.anchors[0])
        for start in range(0, size, self.step):
            part = slice(start, min(start + self.step, size))
            negatives = self.known.expand(part.stop - start, -1)
            for anchor, queued in self.labels:
                negatives = negatives & (anchor[part, None] != queued)
            yield part, negatives

    def counts(self) -> Tensor:
        """How many negatives each anchor has in the queue, (M,) in the type of the views."""
        return torch.cat([negatives.sum(1) for _, negatives in self._tiles()]).to(self.anchors[0])

    def log_sums(self, pairs: Sequence[tuple[int, int]], taus: float | Tensor) -> Tensor:
        """Log of the sum of exp(s / tau) of terms, given as (anchor, candidate) indices of their views, (T, M).

        -inf where an anchor has no negative in the queue. taus: one, or (T, M).
        """
        like = self.anchors[0]
        sums = like.new_empty(len(pairs), len(like))
        for part, negatives in self._tiles():
            for t, (a, c) in enumerate(pairs):
                s = self.anchors[a][part] @ self.rows[c].T / _of(taus, t, part)
                sums[t, part] = s.masked_fill_(~negatives, -math.inf).logsumexp(1)
        return sums

    def gradients(
        self, pairs: Sequence[tuple[int, int]], taus: float | Tensor, offsets: Tensor, total: Tensor, gradient: Tensor
    ) -> Tensor:
        """Add sum_j w_ij (q_j - c_i) to the anchors' `gradient` (V, M, D), with w_ij = exp(s / tau - offset).

        offsets (T, M): +inf where an anchor has no weight. total (T, M): the sums of its weights on the queue.
        Returns sum_j w_ij s_ij, (T, M).
        """
        weighted_sums = torch.empty_like(total)
        for part, negatives in self._tiles():
            for t, (a, c) in enumerate(pairs):
                s = self.anchors[a][part] @ self.rows[c].T
                w = (s / _of(taus, t, part) - offsets[t, part, None]).masked_fill_(~negatives, -math.inf).exp_()
                weighted_sums[t, part] = (w * s).sum(1)
                gradient[a, part] += w @ self.rows[c] - total[t, part, None] * self.anchors[c][part]
        return weighted_sums


def _of(taus: float | Tensor, term: int, part: slice) -> float | Tensor:
    """The temperature of some anchors of a term, shaped to divide their similarities."""
    return taus[term, part, None] if isinstance(taus, Tensor) and taus.dim() else taus
