"""Which images the zero-shot monitor looks at. Runs with a monitor are in tests/models/test_averaging.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amclr.evaluation import monitor
from amclr.evaluation.monitor import Monitor, balanced_subset
from amclr.utils.errors import UserError
from tests.models.test_averaging import classes
from tests.models.test_dual_encoder import encoder


def test_balanced_subset() -> None:
    labels = [0] * 50 + [1] * 3 + [2] * 30
    subset = balanced_subset(labels, 24)
    assert len(set(subset)) == len(subset) <= 24 and subset == balanced_subset(labels, 24)
    counts = np.bincount([labels[i] for i in subset])
    assert counts.tolist() == [10, 3, 10]
    assert np.diff([i for i in subset if labels[i] == 0]).tolist() == [5] * 9, "evenly spaced"
    assert balanced_subset(labels, 1000) == list(range(83))
    assert [labels[i] for i in balanced_subset(labels, 2)] == [0, 1, 2], "one of each class at least"


def test_monitored_images_are_spread_over_the_classes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(monitor, "MONITORED_IMAGES", 8)
    small = Monitor(encoder(), classes(folder))
    assert len(small.labels) + small.rejects == 8 and len(set(small.labels)) == 4
    with pytest.raises(UserError, match="needs a folder with one folder per class"):
        Monitor(encoder(), folder / "nowhere")
