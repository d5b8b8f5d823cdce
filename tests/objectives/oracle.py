"""The objectives as explicit loops in float64, written as the papers write them. Imports nothing of amclr.

Estimates live in linear space in dictionaries keyed by (term, sample id). Every function returns the
loss and its gradient with respect to each view, the gradient by the estimator's own formula
sum_j w_ij grad d_ij, pair by pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Views = dict[str, np.ndarray]
TermName = tuple[str, str]

VIEWS = ("image", "image_aug", "text", "text_aug")
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


def side(view: str) -> str:
    return "image" if view.startswith("image") else "text"


def same(image_ids: list[int], text_ids: list[int], groups: dict[str, list[int]] | None = None) -> np.ndarray:
    """Who are positives of each other: by id, or by a group that views of one modality share."""
    n = len(image_ids)
    found = np.zeros((n, n), dtype=bool)
    for i in range(n):
        for j in range(n):
            found[i, j] = i == j or image_ids[i] == image_ids[j] or text_ids[i] == text_ids[j]
            for one, of_one in (groups or {}).items():
                for other, of_other in (groups or {}).items():
                    if side(one) == side(other) and of_one[i] >= 0 and of_one[i] == of_other[j]:
                        found[i, j] = True
    return found


@dataclass
class Global:
    """SogCLR's family: u per (term, sample), or per (modality, sample) in the reference mode."""

    terms: list[TermName]
    gamma: float
    tau: float
    individual: bool = False
    reference: bool = False
    rho: float = 0.0
    eta: float = 1e-3
    beta: float = 0.9
    tau_range: tuple[float, float] = (0.005, 1.0)
    first_epoch: bool = True
    adaptive: bool = False
    """gamma is then the least of what noise and innovation ask for."""
    queue: int = 0
    """Samples of earlier batches that are negatives too, without a gradient of their own."""
    weights: dict[TermName, float] = field(default_factory=dict)
    statistics: dict[TermName, dict[str, float]] = field(default_factory=dict)
    """Of each term: running means of the drift, the squared innovation and the noise, and how many steps."""
    u: dict[tuple[object, int], float] = field(default_factory=dict)
    temperature: dict[tuple[object, int], float] = field(default_factory=dict)
    velocity: dict[tuple[object, int], float] = field(default_factory=dict)
    queued: list[dict[str, Any]] = field(default_factory=list)
    """Of each: its views by name, its ids as `image id` and `text id`, its groups as `group of` a view."""

    def step(
        self, views: Views, image_ids: list[int], text_ids: list[int], groups: dict[str, list[int]] | None = None
    ) -> tuple[float, Views, float]:
        """The loss, its gradients, and its derivative with respect to a shared temperature; updates u."""
        positives = same(image_ids, text_ids, groups)
        loss, slope = 0.0, 0.0
        gradient = {name: np.zeros_like(rows) for name, rows in views.items()}
        batch = len(image_ids)
        shown = groups or {}
        former_of = [self._former(i, image_ids, text_ids, shown) for i in range(batch)]
        for term in self.terms:
            anchor, candidate = views[term[0]], views[term[1]]
            ids = image_ids if side(term[0]) == "image" else text_ids
            table: object = side(term[0]) if self.reference else term
            weight = self.weights.get(term, 1.0)
            gamma, drift = self.gamma, 0.0
            if self.adaptive:
                gamma, drift = self._adapt(term, ids, anchor, candidate, positives, former_of)
            fresh_u: dict[int, list[float]] = {}
            fresh_slope: dict[int, list[float]] = {}
            for i in range(batch):
                others = [j for j in range(batch) if not positives[i, j]]
                former = former_of[i]
                count = len(others) + len(former)
                if not count:
                    continue
                key = (table, ids[i])
                tau = self.temperature.get(key, self.tau) if self.individual else self.tau
                d = {j: float(anchor[i] @ candidate[j] - anchor[i] @ candidate[i]) for j in others}
                d_former = [float(anchor[i] @ q[term[1]] - anchor[i] @ candidate[i]) for q in former]
                g = (sum(math.exp(d[j] / tau) for j in others) + sum(math.exp(x / tau) for x in d_former)) / count
                unseen = key not in self.u or (self.reference and self.first_epoch)
                u = g if unseen else (1 - gamma) * self.u[key] * math.exp(drift) + gamma * g
                fresh_u.setdefault(ids[i], []).append(u)
                if self.reference:
                    u += 1e-8
                loss += weight * tau * (math.log(u) + self.rho) / batch
                pull = 0.0
                for j in others:
                    w = math.exp(d[j] / tau) / (count * u)
                    gradient[term[0]][i] += weight * w * (candidate[j] - candidate[i]) / batch
                    gradient[term[1]][j] += weight * w * anchor[i] / batch
                    gradient[term[1]][i] -= weight * w * anchor[i] / batch
                    pull += w * d[j] / tau
                for q, x in zip(former, d_former, strict=True):
                    w = math.exp(x / tau) / (count * u)
                    gradient[term[0]][i] += weight * w * (q[term[1]] - candidate[i]) / batch
                    pull += w * x / tau
                fresh_slope.setdefault(ids[i], []).append(math.log(u) + self.rho - pull)
                slope += weight * (math.log(u) + self.rho - pull) / batch
            for sample, values in fresh_u.items():
                key = (table, sample)
                self.u[key] = sum(values) / len(values)
                if self.individual:
                    mean = sum(fresh_slope[sample]) / len(values)
                    self.velocity[key] = self.beta * self.velocity.get(key, 0.0) + (1 - self.beta) * mean
                    moved = self.temperature.get(key, self.tau) - self.eta * self.velocity[key]
                    self.temperature[key] = min(max(moved, self.tau_range[0]), self.tau_range[1])
        for i in range(batch if self.queue else 0):
            ids_of = {"image id": image_ids[i], "text id": text_ids[i]}
            groups_of = {f"group of {v}": g[i] for v, g in shown.items()}
            self.queued = [*self.queued, {**{v: x[i] for v, x in views.items()}, **ids_of, **groups_of}][-self.queue :]
        return loss, gradient, slope

    def _former(
        self, i: int, image_ids: list[int], text_ids: list[int], groups: dict[str, list[int]]
    ) -> list[dict[str, Any]]:
        """The queued samples that are negatives of row i."""
        found = []
        for q in self.queued:
            same = q["image id"] == image_ids[i] or q["text id"] == text_ids[i]
            for v, of_v in groups.items():
                for w in VIEWS:
                    if side(v) == side(w) and of_v[i] >= 0 and of_v[i] == q.get(f"group of {w}"):
                        same = True
            if not same:
                found.append(q)
        return found

    def _adapt(
        self, term: TermName, ids: list[int], anchor: np.ndarray, candidate: np.ndarray, positives: np.ndarray,
        former_of: list[list[dict[str, Any]]],
    ) -> tuple[float, float]:  # fmt: skip
        """Gamma and drift of a term after what a batch shows; at most its first 16 rows tell of the noise."""
        noise, innovations, shares = [], [], []
        s = anchor @ candidate.T
        for i in range(len(s)):
            tau = self.temperature.get((term, ids[i]), self.tau) if self.individual else self.tau
            e = [math.exp((s[i, j] - s[i, i]) / tau) for j in range(len(s)) if not positives[i, j]]
            n = len(e)
            if n > 1 and i < 16:
                mean = sum(e) / n
                # The variance of a mean of n over its square: that of its log, to first order.
                noise.append(sum((x - mean) ** 2 for x in e) / (n - 1) / n / mean**2)
            e += [math.exp((float(anchor[i] @ q[term[1]]) - s[i, i]) / tau) for q in former_of[i]]
            shares.append(n / max(len(e), 1))
            if e and (term, ids[i]) in self.u:
                innovations.append(math.log(sum(e) / len(e)) - math.log(self.u[term, ids[i]]))
        # A mean over the queue too has so much less noise.
        fewer = sum(shares) / len(shares) if self.queued else 1.0
        own = self.statistics.setdefault(term, {"drift": 0.0, "innovation": 0.0, "noise": 0.0, "steps": 0})
        if innovations:
            rate = max(1 / 32, 1 / (own["steps"] + 1))
            own["drift"] += rate * (sum(innovations) / len(innovations) - own["drift"])
            square = sum((x - own["drift"]) ** 2 for x in innovations) / len(innovations)
            own["innovation"] += rate * (square - own["innovation"])
            own["noise"] += rate * (fewer * sum(noise) / max(len(noise), 1) - own["noise"])
            own["steps"] += 1
        if not own["steps"]:
            return 1.0, 0.0
        return min(1.0, max(self.gamma, 1 - own["noise"] / own["innovation"])), own["drift"]


def cross_entropy(anchor: np.ndarray, candidate: np.ndarray, tau: float, same: np.ndarray) -> float:
    """Mean over anchors of -log softmax of the positive; pairs marked `same` are no negatives."""
    total = 0.0
    for i in range(len(anchor)):
        scores = [anchor[i] @ candidate[j] / tau for j in range(len(candidate)) if j == i or not same[i, j]]
        total += math.log(sum(math.exp(s) for s in scores)) - float(anchor[i] @ candidate[i]) / tau
    return total / len(anchor)


def clip(views: Views, tau: float, same: np.ndarray, pairs: list[TermName]) -> float:
    parts = [cross_entropy(views[a], views[b], tau, same) for p in pairs for a, b in (p, p[::-1])]
    return sum(parts) / len(parts)


def cyclic(image: np.ndarray, text: np.ndarray) -> tuple[float, float]:
    """CyCLIP's two inconsistencies."""
    n = len(image)
    cross = sum((image[j] @ text[k] - image[k] @ text[j]) ** 2 for j in range(n) for k in range(n)) / n
    inside = sum((image[j] @ image[k] - text[j] @ text[k]) ** 2 for j in range(n) for k in range(n)) / n
    return float(inside), float(cross)


def cyclip(views: Views, tau: float, same: np.ndarray) -> float:
    return clip(views, tau, same, [("image", "text")]) + 0.25 * sum(cyclic(views["image"], views["text"]))


def siglip(views: Views, tau: float, bias: float, same: np.ndarray) -> float:
    image, text = views["image"], views["text"]
    n = len(image)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j and same[i, j]:
                continue
            z = 1 if i == j else -1
            total += math.log1p(math.exp(-z * (float(image[i] @ text[j]) / tau + bias)))
    return total / n


def simclr(views: Views, tau: float, same: np.ndarray | None = None) -> float:
    """NT-Xent on the 2B rows z_1 .. z_2B, as the pseudo-code of the SimCLR paper; pairs marked `same` are no negatives."""
    z = np.concatenate([views["image"], views["image_aug"]])
    n = len(views["image"])
    total = 0.0
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        rest = [
            k
            for k in range(2 * n)
            if k == partner or (k % n != i % n and not (same is not None and same[i % n, k % n]))
        ]
        denominator = sum(math.exp(float(z[i] @ z[k]) / tau) for k in rest)
        total -= math.log(math.exp(float(z[i] @ z[partner]) / tau) / denominator)
    return total / (2 * n)


def numeric_gradient(function: object, views: Views, step: float = 1e-6) -> Views:
    """Central differences of a scalar function of the views."""
    out = {}
    for name, rows in views.items():
        gradient = np.zeros_like(rows)
        for index in np.ndindex(rows.shape):
            moved = {k: v.copy() for k, v in views.items()}
            moved[name][index] += step
            up = function(moved)  # type: ignore[operator]
            moved[name][index] -= 2 * step
            gradient[index] = (up - function(moved)) / (2 * step)  # type: ignore[operator]
        out[name] = gradient
    return out
