"""The closed form of similarity blocks: both directed terms of a pair of views, value and gradient.

A block between views X and Y (each (B, D)) holds s_ij = <x_i, y_j>. Its rows are the anchors of the
term X -> Y, its columns those of Y -> X. Both terms need the block's row and column log-sum-exps
(`log_sums`), and then, with the updated estimates, the gradient (`gradients`):

    w_ij = exp(s_ij/tau - a_i),  a_i = s_ii/tau + log n_i + log u_i - log c     (row anchors)
    v_ij = exp(s_ij/tau - b_j),  b_j likewise                                  (column anchors)
    G = W + V at the negatives,  -(R_i + C_i) on the diagonal,   dX = G Y,   dY = G^T X

where c = weight / B, and R_i, C_i are the sums of sample i's weights as an anchor of either term:
c exp(log g - log u), known from the first pass. A `Grid` is the blocks of R row views with C column
views, stacked, so that AmCLR's four blocks are one matrix product. It is walked in tiles: the memory
beside the views is that of a tile (small grids keep theirs from the first pass to the second), and
nothing of size B x B is kept for the backward pass. Call without gradients.

Two things make it fast on a CPU. Exponents are in base 2, since torch's exp2 takes a quarter of the
time of its exp, at the same accuracy. And where both directions share a temperature, one exponential
serves both: exp(s_ij/tau - m), times a factor per row and one per column; m is chosen so that nothing
overflows, and what would lose precision by it is done the long way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from amclr.objectives.methods import Term

TILE_ROWS, TILE_COLUMNS = 512, 512
"""A tile on the CPU: 1 MiB of float32, so that it stays in a core's cache between its uses."""
SLAB = 1 << 16
"""Factors of a tile are worked out for so many similarities at a time."""
ACCELERATOR_TILE_BYTES = 1 << 26
"""A tile elsewhere: large enough for the device's matrix units."""
KEPT_BYTES = 1 << 27
"""Tiles are kept from the first pass to the second where those of all grids that are worked on at once take at most
this: beyond it, recomputing them costs one matrix product more, and the memory does not grow with B x B."""
FEW_LABELS = 512
"""Up to so many, a set finds out sooner than sorting does whether one stands twice."""
PLAIN_EXPONENT = 40.0
"""exp of at most this, and sums and products of such, stay in float32's range: no shift is needed."""
LEAST_SUM = 1e-28
"""A shifted sum below this may have lost parts to underflow."""
LARGEST_FACTOR = 80.0 / math.log(2)
LOG2E = math.log2(math.e)
NEG_INF = float("-inf")


Part = slice | Tensor
"""Some samples of a batch: a range of them, or their places."""


@dataclass
class Positives:
    """Which samples of a batch are positives of each other: those that share an id, or a group.

    matches: pairs of labels (N,): i and j are positives where i's in the first equals j's in the second, for
    any of the pairs. None where nothing matches, so that only a sample itself is its positive.
    unique: whether it is known that no id stands twice.
    """

    size: int
    matches: tuple[tuple[Tensor, Tensor], ...] | None
    unique: bool

    @classmethod
    def of(cls, ids: Sequence[Tensor], device: torch.device, groups: Sequence[Sequence[Tensor]] = ()) -> Positives:
        """From the (N,) ids of each modality and the (N,) groups of its views, for use on a device.

        Ids match those of the same modality; groups, where not negative, those of any view of the same
        modality. Looks for matches only where that costs no synchronisation: in what is on the CPU.
        """
        labels = [[i] for i in (ids[:1] if all(i is ids[0] for i in ids) else ids)]
        unique = not any(_may_match(i) for [i] in labels)
        shown = [_own_where_alone(views) for views in groups]
        kept = ([] if unique else labels) + [views for views in shown if _may_match(torch.cat(views))]
        there = {id(x): x.to(device, non_blocking=True) for views in kept for x in views}
        matches = tuple((there[id(x)], there[id(y)]) for views in kept for x in views for y in views)
        return cls(len(ids[0]), matches or None, unique)

    def mask(self, rows: Part, columns: Part) -> Tensor | None:
        """(rows, columns) bool, True at positives; None where that is the diagonal alone."""
        if self.matches is None:
            return None
        found = None
        for one, other in self.matches:
            same = one[rows][:, None] == other[columns][None, :]
            found = same if found is None else found.logical_or_(same)
        return found

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


def _own_where_alone(views: Sequence[Tensor]) -> list[Tensor]:
    """Groups (N,) of a modality's views, with a number of its own in place of one below 0 or that a row has already.

    So that what stands twice, in whichever of the views, stands in different rows.
    """
    found: list[Tensor] = []
    for groups in views:
        alone = groups < 0
        for earlier in found:
            alone |= groups == earlier
        own = -1 - torch.arange(len(groups), device=groups.device) - len(found) * len(groups)
        found.append(torch.where(alone, own, groups))
    return found


class Workspace(threading.local):
    """Tiles that are used again at the next step, by the same thread.

    On a CPU, memory fresh from the system costs more to touch than it does to compute with: about a tenth
    of a step at B = 512. What is held is a tile or, of each grid that is worked on at once, the tiles that
    it keeps. On an accelerator, whose allocator does this by itself, every tile is new.
    """

    def __init__(self) -> None:
        self.held: dict[object, Tensor] = {}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()  # a copy of an objective, or one in a file, begins with none

    def empty(self, key: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of a shape, in the type and place of `like`; the one before with that key is gone."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = math.prod(shape)
        found = self.held.get(key)
        if found is None or found.numel() < size or found.dtype != like.dtype:
            with torch.inference_mode(False):  # else it could not be written to in training
                found = self.held[key] = torch.empty(size, dtype=like.dtype)
        return found[:size].view(shape)


def _may_match(labels: Tensor) -> bool:
    """Whether a label may stand twice: unless it is seen, on the CPU, that none does."""
    if labels.device.type != "cpu":
        return True
    if len(labels) <= FEW_LABELS:
        return len(set(labels.tolist())) < len(labels)
    ordered = np.sort(labels.numpy())
    return bool((ordered[1:] == ordered[:-1]).any())


Tile = tuple[slice, slice, slice, slice]
"""Row views, their rows, column views, their rows."""


class Grid:
    """The blocks of R row views with C column views.

    rows: R views (M, D), columns: C views (N, D). On one process M = N = B. Where the columns are those
    of all processes, the rows are this process's, beginning at `start` of N, and `both` is False: then
    only what the rows need is computed.
    tau_rows, tau_columns: (R, C, M) and (R, C, N), where each anchor has a temperature of its own, or
    both None: then `tau` is everyone's, a float, or a tensor () where its value is not known here.
    number: of this grid, among the `beside` that use the workspace, and keep their tiles, at the same time.
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
        beside: int = 1,
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
        self.keeps = self.single and beside * self.like.element_size() * math.prod(self.shape) <= KEPT_BYTES
        self.joined: dict[int, Tensor] = {}
        self.kept: dict[int, tuple[Tensor, float]] = {}
        self.tiles = list(self._tiles())
        # Slicing costs more than arithmetic in a small batch: a single tile is not sliced.
        self.whole = len(self.tiles) == 1

    # -- tiles ------------------------------------------------------------------------------------

    def _tiles(self) -> Iterator[Tile]:
        """All tiles. A tile spans several views only where it holds them whole."""
        r, m, c, n = self.shape
        height, width = TILE_ROWS, TILE_COLUMNS
        if not self.on_cpu:
            height, width = max(16, ACCELERATOR_TILE_BYTES // (self.like.element_size() * n)), n
        all_rows, all_columns = r * m <= height, c * n <= width
        for p, s in [(slice(0, r), slice(0, m))] if all_rows else _pieces(r, m, height):
            for k, j in [(slice(0, c), slice(0, n))] if all_columns else _pieces(c, n, width):
                yield p, s, k, j

    def _part(self, numbers: Tensor, *place: slice) -> Tensor:
        """The part of some numbers that belongs to a tile."""
        return numbers if self.whole else numbers[place]

    def _rows(self, views: Sequence[Tensor], which: slice, rows: slice) -> Tensor:
        """Rows of some views, one below the other; joined once where a tile holds several views whole."""
        if which.stop - which.start == 1:
            return self._part(views[which.start], rows)
        if id(views) not in self.joined:
            self.joined[id(views)] = torch.cat(list(views))
        return self.joined[id(views)]

    def _scores(self, tile: Tile, keep: int | None = None) -> Tensor:
        """s_ij of a tile, times `rate`: (p, m, k, n). Gone with the next tile, but for the one kept under a number."""
        p, s, k, j = tile
        x, y = self._rows(self.rows, p, s), self._rows(self.columns, k, j)
        shape = p.stop - p.start, s.stop - s.start, k.stop - k.start, j.stop - j.start
        place = self.workspace.empty("tile" if keep is None else (self.number, keep), (len(x), len(y)), x)
        return place.addmm_(x, y.T, beta=0, alpha=self.rate).view(shape)

    def _put(self, values: Tensor, tile: Tile, at_positives: float) -> Tensor:
        """Overwrite a tile at its positives."""
        _, s, _, j = tile
        mask = self.positives.mask(slice(self.start + s.start, self.start + s.stop), j)
        if mask is not None:
            return values.masked_fill_(mask[None, :, None, :], at_positives)
        own = self._own(values, tile)
        if own is not None:
            own[0].fill_(at_positives)
        return values

    def _own(self, values: Tensor, tile: Tile) -> tuple[Tensor, slice] | None:
        """A tile's pairs of a sample with itself: a view (p, k, l) of it, and which of the grid's rows they are."""
        _, s, _, j = tile
        if self.whole and self.both:
            return values.diagonal(dim1=1, dim2=3), s
        low, high = max(self.start + s.start, j.start), min(self.start + s.stop, j.stop)
        if low >= high:
            return None
        rows = slice(low - self.start, high - self.start)
        inner = values[:, rows.start - s.start : rows.stop - s.start, :, low - j.start : high - j.start]
        return inner.diagonal(dim1=1, dim2=3), rows

    def _take_own(self, scores: Tensor, tile: Tile, diagonal: Tensor) -> None:
        """Put a tile's s_ii into the grid's (R, C, M)."""
        p, _, k, _ = tile
        found = self._own(scores, tile)
        if found is not None:
            torch.mul(found[0], 1 / self.rate, out=self._part(diagonal, p, k, found[1]))

    # -- first pass -------------------------------------------------------------------------------

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """Log of the sum over the negatives of exp(s / tau), -inf where there is no negative; and s_ii.

        (2, R, C, M): of the row anchors and of the column anchors; (1, R, C, M) unless `both`. s_ii: (R, C, M).
        """
        r, m, c, _ = self.shape
        found = self.like.new_empty(3 if self.both else 2, r, c, m)
        sums, positive = found[:-1], found[-1]
        if self.single and not self._single_sums(sums, positive):
            self.single = self.keeps = False
            self.rate = 1.0
            self.kept.clear()
        if not self.single:
            self._exact_sums(sums, positive)
        return sums, positive

    def _single_sums(self, sums: Tensor, positive: Tensor) -> bool:
        """By one exponential for both directions; False where that would lose precision."""
        row, *column = sums.unbind()
        level = 0.0  # the sums so far are in units of 2 ** level
        for number, tile in enumerate(self.tiles):
            p, s, k, j = tile
            e, shift = self._scores(tile, number if self.keeps else None), 0.0
            self._take_own(e, tile, positive)
            self._put(e, tile, NEG_INF)
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
        # Without a negative a sum is zero in its own right: the long way tells that from an underflow.
        if self.shifts and not float(sums.amin()) > LEAST_SUM:
            return False
        sums.log_()
        if level:
            sums += level / LOG2E
        return True

    def _shift(self, e: Tensor) -> float:
        """The largest exponent of a tile's negatives; positives, which may be far above them, are out already."""
        return max(float(e.amax()), -1e30)

    def _exact_sums(self, sums: Tensor, positive: Tensor) -> None:
        """By a shift for every row and every column, in one pass."""
        row, *column = sums.fill_(NEG_INF).unbind()
        for tile in self.tiles:
            p, s, k, j = tile
            scores = self._scores(tile)
            self._take_own(scores, tile, positive)
            scaled = self._put(scores / self._tau(tile, "rows"), tile, NEG_INF)
            row[p, k, s] = torch.logaddexp(row[p, k, s], scaled.logsumexp(3).transpose(1, 2))
            if column:
                if self.tau_rows is not None:
                    scaled = self._put(scores / self._tau(tile, "columns"), tile, NEG_INF)
                column[0][p, k, j] = torch.logaddexp(column[0][p, k, j], scaled.logsumexp(1))

    def _tau(self, tile: Tile, side: str) -> Tensor | float:
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
        own: Tensor,
        d_rows: Tensor,
        d_columns: Tensor | None,
        slopes: bool = False,
        fresh: tuple[bool, bool] = (False, False),
    ) -> tuple[Tensor, Tensor | None] | None:
        """Add the gradients to d_rows (R, M, D) and d_columns (C, N, D), None unless `both`.

        a (R, C, M), b (R, C, N): what to add to the exponents (in base 2) of row and column anchors,
        -inf where an anchor has no weight. own (R, C, M): R_i + C_i. fresh: d_rows, d_columns hold nothing yet and
        are overwritten. With `slopes`, returns sum_j w_ij s_ij of the row anchors and sum_i v_ij s_ij of
        the column anchors, shaped like a and b.
        """
        sums = (torch.zeros_like(a), torch.zeros_like(b) if self.both else None) if slopes else None
        for tile, g in self._weights(a, b, sums):
            p, s, k, j = tile
            diagonal = self._own(g, tile)
            if diagonal is not None:
                torch.neg(self._part(own, p, k, diagonal[1]), out=diagonal[0])
            flat = g.view(g.shape[0] * g.shape[1], -1)
            _add_product(
                self._part(d_rows, p, s), flat, self._rows(self.columns, k, j), fresh[0] and k.start == j.start == 0
            )
            if d_columns is not None:
                first = fresh[1] and p.start == s.start == 0
                _add_product(self._part(d_columns, k, j), flat.T, self._rows(self.rows, p, s), first)
        self.kept.clear()
        return sums

    def _weights(
        self, a: Tensor, b: Tensor, sums: tuple[Tensor, Tensor | None] | None
    ) -> Iterator[tuple[Tile, Tensor]]:
        """Tiles of W + V, zero at positives; on the way, where wanted, the sums of w_ij s_ij."""
        plain = self.single and sums is None
        high = max(float(a.amax()), float(b.amax())) if self.shifts and plain else 0.0
        if plain and not self.shifts:
            row_factors, column_factors = a.exp2(), b.exp2()
        for number, tile in enumerate(self.tiles):
            p, s, k, j = tile
            if plain:
                e, shift = self.kept.pop(number, (None, 0.0))
                if e is None:
                    e = self._put(self._scores(tile), tile, NEG_INF)
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
            w, v = (self._put(x.exp2_(), tile, 0.0) for x in (w, v))
            if sums is not None:
                scores /= self.rate
                sums[0][p, k, s] += (w * scores).sum(3).transpose(1, 2)
                if sums[1] is not None:
                    sums[1][p, k, j] += (v * scores).sum(1)
            yield tile, w.add_(v)

    def _scaled(self, tile: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """A tile (p, m, k, n) times the sum of a number per row and one per column; some rows at a time."""
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
    """Numbers of row anchors (p, k, m) as they stand beside a tile (p, m, k, n): (p, m, k, 1)."""
    return rows.transpose(1, 2)[..., None]


def _add_sum(into: Tensor, values: Tensor, dim: int, unit: float, fresh: bool) -> None:
    """Add the sums of values along `dim`, times `unit`, or put them there if nothing is there yet."""
    if fresh and unit == 1.0:
        torch.sum(values, dim, out=into)
    else:
        sums = values.sum(dim) * unit
        into.copy_(sums) if fresh else into.add_(sums)


def _add_product(into: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """Add left @ right to a (views, rows, D) piece that is contiguous in its views and rows, or put it there."""
    into.view(-1, into.shape[-1]).addmm_(left, right, beta=0 if fresh else 1)


@dataclass(frozen=True)
class Layout:
    """Which blocks make a grid: ranges of the stacked views, and its terms.

    The terms of the row anchors, row view by row view, then those of the column anchors in the same order.
    """

    rows: range
    columns: range
    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """R row views, C column views."""
        return len(self.rows), len(self.columns)


class Blocks:
    """All blocks of some layouts: the passes that the objective makes, over any backend's grids.

    every: V views (N, D) of the whole batch. mine: the rows of this process in it (M). T terms,
    in the order of the layouts'. taus: a number, a tensor () or (T, N).
    """

    def __init__(
        self,
        every: Sequence[Tensor],
        mine: slice,
        layouts: Sequence[Layout],
        taus: float | Tensor,
        positives: Positives,
        workspace: Workspace | None = None,
    ) -> None:
        workspace = workspace or Workspace()
        self.layouts = layouts
        self.size = len(every[0])
        self.alone = mine.stop - mine.start == self.size
        shared = taus if isinstance(taus, float) or taus.dim() == 0 else None
        self.grids: list[list[tuple[Grid, range]]] = []
        self.parts: list[tuple[slice, slice]] = []
        start = 0
        beside = len(layouts) * (1 if self.alone else 2)
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
                grid = Grid(rows, columns, positives, shared, tau_rows, tau_columns, 0, True, workspace, number, beside)
                self.grids.append([(grid, layout.rows)])
                continue
            # Each process has the rows of its own anchors, in both directions.
            grids: list[tuple[Grid, range]] = []
            for x, y, views, own, others in (
                (rows, columns, layout.rows, tau_rows, tau_columns),
                (columns, rows, layout.columns, _turned(tau_columns), _turned(tau_rows)),
            ):
                own = own if own is None else own[..., mine]
                part = [v[mine] for v in x]
                place = 2 * number + len(grids)
                grid = Grid(part, y, positives, shared, own, others, mine.start, False, workspace, place, beside)
                grids.append((grid, views))
            self.grids.append(grids)

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """Of this process's anchors: log of the sum over the negatives of exp(s / tau), and s_ii, (T, M) each."""
        sums, positives = [], []
        for grids in self.grids:
            found = [grid.log_sums() for grid, _ in grids]
            sums += [s.flatten(0, -2) for s, _ in found[:1]]
            sums += [s[0].transpose(0, 1).flatten(0, 1) for s, _ in found[1:]]
            positive = found[0][1].flatten(0, 1)
            positives += [positive, positive]
        return sums[0] if len(sums) == 1 else torch.cat(sums), torch.cat(positives)

    def gradients(
        self, offsets: Tensor, own: Tensor, gradient: Tensor, written: set[int], slopes: bool
    ) -> Tensor | None:
        """Add to `gradient` (V, M, D) that of this process's rows.

        offsets (T, N): what to take from an anchor's exponents, +inf where it has no weight. own (T, N):
        the sums of its weights. written: the views whose gradient holds something; the others' is
        overwritten, and they join. With `slopes`, returns sum_j w_ij s_ij of this process's anchors, (T, M).
        """
        pulls: list[Tensor] = []
        levels = offsets * -LOG2E
        for layout, grids, (forth, back) in zip(self.layouts, self.grids, self.parts, strict=True):
            shape = (*layout.shape, self.size)
            a, b, both = (
                levels[forth].view(shape),
                levels[back].view(shape),
                (own[forth] + own[back]).view(shape),
            )
            if self.alone:
                [(grid, _)] = grids
                fresh = _fresh(layout.rows, written), _fresh(layout.columns, written)
                d_rows, d_columns = gradient[_slice(layout.rows)], gradient[_slice(layout.columns)]
                found = grid.gradients(a, b, both, d_rows, d_columns, slopes, fresh)
                pulls += [p.flatten(0, 1) for p in found or () if p is not None]
                continue
            for (grid, views), (x, y, z) in zip(
                grids, ((a, b, both), (b.transpose(0, 1), a.transpose(0, 1), both.transpose(0, 1))), strict=True
            ):
                mine = slice(grid.start, grid.start + grid.shape[1])
                fresh = _fresh(views, written), False
                found = grid.gradients(x[..., mine], y, z[..., mine], gradient[_slice(views)], None, slopes, fresh)
                if found:
                    pulls.append((found[0] if views is layout.rows else found[0].transpose(0, 1)).flatten(0, 1))
        return torch.cat(pulls) if pulls else None


def _turned(numbers: Tensor | None) -> Tensor | None:
    """Numbers (R, C, N) of row views by column views, as (C, R, N)."""
    return None if numbers is None else numbers.transpose(0, 1)


def _fresh(views: range, written: set[int]) -> bool:
    """Whether none of the views is among those written; they are from now on."""
    fresh = written.isdisjoint(views)
    written.update(views)
    return fresh


def _slice(views: range) -> slice:
    return slice(views.start, views.stop)
