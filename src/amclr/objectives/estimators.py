"""Estimators of the inner means, and individual temperatures: what a global objective remembers of each sample.

An estimator is a small class with an entry in `ESTIMATORS`. Estimates are kept as log u, with -inf for "not seen yet":
no overflow at any temperature, no epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from amclr.config.schema import LossConfig
from amclr.objectives.adaptive import AdaptiveGamma
from amclr.objectives.layout import Layout
from amclr.objectives.methods import Term, modality
from amclr.objectives.positives import Labels
from amclr.objectives.tables import Table

REFERENCE_EPS = 1e-8
Noise = Callable[[], Tensor]
"""Computes the variance of log g of the terms at hand, (t,), for the adaptive gamma."""


def update_log_u(log_u: Tensor, log_g: Tensor, gamma: float | Tensor) -> Tensor:
    """Log of (1 - gamma) u + gamma g, or log g where u is not seen yet (log u = -inf). gamma: one, or (T, 1).

    Yuan et al. 2022, arXiv 2202.12387, eq. 6.
    """
    log_keep: float | Tensor
    log_gamma: float | Tensor
    if isinstance(gamma, Tensor):
        log_keep, log_gamma = torch.log1p(-gamma), gamma.log()
    elif gamma >= 1:
        return log_g
    else:
        log_keep, log_gamma = math.log1p(-gamma), math.log(gamma)
    return torch.where(log_u.isneginf(), log_g, torch.logaddexp(log_keep + log_u, log_gamma + log_g))


def mean_by_id(ids: Tensor, values: Tensor, has_negatives: Tensor | None = None, log: bool = False) -> Tensor:
    """Replace every column by the mean over the columns with the same id; `log` means: of exp(values).

    A sample that occurs twice in a batch gets one update, whatever the order of the rows. ids: (N,) int64. values:
    (T, N). has_negatives: (N,) bool, the columns that count; where none of an id's does, the mean is NaN (or, `log`,
    -inf). O(N log N) time and O(T N) memory.
    """
    ids = ids.to(values.device)
    order = ids.argsort(stable=True)
    sorted_ids = ids[order]
    starts = torch.ones_like(sorted_ids)
    starts[1:] = (sorted_ids[1:] != sorted_ids[:-1]).long()
    group = torch.empty_like(starts).scatter_(0, order, starts.cumsum(0) - 1)
    counts = values.new_ones(len(ids)) if has_negatives is None else has_negatives.to(values.dtype)
    size = torch.zeros_like(counts).index_add_(0, group, counts)[group]
    if not log:
        return torch.zeros_like(values).index_add_(1, group, values * counts)[:, group] / size
    if has_negatives is not None:
        values = torch.where(has_negatives, values, -math.inf)
    top = torch.full_like(values, -math.inf).scatter_reduce_(1, group.expand_as(values), values, "amax")[:, group]
    top = top.clamp(min=torch.finfo(values.dtype).min)
    total = torch.zeros_like(values).index_add_(1, group, (values - top).exp())[:, group]
    return top + total.log() - size.clamp(min=1).log()


@dataclass(frozen=True)
class Anchors:
    """The rows of a whole batch of N as estimates see them.

    has_negatives: (N,) bool, or None where all have. distinct: every row is a sample of its own, with negatives.
    """

    labels: Labels
    has_negatives: Tensor | None
    distinct: bool

    def masked(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Values (T, N) with `fill` at anchors without negatives."""
        return values if self.has_negatives is None else torch.where(self.has_negatives, values, fill)

    def to_write(self, mean: Tensor, before: Tensor) -> Tensor:
        """Means to store: samples without negatives, or with NaN embeddings, keep what they had."""
        keeps = mean.isnan() if self.has_negatives is None else mean.isnan() | (mean == -math.inf)
        return torch.where(keeps, before, mean)


class TermTables:
    """The tables of an objective, read and written by terms. A table has a column per term of its modality.

    tables: by name, such as `log_u_image`: what it holds, and the modality of the anchors.
    """

    def __init__(self, terms: Sequence[Term], tables: Mapping[str, Table]) -> None:
        self.columns = {of: [t for t in terms if modality(t.anchor) == of] for of in ("image", "text")}
        self.tables = tables

    def sides(self, wave: Sequence[Layout]) -> Iterator[tuple[slice, str, int, int]]:
        """The terms of a wave by table: their slice, whose table, its first column and the one after the last."""
        start = 0
        for layout in wave:
            half = len(layout.terms) // 2
            for terms in (layout.terms[:half], layout.terms[half:]):
                of = modality(terms[0].anchor)
                first = self.columns[of].index(terms[0])
                yield slice(start, start + half), of, first, first + half
                start += half

    def read(self, name: str, wave: Sequence[Layout], labels: Labels, like: Tensor) -> Tensor:
        """What the tables `name` hold for the terms of a wave and the samples of a batch, (T, N)."""
        sides = self.sides(wave)
        return torch.cat([
            self.tables[f"{name}_{of}"].read(labels.ids[of], first, last, like) for _, of, first, last in sides
        ])  # fmt: skip

    def write(self, name: str, wave: Sequence[Layout], labels: Labels, values: Tensor) -> None:
        """Store values (T, N)."""
        for part, of, first, last in self.sides(wave):
            self.tables[f"{name}_{of}"].write(labels.ids[of], first, last, values[part])

    def mean_by_sample(self, wave: Sequence[Layout], anchors: Anchors, values: Tensor, log: bool) -> Tensor:
        """Values (T, N) averaged over the rows that are the same sample and have negatives."""
        ids, some = anchors.labels.ids, anchors.has_negatives
        if anchors.distinct:
            return values
        if anchors.labels.shared:
            return mean_by_id(anchors.labels.distinct_ids[0], values, some, log)
        return torch.cat([mean_by_id(ids[of], values[part], some, log) for part, of, _, _ in self.sides(wave)])


def make_tables(
    terms: Sequence[Term], settings: LossConfig, num_samples: Mapping[str, int], folder: Path | None
) -> dict[str, Table]:
    """The tables of a global objective: a row per sample, a column per term of its modality, or one for all."""
    fills = {"log_u": -math.inf}
    if settings.temperature_mode == "individual":
        fills |= {"tau": settings.temperature or 1.0, "tau_velocity": 0.0}
    modalities = [modality(t.anchor) for t in terms]
    tables = {}
    for of in sorted(set(modalities)):
        for what, fill in fills.items():
            one = what == "log_u" and not ESTIMATORS[settings.estimator].columns_per_term
            columns = 1 if one else modalities.count(of)
            tables[f"{what}_{of}"] = Table(num_samples[of], columns, fill, settings.storage, folder)
    return tables


class PerTermEstimator:
    """An estimate per sample and term: u <- (1 - gamma) u + gamma g, and u = g at the first visit."""

    columns_per_term = True

    def __init__(self, tables: TermTables, terms: Sequence[Term], adaptive: AdaptiveGamma | None = None) -> None:
        self.tables, self.terms, self.adaptive = tables, terms, adaptive
        self.first_epoch = True

    def update(
        self, wave: Sequence[Layout], log_g: Tensor, anchors: Anchors, gamma: float, training: bool, noise: Noise
    ) -> Tensor:
        """The anchors' updated log u (T, N), 0 where there is no negative; stored if training."""
        before = self.tables.read("log_u", wave, anchors.labels, log_g)
        expected: Tensor = before
        rate: float | Tensor = gamma
        if self.adaptive:
            rows = [self.terms.index(t) for layout in wave for t in layout.terms]
            if training:
                self.adaptive.observe(rows, before, log_g, noise(), anchors.has_negatives)
            expected, rate = self.adaptive.expect(rows, before)
        after = update_log_u(expected, log_g, rate)
        if training:
            mean = self.tables.mean_by_sample(wave, anchors, after, log=True)
            self.tables.write("log_u", wave, anchors.labels, anchors.to_write(mean, before))
        return anchors.masked(after)


class ReferenceEstimator(PerTermEstimator):
    """One estimate per sample, overwritten by the terms in their order, as in the public AmCLR code.

    u = g throughout the first epoch, and eps is added to u. It repeats the paper's runs; it is never the default.
    """

    columns_per_term = False

    def update(
        self, wave: Sequence[Layout], log_g: Tensor, anchors: Anchors, gamma: float, training: bool, noise: Noise
    ) -> Tensor:
        """See `PerTermEstimator.update`. The wave must hold all terms."""
        log_u = torch.empty_like(log_g)
        place = {t: k for k, t in enumerate(t for layout in wave for t in layout.terms)}
        for term in self.terms:
            k, of = place[term], modality(term.anchor)
            ids = anchors.labels.ids[of]
            table, g = self.tables.tables[f"log_u_{of}"], log_g[k : k + 1]
            before = table.read(ids, 0, 1, g)
            after = update_log_u(torch.full_like(before, -math.inf) if self.first_epoch else before, g, gamma)
            if training:
                mean = after if anchors.distinct else mean_by_id(ids, after, anchors.has_negatives, log=True)
                table.write(ids, 0, 1, anchors.to_write(mean, before))
            log_u[k] = torch.logaddexp(after, torch.full_like(after, math.log(REFERENCE_EPS)))[0]
        return anchors.masked(log_u)


ESTIMATORS: Mapping[str, type[PerTermEstimator]] = {"per-term": PerTermEstimator, "reference": ReferenceEstimator}
"""Every estimator by the name that settings call it."""


class IndividualTemperatures:
    """A temperature per sample and term, learned by momentum on d F_i / d tau_i (Qiu et al. 2023, algorithm 1)."""

    def __init__(self, tables: TermTables, settings: LossConfig) -> None:
        self.tables, self.bounds = tables, (settings.temperature_min, settings.temperature_max)
        self.lr, self.momentum = settings.temperature_lr, settings.temperature_momentum

    def read(self, wave: Sequence[Layout], labels: Labels, like: Tensor) -> Tensor:
        """The temperatures of the terms of a wave and the samples of a batch, (T, N)."""
        return self.tables.read("tau", wave, labels, like)

    def step(self, wave: Sequence[Layout], slope: Tensor, anchors: Anchors, taus: Tensor) -> None:
        """Move the temperatures (T, N) against their derivative `slope`, and clamp them to their bounds."""
        before = self.tables.read("tau_velocity", wave, anchors.labels, taus)
        mean = self.tables.mean_by_sample(wave, anchors, slope, log=False)
        velocity = self.momentum * before + (1 - self.momentum) * mean
        moved = (taus - self.lr * velocity).clamp(*self.bounds)
        # The mean is NaN for samples without negatives, or with NaN embeddings.
        learns = ~mean.isnan()
        velocity, moved = torch.where(learns, velocity, before), torch.where(learns, moved, taus)
        self.tables.write("tau_velocity", wave, anchors.labels, velocity)
        self.tables.write("tau", wave, anchors.labels, moved)
