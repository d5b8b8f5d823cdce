"""The closed form of similarity blocks in torch: both directed terms of a pair of views, value and gradient.

A block between views X and Y (each (B, D)) holds s_ij = <x_i, y_j>. Its rows are the anchors of the term X -> Y, its
columns those of Y -> X. Both terms need the block's row and column log-sum-exps (`log_sums`), and then, with the
updated estimates, the gradient (`gradients`):

    w_ij = exp(s_ij/tau - a_i),  a_i = s_ii/tau + log n_i + log u_i - log c     (row anchors)
    v_ij = exp(s_ij/tau - b_j),  b_j likewise                                  (column anchors)
    G = W + V at the negatives,  -(R_i + C_i) on the diagonal,   dX = G Y,   dY = G^T X

Here c = weight / B, and R_i, C_i are the sums of sample i's weights as an anchor of either term, c exp(log g - log u),
known from the first pass. A `Grid` stacks the blocks of R row views with C column views, so that AmCLR's four blocks
are one matrix product. It is computed tile by tile. Besides the views it needs the memory of one tile (small grids
keep theirs from the first pass to the second), and nothing of size B x B is kept for the backward pass. Call it
without gradients.

Two things make it fast on a CPU. Exponents are in base 2: torch's exp2 takes a quarter of the time of its exp at the
same accuracy. And where both directions share a temperature, one exponential serves both: exp(s_ij/tau - m), times a
factor per row and one per column. The shift m prevents overflow; what would lose precision by it is computed exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amclr.objectives.backends.base import LOG2E, BlockInputs, Workspace
from amclr.objectives.positives import Positives

TILE_ROWS, TILE_COLUMNS = 512, 512
"""A tile on the CPU: 1 MiB of float32, so that it stays in a core's cache between its uses."""
SLAB = 1 << 16
"""The factors of a tile are computed for this many similarities at a time."""
ACCELERATOR_TILE_BYTES = 1 << 26
"""A tile elsewhere: large enough for the device's matrix units."""
KEPT_BYTES = 1 << 27
"""Tiles are kept from the first pass to the second if those of all concurrent grids take at most this. Above it they
are recomputed, for one more matrix product, so that memory does not grow with B x B."""
PLAIN_EXPONENT = 40.0
"""exp of at most this, and sums and products of such, stay in float32's range: no shift is needed."""
LEAST_SUM = 1e-28
"""A shifted sum below this may have lost parts to underflow."""
LARGEST_FACTOR = 80.0 / math.log(2)


TileSlices = tuple[slice, slice, slice, slice]
"""What a tile spans: row views, their rows, column views, their rows."""


class Grid:
    """The blocks of R row views with C column views.

    rows: R views (M, D). columns: C views (N, D). On one process M = N = B. With several, the columns are those of all
    processes, the rows this process's, starting at row `start` of N, and `both` is False: then only what the row
    anchors need is computed.
    tau_rows, tau_columns: (R, C, M) and (R, C, N) if each anchor has its own temperature, else None; then `tau` is the
    shared one, a float, or a tensor () whose value is not known on the host.
    number: index of this grid among the `concurrent` ones that keep tiles in the workspace at the same time.
    """

    def __init__(
        self,
        rows: Sequence[Tensor],
        columns: Sequence[Tensor],
        positives: Positives,
        tau: float | Tensor | None,
        tau_rows: Tensor | None = None,
        tau_columns: Tensor | None = None,
        start: int = 0,
        both: bool = True,
        workspace: Workspace | None = None,
        number: int = 0,
        concurrent: int = 1,
    ) -> None:
        self.workspace, self.number = workspace or Workspace(), number
        self.rows, self.columns, self.positives, self.start, self.both = rows, columns, positives, start, both
        self.tau, self.tau_rows, self.tau_columns = tau, tau_rows, tau_columns
        self.like = rows[0]
        self.on_cpu = self.like.device.type == "cpu"
        self.shape = len(rows), len(rows[0]), len(columns), len(columns[0])
        self.rate = LOG2E / tau if isinstance(tau, float) else 1.0
        # One exponential for both directions: always where no shift is needed, and on the CPU with a shift.
        self.single = isinstance(tau, float) and (self.on_cpu or PLAIN_EXPONENT * tau >= 1)
        self.shifts = self.single and PLAIN_EXPONENT * float(tau or 0) < 1
        self.keeps = self.single and concurrent * self.like.element_size() * math.prod(self.shape) <= KEPT_BYTES
        self.joined: dict[str, Tensor] = {}
        self.kept: dict[int, tuple[Tensor, float]] = {}
        self.tiles = list(self._tiles())
        # Slicing costs more than arithmetic in a small batch: a single tile is not sliced.
        self.whole = len(self.tiles) == 1

    # -- tiles ------------------------------------------------------------------------------------

    def _tiles(self) -> Iterator[TileSlices]:
        """All tiles. A tile spans several views only if it holds them whole."""
        r, m, c, n = self.shape
        height, width = TILE_ROWS, TILE_COLUMNS
        if not self.on_cpu:
            height, width = max(16, ACCELERATOR_TILE_BYTES // (self.like.element_size() * n)), n
        all_rows, all_columns = r * m <= height, c * n <= width
        for p, s in [(slice(0, r), slice(0, m))] if all_rows else _pieces(r, m, height):
            for k, j in [(slice(0, c), slice(0, n))] if all_columns else _pieces(c, n, width):
                yield p, s, k, j

    def _part(self, numbers: Tensor, *place: slice) -> Tensor:
        """The part of `numbers` that belongs to a tile."""
        return numbers if self.whole else numbers[place]

    def _stacked(self, side: str, views: slice, rows: slice) -> Tensor:
        """Rows of some views, one below the other; joined once where a tile spans several views whole."""
        all_views = self.rows if side == "rows" else self.columns
        if views.stop - views.start == 1:
            return self._part(all_views[views.start], rows)
        if side not in self.joined:
            self.joined[side] = torch.cat(list(all_views))
        return self.joined[side]

    def _scores(self, tile: TileSlices, keep: int | None = None) -> Tensor:
        """s_ij of a tile times `rate`, (p, m, k, n). The next tile overwrites it unless it is kept under a number."""
        p, s, k, j = tile
        x, y = self._stacked("rows", p, s), self._stacked("columns", k, j)
        shape = p.stop - p.start, s.stop - s.start, k.stop - k.start, j.stop - j.start
        place = self.workspace.empty("tile" if keep is None else (self.number, keep), (len(x), len(y)), x)
        return place.addmm_(x, y.T, beta=0, alpha=self.rate).view(shape)

    def _fill_positives(self, values: Tensor, tile: TileSlices, at_positives: float) -> Tensor:
        """Overwrite a tile at its positives."""
        _, s, _, j = tile
        mask = self.positives.mask(slice(self.start + s.start, self.start + s.stop), j)
        if mask is not None:
            return values.masked_fill_(mask[None, :, None, :], at_positives)
        diagonal = self._diagonal(values, tile)
        if diagonal is not None:
            diagonal[0].fill_(at_positives)
        return values

    def _diagonal(self, values: Tensor, tile: TileSlices) -> tuple[Tensor, slice] | None:
        """A tile's pairs (i, i): a view (p, k, l) of it, and their rows in the grid; None if it has none."""
        _, s, _, j = tile
        if self.whole and self.both:
            return values.diagonal(dim1=1, dim2=3), s
        low, high = max(self.start + s.start, j.start), min(self.start + s.stop, j.stop)
        if low >= high:
            return None
        rows = slice(low - self.start, high - self.start)
        inner = values[:, rows.start - s.start : rows.stop - s.start, :, low - j.start : high - j.start]
        return inner.diagonal(dim1=1, dim2=3), rows

    def _read_diagonal(self, scores: Tensor, tile: TileSlices, positive: Tensor) -> None:
        """Copy a tile's s_ii into the grid's (R, C, M)."""
        p, _, k, _ = tile
        pairs = self._diagonal(scores, tile)
        if pairs is not None:
            torch.mul(pairs[0], 1 / self.rate, out=self._part(positive, p, k, pairs[1]))

    # -- first pass -------------------------------------------------------------------------------

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """Log of the sum over the negatives of exp(s / tau), -inf where there is none; and s_ii.

        Returns (2, R, C, M), for the row anchors and the column anchors, or (1, R, C, M) unless `both`; and s_ii
        (R, C, M).
        """
        r, m, c, _ = self.shape
        output = self.like.new_empty(3 if self.both else 2, r, c, m)
        sums, positive = output[:-1], output[-1]
        if self.single and not self._single_sums(sums, positive):
            self.single = self.keeps = False
            self.rate = 1.0
            self.kept.clear()
        if not self.single:
            self._exact_sums(sums, positive)
        return sums, positive

    def _single_sums(self, sums: Tensor, positive: Tensor) -> bool:
        """Use one exponential for both directions; False if that would lose precision."""
        row, *column = sums.unbind()
        level = 0.0  # the sums so far are in units of 2 ** level
        for number, tile in enumerate(self.tiles):
            p, s, k, j = tile
            e, shift = self._scores(tile, number if self.keeps else None), 0.0
            self._read_diagonal(e, tile, positive)
            self._fill_positives(e, tile, -math.inf)
            if self.shifts:
                shift = self._shift(e)
                e.sub_(shift)
                if number == 0:
                    level = shift
                elif shift > level:
                    sums *= 2.0 ** (level - shift)
                    level = shift
            e.exp2_()
            unit = 2.0 ** (shift - level)
            _add_sum(self._part(row, p, k, s).transpose(1, 2), e, 3, unit, j.start == 0)
            if column:
                _add_sum(self._part(column[0], p, k, j), e, 1, unit, s.start == 0)
            if self.keeps:
                self.kept[number] = e, shift
        # A sum without negatives is zero rightly: `_exact_sums` tells that from an underflow.
        if self.shifts and not float(sums.amin()) > LEAST_SUM:
            return False
        sums.log_()
        if level:
            sums += level / LOG2E
        return True

    def _shift(self, e: Tensor) -> float:
        """The largest exponent of a tile's negatives; positives, which may be far above, are masked already."""
        return max(float(e.amax()), -1e30)

    def _exact_sums(self, sums: Tensor, positive: Tensor) -> None:
        """Shift every row and every column by its own maximum, in one pass."""
        row, *column = sums.fill_(-math.inf).unbind()
        for tile in self.tiles:
            p, s, k, j = tile
            scores = self._scores(tile)
            self._read_diagonal(scores, tile, positive)
            scaled = self._fill_positives(scores / self._tau(tile, "rows"), tile, -math.inf)
            row[p, k, s] = torch.logaddexp(row[p, k, s], scaled.logsumexp(3).transpose(1, 2))
            if column:
                if self.tau_rows is not None:
                    scaled = self._fill_positives(scores / self._tau(tile, "columns"), tile, -math.inf)
                column[0][p, k, j] = torch.logaddexp(column[0][p, k, j], scaled.logsumexp(1))

    def _tau(self, tile: TileSlices, side: str) -> Tensor | float:
        p, s, k, j = tile
        if side == "rows" and self.tau_rows is not None:
            return _along(self.tau_rows[p, k, s])
        if side == "columns" and self.tau_columns is not None:
            return self.tau_columns[p, k, j][:, None]
        assert self.tau is not None
        return self.tau

    # -- second pass ------------------------------------------------------------------------------

    def gradients(
        self,
        a: Tensor,
        b: Tensor,
        positive_weights: Tensor,
        d_rows: Tensor,
        d_columns: Tensor | None,
        weighted_sums: bool = False,
        fresh: tuple[bool, bool] = (False, False),
    ) -> tuple[Tensor, Tensor | None] | None:
        """Add the gradients to d_rows (R, M, D) and d_columns (C, N, D), None unless `both`.

        a (R, C, M), b (R, C, N): added to the exponents (in base 2) of row and column anchors; -inf where an anchor
        has no weight. positive_weights (R, C, M): R_i + C_i. fresh: whether d_rows and d_columns are uninitialised.
        With `weighted_sums`, returns sum_j w_ij s_ij of the row anchors and sum_i v_ij s_ij of the column anchors,
        shaped like a and b.
        """
        sums = (torch.zeros_like(a), torch.zeros_like(b) if self.both else None) if weighted_sums else None
        for tile, g in self._weights(a, b, sums):
            p, s, k, j = tile
            diagonal = self._diagonal(g, tile)
            if diagonal is not None:
                torch.neg(self._part(positive_weights, p, k, diagonal[1]), out=diagonal[0])
            flat = g.view(g.shape[0] * g.shape[1], -1)
            _add_product(
                self._part(d_rows, p, s), flat, self._stacked("columns", k, j), fresh[0] and k.start == j.start == 0
            )
            if d_columns is not None:
                first = fresh[1] and p.start == s.start == 0
                _add_product(self._part(d_columns, k, j), flat.T, self._stacked("rows", p, s), first)
        self.kept.clear()
        return sums

    def _weights(
        self, a: Tensor, b: Tensor, sums: tuple[Tensor, Tensor | None] | None
    ) -> Iterator[tuple[TileSlices, Tensor]]:
        """Tiles of W + V, zero at positives. Adds the sums of w_ij s_ij to `sums`, if given."""
        plain = self.single and sums is None
        high = max(float(a.amax()), float(b.amax())) if self.shifts and plain else 0.0
        if plain and not self.shifts:
            row_factors, column_factors = a.exp2(), b.exp2()
        for number, tile in enumerate(self.tiles):
            p, s, k, j = tile
            if plain:
                e, shift = self.kept.pop(number, (None, 0.0))
                if e is None:
                    e = self._fill_positives(self._scores(tile), tile, -math.inf)
                    if self.shifts:
                        shift = self._shift(e)
                        e.sub_(shift)
                    e.exp2_()
                if not self.shifts:
                    of_rows, of_columns = self._part(row_factors, p, k, s), self._part(column_factors, p, k, j)
                    yield tile, self._scaled(e, _along(of_rows), of_columns[:, None])
                    continue
                if shift + high < LARGEST_FACTOR:
                    of_rows, of_columns = (a[p, k, s] + shift).exp2_(), (b[p, k, j] + shift).exp2_()
                    yield tile, self._scaled(e, _along(of_rows), of_columns[:, None])
                    continue
            scores = self._scores(tile)
            w = scores * (LOG2E / self.rate / self._tau(tile, "rows")) + _along(a[p, k, s])
            v = scores * (LOG2E / self.rate / self._tau(tile, "columns")) + b[p, k, j][:, None]
            w, v = (self._fill_positives(x.exp2_(), tile, 0.0) for x in (w, v))
            if sums is not None:
                scores /= self.rate
                sums[0][p, k, s] += (w * scores).sum(3).transpose(1, 2)
                if sums[1] is not None:
                    sums[1][p, k, j] += (v * scores).sum(1)
            yield tile, w.add_(v)

    def _scaled(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """A tile (p, m, k, n) times the sum of a factor per row and one per column, some rows at a time."""
        p, m, k, n = tile.shape
        step = max(1, SLAB // (p * k * n)) if self.on_cpu else m
        for start in range(0, m, step):
            part = tile[:, start : start + step] if step < m else tile
            sums = self.workspace.empty("factors", tuple(part.shape), part)
            part.mul_(torch.add(rows[:, start : start + step], columns, out=sums))
        return tile


def _pieces(views: int, length: int, step: int) -> Iterator[tuple[slice, slice]]:
    for v in range(views):
        for start in range(0, length, step):
            yield slice(v, v + 1), slice(start, min(start + step, length))


def _along(rows: Tensor) -> Tensor:
    """Numbers of row anchors (p, k, m), shaped to broadcast over a tile (p, m, k, n): (p, m, k, 1)."""
    return rows.transpose(1, 2)[..., None]


def _add_sum(out: Tensor, values: Tensor, dim: int, unit: float, fresh: bool) -> None:
    """Add the sums of values along `dim`, times `unit`, to `out`; overwrite it if it is fresh."""
    if fresh and unit == 1.0:
        torch.sum(values, dim, out=out)
    else:
        sums = values.sum(dim) * unit
        out.copy_(sums) if fresh else out.add_(sums)


def _add_product(out: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """Add left @ right to a (views, rows, D) piece, contiguous in its views and rows; overwrite it if it is fresh."""
    out.view(-1, out.shape[-1]).addmm_(left, right, beta=0 if fresh else 1)


class TorchBlocks:
    """The blocks of some layouts as grids of tiles. Implements `SimilarityBlocks`."""

    def __init__(self, inputs: BlockInputs) -> None:
        every, mine, taus, layouts = inputs.every, inputs.mine, inputs.taus, inputs.layouts
        positives, workspace = inputs.positives, inputs.workspace
        self.layouts = layouts
        self.size = len(every[0])
        self.alone = mine.stop - mine.start == self.size
        shared = taus if isinstance(taus, float) or taus.dim() == 0 else None
        self.grids: list[list[tuple[Grid, range]]] = []
        self.parts: list[tuple[slice, slice]] = []
        start = 0
        concurrent = len(layouts) * (1 if self.alone else 2)
        for number, layout in enumerate(layouts):
            half = len(layout.terms) // 2
            forth, back = slice(start, start + half), slice(start + half, start := start + 2 * half)
            self.parts.append((forth, back))
            shape = (*layout.shape, self.size)
            tau_rows = tau_columns = None
            if shared is None:
                assert isinstance(taus, Tensor)
                tau_rows, tau_columns = taus[forth].view(shape), taus[back].view(shape)
            rows, columns = every[_slice(layout.rows)], every[_slice(layout.columns)]
            if self.alone:
                grid = Grid(
                    rows, columns, positives, shared, tau_rows, tau_columns, 0, True, workspace, number, concurrent
                )
                self.grids.append([(grid, layout.rows)])
                continue
            # Each process computes the rows of its own anchors, in both directions.
            grids: list[tuple[Grid, range]] = []
            for x, y, views, tau_x, tau_y in (
                (rows, columns, layout.rows, tau_rows, tau_columns),
                (columns, rows, layout.columns, _transposed(tau_columns), _transposed(tau_rows)),
            ):
                tau_x = None if tau_x is None else tau_x[..., mine]
                part = [v[mine] for v in x]
                place = 2 * number + len(grids)
                grid = Grid(part, y, positives, shared, tau_x, tau_y, mine.start, False, workspace, place, concurrent)
                grids.append((grid, views))
            self.grids.append(grids)

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """See `SimilarityBlocks.log_sums`."""
        sums, positives = [], []
        for grids in self.grids:
            results = [grid.log_sums() for grid, _ in grids]
            sums += [s.flatten(0, -2) for s, _ in results[:1]]
            sums += [s[0].transpose(0, 1).flatten(0, 1) for s, _ in results[1:]]
            positive = results[0][1].flatten(0, 1)
            positives += [positive, positive]
        return sums[0] if len(sums) == 1 else torch.cat(sums), torch.cat(positives)

    def gradients(
        self, offsets: Tensor, weight_sums: Tensor, gradient: Tensor, written: set[int], weighted_sums: bool
    ) -> Tensor | None:
        """See `SimilarityBlocks.gradients`."""
        similarity_sums: list[Tensor] = []
        levels = offsets * -LOG2E
        for layout, grids, (forth, back) in zip(self.layouts, self.grids, self.parts, strict=True):
            shape = (*layout.shape, self.size)
            a, b, both = (
                levels[forth].view(shape),
                levels[back].view(shape),
                (weight_sums[forth] + weight_sums[back]).view(shape),
            )
            if self.alone:
                [(grid, _)] = grids
                fresh = _fresh(layout.rows, written), _fresh(layout.columns, written)
                d_rows, d_columns = gradient[_slice(layout.rows)], gradient[_slice(layout.columns)]
                sums = grid.gradients(a, b, both, d_rows, d_columns, weighted_sums, fresh)
                similarity_sums += [p.flatten(0, 1) for p in sums or () if p is not None]
                continue
            for (grid, views), (x, y, z) in zip(
                grids, ((a, b, both), (b.transpose(0, 1), a.transpose(0, 1), both.transpose(0, 1))), strict=True
            ):
                mine = slice(grid.start, grid.start + grid.shape[1])
                fresh = _fresh(views, written), False
                d_rows = gradient[_slice(views)]
                sums = grid.gradients(x[..., mine], y, z[..., mine], d_rows, None, weighted_sums, fresh)
                if sums:
                    of_rows = sums[0] if views is layout.rows else sums[0].transpose(0, 1)
                    similarity_sums.append(of_rows.flatten(0, 1))
        return torch.cat(similarity_sums) if similarity_sums else None


def _transposed(numbers: Tensor | None) -> Tensor | None:
    """Numbers (R, C, N) of row views by column views, as (C, R, N)."""
    return None if numbers is None else numbers.transpose(0, 1)


def _fresh(views: range, written: set[int]) -> bool:
    """Whether none of the views has been written yet; marks them as written."""
    fresh = written.isdisjoint(views)
    written.update(views)
    return fresh


def _slice(views: range) -> slice:
    return slice(views.start, views.stop)
