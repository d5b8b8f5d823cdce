"""The objectives as loops over explicit pairs in float64, written as the papers write them. Imports nothing of amclr.

A term is (anchor view, candidate view). A global objective (SogCLR and its descendants) is put together from parts:

    GlobalContrastive       the loss and its gradients
      PerTermEstimator      the estimates u: or ReferenceEstimator, or AdaptiveGamma
      FixedTemperature      tau: or IndividualTemperatures
      Queue                 negatives from earlier batches

The mini-batch objectives (CLIP, CyCLIP, SigLIP, NT-Xent) are functions; `numeric_gradient` differentiates them.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Views = dict[str, np.ndarray]
"""Embeddings (B, D) by the name of the view."""
TermName = tuple[str, str]

CROSS = [("image", "text"), ("image", "text_aug"), ("image_aug", "text"), ("image_aug", "text_aug")]
TERMS: dict[str, list[TermName]] = {
    "sogclr": [("image", "text"), ("text", "image")],
    "amclr": CROSS + [(t, i) for i, t in CROSS],
    "xamclr": [
        *CROSS, ("image", "image_aug"), ("image_aug", "image"),
        *[(t, i) for i, t in CROSS], ("text", "text_aug"), ("text_aug", "text"),
    ],
    "xamclr-image": [*CROSS, ("image", "image_aug"), ("image_aug", "image"), *[(t, i) for i, t in CROSS]],
    "xamclr-text": [*CROSS, *[(t, i) for i, t in CROSS], ("text", "text_aug"), ("text_aug", "text")],
}  # fmt: skip


# -- Positives and negatives ----------------------------------------------------------------------


def modality(view: str) -> str:
    return "image" if view.startswith("image") else "text"


@dataclass
class Sample:
    """An image-text pair: views (D,) by name, ids by modality, groups by view; a group below 0 is none."""

    views: dict[str, np.ndarray]
    ids: dict[str, int]
    groups: dict[str, int]

    def is_positive_of(self, other: Sample) -> bool:
        """They share the image, the text, or a group of views of one modality."""
        return any(self.ids[m] == other.ids[m] for m in ("image", "text")) or any(
            modality(v) == modality(w) and group >= 0 and group == other_group
            for v, group in self.groups.items()
            for w, other_group in other.groups.items()
        )


def samples(
    views: Views, image_ids: list[int], text_ids: list[int], groups: dict[str, list[int]] | None = None
) -> list[Sample]:
    """The rows of a batch."""
    return [
        Sample(
            {v: x[i] for v, x in views.items()},
            {"image": image_ids[i], "text": text_ids[i]},
            {v: group[i] for v, group in (groups or {}).items()},
        )
        for i in range(len(image_ids))
    ]


def positive_pairs(image_ids: list[int], text_ids: list[int], groups: dict[str, list[int]] | None = None) -> np.ndarray:
    """Which rows of a batch are positives of each other, (B, B) bool."""
    batch = samples({}, image_ids, text_ids, groups)
    return np.array([[one.is_positive_of(other) for other in batch] for one in batch])


class Negative(NamedTuple):
    """Negative j of an anchor i."""

    candidate: np.ndarray
    """(D,)."""
    d: float
    """d_ij = s_ij - s_ii."""
    row: int | None
    """Row j of the batch; None if it is from the queue."""


@dataclass
class Anchor:
    """Anchor i of a term, with its temperature and its negatives N_i."""

    row: int
    sample_id: int
    tau: float
    negatives: list[Negative]

    @property
    def g(self) -> float:
        """g_i = 1 / |N_i| sum_{j in N_i} exp(d_ij / tau)."""
        return sum(math.exp(n.d / self.tau) for n in self.negatives) / len(self.negatives)


def mean_by_sample(anchors: list[Anchor], values: list[float]) -> dict[int, float]:
    """A sample that occurs twice in a batch gets one update: the mean."""
    by_sample = defaultdict(list)
    for anchor, value in zip(anchors, values, strict=True):
        by_sample[anchor.sample_id].append(value)
    return {sample: sum(x) / len(x) for sample, x in by_sample.items()}


# -- Global objectives ----------------------------------------------------------------------------


class PerTermEstimator:
    """SogCLR's moving averages, one per term and sample. Yuan et al. 2022, arXiv 2202.12387, eq. 6.

        u_i <- (1 - gamma) u_i + gamma g_i,    u_i = g_i at the first visit
    """  # fmt: skip

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.u: dict[tuple[object, int], float] = {}

    def key(self, term: TermName, sample_id: int) -> tuple[object, int]:
        """Under which `u` holds an estimate."""
        return term, sample_id

    def observe(self, term: TermName, anchors: list[Anchor]) -> None:
        """Learn from all anchors of a batch before its update."""

    def average(self, term: TermName, anchor: Anchor) -> float:
        """The new u of an anchor."""
        key = self.key(term, anchor.sample_id)
        return (1 - self.gamma) * self.u[key] + self.gamma * anchor.g if key in self.u else anchor.g

    def update(self, term: TermName, anchors: list[Anchor]) -> list[float]:
        """Store the new u of each anchor, and return what the loss takes for it."""
        new = [self.average(term, anchor) for anchor in anchors]
        for sample, mean in mean_by_sample(anchors, new).items():
            self.u[self.key(term, sample)] = mean
        return new


class ReferenceEstimator(PerTermEstimator):
    """The public AmCLR code: one u per modality and sample, which the terms overwrite in turn.

    u = g throughout the first epoch. The loss takes u + 1e-8.
    """

    first_epoch = True

    def key(self, term: TermName, sample_id: int) -> tuple[object, int]:
        return modality(term[0]), sample_id

    def average(self, term: TermName, anchor: Anchor) -> float:
        return anchor.g if self.first_epoch else super().average(term, anchor)

    def update(self, term: TermName, anchors: list[Anchor]) -> list[float]:
        return [u + 1e-8 for u in super().update(term, anchors)]


@dataclass
class Statistics:
    """Running means of a term over about 32 steps."""

    drift: float = 0.0
    innovation: float = 0.0
    noise: float = 0.0
    steps: int = 0

    def update(self, noise: float, innovations: list[float]) -> None:
        rate = max(1 / 32, 1 / (self.steps + 1))
        self.drift += rate * (sum(innovations) / len(innovations) - self.drift)
        square = sum((x - self.drift) ** 2 for x in innovations) / len(innovations)
        self.innovation += rate * (square - self.innovation)
        self.noise += rate * (noise - self.noise)
        self.steps += 1


class AdaptiveGamma(PerTermEstimator):
    """The steady-state gain of a Kalman filter on log u, per term (docs/method.md, "Adaptive gamma").

        gamma = 1 - R / S, at least `least`
        R: variance of log g within a batch, from the first 16 anchors
        S: variance of the innovations log g - log u - drift
        u_i <- (1 - gamma) exp(drift) u_i + gamma g_i
    """  # fmt: skip

    def __init__(self, least: float) -> None:
        super().__init__(least)
        self.statistics: defaultdict[TermName, Statistics] = defaultdict(Statistics)

    def observe(self, term: TermName, anchors: list[Anchor]) -> None:
        noise, innovations, shares = [], [], []
        for anchor in anchors:
            e = [math.exp(n.d / anchor.tau) for n in anchor.negatives if n.row is not None]
            if len(e) > 1 and anchor.row < 16:
                noise.append(self.variance_of_log_mean(e))
            if anchor.negatives and (term, anchor.sample_id) in self.u:
                innovations.append(math.log(anchor.g) - math.log(self.u[term, anchor.sample_id]))
            shares.append(len(e) / max(len(anchor.negatives), 1))
        r = sum(noise) / max(len(noise), 1)
        if any(n.row is None for anchor in anchors for n in anchor.negatives):
            r *= sum(shares) / len(shares)  # g is a mean over the queue too: of more numbers, so with less noise
        statistics = self.statistics[term]
        if innovations:
            statistics.update(r, innovations)

    @staticmethod
    def variance_of_log_mean(e: list[float]) -> float:
        """To first order, the variance of the mean over its square."""
        n, mean = len(e), sum(e) / len(e)
        return sum((x - mean) ** 2 for x in e) / (n - 1) / n / mean**2

    def average(self, term: TermName, anchor: Anchor) -> float:
        if (term, anchor.sample_id) not in self.u:
            return anchor.g
        of_term = self.statistics[term]
        gamma = min(1.0, max(self.gamma, 1 - of_term.noise / of_term.innovation))
        return (1 - gamma) * math.exp(of_term.drift) * self.u[term, anchor.sample_id] + gamma * anchor.g


class FixedTemperature:
    """One tau for all."""

    def __init__(self, tau: float) -> None:
        self.initial = tau

    def of(self, term: TermName, sample_id: int) -> float:
        return self.initial

    def update(self, term: TermName, anchors: list[Anchor], slopes: list[float]) -> None:
        """Move against the slopes dF_i / dtau_i."""


class IndividualTemperatures(FixedTemperature):
    """iSogCLR's temperatures, one per term and sample. Qiu et al. 2023, arXiv 2305.11965, algorithm 1.

        v_i   <- beta v_i + (1 - beta) dF_i / dtau_i
        tau_i <- clamp(tau_i - eta v_i, tau_min, tau_max)
    """  # fmt: skip

    def __init__(self, tau: float, eta: float, beta: float = 0.9, bounds: tuple[float, float] = (0.005, 1.0)) -> None:
        super().__init__(tau)
        self.eta, self.beta, self.bounds = eta, beta, bounds
        self.tau: dict[tuple[TermName, int], float] = {}
        self.velocity: dict[tuple[TermName, int], float] = {}

    def of(self, term: TermName, sample_id: int) -> float:
        return self.tau.get((term, sample_id), self.initial)

    def update(self, term: TermName, anchors: list[Anchor], slopes: list[float]) -> None:
        low, high = self.bounds
        for sample, slope in mean_by_sample(anchors, slopes).items():
            velocity = self.beta * self.velocity.get((term, sample), 0.0) + (1 - self.beta) * slope
            self.velocity[term, sample] = velocity
            self.tau[term, sample] = min(max(self.of(term, sample) - self.eta * velocity, low), high)


class Queue:
    """Cross-batch memory: the last `size` samples are further, constant negatives. Wang et al. 2020, arXiv 1912.06798."""

    def __init__(self, size: int) -> None:
        self.samples: deque[Sample] = deque(maxlen=size)

    def push(self, batch: list[Sample]) -> None:
        self.samples.extend(batch)


class GlobalContrastive:
    """SogCLR's loss and gradient estimator, summed over terms. Yuan et al. 2022, arXiv 2202.12387, eq. 4 and 6.

        s_ij = <anchor_i, candidate_j>,    d_ij = s_ij - s_ii
        g_i  = 1 / |N_i| sum_{j in N_i} exp(d_ij / tau_i),    N_i: rows and queued samples that are no positives of i
        F    = 1 / B sum_i tau_i (log u_i + rho)
        dF   = 1 / B sum_i sum_{j in N_i} w_ij dd_ij,    w_ij = exp(d_ij / tau_i) / (|N_i| u_i)

    u_i estimates g_i over the whole data set. rho: Qiu et al. 2023, arXiv 2305.11965, eq. 5. weights: of terms, 1 if absent.
    """  # fmt: skip

    def __init__(
        self, terms: list[TermName], estimator: PerTermEstimator, temperature: FixedTemperature,
        rho: float = 0.0, queue: int = 0, weights: dict[TermName, float] | None = None,
    ) -> None:  # fmt: skip
        self.terms, self.estimator, self.temperature = terms, estimator, temperature
        self.rho, self.queue, self.weights = rho, Queue(queue), weights or {}

    def anchor(self, term: TermName, batch: list[Sample], i: int) -> Anchor:
        anchor, positive = batch[i].views[term[0]], batch[i].views[term[1]]
        negatives = []
        for row, sample in [*enumerate(batch), *((None, queued) for queued in self.queue.samples)]:
            if not sample.is_positive_of(batch[i]):
                candidate = sample.views[term[1]]
                negatives.append(Negative(candidate, float(anchor @ candidate - anchor @ positive), row))
        sample_id = batch[i].ids[modality(term[0])]
        return Anchor(i, sample_id, self.temperature.of(term, sample_id), negatives)

    def step(
        self, views: Views, image_ids: list[int], text_ids: list[int], groups: dict[str, list[int]] | None = None
    ) -> tuple[float, Views, float]:
        """The loss, its gradients, and its derivative with respect to a shared temperature. Updates all parts."""
        batch = samples(views, image_ids, text_ids, groups)
        gradient = {v: np.zeros_like(x) for v, x in views.items()}
        loss = slope = 0.0
        for term in self.terms:
            anchor_view, candidate_view = term
            weight = self.weights.get(term, 1.0) / len(batch)
            anchors = [self.anchor(term, batch, i) for i in range(len(batch))]
            self.estimator.observe(term, anchors)
            anchors = [anchor for anchor in anchors if anchor.negatives]
            slopes = []
            for anchor, u in zip(anchors, self.estimator.update(term, anchors), strict=True):
                i, tau = anchor.row, anchor.tau
                x, positive = views[anchor_view][i], views[candidate_view][i]
                loss += weight * tau * (math.log(u) + self.rho)
                slopes.append(math.log(u) + self.rho)
                for n in anchor.negatives:
                    w = math.exp(n.d / tau) / (len(anchor.negatives) * u)
                    slopes[-1] -= w * n.d / tau
                    gradient[anchor_view][i] += weight * w * (n.candidate - positive)
                    if n.row is not None:  # queued samples are constants, and the positive is one to them
                        gradient[candidate_view][n.row] += weight * w * x
                        gradient[candidate_view][i] -= weight * w * x
            slope += weight * sum(slopes)
            self.temperature.update(term, anchors, slopes)
        self.queue.push(batch)
        return loss, gradient, slope


# -- Mini-batch objectives ------------------------------------------------------------------------


def cross_entropy(anchor: np.ndarray, candidate: np.ndarray, tau: float, positives: np.ndarray) -> float:
    """Mean over anchors of -log softmax of the matched candidate; other positives are left out of the softmax."""
    total = 0.0
    for i in range(len(anchor)):
        scores = [anchor[i] @ candidate[j] / tau for j in range(len(candidate)) if j == i or not positives[i, j]]
        total += math.log(sum(math.exp(s) for s in scores)) - float(anchor[i] @ candidate[i]) / tau
    return total / len(anchor)


def clip(views: Views, tau: float, positives: np.ndarray, pairs: list[TermName]) -> float:
    """CLIP: the mean cross-entropy of both directions. Radford et al. 2021, arXiv 2103.00020, figure 3."""
    losses = [cross_entropy(views[a], views[b], tau, positives) for p in pairs for a, b in (p, p[::-1])]
    return sum(losses) / len(losses)


def cyclic(image: np.ndarray, text: np.ndarray) -> tuple[float, float]:
    """CyCLIP's in-modal and cross-modal inconsistency. Goel et al. 2022, arXiv 2205.14459, section 3."""
    n = len(image)
    cross_modal = sum((image[j] @ text[k] - image[k] @ text[j]) ** 2 for j in range(n) for k in range(n)) / n
    in_modal = sum((image[j] @ image[k] - text[j] @ text[k]) ** 2 for j in range(n) for k in range(n)) / n
    return float(in_modal), float(cross_modal)


def cyclip(views: Views, tau: float, positives: np.ndarray) -> float:
    """CyCLIP: CLIP and both inconsistencies at 0.25. Goel et al. 2022, arXiv 2205.14459, section 3."""
    return clip(views, tau, positives, [("image", "text")]) + 0.25 * sum(cyclic(views["image"], views["text"]))


def siglip(views: Views, tau: float, bias: float, positives: np.ndarray) -> float:
    """SigLIP: log(1 + exp(-z_ij (s_ij / tau + bias))). Zhai et al. 2023, arXiv 2303.15343, algorithm 1.

    z_ij: 1 for the matched pair, -1 for negatives; other positives are left out.
    """
    image, text = views["image"], views["text"]
    n = len(image)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i == j or not positives[i, j]:
                z = 1 if i == j else -1
                total += math.log1p(math.exp(-z * (float(image[i] @ text[j]) / tau + bias)))
    return total / n


def simclr(views: Views, tau: float, positives: np.ndarray) -> float:
    """NT-Xent on the 2B rows z_1 .. z_2B. Chen et al. 2020, arXiv 2002.05709, eq. 1 and algorithm 1.

    Other positives than the partner, the other view of the sample, are left out of the denominator.
    """
    z = np.concatenate([views["image"], views["image_aug"]])
    n = len(views["image"])
    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        rest = [k for k in range(2 * n) if k == partner or not positives[i % n, k % n]]
        denominator = sum(math.exp(float(z[i] @ z[k]) / tau) for k in rest)
        total -= math.log(math.exp(float(z[i] @ z[partner]) / tau) / denominator)
    return total / (2 * n)


def numeric_gradient(function: Callable[[Views], float], views: Views, step: float = 1e-6) -> Views:
    """Central differences of a scalar function of the views."""
    gradients = {}
    for name, rows in views.items():
        gradient = np.zeros_like(rows)
        for index in np.ndindex(rows.shape):
            moved = {v: x.copy() for v, x in views.items()}
            moved[name][index] += step
            above = function(moved)
            moved[name][index] -= 2 * step
            gradient[index] = (above - function(moved)) / (2 * step)
        gradients[name] = gradient
    return gradients
