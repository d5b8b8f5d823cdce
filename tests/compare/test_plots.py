"""Figures of comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from amclr.compare.plots import without_fold_means


def test_figures_of_folds_show_what_variants_differ_in() -> None:
    """Folds that differ by 10 points for all variants; a run that is missing takes those of its fold out."""
    runs = {"a": {0: 30.0, 1: 40.0, 2: 50.0}, "b": {0: 31.0, 1: 43.0}}
    rows = [
        {"variant": v, "grid": {}, "runs": [{"seed": s, "r_mean": values.get(s)} if s in values else {"seed": s} for s in range(3)]}
        for v, values in runs.items()
    ]  # fmt: skip
    alike = [without_fold_means({"rows": rows}, row, "r_mean") for row in rows]
    assert alike == [pytest.approx([35.5, 34.5]), pytest.approx([36.5, 37.5])]
    assert np.mean(alike[1]) - np.mean(alike[0]) == pytest.approx(2)
