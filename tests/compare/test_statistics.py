"""Statistics of comparisons: sign-flip tests, pairing, equal cost, and which variants are cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from amclr.compare.outcome import Outcome
from amclr.compare.plan import Cell
from amclr.compare.statistics import at_equal_cost, paired_test, sign_flip, too_far_behind


def enumerated(differences: np.ndarray) -> float:
    """The p-value by its definition: every choice of signs, one after the other."""
    seen = abs(sum(differences))
    choices = list(itertools.product((1, -1), repeat=len(differences)))
    far = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= seen - 1e-12 for signs in choices]
    return sum(far) / len(choices)


@pytest.mark.parametrize("n", range(1, 11))
def test_sign_flips_against_enumeration(n: int) -> None:
    draw = np.random.default_rng(n)
    for k in range(5):
        differences = draw.normal(0.4, 1, n) if k % 2 else draw.integers(-2, 3, n).astype(float)  # ties and zeros too
        assert sign_flip(differences) == pytest.approx(enumerated(differences))
    assert sign_flip(np.ones(n)) == pytest.approx(2 / 2**n), "the least that n clusters can show"


def test_drawn_sign_flips_against_enumeration() -> None:
    """Beyond 14 clusters signs are drawn: the p-value is that of all of them, within three standard errors."""
    for k in range(3):
        differences = np.random.default_rng(k).normal(0.3, 1, 16)
        signs = 1 - 2 * (np.arange(1 << 16)[:, None] >> np.arange(16) & 1)
        exact = (np.abs(signs @ differences) >= abs(differences.sum()) - 1e-12).mean()
        assert sign_flip(differences) == pytest.approx(exact, abs=3 * np.sqrt(exact * (1 - exact) / 9999) + 2e-4)
    assert sign_flip(np.ones(40)) == pytest.approx(1e-4), "never 0"
    assert sign_flip(np.zeros(5)) == 1.0


@pytest.mark.parametrize("n", [6, 10, 30])
def test_false_positives_under_the_null(n: int) -> None:
    """Where nothing differs, p is below 0.05 in 5 of 100 cases or fewer, however long the tails are."""
    draw = np.random.default_rng(n)
    p = np.array([sign_flip(draw.standard_t(2, n)) for _ in range(600)])
    # Of n = 6 and 10 the p-values are whole multiples of 2 / 2^n, and the rate is known exactly.
    rate = np.floor(0.05 * 2 ** (n - 1)) / 2 ** (n - 1) if n < 14 else 0.05
    assert abs((p <= 0.05).mean() - rate) < 3.5 * np.sqrt(rate * (1 - rate) / len(p))
    assert np.mean([sign_flip(draw.normal(2.0, 1, n)) <= 0.05 for _ in range(50)]) > 0.9, "and finds what is there"


def outcome(seed: int, hits: np.ndarray, queries: str = "q") -> Outcome:
    run = Outcome(None, seed, Path())  # type: ignore[arg-type]
    run.shares, run.queries = {"r_mean": 100 * hits / len(hits)}, {"r_mean": queries}
    return run


def test_seeds_are_clusters() -> None:
    """Runs that differ by their seeds alone: with seeds as clusters a difference is rarely claimed, with images often.

    This is why both are reported, and what the second ignores.
    """
    draw, seeds, images = np.random.default_rng(0), 6, 60
    tests = []
    for _ in range(200):
        easy = draw.normal(0, 1, images)  # some images are found by all
        runs = [
            [outcome(s, (easy + draw.normal(0, 1) + draw.normal(0, 1, images) > 0).astype(float)) for s in range(seeds)]
            for _ in range(2)
        ]  # fmt: skip
        tests.append(paired_test(*runs, "r_mean"))
    by_seeds, by_images = (np.mean([t[p] <= 0.05 for t in tests if t]) for p in ("p_seeds", "p_images"))
    assert by_seeds < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200) and by_images > 0.3


def test_what_is_paired_with_what() -> None:
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2, (5, 40)).astype(float)
    runs = [outcome(2, rows[0]), outcome(0, rows[1]), outcome(5, rows[4])]
    base = [outcome(0, rows[2]), outcome(2, rows[3]), outcome(1, rows[4])]
    test = paired_test(runs, base, "r_mean")
    assert test is not None and (test["seeds"], test["images"]) == (2, 40)
    assert test["difference"] == pytest.approx(100 * np.mean([rows[0] - rows[3], rows[1] - rows[2]]))
    per_image = (rows[0] - rows[3] + rows[1] - rows[2]) / 2
    assert test["p_images"] == sign_flip(100 * per_image / 40)
    assert paired_test(runs, [outcome(0, rows[2], "other queries")], "r_mean") is None
    assert paired_test(runs, base, "zeroshot") is None


def curve(*evaluations: tuple[int, int, float, float]) -> list[dict[str, float]]:
    return [dict(zip(("steps", "passes", "seconds", "r_mean"), e, strict=True)) for e in evaluations]


def test_at_equal_cost_by_hand() -> None:
    cheap = [
        curve((10, 100, 1.0, 20.0), (20, 200, 2.0, 30.0), (30, 300, 3.0, 25.0)),
        curve((10, 100, 1.5, 22.0), (20, 200, 3.0, 24.0), (30, 300, 4.5, 40.0)),
    ]
    dear = [curve((10, 200, 4.0, 35.0), (20, 400, 8.0, 50.0))]
    best = at_equal_cost({"cheap": cheap, "dear": dear})
    assert {k: (v["at"], v["values"]) for k, v in best["cheap"].items()} == {
        "steps": (20, [30.0, 24.0]), "passes": (300, [30.0, 40.0]), "seconds": (3.0, [30.0, 24.0]),
    }  # fmt: skip
    assert best["cheap"]["passes"]["mean"] == 35 and best["cheap"]["passes"]["sd"] == pytest.approx(50**0.5)
    # After 3 seconds, the expensive one had not been evaluated.
    assert {k: (v["at"], v["values"]) for k, v in best["dear"].items()} == {
        "steps": (20, [50.0]),
        "passes": (300, [35.0]),
    }
    assert at_equal_cost({"cheap": cheap, "failed": [[]]}) == {"cheap": {}, "failed": {}}
    assert at_equal_cost({}) == {}


def result(variant: str, seed: int, recall: float, point: int = 0) -> Outcome:
    failure = "" if recall else "no luck"
    return Outcome(Cell(variant, {"size": point}, {}), seed, Path(), failure, {"r_mean": recall})


def test_who_is_too_far_behind() -> None:
    """Baselines and those that failed are not; the best at the same point of the grid, over the same seeds, counts."""
    first = [
        result("base", 0, 10.0), result("best", 0, 30.0), result("near", 0, 26.0), result("far", 0, 25.9),
        result("broken", 0, 0.0), result("far", 0, 5.0, point=1), result("base", 0, 6.0, point=1),
    ]  # fmt: skip
    assert too_far_behind(first, 1, 4.0, "base") == {"far,size=0": {"after": 1, "behind": pytest.approx(4.1)}}
    # Of what is left, the means of both seeds count: 28 for the best, 25 for near.
    second = [result("base", 1, 10.0), result("best", 1, 26.0), result("near", 1, 24.0), result("broken", 1, 99.0)]
    assert too_far_behind([*first, *second], 2, 4.0, "base") == {}
    assert too_far_behind([*first, *second[:2], result("near", 1, 21.9)], 2, 4.0, "base") == {
        "near,size=0": {"after": 2, "behind": pytest.approx(4.05)}
    }
