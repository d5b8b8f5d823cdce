"""Cross-validation in a comparison."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from amclr import cli
from amclr.compare.experiment import read_experiment
from amclr.compare.plan import plan
from amclr.compare.statistics import sign_flip
from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.runs.folder import Run
from amclr.utils.files import read_arrays
from tests.compare.experiments import run, written

pytestmark = pytest.mark.usefixtures("undrawn")


def test_folds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cross-validation: every training image is measured on once, by weights that have not seen it."""
    file = written(tmp_path / "small.yaml", folder, folds=3, seeds=[5, 6, 7, 8, 9, 10])
    comparison = run(file)
    assert not comparison.failed
    measured, shares = list[str](), dict[str, list[np.ndarray]]()
    for variant in ("sogclr", "amclr"):
        for k, seed in zip((1, 2, 3, 1, 2, 3), range(5, 11), strict=True):
            of = Run.open(tmp_path / "out" / "runs" / variant / f"seed{seed}")
            assert of.config.source.fold == f"{k}/3" and of.config.seed == seed
            hits = read_arrays(of.folder / "queries.npz")
            assert hits is not None
            _, owner = np.unique(hits["image_of_text"], return_inverse=True)
            own = np.bincount(owner, hits["img"].mean(1)) / len(owner) + hits["txt"].mean(1) / len(hits["txt"])
            shares.setdefault(variant, []).append(50 * own)
            held = {s.name for s in manifests.load(of.config, tmp_path).split("val")}
            result = comparison.results["rows"][variant == "amclr"]["runs"][seed - 5]
            assert len(own) == len(held) and 50 * sum(own) == pytest.approx(result["r_mean"], abs=1e-4)
            measured += held
    train = manifests.load(Config(data=str(folder)), tmp_path).split("train")
    assert Counter(measured) == {s.name: 4 for s in train} and len(train) == 32
    test = comparison.results["rows"][1]["against"]["r_mean"]
    # Both runs of a fold have the same queries, and are averaged.
    differences = [
        np.mean([shares["amclr"][k] - shares["sogclr"][k], shares["amclr"][k + 3] - shares["sogclr"][k + 3]], axis=0)
        for k in range(3)
    ]
    assert (test["seeds"], test["images"]) == (6, 32)
    assert test["difference"] == pytest.approx(np.mean([d.sum() for d in differences]))
    assert test["p_seeds"] == sign_flip(np.array([d.sum() for d in differences]))
    # Signs are drawn, and a difference that is 0 but for rounding draws them otherwise.
    assert test["p_images"] == pytest.approx(sign_flip(np.concatenate(differences)), abs=0.03)
    for part in ("| p, folds |", "cut into 3 parts, of which each in turn is held out", "cannot go below 0.25"):
        assert part in comparison.table
    assert (
        "same training images" not in comparison.table
        and "over the folds" in (tmp_path / "out/report.html").read_text()
    )
    # Some of the seeds are their folds; the finished runs are theirs.
    subset = run(file, seeds="5,6")
    assert subset.runs == 4 and "cut into 3 parts, of which 2 in turn" in subset.table
    one = subset.results["rows"][1]["against"]["r_mean"]
    own = [(shares["amclr"][k] - shares["sogclr"][k]).sum() for k in range(2)]
    assert one["seeds"] == 2 and one["p_seeds"] == sign_flip(np.array(own))
    (cell, _) = plan(read_experiment(file, seeds="7,8"), tmp_path)
    assert {s: c.source.fold for s, c in cell.configs.items()} == {7: "3/3", 8: "1/3"}
    for seeds in ("2", "5,11"):
        assert cli.main(["compare", str(file), "--seeds", seeds]) == 1
        assert "the seeds of the folds are 5, 6, 7, 8, 9, 10: choose from those" in capsys.readouterr().err
