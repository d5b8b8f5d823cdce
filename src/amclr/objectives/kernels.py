"""The closed form as Triton kernels: what `blocks.Blocks` does, in one launch a pass whatever the terms.

Each program owns some rows of one view and walks all candidates, forming similarities tile by tile and
dropping them again (online log-sum-exp in the first pass, recomputed in the second). So no two programs
write to the same place: there are no atomics, and the result does not depend on their order. Sums are in
float32; the features may be float16, bfloat16, float32 as TF32, or float32 exactly (IEEE).

Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amclr.objectives.blocks import LOG2E, Layout, Positives

ROWS, CANDIDATES, DEPTH = 64, 64, 64
"""Tile of a program: anchors, candidates, and how many dimensions are multiplied at a time."""
WIDTH = 128
"""Dimensions of the gradient that a program accumulates; more are split among programs."""
HALF_SCALE = 64.0
"""Weights times B are lifted by this into the middle of float16's range before they are rounded to it."""


@triton.jit
def _similarities(z, a, c, i, j, n, d, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """<z[a, i], z[c, j]> for some rows of two views, float32."""
    k = tl.arange(0, DEPTH)
    s = tl.zeros((i.shape[0], j.shape[0]), dtype=tl.float32)
    for start in range(0, d, DEPTH):
        inside = start + k < d
        x = tl.load(z + (a * n + i[:, None]).to(tl.int64) * d + start + k[None, :],
                    mask=(i < n)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        y = tl.load(z + (c * n + j[:, None]).to(tl.int64) * d + start + k[None, :],
                    mask=(j < n)[:, None] & inside[None, :], other=0.0)  # fmt: skip
        s = tl.dot(x, tl.trans(y), s, input_precision=PRECISION)
    return s


@triton.jit
def _positives(ids, i, j, n, IDS: tl.constexpr):
    """Which pairs share an id of either modality; pairs beyond the batch count as positives."""
    out = (j >= n)[None, :] | (i >= n)[:, None]
    for m in tl.static_range(IDS):
        own = tl.load(ids + m * n + i, mask=i < n, other=-1)
        other = tl.load(ids + m * n + j, mask=j < n, other=-2)
        out = out | (own[:, None] == other[None, :])
    return out


@triton.jit
def _log_sums(
    z, terms, rates, ids, sums, positive, first, last, n, d, rate_stride,
    IDS: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of anchors, term): log of the sum over negatives of exp(s / tau), and s_ii."""
    t = tl.program_id(1)
    a, c = tl.load(terms + 2 * t), tl.load(terms + 2 * t + 1)
    i = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = i < last
    rate = tl.load(rates + t * rate_stride * n + i * rate_stride, mask=mine, other=0.0)
    top = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    own = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, n, CANDIDATES):
        j = start + tl.arange(0, CANDIDATES)
        s = _similarities(z, a, c, i, j, n, d, DEPTH, PRECISION)
        own += tl.sum(tl.where(i[:, None] == j[None, :], s, 0.0), 1)
        s = tl.where(_positives(ids, i, j, n, IDS), float("-inf"), s * rate[:, None])
        higher = tl.maximum(top, tl.max(s, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - level) + tl.sum(tl.exp2(s - level[:, None]), 1)
        top = higher
    found = tl.where(total > 0, (top + tl.log2(tl.maximum(total, 1e-38))) * 0.6931471805599453, float("-inf"))
    out = t * (last - first) + i - first
    tl.store(sums + out, found, mask=mine)
    tl.store(positive + out, own, mask=mine)


@triton.jit
def _gradients(
    z, partners, rates, offsets, own, ids, gradient, pulls, first, last, n, d, rate_stride, unscale,
    PARTNERS: tl.constexpr, SLOPES: tl.constexpr, IDS: tl.constexpr, ROWS: tl.constexpr, CANDIDATES: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of rows, view, block of dimensions): the view's gradient from all blocks that it is in.

    partners: per view, PARTNERS times (other view, term of this view's anchors, term of the other's), -1 for none.
    """
    v, part = tl.program_id(1), tl.program_id(2)
    i = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = i < last
    k = part * WIDTH + tl.arange(0, WIDTH)
    out = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for e in range(PARTNERS):
        p = tl.load(partners + (v * PARTNERS + e) * 3)
        if p >= 0:
            forth = tl.load(partners + (v * PARTNERS + e) * 3 + 1)
            back = tl.load(partners + (v * PARTNERS + e) * 3 + 2)
            a = tl.load(offsets + forth * n + i, mask=mine, other=float("inf"))
            rate_a = tl.load(rates + forth * rate_stride * n + i * rate_stride, mask=mine, other=0.0)
            owned = tl.load(own + forth * n + i, mask=mine, other=0.0) + tl.load(own + back * n + i, mask=mine, other=0.0)
            pull = tl.zeros((ROWS,), dtype=tl.float32)
            for start in range(0, n, CANDIDATES):
                j = start + tl.arange(0, CANDIDATES)
                s = _similarities(z, v, p, i, j, n, d, DEPTH, PRECISION)
                b = tl.load(offsets + back * n + j, mask=j < n, other=float("inf"))
                rate_b = tl.load(rates + back * rate_stride * n + j * rate_stride, mask=j < n, other=0.0)
                positives = _positives(ids, i, j, n, IDS)
                w = tl.where(positives, 0.0, tl.exp2(s * rate_a[:, None] - a[:, None]))
                if SLOPES:
                    pull += tl.sum(w * s, 1)
                w += tl.where(positives, 0.0, tl.exp2(s * rate_b[None, :] - b[None, :]))
                w = tl.where(i[:, None] == j[None, :], -owned[:, None], w)
                y = tl.load(z + (p * n + j[:, None]).to(tl.int64) * d + k[None, :],
                            mask=(j < n)[:, None] & (k < d)[None, :], other=0.0)  # fmt: skip
                out = tl.dot(w.to(y.dtype), y, out, input_precision=PRECISION)
            if SLOPES:
                if part == 0:
                    tl.store(pulls + forth * (last - first) + i - first, pull * unscale, mask=mine)
    place = gradient + (v * (last - first) + i - first)[:, None].to(tl.int64) * d + k[None, :]
    tl.store(place, out * unscale, mask=mine[:, None] & (k < d)[None, :])


class TritonBlocks:
    """The passes of `blocks.Blocks`, with the same arguments and results, over all layouts at once.

    products: "auto" and "float32" are exact for float32 views, "tf32" is not.
    """

    def __init__(
        self,
        every: Sequence[Tensor],
        mine: slice,
        layouts: Sequence[Layout],
        taus: float | Tensor,
        positives: Positives,
        products: str,
    ) -> None:
        dtype = every[0].dtype
        if products in ("float16", "bfloat16"):
            dtype = getattr(torch, products)
        self.z = torch.stack(list(every)).to(dtype)
        if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET"):
            self.z = self.z.float()  # the interpreter, which is NumPy, cannot multiply bfloat16
        self.mine, self.layouts = mine, layouts
        self.views, self.size, self.dim = self.z.shape
        self.terms, self.partners = _tables(tuple(layouts), self.views, self.z.device)
        like = every[0].float()
        rates = LOG2E / taus if isinstance(taus, Tensor) else like.new_full((), LOG2E / taus)
        self.rate_stride = 1 if rates.dim() else 0
        self.rates = rates.contiguous()
        if positives.ids is None:
            self.ids = torch.arange(self.size, device=self.z.device)[None]
        else:
            self.ids = torch.stack(positives.ids)
        self.options = {
            "IDS": len(self.ids), "ROWS": ROWS, "CANDIDATES": CANDIDATES, "DEPTH": DEPTH,
            "PRECISION": "tf32" if products == "tf32" else "ieee",
        }  # fmt: skip

    @property
    def _rows(self) -> int:
        return self.mine.stop - self.mine.start

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """As `Blocks.log_sums`."""
        sums, positive = torch.empty(2, len(self.terms), self._rows, device=self.z.device)
        _log_sums[(triton.cdiv(self._rows, ROWS), len(self.terms))](
            self.z, self.terms, self.rates, self.ids, sums, positive, self.mine.start, self.mine.stop,
            self.size, self.dim, self.rate_stride, **self.options,
        )  # fmt: skip
        return sums, positive

    def gradients(
        self, offsets: Tensor, own: Tensor, gradient: Tensor, written: set[int], slopes: bool
    ) -> Tensor | None:
        """As `Blocks.gradients`."""
        half = self.z.dtype == torch.float16
        scale = HALF_SCALE * self.size if half else 1.0
        offsets = torch.add(offsets.float(), -math.log(scale)).mul_(LOG2E)
        pulls = torch.empty(len(self.terms), self._rows, device=self.z.device) if slopes else None
        fresh = gradient if not written else torch.empty_like(gradient)
        width = min(WIDTH, max(16, triton.next_power_of_2(self.dim)))
        _gradients[(triton.cdiv(self._rows, ROWS), self.views, triton.cdiv(self.dim, width))](
            self.z, self.partners, self.rates, offsets.contiguous(), (own * scale).float(), self.ids, fresh,
            pulls if pulls is not None else fresh, self.mine.start, self.mine.stop, self.size, self.dim,
            self.rate_stride, 1.0 / scale, PARTNERS=self.partners.shape[1], SLOPES=slopes, WIDTH=width, **self.options,
        )  # fmt: skip
        if fresh is not gradient:
            gradient += fresh
        written.update(range(self.views))
        return pulls


_CACHE: dict[Any, tuple[Tensor, Tensor]] = {}


def _tables(layouts: tuple[Layout, ...], views: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(T, 2) views of each term, and (V, K, 3) partners of each view; made once per device."""
    key = layouts, views, device
    if key not in _CACHE:
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
        padded = [p + [(-1, -1, -1)] * (longest - len(p)) for p in partners]
        made = (torch.tensor(x, dtype=torch.int32, device=device) for x in (terms, padded))
        _CACHE[key] = next(made), next(made)
    return _CACHE[key]
