"""The closed form of a similarity block: both directed terms of a pair of views, value and gradient.

A block between views X and Y (each (B, D)) holds s_ij = <x_i, y_j>. Its rows are the anchors of the
term X -> Y, its columns those of Y -> X. Both terms need the block's row and column log-sum-exps
(`log_inner_means`), and then, with the updated estimates, the gradient (`gradients`):

    w_ij = exp(s_ij/tau - a_i),  a_i = s_ii/tau + log n_i + log u_i       (row anchors)
    v_ij = exp(s_ij/tau - b_j),  b_j likewise                              (column anchors)
    G = c (W + V) without positives,  dX = G Y - c (R + C) * Y,  dY = G^T X - c (R + C) * X

where R_i, C_j are the sums of an anchor's weights: exp(log g - log u), known from the first pass. The
block is walked in tiles of rows, so the memory beside the views is that of a tile, and nothing of
size B x B is kept for the backward pass. Needs torch alone; call without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amclr.objectives.contrast import NEG_INF, log_count

TILE_BYTES = 1 << 22
"""Size of a tile: small enough for a core's cache, large enough for an efficient matrix product."""
WHOLE_BYTES = 1 << 23
"""Blocks up to this size are formed once and kept from the first pass to the second."""
SAFE_EXPONENT = 40.0
"""exp of at most this, and sums and products of such, stay in float32's range."""


@dataclass
class Positives:
    """Which rows are positives of each other: equal ids of the image or of the text.

    `ids` is None where no id stands twice, so that only the diagonal is positive.
    """

    size: int
    ids: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, ids: tuple[Tensor, ...]) -> Positives:
        """From the (B,) ids of each modality. Looks for duplicates only where that costs no synchronisation."""
        different = ids[:1] if all(i is ids[0] for i in ids) else ids
        size = len(ids[0])
        if ids[0].device.type == "cpu" and all(len(torch.unique(i)) == size for i in different):
            return cls(size, None)
        return cls(size, different)

    def mask(self, start: int, stop: int) -> Tensor | None:
        """(stop - start, B) bool, True at positives; None where that is the diagonal alone."""
        if self.ids is None:
            return None
        found = self.ids[0][start:stop, None] == self.ids[0][None, :]
        for other in self.ids[1:]:
            found |= other[start:stop, None] == other[None, :]
        return found

    def negatives(self, like: Tensor) -> Tensor:
        """How many negatives each row has, (B,) int64 on the device of `like`."""
        if self.ids is None:
            return torch.full((self.size,), self.size - 1, device=like.device)
        step = max(1, TILE_BYTES // self.size)
        counts = [(~self.mask(k, min(k + step, self.size))).sum(1) for k in range(0, self.size, step)]  # type: ignore[operator]
        return torch.cat(counts)


@dataclass
class Block:
    """One block. tau_rows, tau_columns: () where shared, (B,) where each anchor has its own."""

    rows: Tensor
    columns: Tensor
    tau_rows: Tensor
    tau_columns: Tensor
    positives: Positives
    count: Tensor
    kept: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.diagonal = (self.rows * self.columns).sum(1)
        # One exponential serves both directions where they share a temperature that cannot overflow.
        self.shared = self.tau_rows is self.tau_columns and self.tau_rows.dim() == 0
        if self.shared and self.rows.device.type == "cpu":
            self.plain = float(self.tau_rows) * SAFE_EXPONENT >= 1.0
        else:
            self.plain = False

    def _tiles(self) -> Iterator[tuple[int, int]]:
        size, width = len(self.rows), self.rows.element_size()
        step = size if size * size * width <= WHOLE_BYTES else max(16, TILE_BYTES // (size * width))
        for start in range(0, size, step):
            yield start, min(start + step, size)

    def _clear(self, tile: Tensor, start: int, stop: int, value: float) -> Tensor:
        """Overwrite the positives of a tile."""
        mask = self.positives.mask(start, stop)
        if mask is None:
            tile.diagonal(start).fill_(value)
            return tile
        return tile.masked_fill_(mask, value)

    def log_inner_means(self) -> tuple[Tensor, Tensor]:
        """Log g of the row anchors and of the column anchors, (B,) each; -inf where there is no negative."""
        if self.plain:
            row_sum, column_sum = self._plain_sums()
            row, column = row_sum.log(), column_sum.log()
        else:
            row, column = self._shifted_sums()
        log_n = log_count(self.count, self.rows.dtype)
        return row - self.diagonal / self.tau_rows - log_n, column - self.diagonal / self.tau_columns - log_n

    def _plain_sums(self) -> tuple[Tensor, Tensor]:
        row_sum, column_sum = torch.empty_like(self.diagonal), torch.zeros_like(self.diagonal)
        for start, stop, tile in self._exponentials():
            row_sum[start:stop] = tile.sum(1)
            column_sum += tile.sum(0)
            if stop - start == len(self.rows):
                self.kept = tile
        return row_sum, column_sum

    def _exponentials(self) -> Iterator[tuple[int, int, Tensor]]:
        """Tiles of exp(s / tau), zero at positives."""
        scaled = self.rows / self.tau_rows
        for start, stop in self._tiles():
            tile = (scaled[start:stop] @ self.columns.T).exp_()
            yield start, stop, self._clear(tile, start, stop, 0.0)

    def _shifted_sums(self) -> tuple[Tensor, Tensor]:
        row = torch.empty_like(self.diagonal)
        top = torch.full_like(self.diagonal, torch.finfo(self.diagonal.dtype).min)
        total = torch.zeros_like(top)
        tau = _along_rows(self.tau_rows)
        for start, stop in self._tiles():
            s = self.rows[start:stop] @ self.columns.T
            scaled = self._clear(s / (tau[start:stop] if tau.dim() else tau), start, stop, NEG_INF)
            row[start:stop] = scaled.logsumexp(1)
            if not self.shared:
                scaled = self._clear(s.div_(self.tau_columns), start, stop, NEG_INF)
            higher = torch.maximum(top, scaled.amax(0))
            total = total * (top - higher).exp() + scaled.sub_(higher).exp_().sum(0)
            top = higher
        return row, torch.where(total > 0, top + total.log(), NEG_INF)

    def gradients(
        self, log_u_rows: Tensor, log_u_columns: Tensor, sums: Tensor, scale: float, slopes: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dX, dY (B, D), and where `slopes` sum_j w_ij d_ij of the row and of the column anchors, (B,) each.

        log_u_rows, log_u_columns: the updated estimates. sums: R + C, zero where there is no negative.
        scale: weight / B of both terms.
        """
        log_n = log_count(self.count, self.rows.dtype)
        a = self.diagonal / self.tau_rows + log_n + log_u_rows
        b = self.diagonal / self.tau_columns + log_n + log_u_columns
        d_rows, d_columns = torch.empty_like(self.rows), torch.zeros_like(self.columns)
        slope_rows, slope_columns = torch.zeros_like(a), torch.zeros_like(b)
        for start, stop, weights in self._weights(a, b, slope_rows, slope_columns, slopes):
            torch.mm(weights, self.columns, out=d_rows[start:stop])
            d_columns.addmm_(weights.T, self.rows[start:stop])
        own = sums[:, None]
        d_rows.addcmul_(own, self.columns, value=-1).mul_(scale)
        d_columns.addcmul_(own, self.rows, value=-1).mul_(scale)
        return d_rows, d_columns, slope_rows, slope_columns

    def _weights(
        self, a: Tensor, b: Tensor, slope_rows: Tensor, slope_columns: Tensor, slopes: bool
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Tiles of W + V; on the way, where wanted, the sums of w_ij d_ij."""
        if self.plain and not slopes:
            row_factor, column_factor = (-a).exp(), (-b).exp()
            whole = [(0, len(a), self.kept)] if self.kept is not None else None
            for start, stop, tile in whole or self._exponentials():
                yield start, stop, tile.mul_(row_factor[start:stop, None] + column_factor)
            self.kept = None
            return
        tau_r, tau_c = _along_rows(self.tau_rows), self.tau_columns
        for start, stop in self._tiles():
            s = self.rows[start:stop] @ self.columns.T
            scaled = s / (tau_r[start:stop] if tau_r.dim() else tau_r)
            w = self._clear((scaled - a[start:stop, None]).exp_(), start, stop, 0.0)
            scaled = s / tau_c if not self.shared else scaled
            v = self._clear(scaled.sub_(b).exp_(), start, stop, 0.0)
            if slopes:
                slope_rows[start:stop] = (w * (s - self.diagonal[start:stop, None])).sum(1)
                slope_columns += (v * (s - self.diagonal)).sum(0)
            yield start, stop, w.add_(v)


def _along_rows(tau: Tensor) -> Tensor:
    return tau[:, None] if tau.dim() else tau
