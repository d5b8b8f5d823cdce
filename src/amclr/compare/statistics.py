"""Statistics of the runs of a comparison: spread, paired tests, equal cost. Pure functions."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from amclr.compare.outcome import Outcome

EXACT, DRAWS = 14, 9_999
"""Up to EXACT clusters every choice of signs is tried; for more, DRAWS of them are drawn."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation (None for one value) and the values."""
    return {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else None,
            "values": list(values)}  # fmt: skip


def sign_flip(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a sign-flip permutation test that the sum of paired differences is 0. differences: (n,).

    Each difference is that of one cluster: of all that would change sign together if the two methods swapped names.
    Assumes that clusters are independent, and that under the null hypothesis a difference is as likely as its negative;
    assumes nothing about distributions or the number of clusters. The p-value is the share of the 2^n choices of signs
    whose sum is at least as far from 0 (all of them for up to 14 clusters, else 9,999 drawn ones and the observed one),
    so it is at least 2 / 2^n: n = 3 cannot go below 0.25, and 0.05 needs n = 6.
    """
    nonzero = differences[differences != 0]  # the sign of a 0 changes nothing
    if not len(nonzero):
        return 1.0
    # Sums of the same numbers in another order round differently.
    observed = abs(nonzero.sum()) - 1e-9 * np.abs(nonzero).sum()
    if len(nonzero) <= EXACT:
        signs = 1.0 - 2 * (np.arange(1 << len(nonzero))[:, None] >> np.arange(len(nonzero)) & 1)
        return float((np.abs(signs @ nonzero) >= observed).mean())
    draw, extreme = np.random.default_rng(seed), 1
    for part in np.array_split(np.arange(DRAWS), -(-DRAWS * len(nonzero) // 10_000_000)):
        signs = 2.0 * draw.integers(0, 2, (len(part), len(nonzero)), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ nonzero) >= observed).sum())
    return extreme / (DRAWS + 1)


def paired_test(
    runs: Sequence[Outcome], baseline: Sequence[Outcome], measure: str, fold_of: Mapping[int, int] | None = None
) -> dict[str, Any] | None:
    """A variant's difference from the baseline, paired over the seeds and queries that both have; None without pairs.

    p_seeds: `sign_flip` with the seeds as clusters. Would it be so with other seeds, for these images? The strict test
    with few seeds: at least 0.25 with three.
    p_images: with the images as clusters, each with its captions, averaged over the seeds. Would it be so for other
    images, with these weights? It does not know how much seeds differ, so a small p_images alone does not show that a
    method is better.

    fold_of: the fold of each seed. Then the folds, each with its seeds averaged, are the clusters of p_seeds, and the
    images of all folds those of p_images.
    """
    pairs = [
        (run, base) for run in runs for base in baseline
        if run.seed == base.seed and measure in run.shares and measure in base.shares
        and run.queries[measure] == base.queries[measure]
    ]  # fmt: skip
    if not pairs:
        return None
    if not fold_of:  # shares can be averaged over seeds only if all have the same queries
        pairs = [p for p in pairs if p[0].queries[measure] == pairs[0][0].queries[measure]]
    by_queries, by_cluster = defaultdict[str, list[np.ndarray]](list), defaultdict[int, list[float]](list)
    for run, base in pairs:
        difference = run.shares[measure] - base.shares[measure]
        by_queries[run.queries[measure]].append(difference)
        by_cluster[fold_of[run.seed] if fold_of else run.seed].append(float(difference.sum()))
    clusters = np.array([np.mean(differences) for differences in by_cluster.values()])
    # The share of an image is that among the images of its own fold.
    images = np.concatenate([np.mean(differences, axis=0) for differences in by_queries.values()])
    return {"difference": float(clusters.mean()), "seeds": len(pairs), "images": len(images),
            "p_seeds": sign_flip(clusters), "p_images": sign_flip(images)}  # fmt: skip


def at_equal_cost(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> dict[str, dict[str, Any]]:
    """The best recall of each variant at a cost that all runs reached, in steps, passes and seconds.

    curves: the evaluations of each run of each variant, as in `Outcome.curve`. For each kind of cost: the most that all
    runs reached (`at`), and the best mean recall of each run up to there, with its spread. A variant has no entry of a
    kind if one of its runs had not been evaluated by then.
    """
    all_curves = [curve for runs in curves.values() for curve in runs]
    best_at: dict[str, dict[str, Any]] = {name: {} for name in curves}
    for cost in ("steps", "passes", "seconds") if all_curves and all(all_curves) else ():
        at = min(curve[-1][cost] for curve in all_curves)
        for name, runs in curves.items():
            best = [max((e["r_mean"] for e in curve if e[cost] <= at), default=None) for curve in runs]
            if values := [b for b in best if b is not None] if None not in best else []:
                best_at[name][cost] = {"at": at, **spread(values)}
    return best_at


def too_far_behind(
    outcomes: Sequence[Outcome], seeds: int, limit: float, baseline: str = ""
) -> dict[str, dict[str, float]]:
    """Which variants are more than `limit` points of mean recall behind after `seeds` seeds, by label.

    Means are compared at the same point of the grid, for variants that have a result for every one of the seeds. Each
    entry has that number of seeds (`after`) and the points behind the best (`behind`). The baseline is never listed.
    """
    recalls: dict[str, list[float]] = {}
    cells = {o.cell.label: o.cell for o in outcomes}
    for outcome in outcomes:
        if not outcome.failure:
            recalls.setdefault(outcome.cell.label, []).append(outcome.measures["r_mean"])
    means = {label: statistics.mean(values) for label, values in recalls.items() if len(values) == seeds}
    cut = {}
    for label, mean in means.items():
        cell = cells[label]
        behind = max(m for other, m in means.items() if cells[other].point == cell.point) - mean
        if cell.variant != baseline and behind > limit:
            cut[label] = {"after": seeds, "behind": behind}
    return cut
