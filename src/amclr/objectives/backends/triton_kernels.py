"""The closed form as Triton kernels: each pass of `SimilarityBlocks` in one launch, whatever the terms.

Each program owns some rows of one view and walks all candidates, forming similarities tile by tile and
dropping them again (online log-sum-exp in the first pass, recomputed in the second). So no two programs
write to the same place: there are no atomics, and the result does not depend on their order. Sums are in
float32; the features may be float16, bfloat16, float32 as TF32, or float32 exactly (IEEE).

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amclr.distributed.world import World
from amclr.objectives.backends.base import LOG2E, BlockInputs
from amclr.objectives.layout import Layout

BLOCK, CANDIDATES = 64, 64
"""Anchors of a program that works out estimates, and rows that it looks through at a time for the same samples."""
HALF_SCALE = 64.0
"""Weights times B are lifted by this into the middle of float16's range before they are rounded to it."""
LARGEST_HALF = 3e4
"""What a lifted weight may come to: half of float16's range."""


@dataclass(frozen=True)
class TileShape:
    """What a program of `_log_sums` or `_gradients` works on at a time, and with how many warps and stages of loads.

    rows: its anchors. candidates: beside each other. depth: dimensions that are multiplied at a time; all of
    them, if `whole`: then the anchors stay where they are. width: dimensions of the gradient that a program
    accumulates; the others are other programs', and each forms the similarities again.
    """

    rows: int
    candidates: int
    depth: int
    warps: int
    stages: int
    width: int = 0
    whole: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        """As the kernels take them."""
        found = {"ROWS": self.rows, "CANDIDATES": self.candidates, "DEPTH": self.depth, "WHOLE": self.whole}
        return found | ({"WIDTH": self.width} if self.width else {})

    @property
    def launch(self) -> dict[str, int]:
        """As Triton takes them."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def shared_bytes(self, item: int) -> int:
        """Memory that the warps of a program share for what is loaded, in numbers of `item` bytes."""
        loads = 1 if self.whole else self.stages  # of the anchors
        return item * self.depth * (loads * self.rows + self.stages * self.candidates) + 1024

    def within(self, dim: int) -> TileShape:
        """Without the part that rows of so many dimensions leave empty."""
        most = max(16, triton.next_power_of_2(dim))
        return replace(self, depth=min(self.depth, most), width=min(self.width, most))


SMALL = {
    "half": (TileShape(64, 64, 64, 4, 3), TileShape(64, 64, 64, 4, 3, 128)),
    "tf32": (TileShape(64, 64, 32, 4, 3), TileShape(64, 64, 32, 8, 3, 128)),
    "ieee": (TileShape(64, 64, 32, 8, 3), TileShape(64, 64, 32, 8, 3, 128)),
}
LARGE = {
    "half": (TileShape(128, 128, 64, 8, 3), TileShape(128, 64, 64, 8, 3, 128)),
    "tf32": (TileShape(128, 128, 32, 8, 3), TileShape(128, 64, 32, 8, 3, 128)),
    "ieee": (TileShape(128, 64, 16, 8, 3), TileShape(64, 64, 32, 8, 3, 128)),
}
"""Tiles of the two passes by how products are formed: where programs are too few to fill the device, and from there.

Chosen by what the compiler reports for sm_90 (`python -m benchmarks.kernels`): registers without spills, and the
matrix units' instructions. They have not been timed.
"""
WHOLE = {
    256: (TileShape(128, 64, 256, 8, 2, whole=True), TileShape(64, 64, 256, 8, 2, 256, whole=True)),
    512: (TileShape(128, 32, 512, 8, 2, whole=True), TileShape(64, 64, 512, 8, 2, 512, whole=True)),
}
"""Tiles of half precision for rows of up to so many dimensions, where a program's warps can share the memory for it.

Similarities are formed again once for the gradient, and not for every 128 dimensions of it.
"""
WHOLE_CAPABILITIES = (8, 9)
"""NVIDIA's from A100 to H200. On later ones the weights take shared memory too, which those tiles leave none for."""


def tile_pairs(kind: str, dim: int, whole: bool) -> list[tuple[TileShape, TileShape]]:
    """The tiles of both passes that there are for rows of so many dimensions, smaller first; `whole`: `WHOLE` too."""
    pairs = [SMALL[kind], LARGE[kind]]
    if kind == "half" and whole:
        pairs += [pair for most, pair in WHOLE.items() if dim <= most][:1]
    return [(first.within(dim), second.within(dim)) for first, second in pairs]


def tiles(kind: str, dim: int, rows: int, terms: int, views: int, device: torch.device) -> tuple[TileShape, TileShape]:
    """The tiles of both passes, for `rows` anchors of each of `terms` terms, and of each of `views` views."""
    return _chosen(kind, dim, rows, terms, views, *_limits(device))


@cache
def _chosen(
    kind: str, dim: int, rows: int, terms: int, views: int, processors: int, shared: int, whole: bool
) -> tuple[TileShape, TileShape]:
    found = []
    for choices, groups in zip(zip(*tile_pairs(kind, dim, whole), strict=True), (terms, views), strict=True):
        best, *larger = choices
        for tile in larger:
            programs = triton.cdiv(rows, tile.rows) * groups * triton.cdiv(dim, tile.width or dim)
            # A tile twice as large on half of the processors takes as long.
            if 2 * programs >= processors and tile.shared_bytes(2 if kind == "half" else 4) <= shared:
                best = tile
        found.append(best)
    return found[0], found[1]


@cache
def _limits(device: torch.device) -> tuple[int, int, bool]:
    """Processors of a device, bytes of memory that a program's warps can share, and whether `WHOLE` is for it."""
    if device.type != "cuda":
        return sys.maxsize, 0, False
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    whole = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in WHOLE_CAPABILITIES
    return found["multiprocessor_count"], found["max_shared_mem"], whole


@triton.jit
def _rows(z, v, i, n, d, k):
    """Dimensions k of rows i of view v, zero beyond both."""
    place = z + (v * n + i[:, None]).to(tl.int64) * d + k[None, :]
    return tl.load(place, mask=(i < n)[:, None] & (k < d)[None, :], other=0.0)


@triton.jit
def _own(z, a, c, i, n, d, DEPTH: tl.constexpr):
    """<z[a, i], z[c, i]> for some rows of two views, float32."""
    own = tl.zeros((i.shape[0],), dtype=tl.float32)
    for start in range(0, d, DEPTH):
        k = start + tl.arange(0, DEPTH)
        own += tl.sum(_rows(z, a, i, n, d, k).to(tl.float32) * _rows(z, c, i, n, d, k).to(tl.float32), 1)
    return own


@triton.jit
def _similarities(z, a, c, i, j, n, d, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """<z[a, i], z[c, j]> for some rows of two views, float32, where the rows have more dimensions than a tile."""
    s = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    for start in range(0, d, DEPTH):
        k = start + tl.arange(0, DEPTH)
        s = tl.dot(_rows(z, a, i, n, d, k), tl.trans(_rows(z, c, j, n, d, k)), s, input_precision=PRECISION)
    return s


@triton.jit
def _positives(ones, others, i, j, n, MATCHES: tl.constexpr):
    """Which pairs have a match, `Positives.matches`, or are a row with itself; those beyond the batch too."""
    out = (j >= n)[None, :] | (i[:, None] == j[None, :])
    for m in tl.static_range(MATCHES):
        own = tl.load(ones + m * n + i, mask=i < n, other=0)
        other = tl.load(others + m * n + j, mask=j < n, other=0)
        out = out | (own[:, None] == other[None, :])
    return out


@triton.jit
def _log_sums(
    z, terms, rates, ones, others, sums, positive, counts, first, last, n, d, rate_stride,
    MATCHES: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of anchors, term): log of the sum over negatives of exp(s / tau), s_ii, how many negatives.

    WHOLE: a tile has all dimensions: the anchors are loaded once.
    """
    t = tl.program_id(1)
    a, c = tl.load(terms + 2 * t), tl.load(terms + 2 * t + 1)
    i = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = i < last
    rate = tl.load(rates + t * rate_stride * n + i * rate_stride, mask=mine, other=0.0)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    count = tl.zeros((ROWS,), dtype=tl.float32)
    k = tl.arange(0, DEPTH)
    if WHOLE:
        x = _rows(z, a, i, n, d, k)
    for start in range(0, n, CANDIDATES):
        j = start + tl.arange(0, CANDIDATES)
        if WHOLE:
            s = tl.dot(x, tl.trans(_rows(z, c, j, n, d, k)), input_precision=PRECISION)
        else:
            s = _similarities(z, a, c, i, j, n, d, DEPTH, PRECISION)
        positives = _positives(ones, others, i, j, n, MATCHES)
        s = tl.where(positives, float("-inf"), s * rate[:, None])
        higher = tl.maximum(top, tl.max(s, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - level) + tl.sum(tl.exp2(s - level[:, None]), 1)
        top = higher
    # Triton's maximum leaves NaN out; the sum does not, and lets the loss be NaN where an embedding is.
    none = tl.where(total == 0, float("-inf"), float("nan"))
    found = tl.where(total > 0, (top + tl.log2(tl.maximum(total, 1e-38))) * 0.6931471805599453, none)
    out = t * (last - first) + i - first
    tl.store(sums + out, found, mask=mine)
    tl.store(positive + out, _own(z, a, c, i, n, d, DEPTH), mask=mine)
    if t == 0:
        # Apart from the products, which leave no registers for it.
        if MATCHES == 0:
            count += n - 1
        else:
            for start in range(0, n, CANDIDATES):
                j = start + tl.arange(0, CANDIDATES)
                count += tl.sum(tl.where(_positives(ones, others, i, j, n, MATCHES), 0.0, 1.0), 1)
        tl.store(counts + i - first, count, mask=mine)


@triton.jit
def _logaddexp(x, y):
    top = tl.maximum(x, y)
    level = tl.where(top == float("-inf"), 0.0, top)
    return level + tl.log(tl.maximum(tl.exp(x - level) + tl.exp(y - level), 1e-38))


@triton.jit
def _estimate(
    sums, positive, counts, columns, weights, rates, ids, image_table, text_table, gamma_logs, offsets, own, updated,
    partials, n, lift, rho,
    GLOBAL: tl.constexpr, UNIQUE: tl.constexpr, IDS: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Program (block of anchors, term): from log-sum-exps to estimates, losses, and what the gradient needs.

    UNIQUE: no sample stands twice. columns: per term its modality (0 image, 1 text), its column in that table,
    and the table's width.
    partials (3, T, blocks): sums of weighted losses, of -tau log g, and of s_ii, over n.
    """
    t = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    of, column, width = tl.load(columns + 3 * t), tl.load(columns + 3 * t + 1), tl.load(columns + 3 * t + 2)
    rate, weight = tl.load(rates), tl.load(weights + t)
    tau = 1.4426950408889634 / rate
    count = tl.load(counts + i, mask=inside, other=0.0)
    some = count > 0
    log_n = tl.log(tl.maximum(count, 1.0))
    s = tl.load(positive + t * n + i, mask=inside, other=0.0)
    log_g = tl.where(some, tl.load(sums + t * n + i, mask=inside, other=0.0) - s / tau - log_n, 0.0)
    if GLOBAL:
        row = ids + tl.minimum(of, IDS - 1) * n
        sample = tl.load(row + i, mask=inside, other=-1)
        if of == 0:
            before = tl.load(image_table + sample * width + column, mask=inside, other=0.0)
        else:
            before = tl.load(text_table + sample * width + column, mask=inside, other=0.0)
        number = tl.where(some, 1.0, 0.0)
        total = number
        mean = log_g
        if not UNIQUE:
            # A sample that stands several times gets one update: with the mean of its rows' g.
            top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            number = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, n, CANDIDATES):
                j = start + tl.arange(0, CANDIDATES)
                other = tl.load(row + j, mask=j < n, other=-2)
                there = tl.load(counts + j, mask=j < n, other=0.0)
                g = tl.load(sums + t * n + j, mask=j < n, other=0.0)
                g -= tl.load(positive + t * n + j, mask=j < n, other=0.0) / tau
                same = (sample[:, None] == other[None, :]) & (there > 0)[None, :]
                x = tl.where(same, (g - tl.log(tl.maximum(there, 1.0)))[None, :], float("-inf"))
                higher = tl.maximum(top, tl.max(x, 1))
                level = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(top - level) + tl.sum(tl.exp(x - level[:, None]), 1)
                top = higher
                number += tl.sum(tl.where(same, 1.0, 0.0), 1)
            mean = top + tl.log(tl.maximum(total, 1e-38)) - tl.log(tl.maximum(number, 1.0))
        unseen = before == float("-inf")
        old = tl.load(gamma_logs) + before
        new = tl.load(gamma_logs + 1)
        log_u = tl.where(unseen, log_g, _logaddexp(old, new + log_g))
        log_u = tl.where(log_g == log_g, log_u, float("nan"))
        mixed = tl.where(unseen, mean, _logaddexp(old, new + mean))
        # A sample whose embeddings are NaN keeps what it had, as one without negatives does.
        learned = (number > 0) & (total == total) & (mean == mean) & (mixed == mixed)
        tl.store(updated + t * n + i, tl.where(learned, mixed, before), mask=inside)
        value = tau * (log_u + rho)
        log_total = log_u + log_n
        log_c = tl.log(weight / n)
    else:
        x = log_g + log_n
        log_total = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
        log_u = log_total - log_n
        value = log_total
        log_c = tl.log(weight / (n * tau))
    rest = s / tau + log_total - log_c - tl.log(lift)
    tl.store(offsets + t * n + i, tl.where(some, rest * 1.4426950408889634, float("inf")), mask=inside)
    tl.store(own + t * n + i, tl.where(some, tl.exp(log_g - log_u + log_c) * lift, 0.0), mask=inside)
    place = t * tl.num_programs(0) + tl.program_id(0)
    size = tl.num_programs(0) * tl.num_programs(1)
    tl.store(partials + place, tl.sum(tl.where(some, value, 0.0), 0) * weight / n)
    tl.store(partials + size + place, -tau * tl.sum(log_g, 0) / n)
    tl.store(partials + 2 * size + place, tl.sum(s, 0) / n)


@triton.jit
def _store(
    updated, columns, ids, image_table, text_table, n, IDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the updated estimates. Apart from `_estimate`, whose programs may still read what is overwritten."""
    t = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    of, column, width = tl.load(columns + 3 * t), tl.load(columns + 3 * t + 1), tl.load(columns + 3 * t + 2)
    sample = tl.load(ids + tl.minimum(of, IDS - 1) * n + i, mask=i < n, other=0)
    value = tl.load(updated + t * n + i, mask=i < n)
    if of == 0:
        tl.store(image_table + sample * width + column, value, mask=i < n)
    else:
        tl.store(text_table + sample * width + column, value, mask=i < n)


@triton.jit
def _gradients(
    z, partners, rates, offsets, own, ones, others, gradient, pulls, first, last, n, d, rate_stride, unscale,
    PARTNERS: tl.constexpr, SLOPES: tl.constexpr, MATCHES: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, view, block of dimensions): the view's gradient from all blocks that it is in.

    partners: per view, PARTNERS times (other view, term of this view's anchors, term of the other's), -1 for none.
    WHOLE: a tile has all dimensions: the view's rows are loaded once, and where WIDTH has all of them too, so
    that there is one block of dimensions, a candidate tile serves both products.
    """
    v, part = tl.program_id(1), tl.program_id(2)
    i = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = i < last
    k = part * WIDTH + tl.arange(0, WIDTH)
    out = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    if WHOLE:
        x = _rows(z, v, i, n, d, tl.arange(0, DEPTH))
    for e in range(PARTNERS):
        p = tl.load(partners + (v * PARTNERS + e) * 3)
        if p >= 0:
            forth = tl.load(partners + (v * PARTNERS + e) * 3 + 1)
            back = tl.load(partners + (v * PARTNERS + e) * 3 + 2)
            a = tl.load(offsets + forth * n + i, mask=mine, other=float("inf"))
            rate_a = tl.load(rates + forth * rate_stride * n + i * rate_stride, mask=mine, other=0.0)
            owned = tl.load(own + forth * n + i, mask=mine, other=0.0) + tl.load(
                own + back * n + i, mask=mine, other=0.0
            )
            # A row's positive with itself: apart, in float32, and not rounded as the weights below are.
            out -= owned[:, None] * _rows(z, p, i, n, d, k).to(tl.float32)
            pull = tl.zeros((ROWS,), dtype=tl.float32)
            for start in range(0, n, CANDIDATES):
                j = start + tl.arange(0, CANDIDATES)
                if WHOLE:
                    y = _rows(z, p, j, n, d, tl.arange(0, DEPTH))
                    s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
                else:
                    s = _similarities(z, v, p, i, j, n, d, DEPTH, PRECISION)
                b = tl.load(offsets + back * n + j, mask=j < n, other=float("inf"))
                rate_b = tl.load(rates + back * rate_stride * n + j * rate_stride, mask=j < n, other=0.0)
                positives = _positives(ones, others, i, j, n, MATCHES)
                w = tl.exp2(s * rate_a[:, None] - a[:, None])
                if SLOPES:
                    pull += tl.sum(tl.where(positives, 0.0, w * s), 1)
                w = tl.where(positives, 0.0, w + tl.exp2(s * rate_b[None, :] - b[None, :]))
                if not WHOLE or WIDTH < DEPTH:
                    y = _rows(z, p, j, n, d, k)
                out = tl.dot(w.to(z.dtype.element_ty), y, out, input_precision=PRECISION)
            if SLOPES and part == 0:
                tl.store(pulls + forth * (last - first) + i - first, pull * unscale, mask=mine)
    place = gradient + (v * (last - first) + i - first)[:, None].to(tl.int64) * d + k[None, :]
    tl.store(place, out * unscale, mask=mine[:, None] & (k < d)[None, :])


class TritonBlocks:
    """Implements `SimilarityBlocks`, over all layouts at once. `fused_step` makes a whole step in five launches.

    matmul_dtype "auto" and "float32" are exact for float32 views, "tf32" is not.
    """

    def __init__(self, inputs: BlockInputs) -> None:
        every, taus, matmul_dtype = inputs.every, inputs.taus, inputs.matmul_dtype
        self.dtype = dtype = every[0].dtype
        if matmul_dtype in ("float16", "bfloat16"):
            dtype = getattr(torch, matmul_dtype)
        self.z = torch.stack(list(every)).to(dtype)
        if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET"):
            self.z = self.z.float()  # the interpreter, which is NumPy, cannot multiply bfloat16
        self.mine = inputs.mine
        self.views, self.size, self.dim = self.z.shape
        self.terms, self.partners = _tables(tuple(inputs.layouts), self.views, self.z.device)
        rates = LOG2E / taus.float() if isinstance(taus, Tensor) else _constant((LOG2E / taus,), self.z.device)[0]
        self.rate_stride = 1 if rates.dim() else 0
        self.rates = rates.contiguous()
        matches = inputs.positives.matches or ()
        self.ones = self.others = self.z  # for no matches, of which nothing is read
        if matches:
            self.ones = self.others = matches[0][0][None] if len(matches) == 1 else torch.stack([a for a, _ in matches])
        if any(a is not b for a, b in matches):
            self.others = torch.stack([b for _, b in matches])
        half = self.z.dtype == torch.float16
        self.lift = self.size * min(HALF_SCALE, LARGEST_HALF / inputs.largest_weight) if half else 1.0
        self.unique = inputs.positives.unique
        kind = "half" if self.z.element_size() == 2 else "tf32" if matmul_dtype == "tf32" else "ieee"
        self.tiles = tiles(kind, self.dim, self._rows, len(self.terms), self.views, self.z.device)
        self.options = {"MATCHES": len(matches), "PRECISION": "tf32" if kind == "tf32" else "ieee"}

    @property
    def _rows(self) -> int:
        return self.mine.stop - self.mine.start

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """See `SimilarityBlocks.log_sums`."""
        anchors = self.anchors()
        return anchors[: len(self.terms)], anchors[len(self.terms) : -1]

    def anchors(self) -> Tensor:
        """The first pass over this process's anchors, (2 T + 1, M): log-sum-exps, s_ii, and numbers of negatives."""
        count = len(self.terms)
        anchors = torch.empty(2 * count + 1, self._rows, device=self.z.device)
        tile = self.tiles[0]
        _log_sums[(triton.cdiv(self._rows, tile.rows), count)](
            self.z, self.terms, self.rates, self.ones, self.others, anchors, anchors[count:], anchors[2 * count :],
            self.mine.start, self.mine.stop, self.size, self.dim, self.rate_stride,
            **self.options, **tile.sizes, **tile.launch,
        )  # fmt: skip
        return anchors

    def fused_step(
        self, world: World, ids: Sequence[Tensor], columns: tuple[tuple[int, int, int], ...], weights: Sequence[float],
        tables: Sequence[Tensor], gamma: float, rho: float, *, write: bool, wants_gradient: bool,
        check: Callable[[Tensor], None] | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """A step whose numbers per anchor stay on the device: sums (3, T) and the gradient (V, M, D), if wanted.

        The arguments of `estimate`; check: called with whether each anchor has negatives. Returns sums over the anchors
        of losses, margins and similarities.
        """
        anchors = world.gather(self.anchors(), 1)
        if check:
            check(anchors[-1] > 0)
        offsets, weight_sums, sums = self.estimate(anchors, ids, columns, weights, tables, gamma, rho, write)
        if not wants_gradient:
            return sums, None
        # bfloat16 has float32's range. In float16 a gradient would be lost before loss scaling can lift it.
        kind = torch.bfloat16 if self.z.dtype == self.dtype == torch.bfloat16 else torch.float32
        gradient = torch.empty(self.views, self._rows, self.dim, dtype=kind, device=self.z.device)
        self.gradients_from(offsets, weight_sums, gradient, set(), False)
        return sums, gradient

    def estimate(
        self, anchors: Tensor, ids: Sequence[Tensor], columns: tuple[tuple[int, int, int], ...],
        weights: Sequence[float], tables: Sequence[Tensor], gamma: float, rho: float, write: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Update the estimates of a batch, of all processes, in two launches.

        anchors: (2 T + 1, N), as `anchors` gives it. ids: of each modality, (N,), or one tensor if shared. columns: per
        term its modality (0 image, 1 text), its column and the width of the table. tables: of log u, by modality;
        none for mini-batch terms, whose loss is the cross-entropy. write: put the new estimates there.
        Returns offsets and own (T, N) as `gradients_from` takes them, and (3, T): losses, margins, similarities.
        """
        count, device = len(self.terms), self.z.device
        both = ids[0][None] if len(ids) == 1 else torch.stack(list(ids))
        blocks = triton.cdiv(self.size, BLOCK)
        offsets, own, updated = torch.empty(3, count, self.size, device=device)
        partials = torch.empty(3, count, blocks, device=device)
        image, text = (tables[0], tables[-1]) if tables else (offsets, offsets)
        where = _constant(columns, device, torch.int32)
        logs = _constant((math.log1p(-gamma) if gamma < 1 else -math.inf, math.log(gamma)), device)
        _estimate[(blocks, count)](
            anchors, anchors[count:], anchors[2 * count :], where, _constant(tuple(weights), device), self.rates, both,
            image, text, logs, offsets, own, updated, partials, self.size, self.lift, rho,
            GLOBAL=bool(tables), UNIQUE=self.unique, IDS=len(both), BLOCK=BLOCK, CANDIDATES=CANDIDATES,
        )  # fmt: skip
        if tables and write:
            _store[(blocks, count)](updated, where, both, image, text, self.size, IDS=len(both), BLOCK=BLOCK)
        return offsets, own, partials.sum(2)

    def gradients(
        self, offsets: Tensor, weight_sums: Tensor, gradient: Tensor, written: set[int], weighted_sums: bool
    ) -> Tensor | None:
        """See `SimilarityBlocks.gradients`."""
        offsets = torch.add(offsets.float(), -math.log(self.lift)).mul_(LOG2E).contiguous()
        lifted = (weight_sums * self.lift).float().contiguous()
        return self.gradients_from(offsets, lifted, gradient, written, weighted_sums)

    def gradients_from(
        self, offsets: Tensor, weight_sums: Tensor, gradient: Tensor, written: set[int], weighted_sums: bool
    ) -> Tensor | None:
        """`gradients`, with offsets in base 2 and weights lifted into the range of the products' type."""
        pulls = torch.empty(len(self.terms), self._rows, device=self.z.device) if weighted_sums else None
        fresh = gradient if not written else torch.empty_like(gradient)
        tile = self.tiles[1]
        _gradients[(triton.cdiv(self._rows, tile.rows), self.views, triton.cdiv(self.dim, tile.width))](
            self.z, self.partners, self.rates, offsets, weight_sums, self.ones, self.others, fresh,
            pulls if pulls is not None else fresh, self.mine.start, self.mine.stop, self.size, self.dim,
            self.rate_stride, 1.0 / self.lift, PARTNERS=self.partners.shape[1], SLOPES=weighted_sums,
            **self.options, **tile.sizes, **tile.launch,
        )  # fmt: skip
        if fresh is not gradient:
            gradient += fresh
        written.update(range(self.views))
        return pulls


@cache
def _constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers on a device, copied there once: a copy would wait, and may not stand in a CUDA graph."""
    return torch.tensor(values, dtype=dtype, device=device)


@cache
def _tables(layouts: tuple[Layout, ...], views: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(T, 2) views of each term, and (V, K, 3) partners of each view."""
    terms: list[tuple[int, int]] = []
    partners: list[list[tuple[int, int, int]]] = [[] for _ in range(views)]
    for layout in layouts:
        pairs = [(r, c) for r in layout.rows for c in layout.columns]
        for k, (r, c) in enumerate(pairs):
            forth, back = len(terms) + k, len(terms) + len(pairs) + k
            partners[r].append((c, forth, back))
            partners[c].append((r, back, forth))
        terms += pairs + [(c, r) for r, c in pairs]
    longest = max(map(len, partners))
    padded = [tuple(p + [(-1, -1, -1)] * (longest - len(p))) for p in partners]
    return _constant(tuple(terms), device, torch.int32), _constant(tuple(padded), device, torch.int32)
