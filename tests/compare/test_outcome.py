"""What came of a run: seconds of its evaluations, zero-shot and paraphrased queries."""

from __future__ import annotations

from pathlib import Path

import pytest

from amclr.compare import report
from amclr.compare.outcome import learning_curve
from amclr.config.schema import Config
from amclr.evaluation.run import evaluate_run
from tests.compare.experiments import paraphrases_file, run, written

pytestmark = pytest.mark.usefixtures("undrawn")


def test_seconds_of_an_evaluation() -> None:
    """Time is logged at steps 1, 11 and 16: 2 s, then 10 x 1 s, then 5 x 3 s; evaluations lie in between."""
    rows = [
        {"kind": "train", "step": 1, "seconds_per_step": 2.0}, {"kind": "eval", "step": 6, "epoch": 1.0, "r_mean": 5.0},
        {"kind": "train", "step": 11, "seconds_per_step": 1.0}, {"kind": "eval", "step": 12, "epoch": 2.0, "r_mean": 7.0},
        {"kind": "train", "step": 16, "seconds_per_step": 3.0}, {"kind": "eval", "step": 16, "epoch": 3.0, "r_mean": 6.0},
    ]  # fmt: skip
    curve = learning_curve(Config(objective="amclr", batch_size=8), rows)
    assert [(e["steps"], e["passes"], e["seconds"]) for e in curve] == [(6, 192, 7.0), (12, 384, 15.0), (16, 512, 27.0)]


def test_prompts_and_paraphrased_queries(
    folder: Path, tmp_path: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measures of every run like the others: what `amclr evaluate` finds, tested, and measured once."""
    monkeypatch.setattr(report, "draw", lambda *_: {})
    options = {
        "paraphrased": paraphrases_file(tmp_path / "mine.csv"),
        "zeroshot": [str(classes)],
        "templates": "simple",
    }
    file = written(tmp_path / "small.yaml", folder, **options)
    comparison = run(file)
    assert not comparison.failed
    names = ("paraphrased img_r_mean", "paraphrased drop", "paraphrased overlap", "paraphrased rbo")
    for row in comparison.results["rows"]:
        one = row["runs"][1]
        evaluated = evaluate_run(
            Path(one["folder"]), paraphrased=options["paraphrased"], zeroshot=options["zeroshot"], templates="simple",
            progress=False,
        )  # fmt: skip
        paraphrased = evaluated["paraphrased"]
        assert (paraphrased["captions"], paraphrased["without"]) == (8, 8)
        drop = paraphrased["as_is"]["img_r_mean"] - paraphrased["paraphrased"]["img_r_mean"]
        expected = (paraphrased["paraphrased"]["img_r_mean"], drop, paraphrased["overlap"], 100 * paraphrased["rbo"])
        assert [one[name] for name in names] == pytest.approx(expected, abs=1e-3)
        assert one["zeroshot colours"] == pytest.approx(evaluated["zeroshot_top1"], abs=1e-3)
    base, other = comparison.results["rows"]
    for name in names:
        test = other["against"][name]
        means = [row["measures"][name]["mean"] for row in (other, base)]
        assert test["difference"] == pytest.approx(means[0] - means[1]) and 0 < test["p_seeds"] <= 1
        assert test["images"] == 8 and test["seeds"] == 2
    assert "| image retrieval, paraphrased | RBO, paraphrased |" in comparison.table.replace("colours top-1 | ", "")
    about = "4 names (as its folders are called), 7 prompts (simple, by open_clip)"
    assert comparison.results["zeroshot"] == {"colours": about} and f"Zero-shot: colours: {about}." in comparison.table
    assert (
        f"Paraphrased by {options['paraphrased']}: queries are the paraphrases of the captions that have one."
        in comparison.table
    )
    # Again: what is there is taken. With other prompts or paraphrases it is measured anew.
    times = {
        f: f.stat().st_mtime_ns
        for f in (tmp_path / "out" / "runs").rglob("*.npz")
        if "paraphrased" in f.name or "zeroshot" in f.name
    }
    assert len(times) == 8
    assert run(file).results == comparison.results and all(f.stat().st_mtime_ns == t for f, t in times.items())
    some = (tmp_path / "mine.csv").read_text().splitlines()[:8]
    (tmp_path / "mine.csv").write_text("\n".join(some))
    run(written(file, folder, **options | {"templates": "amclr"}))
    assert all(f.stat().st_mtime_ns != t for f, t in times.items())
