"""The runs of an experiment: equal budgets."""

from __future__ import annotations

from pathlib import Path

from amclr.compare.experiment import read_experiment
from amclr.compare.plan import plan
from tests.compare.experiments import written


def test_as_many_passes(folder: Path, tmp_path: Path) -> None:
    """Epochs by hand: 32 images; views at a step 2 (SogCLR), 4 (AmCLR), 2 (SimCLR), 4 (CLIP with all pairs)."""
    variants = {
        "sogclr": None,
        "amclr": None,
        "simclr": None,
        "wide": {"objective": "clip", "loss.pairs": "all"},
        "uneven": {"objective": "sogclr", "batch_size": 12},  # 24 of the images an epoch
    }
    file = written(tmp_path / "e.yaml", folder, variants=variants, equal="passes", grid={"epochs": [3, 5]})
    cells = plan(read_experiment(file), tmp_path / "out")
    epochs = {(c.variant, c.point["epochs"]): {config.epochs for config in c.configs.values()} for c in cells}
    assert epochs == {
        ("sogclr", 3): {6}, ("amclr", 3): {3}, ("simclr", 3): {6}, ("wide", 3): {3}, ("uneven", 3): {8},
        ("sogclr", 5): {10}, ("amclr", 5): {5}, ("simclr", 5): {10}, ("wide", 5): {5}, ("uneven", 5): {13},
    }  # fmt: skip
    alone = plan(read_experiment(written(file, folder, variants=["sogclr"], equal="passes")), tmp_path / "out")
    assert alone[0].configs[0].epochs == 2, "nothing is more expensive"
