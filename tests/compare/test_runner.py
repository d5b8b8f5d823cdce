"""Comparisons of many runs: fairness, budgets, resuming, failures, tables, the command line."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from PIL import Image, ImageColor

import amclr.training.step
from amclr import cli
from amclr.compare import Comparison, compare, report, runner
from amclr.training import loop
from amclr.training.loop import Stopped
from amclr.utils import figures
from amclr.utils.errors import UserError
from amclr.utils.files import read_arrays
from tests.compare.experiments import BASE, STEPS, run, written
from tests.conftest import Command

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_comparison(
    folder: Path, tmp_path: Path, classes: Path, steps_made: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "small.yaml", folder, grid={"optim.name": ["adamw", "sgd"]}, regime="all of them")
    comparison = run(file, zeroshot=[str(classes)])
    assert not comparison.failed and sum(steps_made.values()) == 8 * STEPS
    out = tmp_path / "out"
    rows = {(r["variant"], r["grid"]["optim.name"]): r for r in comparison.results["rows"]}
    assert list(rows) == [("sogclr", "adamw"), ("amclr", "adamw"), ("sogclr", "sgd"), ("amclr", "sgd")]
    for (variant, _), row in rows.items():
        views = {"sogclr": 1, "amclr": 2}[variant]
        for number in ("image_passes", "caption_passes"):
            assert row["budget"][number]["values"] == [views * 8 * STEPS] * 2
        for one in row["runs"]:
            own = json.loads((Path(one["folder"]) / "results.json").read_text())
            for measure in ("txt_r_mean", "img_r_mean", "r_mean", "txt_r1", "img_r1"):
                assert one[measure] == pytest.approx(own[measure], abs=1e-4)
            assert 0 < one["seconds"] < 60 and [e["epoch"] for e in one["curve"]] == [1.0, 2.0]
            assert [(e["steps"], e["passes"]) for e in one["curve"]] == [(4, 8 * views * 8), (8, 16 * views * 8)]
            assert 0 < one["curve"][0]["seconds"] < one["curve"][1]["seconds"] == pytest.approx(one["seconds"])
            assert max(e["r_mean"] for e in one["curve"]) == pytest.approx(one["r_mean"], abs=1e-4)
        values = [one["r_mean"] for one in row["runs"]]
        assert row["measures"]["r_mean"]["mean"] == pytest.approx(np.mean(values))
        assert row["measures"]["r_mean"]["sd"] == pytest.approx(np.std(values, ddof=1))
        assert row["measures"]["zeroshot colours"]["values"] == [one["zeroshot colours"] for one in row["runs"]]
    # A variant is tested against the baseline at its own point of the grid.
    for optimiser in ("adamw", "sgd"):
        own, base = (rows[v, optimiser]["measures"]["r_mean"]["mean"] for v in ("amclr", "sogclr"))
        test = rows["amclr", optimiser]["against"]["r_mean"]
        assert test["difference"] == pytest.approx(own - base) and (test["seeds"], test["images"]) == (2, 8)
        assert not rows["sogclr", optimiser]["against"]
    # At equal cost: 128 passes are all of SogCLR's, and the first epoch of AmCLR.
    for (variant, _), row in rows.items():
        equal = row["at equal cost"]
        assert (equal["steps"]["at"], equal["passes"]["at"]) == (8, 128)
        assert equal["steps"]["values"] == [max(e["r_mean"] for e in one["curve"]) for one in row["runs"]]
        last = 1 if variant == "amclr" else 2
        assert equal["passes"]["values"] == [max(e["r_mean"] for e in one["curve"][:last]) for one in row["runs"]]
    # Two numbers of seconds, or one where a slow machine left nothing to compare at the other point of the grid.
    at = {equal["seconds"]["at"] for row in rows.values() if "seconds" in (equal := row["at equal cost"])}
    seconds = f"{at.pop():,.1f}" if len(at) == 1 else "equal"
    header = f"| variant | optim.name | by 8 steps | by 0.128 thousand passes | by {seconds} seconds |"
    assert header in comparison.table
    assert "**small (all of them)**" in comparison.table and "with 2 seeds, it cannot go below 0.5" in comparison.table
    assert "| amclr | sgd |" in comparison.table and "1 of an image (weak), 1 of a caption: sogclr" in comparison.table
    with (out / "table.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert [float(line["r_mean"]) for line in lines] == [r["measures"]["r_mean"]["mean"] for r in rows.values()]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and not re.search(r"<script|<link|(src|href)=\"(?!data:)", page)
    # A notebook shows the same tables and figures, and names as text.
    assert repr(comparison) == f"<amclr comparison '{out}': 4 variants, 8 runs>"
    shown = comparison._repr_html_()
    assert shown.count("data:image/png;base64,") == 4 and "<td>amclr</td><td>sgd</td>" in shown
    named = json.loads(json.dumps(comparison.results).replace("sogclr", "<script>"))
    assert "<script" not in (strange := Comparison(out, named)._repr_html_()) and "&lt;script&gt;" in strange
    for figure in ("retrieval.png", "zeroshot.png", "learning.png", "cost.png"):
        with Image.open(out / figure) as image:
            assert min(image.size) > 200
            shown = np.array(image.convert("RGB").crop((0, 0, image.width * 0.55, image.height)))  # not the legend
        for colour in (figures.BLUE, figures.ORANGE):
            assert (shown == ImageColor.getrgb(colour)).all(axis=-1).sum() > 20, f"{colour} in {figure}"
    # Again: nothing is trained, and nothing differs.
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("trained a run that was done"))
    monkeypatch.setattr(report, "draw", lambda *_: {})
    assert run(file, zeroshot=[str(classes)]).results == comparison.results
    with pytest.raises(UserError, match=r"epochs is 2 there, 3 here. Give another --out"):
        run(written(file, folder, settings={**BASE["settings"], "epochs": 3}, grid={"optim.name": ["sgd"]}))


def test_runs_of_a_seed_differ_in_the_objective_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples, their order, first views, captions and starting weights: the objective alone differs."""
    seen: dict[tuple[str, int], list[Any]] = {}
    advance = loop.advance

    def look(t: Any, batch: Any) -> Any:
        rows = seen.setdefault((t.config.objective, t.config.seed), [])
        if not rows:
            rows.append({k: v.clone() for k, v in t.model.state_dict().items()})
        n = len(batch.ids)
        drawn = amclr.training.step.embed(
            lambda images, tokens: (images.float().flatten(1), tokens["input_ids"]), batch
        )
        rows.append((batch.ids.clone(), drawn["image"].clone(), drawn["text"][:n].clone()))
        return advance(t, batch)

    monkeypatch.setattr(loop, "advance", look)
    monkeypatch.setattr(report, "draw", lambda *_: {})
    trained = {**BASE["settings"], "model": {"image_size": 32, "dim": 16}, "epochs": 1}
    assert not run(written(tmp_path / "small.yaml", folder, settings=trained)).failed
    for seed in (0, 1):
        (weights, *first), (others, *second) = seen["sogclr", seed], seen["amclr", seed]
        assert all(torch.equal(v, others[k]) for k, v in weights.items())
        assert len(first) == len(second) == 4
        for one, other in zip(first, second, strict=True):
            # Captions of a batch are padded to the longest, which may be a second view.
            width = min(one[2].shape[1], other[2].shape[1])
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
            assert torch.equal(one[2][:, :width], other[2][:, :width])
    assert not torch.equal(seen["sogclr", 0][1][0], seen["sogclr", 1][1][0])
    assert not all(torch.equal(v, seen["sogclr", 1][0][k]) for k, v in seen["sogclr", 0][0].items())


def test_equal_passes(
    experiment: Path, folder: Path, steps_made: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})
    comparison = run(written(experiment, folder, equal="passes", seeds=1))
    assert steps_made == {("sogclr", 0): 2 * STEPS, ("amclr", 0): STEPS}
    rows = {row["variant"]: row for row in comparison.results["rows"]}
    passes = [r["budget"]["image_passes"]["mean"] + r["budget"]["caption_passes"]["mean"] for r in rows.values()]
    assert passes == [256, 256] and (rows["sogclr"]["epochs"], rows["amclr"]["epochs"]) == (4, 2)
    config = yaml.safe_load((Path(rows["sogclr"]["runs"][0]["folder"]) / "config.yaml").read_text())
    assert config["epochs"] == 4, "so that its schedule ends with it"
    assert " epochs | passes (thousands) |" in comparison.table and " | 4 | 0.256 | " in comparison.table
    assert "by 8 steps | by 0.256 thousand passes" in comparison.table
    with pytest.raises(UserError, match="epochs is 4 there, 2 here"):
        run(written(experiment, folder, seeds=1))


def test_variants_too_far_behind_are_cut(
    experiment: Path,
    folder: Path,
    tmp_path: Path,
    steps_made: Counter[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})
    same = {"baseline": ""}
    comparison = run(written(experiment, folder, **same, cut={"behind": 0.01}))
    rows = {row["variant"]: row for row in comparison.results["rows"]}
    first = {name: row["runs"][0]["r_mean"] for name, row in rows.items()}
    hopeless = {name for name in rows if first[name] < max(first.values()) - 0.01}
    assert len(hopeless) == 1 and {name for name, row in rows.items() if row["cut"]} == hopeless
    made = {(name, seed) for name in rows for seed in (0, 1) if not (seed and name in hopeless)}
    assert set(steps_made) == made and not comparison.failed and comparison.runs == len(made)
    for name in hopeless:
        behind = max(first.values()) - first[name]
        assert rows[name]["cut"] == {"after": 1, "behind": pytest.approx(behind)} and len(rows[name]["runs"]) == 1
        assert (
            f"- {name}: cut after 1 seed, {behind:.1f} behind" in comparison.table and "| 1, cut |" in comparison.table
        )
    # Again, nothing is trained and all is as it was; without the cut, the others are made too; with it they do not count.
    before = steps_made.copy()
    assert run(experiment).results == comparison.results and steps_made == before
    assert run(written(experiment, folder, **same)).runs == 4 and sum(steps_made.values()) == 4 * STEPS
    assert run(written(experiment, folder, **same, cut={"behind": 0.01})).results["rows"] == comparison.results["rows"]


def test_a_failing_run_does_not_stop_the_others(
    experiment: Path, tmp_path: Path, steps_made: Counter[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    counted = loop.advance

    def broken(t: Any, batch: Any) -> Any:
        if (t.config.objective, t.config.seed) == ("sogclr", 1) and t.step == 5:
            raise RuntimeError("no such kernel")
        return counted(t, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "advance", broken)
        assert cli.main(["compare", str(experiment), "--out", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert output.err.endswith("amclr: 1 of 4 runs failed: the table says why\n")
    assert "- sogclr, seed 1: RuntimeError: no such kernel (see " in output.out and "| 1 of 2 |" in output.out
    trace = tmp_path / "out/runs/sogclr/seed1-error.txt"
    assert str(trace) in output.out and "in broken" in trace.read_text()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [len(r["measures"]["r_mean"]["values"]) for r in results["rows"]] == [1, 2]
    assert results["rows"][1]["against"]["r_mean"]["seeds"] == 1
    # The same command tries it again, from where it was, and leaves the others be.
    before = steps_made.copy()
    rerun = run(experiment)
    assert not rerun.failed and steps_made - before == {("sogclr", 1): 4}, "resumes from the checkpoint of epoch 1"


def test_all_runs_may_fail(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise UserError("the data are gone")

    monkeypatch.setattr(loop, "advance", broken)
    comparison = run(experiment)
    assert comparison.failed == 4 and "- amclr, seed 1: the data are gone" in comparison.table
    assert "<h2>Runs</h2>" in (comparison.folder / "report.html").read_text()


def test_interrupted_and_resumed(
    experiment: Path, tmp_path: Path, steps_made: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of the second run: no step is made twice, and the end is that without it."""
    monkeypatch.setattr(report, "draw", lambda *_: {})
    counted = loop.advance

    def interrupted(t: Any, batch: Any) -> Any:
        if (t.config.objective, t.step) == ("amclr", 2):
            signal.raise_signal(signal.SIGTERM)
        return counted(t, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", interrupted)
        with pytest.raises(Stopped, match=rf"To resume: amclr compare {experiment} --out .*out$") as stopped:
            run(experiment)
    assert stopped.value.code == 143 and steps_made == {("sogclr", 0): STEPS, ("amclr", 0): 3}
    # What a kill leaves of a run that has only made its folder.
    (tmp_path / "out/runs/sogclr/seed1/checkpoints").mkdir(parents=True)
    (tmp_path / "out/runs/sogclr/seed1/environment.json").write_text("{}")
    comparison = run(experiment)
    assert steps_made == {(o, s): STEPS for o in ("sogclr", "amclr") for s in (0, 1)}
    whole = compare(experiment, out=str(tmp_path / "whole"), progress=False)
    for one, other in zip(comparison.results["rows"], whole.results["rows"], strict=True):
        assert one["measures"] == other["measures"] and one["against"] == other["against"]


def test_ctrl_c_between_runs_says_how_to_resume(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "collect", pressed)
    with pytest.raises(Stopped, match="To resume: amclr compare") as stopped:
        run(experiment)
    assert stopped.value.code == 130


def test_two_at_once_are_refused(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another amclr compare is running"):
        run(experiment)


def test_a_damaged_file_of_hits_is_made_again(
    experiment: Path, steps_made: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})
    first = run(experiment, seeds="1")
    file = Path(first.results["rows"][0]["runs"][0]["folder"]) / "queries.npz"
    file.write_bytes(file.read_bytes()[:100])
    before = steps_made.copy()
    assert run(experiment, seeds="1").results["rows"] == first.results["rows"] and steps_made == before
    assert read_arrays(file) is not None


def test_the_command(main: Command, experiment: Path, classes: Path, tmp_path: Path) -> None:
    done = main("compare", experiment, "--seeds", "1", "--zeroshot", classes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "run 2 of 2: amclr, seed 0: text retrieval" in done.stderr
    assert f"Made by `amclr compare {experiment} --seeds 1 --zeroshot {classes}`" in done.stdout
    assert (tmp_path / "runs/compare-small/report.html").is_file() and "colours top-1" in done.stdout


@pytest.mark.slow
def test_killed_and_resumed(amclr: Command, folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the third of four runs: the two before it are not touched again."""
    file = written(tmp_path / "e.yaml", folder, settings={**BASE["settings"], "epochs": 12})
    command = [sys.executable, "-m", "amclr", "compare", str(file), "--out", "out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    runs = tmp_path / "out" / "runs"
    deadline = time.monotonic() + 200
    while not (runs / "sogclr/seed1/checkpoints/step-00000008.pt").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    before = {f: f.stat().st_mtime_ns for seed in ("sogclr/seed0", "amclr/seed0") for f in (runs / seed).rglob("*.pt")}
    assert before
    done = amclr("compare", file, "--out", "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(f.stat().st_mtime_ns == then for f, then in before.items())
    whole = amclr("compare", file, "--out", "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    rows = [json.loads((tmp_path / o / "results.json").read_text())["rows"] for o in ("out", "whole")]
    assert [r["measures"] for r in rows[0]] == [r["measures"] for r in rows[1]]
