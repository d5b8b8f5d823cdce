"""A queue of embeddings of recent batches, as further negatives that are constant: cross-batch memory.

A running estimate remembers a number per anchor, which is an epoch old when the anchor comes again. A queue remembers
the embeddings of the last samples, which are a few steps old: the anchors of a batch are contrasted with them as well
as with each other. No gradient flows into what is queued, nor from it into an anchor's positive; the samples of the
batch are anchors of the opposite terms, where they are pushed away themselves.

Sources: Wang et al. 2020 (arXiv 1912.06798), for samples of the same encoder a few steps ago; He et al. 2020 (arXiv
1911.05722), with an averaged one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amclr.objectives.blocks import ACCELERATOR_TILE_BYTES, NEG_INF
from amclr.objectives.methods import modality

TILE = 1 << 20
"""Similarities that are worked on at once on a CPU: 4 MiB of float32."""


class Queue(nn.Module):
    """The last `size` samples of an objective: their views, and what tells whose positives they are. Starts empty.

    views: names of the objective's views, in the order of the tensors that `push` is given. `len` says how many
    samples it holds.
    """

    rows: Tensor
    """(V, K, D), of the K samples that there are."""
    ids: Tensor
    """(2, K) int64, of image and text; -1 where embeddings were not finite: such a sample is nobody's negative."""
    groups: Tensor
    """(V, K) int64, as the objective was given them; -1 for none."""

    def __init__(self, size: int, views: Sequence[str]) -> None:
        super().__init__()
        self.size, self.views = size, tuple(views)
        self.register_buffer("rows", torch.empty(len(views), 0, 0))
        self.register_buffer("ids", torch.empty(2, 0, dtype=torch.int64))
        self.register_buffer("groups", torch.empty(len(views), 0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.ids.shape[1]

    def push(self, every: Sequence[Tensor], ids: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> None:
        """Take up a whole batch: V views (N, D), ids by modality and groups by view, (N,), all in one place.

        The oldest samples go. Copies what stays: 4 V K D bytes.
        """
        new = torch.stack([v.detach()[-self.size :] for v in every])
        finite = torch.isfinite(new).all(2).all(0)
        first = next(iter(ids.values()))
        none = torch.full_like(first, -1)
        labels = torch.stack([ids.get(of, first) for of in ("image", "text")])[:, -self.size :]
        shown = torch.stack([groups.get(v, none) for v in self.views])[:, -self.size :].clamp(min=-1)
        kept = min(len(self), self.size - new.shape[1])
        places = slice(len(self) - kept, None)

        def joined(before: Tensor, now: Tensor) -> Tensor:
            return torch.cat([before[:, places].to(now), now], 1) if kept else now

        # New tensors, not the old ones overwritten: `state` holds on to those.
        self.rows = joined(self.rows, torch.where(finite[:, None], new, 0.0))
        self.ids = joined(self.ids, torch.where(finite, labels, -1))
        self.groups = joined(self.groups, shown)

    @property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is queued; assign it to go back to it."""
        return self.rows, self.ids, self.groups

    @state.setter
    def state(self, state: tuple[Tensor, Tensor, Tensor]) -> None:
        self.rows, self.ids, self.groups = state

    def clear(self) -> None:
        """Forget everything."""
        views = len(self.views)
        self.state = self.rows.new_empty(views, 0, 0), self.ids.new_empty(2, 0), self.groups.new_empty(views, 0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # It grows in training, so it takes the size of what it is given; not another number of views.
        for name in ("rows", "ids", "groups"):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(given, Tensor) and given.dim() == own.dim() and len(given) == len(own):
                state_dict[prefix + name] = given = given[:, -self.size :]
                setattr(self, name, torch.empty_like(given, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class QueuedNegatives:
    """What is queued, against the anchors of a batch, in two passes as `blocks.Blocks`. Call without gradients.

    anchors: V views (M, D). ids by modality and groups by view: (M,), the anchors', in the same place.
    """

    def __init__(
        self, queue: Queue, anchors: Sequence[Tensor], ids: Mapping[str, Tensor], groups: Mapping[str, Tensor]
    ) -> None:
        self.anchors = anchors
        self.rows, self.known = queue.rows.to(anchors[0]), queue.ids[0] >= 0
        # Pairs of labels, of the anchors and of the queue: positives of each other where any is equal.
        self.labels = [(ids[of], queue.ids[k]) for k, of in enumerate(("image", "text")) if of in ids]
        for v, g in groups.items():
            own = torch.where(g >= 0, g, -2)  # which none of the queue has
            same = [k for k, w in enumerate(queue.views) if modality(v) == modality(w)]
            self.labels += [(own, queue.groups[k]) for k in same]
        like = anchors[0]
        tile = TILE if like.device.type == "cpu" else ACCELERATOR_TILE_BYTES // like.element_size()
        self.step = max(1, tile // len(self.known))
        # Whose negatives are whose is asked in every pass: found once where it takes no more than a tile.
        self.kept = list(self._found()) if self.step >= len(like) else None

    def _tiles(self) -> Iterable[tuple[slice, Tensor]]:
        """Some anchors at a time, and which of the queue are their negatives, (m, K)."""
        return self._found() if self.kept is None else self.kept

    def _found(self) -> Iterator[tuple[slice, Tensor]]:
        size = len(self.anchors[0])
        for start in range(0, size, self.step):
            part = slice(start, min(start + self.step, size))
            found = self.known.expand(part.stop - start, -1)
            for own, others in self.labels:
                found = found & (own[part, None] != others)
            yield part, found

    def counts(self) -> Tensor:
        """How many negatives each anchor has in the queue, (M,) in the type of the views."""
        return torch.cat([negatives.sum(1) for _, negatives in self._tiles()]).to(self.anchors[0])

    def log_sums(self, pairs: Sequence[tuple[int, int]], taus: float | Tensor) -> Tensor:
        """Of terms, by places (anchor, candidate) of their views: log of the sum of exp(s / tau), (T, M).

        -inf where an anchor has no negative in the queue. taus: one, or (T, M).
        """
        like = self.anchors[0]
        sums = like.new_empty(len(pairs), len(like))
        for part, negatives in self._tiles():
            for t, (a, c) in enumerate(pairs):
                s = self.anchors[a][part] @ self.rows[c].T / _of(taus, t, part)
                sums[t, part] = s.masked_fill_(~negatives, NEG_INF).logsumexp(1)
        return sums

    def gradients(
        self, pairs: Sequence[tuple[int, int]], taus: float | Tensor, offsets: Tensor, total: Tensor, gradient: Tensor
    ) -> Tensor:
        """Add the anchors' part to `gradient` (V, M, D): sum_j w_ij (q_j - c_i), with w_ij = exp(s / tau - offset).

        offsets (T, M): +inf where an anchor has no weight. total (T, M): the sums of its weights on the queue.
        Returns sum_j w_ij s_ij, (T, M).
        """
        pulls = torch.empty_like(total)
        for part, negatives in self._tiles():
            for t, (a, c) in enumerate(pairs):
                s = self.anchors[a][part] @ self.rows[c].T
                w = (s / _of(taus, t, part) - offsets[t, part, None]).masked_fill_(~negatives, NEG_INF).exp_()
                pulls[t, part] = (w * s).sum(1)
                gradient[a, part] += w @ self.rows[c] - total[t, part, None] * self.anchors[c][part]
        return pulls


def _of(taus: float | Tensor, term: int, part: slice) -> float | Tensor:
    """The temperature of some anchors of a term, as it stands beside their similarities."""
    return taus[term, part, None] if isinstance(taus, Tensor) and taus.dim() else taus
