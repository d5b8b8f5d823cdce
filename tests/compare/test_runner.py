"""Comparisons of many runs: experiment files, fairness, budgets, going on, what fails, tables, tests of significance."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor

import amclr.training.step
from amclr import cli
from amclr.compare import report
from amclr.compare import runner as compare
from amclr.compare.runner import Comparison, Outcome, against, plan, read, sign_flip
from amclr.config.schema import Config, flat
from amclr.data import manifest as manifests
from amclr.data.images import decode as images
from amclr.evaluation.evaluator import evaluate_run
from amclr.models.features import caption_features, image_features
from amclr.runs.folder import Run
from amclr.runs.loading import initial_model
from amclr.training import loop
from amclr.training.loop import Stopped
from amclr.utils import figures
from amclr.utils.errors import UserError
from amclr.utils.files import read_arrays
from tests.conftest import COLOURS, Command, paint
from tests.processes import Processes

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]

# Both towers frozen at random weights: a run takes a second.
BASE: dict[str, Any] = {
    "recipe": "scratch",
    "settings": {
        "epochs": 2, "batch_size": 8, "accelerator": "cpu", "views.image": "weak",
        "model": {"image_size": 32, "dim": 16, "image_lr": 0, "text_lr": 0, "head": "residual", "hidden": 32},
    },
    "variants": ["sogclr", "amclr"], "seeds": 2, "baseline": "sogclr",
}  # fmt: skip
STEPS = 8


@pytest.fixture
def experiment(folder: Path, tmp_path: Path) -> Path:
    """An experiment file on the small folder."""
    return written(tmp_path / "small.yaml", folder)


def written(file: Path, folder: Path, **changes: Any) -> Path:
    values = BASE | changes
    if isinstance(values["settings"], dict):
        values["settings"] = {**values["settings"], "data": str(folder)}
    file.write_text(yaml.safe_dump(values))
    return file


def run(file: Path, **changes: Any) -> Comparison:
    return compare.compare(file, out=str(file.parent / "out"), progress=False, **changes)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Patches by colour."""
    for colour in COLOURS:
        (tmp_path / "colours" / "test" / colour).mkdir(parents=True)
        for k in range(3):
            paint(colour, 300 + k).save(tmp_path / "colours" / "test" / colour / f"{k}.png")
    return tmp_path / "colours" / "test"


@pytest.fixture
def steps_made(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Steps that were made, by objective and seed."""
    made, advance = Counter[tuple[str, int]](), loop.advance

    def counted(t: Any, batch: Any) -> Any:
        made[t.config.objective, t.config.seed] += 1
        return advance(t, batch)

    monkeypatch.setattr(loop, "advance", counted)
    return made


# -- all of it -----------------------------------------------------------------------------------


def test_a_comparison(
    folder: Path, tmp_path: Path, classes: Path, steps_made: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "small.yaml", folder, grid={"optim.name": ["adamw", "sgd"]}, regime="all of them")
    found = run(file, zeroshot=[str(classes)])
    assert not found.failed and sum(steps_made.values()) == 8 * STEPS
    out = tmp_path / "out"
    rows = {(r["variant"], r["grid"]["optim.name"]): r for r in found.results["rows"]}
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
    assert header in found.table
    assert (
        "**small (all of them)**" in found.table
        and "with seeds as many as here, 2, it cannot go below 0.5" in found.table
    )
    assert "| amclr | sgd |" in found.table and "1 of an image (weak), 1 of a caption: sogclr" in found.table
    with (out / "table.csv").open() as handle:
        lines = list(csv.DictReader(handle))
    assert [float(line["r_mean"]) for line in lines] == [r["measures"]["r_mean"]["mean"] for r in rows.values()]
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and not re.search(r"<script|<link|(src|href)=\"(?!data:)", page)
    # A notebook shows the same tables and figures, and names as text.
    assert repr(found) == f"<amclr comparison '{out}': 4 variants, 8 runs>"
    shown = found._repr_html_()
    assert shown.count("data:image/png;base64,") == 4 and "<td>amclr</td><td>sgd</td>" in shown
    named = json.loads(json.dumps(found.results).replace("sogclr", "<script>"))
    assert "<script" not in (strange := Comparison(out, named)._repr_html_()) and "&lt;script&gt;" in strange
    for figure in ("retrieval.png", "zeroshot.png", "learning.png", "cost.png"):
        with Image.open(out / figure) as image:
            assert min(image.size) > 200
            shown = np.array(image.convert("RGB").crop((0, 0, image.width * 0.55, image.height)))  # not the legend
        for colour in (figures.BLUE, figures.ORANGE):
            assert (shown == ImageColor.getrgb(colour)).all(axis=-1).sum() > 20, f"{colour} in {figure}"
    # Again: nothing is trained, and nothing differs.
    monkeypatch.setattr(compare, "train", lambda *_, **__: pytest.fail("trained a run that was done"))
    monkeypatch.setattr(report, "draw", lambda *_: {})
    assert run(file, zeroshot=[str(classes)]).results == found.results
    with pytest.raises(UserError, match=r"epochs is 2 there, 3 here. Give another --out"):
        run(written(file, folder, settings={**BASE["settings"], "epochs": 3}, grid={"optim.name": ["sgd"]}))


def test_runs_of_a_seed_begin_and_go_on_alike(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


# -- budgets ---------------------------------------------------------------------------------------


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
    cells = plan(read(file), tmp_path / "out")
    epochs = {(c.variant, c.point["epochs"]): {config.epochs for config in c.configs.values()} for c in cells}
    assert epochs == {
        ("sogclr", 3): {6}, ("amclr", 3): {3}, ("simclr", 3): {6}, ("wide", 3): {3}, ("uneven", 3): {8},
        ("sogclr", 5): {10}, ("amclr", 5): {5}, ("simclr", 5): {10}, ("wide", 5): {5}, ("uneven", 5): {13},
    }  # fmt: skip
    alone = plan(read(written(file, folder, variants=["sogclr"], equal="passes")), tmp_path / "out")
    assert alone[0].configs[0].epochs == 2, "nothing is more expensive"


def test_equal_passes(
    experiment: Path, folder: Path, steps_made: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})
    found = run(written(experiment, folder, equal="passes", seeds=1))
    assert steps_made == {("sogclr", 0): 2 * STEPS, ("amclr", 0): STEPS}
    rows = {row["variant"]: row for row in found.results["rows"]}
    passes = [r["budget"]["image_passes"]["mean"] + r["budget"]["caption_passes"]["mean"] for r in rows.values()]
    assert passes == [256, 256] and (rows["sogclr"]["epochs"], rows["amclr"]["epochs"]) == (4, 2)
    config = yaml.safe_load((Path(rows["sogclr"]["runs"][0]["folder"]) / "config.yaml").read_text())
    assert config["epochs"] == 4, "so that its schedule ends with it"
    assert " epochs | passes (thousands) |" in found.table and " | 4 | 0.256 | " in found.table
    assert "by 8 steps | by 0.256 thousand passes" in found.table
    with pytest.raises(UserError, match="epochs is 4 there, 2 here"):
        run(written(experiment, folder, seeds=1))


def curve(*evaluations: tuple[int, int, float, float]) -> list[dict[str, float]]:
    return [dict(zip(("steps", "passes", "seconds", "r_mean"), e, strict=True)) for e in evaluations]


def test_at_equal_cost_by_hand() -> None:
    cheap = [
        curve((10, 100, 1.0, 20.0), (20, 200, 2.0, 30.0), (30, 300, 3.0, 25.0)),
        curve((10, 100, 1.5, 22.0), (20, 200, 3.0, 24.0), (30, 300, 4.5, 40.0)),
    ]
    dear = [curve((10, 200, 4.0, 35.0), (20, 400, 8.0, 50.0))]
    found = compare.at_equal_cost({"cheap": cheap, "dear": dear})
    assert {k: (v["at"], v["values"]) for k, v in found["cheap"].items()} == {
        "steps": (20, [30.0, 24.0]), "passes": (300, [30.0, 40.0]), "seconds": (3.0, [30.0, 24.0]),
    }  # fmt: skip
    assert found["cheap"]["passes"]["mean"] == 35 and found["cheap"]["passes"]["sd"] == pytest.approx(50**0.5)
    # After 3 seconds, the expensive one had not been evaluated.
    assert {k: (v["at"], v["values"]) for k, v in found["dear"].items()} == {
        "steps": (20, [50.0]),
        "passes": (300, [35.0]),
    }
    assert compare.at_equal_cost({"cheap": cheap, "failed": [[]]}) == {"cheap": {}, "failed": {}}
    assert compare.at_equal_cost({}) == {}


def test_seconds_of_an_evaluation() -> None:
    """Time is logged at steps 1, 11 and 16: 2 s, then 10 x 1 s, then 5 x 3 s; evaluations lie in between."""
    rows = [
        {"kind": "train", "step": 1, "seconds_per_step": 2.0}, {"kind": "eval", "step": 6, "epoch": 1.0, "r_mean": 5.0},
        {"kind": "train", "step": 11, "seconds_per_step": 1.0}, {"kind": "eval", "step": 12, "epoch": 2.0, "r_mean": 7.0},
        {"kind": "train", "step": 16, "seconds_per_step": 3.0}, {"kind": "eval", "step": 16, "epoch": 3.0, "r_mean": 6.0},
    ]  # fmt: skip
    found = compare._curve(Config(objective="amclr", batch_size=8), rows)
    assert [(e["steps"], e["passes"], e["seconds"]) for e in found] == [(6, 192, 7.0), (12, 384, 15.0), (16, 512, 27.0)]


# -- cut -------------------------------------------------------------------------------------------


def test_hopeless_ones_are_cut(
    experiment: Path,
    folder: Path,
    tmp_path: Path,
    steps_made: Counter[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "draw", lambda *_: {})
    same = {"baseline": ""}
    found = run(written(experiment, folder, **same, cut={"behind": 0.01}))
    rows = {row["variant"]: row for row in found.results["rows"]}
    first = {name: row["runs"][0]["r_mean"] for name, row in rows.items()}
    hopeless = {name for name in rows if first[name] < max(first.values()) - 0.01}
    assert len(hopeless) == 1 and {name for name, row in rows.items() if row["cut"]} == hopeless
    made = {(name, seed) for name in rows for seed in (0, 1) if not (seed and name in hopeless)}
    assert set(steps_made) == made and not found.failed and found.runs == len(made)
    for name in hopeless:
        behind = max(first.values()) - first[name]
        assert rows[name]["cut"] == {"after": 1, "behind": pytest.approx(behind)} and len(rows[name]["runs"]) == 1
        assert f"- {name}: cut after 1 seed, {behind:.1f} behind" in found.table and "| 1, cut |" in found.table
    # Again, nothing is trained and all is as it was; without the cut, the others are made too; with it they do not count.
    before = steps_made.copy()
    assert run(experiment).results == found.results and steps_made == before
    assert run(written(experiment, folder, **same)).runs == 4 and sum(steps_made.values()) == 4 * STEPS
    assert run(written(experiment, folder, **same, cut={"behind": 0.01})).results["rows"] == found.results["rows"]


def result(variant: str, seed: int, recall: float, point: int = 0) -> Outcome:
    failure = "" if recall else "no luck"
    return Outcome(compare.Cell(variant, {"size": point}, {}), seed, Path(), failure, {"r_mean": recall})


def test_who_is_hopeless() -> None:
    """Baselines and those that failed are not; the best at the same point of the grid, over the same seeds, counts."""
    plans = compare.Experiment({}, baseline="base", cut={"behind": 4.0, "after": 1})
    first = [
        result("base", 0, 10.0), result("best", 0, 30.0), result("near", 0, 26.0), result("far", 0, 25.9),
        result("broken", 0, 0.0), result("far", 0, 5.0, point=1), result("base", 0, 6.0, point=1),
    ]  # fmt: skip
    assert compare.hopeless(first, plans, 1) == {"far,size=0": {"after": 1, "behind": pytest.approx(4.1)}}
    # Of what is left, the means of both seeds count: 28 for the best, 25 for near.
    second = [result("base", 1, 10.0), result("best", 1, 26.0), result("near", 1, 24.0), result("broken", 1, 99.0)]
    assert compare.hopeless([*first, *second], plans, 2) == {}
    assert compare.hopeless([*first, *second[:2], result("near", 1, 21.9)], plans, 2) == {
        "near,size=0": {"after": 2, "behind": pytest.approx(4.05)}
    }


# -- several at a time -----------------------------------------------------------------------------


def measured(found: Comparison | Path) -> list[Any]:
    """What must not depend on what ran beside what."""
    rows = (
        json.loads((found / "results.json").read_text())["rows"] if isinstance(found, Path) else found.results["rows"]
    )
    return [(row["variant"], row["grid"], row["measures"], row["against"], row["cut"]) for row in rows]


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes of runs have too, whatever the machine: sums then round alike."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
def test_two_at_a_time_are_the_same(
    experiment: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(report, "draw", lambda *_: {})
    experiment.write_text(f"{experiment.read_text()}\nparaphrased: {reworded(tmp_path / 'mine.csv')}\n")
    assert cli.main(["compare", str(experiment), "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "two")]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("run ")]
    assert [line[:11] for line in lines] == ["run 1 of 2:", "run 2 of 2:"] and "2 at a time" in said.err
    assert {line.split()[4] for line in lines} == {"sogclr,", "amclr,"}
    assert "Runs were made 2 at a time: seconds are those beside others" in said.out and "--jobs 2`" in said.out
    one = run(experiment, seeds="1")
    assert measured(tmp_path / "two") == measured(one) and "at a time" not in one.table
    assert not list((tmp_path / "two").rglob("*output.txt"))
    # Taken as they are, whatever the number now is; what they ran beside is not forgotten.
    monkeypatch.setattr(compare, "train", lambda *_, **__: pytest.fail("trained a run that was done"))
    monkeypatch.setattr(compare, "side_by_side", lambda *_: pytest.fail("started a process for a run that was done"))
    for jobs in (1, 3):
        again = compare.compare(experiment, seeds="1", out=str(tmp_path / "two"), jobs=jobs, progress=False)
        assert measured(again) == measured(one) and "made 2 at a time" in again.table


class Beside:
    """`amclr compare FILE --jobs 2 --out out` in a process of its own, with those that it started."""

    def __init__(self, file: Path) -> None:
        self.out, self.said = file.parent / "out", file.parent / "said.txt"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "amclr", "compare", str(file), "--jobs", "2", "--out", "out"],
                cwd=file.parent, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def workers(self) -> dict[int, Path]:
        """The processes of its runs, and where these lie: what they print goes beside that."""
        found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
        found = [pid for pid in found if parent_of(pid) == self.process.pid]
        return {pid: Path(os.readlink(f"/proc/{pid}/fd/1").replace("-output.txt", "")) for pid in found}

    def until_they_train(self) -> dict[int, Path]:
        """Wait until two runs go on at once, and have made steps."""
        deadline = time.monotonic() + 300
        while len(running := self.workers()) < 2 or not all((f / "metrics.jsonl").is_file() for f in running.values()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.said.read_text()[-2000:]
            time.sleep(0.1)
        return running


def parent_of(pid: int) -> int:
    """The parent of a process that runs; 0 where it has ended."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return 0
    return int(parent) if state != "Z" else 0


@pytest.fixture
def longer(folder: Path, tmp_path: Path) -> Callable[[int], Path]:
    """An experiment of two objectives over so many seeds, whose runs take some seconds each."""
    settings = {**BASE["settings"], "epochs": 40, "eval_every": 20}
    return lambda seeds: written(tmp_path / "longer.yaml", folder, settings=settings, seeds=seeds)


def steps_logged(folder: Path) -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["kind"] == "train"]


def as_one_after_the_other(file: Path, out: Path) -> bool:
    """Whether a comparison gone on with, its runs side by side, is the same as with one run after the other."""
    again = compare.compare(file, out=str(out), jobs=2, progress=False)
    assert not again.failed
    assert all(steps_logged(f) == [*range(1, 160, 10), 160] for f in (out / "runs").glob("*/seed?"))
    return measured(again) == measured(compare.compare(file, out=str(file.parent / "whole"), progress=False))


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_named(longer: Callable[[int], Path], one_thread: None) -> None:
    beside = Beside(file := longer(2))
    pid, victim = next(iter(beside.until_they_train().items()))
    os.kill(pid, signal.SIGKILL)
    assert beside.process.wait(timeout=300) == 1
    said, name = beside.said.read_text(), f"{victim.parent.name}, seed {victim.name[-1]}"
    assert f": {name}: failed: its process was ended by SIGKILL: memory may have run out" in said
    assert f"- {name}: its process was ended by SIGKILL" in said and "amclr: 1 of 4 runs failed" in said
    rows = json.loads((beside.out / "results.json").read_text())["rows"]
    assert sorted(len(row["measures"]["r_mean"]["values"]) for row in rows) == [1, 2], "the others have finished"
    assert as_one_after_the_other(file, beside.out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_runs_are_stopped_and_gone_on_with(
    number: signal.Signals, longer: Callable[[int], Path], one_thread: None
) -> None:
    """After SIGTERM the command waits for the two; killed, it cannot, and they end by themselves. Neither is lost."""
    beside = Beside(file := longer(1))
    running = beside.until_they_train()
    beside.process.send_signal(number)
    code = beside.process.wait(timeout=60)
    if number == signal.SIGTERM:
        assert code == 143 and not any(map(parent_of, running))
        assert "this goes on: amclr compare" in beside.said.read_text().splitlines()[-1]
    else:
        deadline = time.monotonic() + 60
        while any(map(parent_of, running)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    for folder in running.values():
        assert (folder / "checkpoints" / "last.pt").is_file() and not (folder / "results.json").is_file()
    assert as_one_after_the_other(file, beside.out)


def test_runs_that_want_the_same_at_once(folder: Path, own_cache: Path, tmp_path: Path) -> None:
    """Features and verdicts on images: of two processes one computes them, and the other waits."""
    config = compare._changed(Config(), {"data": str(folder), **flat(BASE["settings"])}, "")
    model = initial_model(config, ["a red patch"], tmp_path / "run")
    texts = [f"patch {k}" for k in range(300)]
    log = tmp_path / "made.txt"

    def counted(what: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            with log.open("a") as handle:
                handle.write(f"{what}\n")
            time.sleep(0.05)
            return function(*arguments, **named)

        return call

    def work(rank: int) -> None:
        model.text_tower.forward = counted("captions", model.text_tower.forward)
        model.image_tower.forward = counted("images", model.image_tower.forward)
        images.read_image = counted("decoded", images.read_image)
        samples = manifests.prepare(config, own_cache, False).split("train")
        store = images.ImageStore([s.image for s in samples], 32, progress=False)
        made = image_features(model, samples, "weak", 2, config, own_cache, store, False)
        rows = caption_features(model, texts, own_cache, False)
        assert made.readable().all() and len(rows) == 300

    Processes(2, work, logs=tmp_path / "logs").succeed()
    said = Counter(log.read_text().split())
    # 40 images are looked at, and 32 decoded again for their features of 64 views; 300 captions are 3 chunks.
    assert said["decoded"] == 40 + 32 and said["captions"] == 3 and said["images"] == -(-64 // model.images_at_once)


def test_figures_of_folds_show_what_variants_differ_in() -> None:
    """Folds that differ by 10 points for all variants; a run that is missing takes those of its fold out."""
    runs = {"a": {0: 30.0, 1: 40.0, 2: 50.0}, "b": {0: 31.0, 1: 43.0}}
    rows = [
        {"variant": v, "grid": {}, "runs": [{"seed": s, "r_mean": own.get(s)} if s in own else {"seed": s} for s in range(3)]}
        for v, own in runs.items()
    ]  # fmt: skip
    alike = [report._alike({"rows": rows}, row, "r_mean") for row in rows]
    assert alike == [pytest.approx([35.5, 34.5]), pytest.approx([36.5, 37.5])]
    assert np.mean(alike[1]) - np.mean(alike[0]) == pytest.approx(2)


def test_folds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cross-validation: every training image is measured on once, by weights that have not seen it."""
    file = written(tmp_path / "small.yaml", folder, folds=3, seeds=[5, 6, 7, 8, 9, 10])
    found = run(file)
    assert not found.failed
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
            told = found.results["rows"][variant == "amclr"]["runs"][seed - 5]
            assert len(own) == len(held) and 50 * sum(own) == pytest.approx(told["r_mean"], abs=1e-4)
            measured += held
    train = manifests.load(Config(data=str(folder)), tmp_path).split("train")
    assert Counter(measured) == {s.name: 4 for s in train} and len(train) == 32
    test = found.results["rows"][1]["against"]["r_mean"]
    # Both runs of a fold are asked the same, and averaged.
    differences = [
        np.mean([shares["amclr"][k] - shares["sogclr"][k], shares["amclr"][k + 3] - shares["sogclr"][k + 3]], axis=0)
        for k in range(3)
    ]
    assert (test["seeds"], test["images"]) == (6, 32)
    assert test["difference"] == pytest.approx(np.mean([d.sum() for d in differences]))
    assert test["p_seeds"] == sign_flip(np.array([d.sum() for d in differences]))
    # Signs are drawn, and a difference that is 0 but for rounding draws them otherwise.
    assert test["p_images"] == pytest.approx(sign_flip(np.concatenate(differences)), abs=0.03)
    for part in ("| p, folds |", "cut into 3 parts, of which each in turn is kept aside", "cannot go below 0.25"):
        assert part in found.table
    assert "same training images" not in found.table and "over the folds" in (tmp_path / "out/report.html").read_text()
    # Some of the seeds are their folds; the finished runs are theirs.
    some = run(file, seeds="5,6")
    assert some.runs == 4 and "cut into 3 parts, of which 2 in turn" in some.table
    one = some.results["rows"][1]["against"]["r_mean"]
    own = [(shares["amclr"][k] - shares["sogclr"][k]).sum() for k in range(2)]
    assert one["seeds"] == 2 and one["p_seeds"] == sign_flip(np.array(own))
    (cell, _) = plan(read(file, seeds="7,8"), tmp_path)
    assert {s: c.source.fold for s, c in cell.configs.items()} == {7: "3/3", 8: "1/3"}
    for slip in ("2", "5,11"):
        assert cli.main(["compare", str(file), "--seeds", slip]) == 1
        assert "the seeds of the folds are 5, 6, 7, 8, 9, 10: give some of those" in capsys.readouterr().err


# -- what goes wrong -----------------------------------------------------------------------------


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
    said = capsys.readouterr()
    assert said.err.endswith("amclr: 1 of 4 runs failed: the table says why\n")
    assert "- sogclr, seed 1: RuntimeError: no such kernel (see " in said.out and "| 1 of 2 |" in said.out
    trace = tmp_path / "out/runs/sogclr/seed1-error.txt"
    assert str(trace) in said.out and "in broken" in trace.read_text()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [len(r["measures"]["r_mean"]["values"]) for r in results["rows"]] == [1, 2]
    assert results["rows"][1]["against"]["r_mean"]["seeds"] == 1
    # The same command tries it again, from where it was, and leaves the others be.
    before = steps_made.copy()
    healed = run(experiment)
    assert not healed.failed and steps_made - before == {("sogclr", 1): 4}, "goes on from the checkpoint of epoch 1"


def test_all_runs_may_fail(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise UserError("the data are gone")

    monkeypatch.setattr(loop, "advance", broken)
    found = run(experiment)
    assert found.failed == 4 and "- amclr, seed 1: the data are gone" in found.table
    assert "<h2>Runs</h2>" in (found.folder / "report.html").read_text()


def test_stopped_and_gone_on_with(
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
        with pytest.raises(Stopped, match=rf"this goes on: amclr compare {experiment} --out .*out$") as stopped:
            run(experiment)
    assert stopped.value.code == 143 and steps_made == {("sogclr", 0): STEPS, ("amclr", 0): 3}
    # What a kill leaves of a run that has only made its folder.
    (tmp_path / "out/runs/sogclr/seed1/checkpoints").mkdir(parents=True)
    (tmp_path / "out/runs/sogclr/seed1/environment.json").write_text("{}")
    found = run(experiment)
    assert steps_made == {(o, s): STEPS for o in ("sogclr", "amclr") for s in (0, 1)}
    whole = compare.compare(experiment, out=str(tmp_path / "whole"), progress=False)
    for one, other in zip(found.results["rows"], whole.results["rows"], strict=True):
        assert one["measures"] == other["measures"] and one["against"] == other["against"]


def test_ctrl_c_between_runs_tells_how_to_go_on(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_measure", pressed)
    with pytest.raises(Stopped, match="this goes on: amclr compare") as stopped:
        run(experiment)
    assert stopped.value.code == 130


def test_two_at_once_are_refused(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with compare.FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another amclr compare"):
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


SLIPS = [
    ({"variant": ["clip"]}, "unknown key 'variant': did you mean 'variants'?"),
    ({"epochs": 3}, r"unknown key 'epochs' \(a setting belongs under settings\)"),
    ({"variants": None}, "must be names with values"),
    ({"variants": []}, "variants is empty"),
    ({"variants": ["sogclr", "amlcr"]}, "unknown objective 'amlcr': did you mean 'amclr'?"),
    ({"variants": ["sogclr", "sogclr"]}, "'sogclr' stands twice"),
    ({"variants": {"sogclr": None, "mine": {"objective": "amlcr"}}}, "mine: unknown objective 'amlcr': did you mean"),
    ({"variants": {"sogclr": None, "mine": {"optim.lrr": 1}}}, "variant 'mine': unknown setting 'optim.lrr': did you mean 'optim.lr'?"),
    ({"variants": {"sogclr": None, "mine": {"optim": {"lr": "fast"}}}}, "variant 'mine': optim.lr must be float, got 'fast'"),
    ({"variants": {"sogclr": None, "mine": {"optim.lr": -1}}}, "mine: --optim.lr must lie between"),
    ({"variants": {"sogclr": None, "mine": {"objective": "sogclr"}}}, "'.*' and '.*' are the same run"),
    ({"variants": {"sogclr": None, "a b": {"epochs": 3}, "a_b": {"epochs": 4}}}, "would have one folder: rename a variant"),
    ({"variants": {"sogclr": None, "mine": {"seed": 3}}}, r"seed is not set here: give seeds: \[0, 1, 2\]"),
    ({"variants": {"sogclr": None, "mine": {"views.image": [{"ColorJiter": {}}]}}}, "mine: image views: unknown transform 'ColorJiter'"),
    ({"variants": {"sogclr": None, "mine": {"init_from": "nowhere"}}}, "mine: init_from: there is no run folder 'nowhere'"),
    ({"variants": {"sogclr": None, "mine": {"batch_size": 64}}}, "32 training images are fewer than one batch"),
    ({"variants": {"sogclr": None, "mine": {"devices": 2}}}, "trains each run in one process"),
    ({"grid": {"optim.name": "adamp"}}, "grid: optim.name must be a list of values"),
    ({"grid": {"optim.name": ["adamw", "adamx"]}}, "optim.name=adamx: unknown optimiser"),
    ({"grid": {"optim.name": ["adamw", "adamw"]}}, "would have one folder"),
    ({"grid": {"objective": ["clip", "amclr"]}}, "variant 'sogclr' sets objective, which the grid varies"),
    ({"baseline": "sogclrr"}, "baseline: there is no variant 'sogclrr': did you mean 'sogclr'?"),
    ({"recipe": "frosen"}, "unknown recipe 'frosen': did you mean 'frozen'?"),
    ({"seeds": []}, "at least one"),
    ({"folds": 1}, "folds must be how many, 2 at the least, got 1"),
    ({"folds": "six", "seeds": None}, "folds must be how many"),
    ({"folds": True}, "folds must be how many"),
    ({"folds": 2, "seeds": 3}, "3 seeds for 2 folds: give as many for each"),
    ({"folds": 3, "seeds": None, "variants": {"sogclr": None, "mine": {"objective": "sogclr"}}}, "'.*' and '.*' are the same run"),
    ({"folds": 3, "seeds": None, "settings": BASE["settings"] | {"batch_size": 22}}, "21 training images are fewer than one batch"),
    ({"folds": 2, "seeds": None, "variants": {"sogclr": None, "mine": {"source.fold": "1/6"}}}, "mine: source.fold follows from folds"),
    ({"folds": 40, "seeds": None}, "32 training images: they cannot be cut into 40 parts"),
    ({"variants": {"sogclr": None, "mine": {"source.fold": "6/5"}}}, "mine: --source.fold is K/N"),
    ({"seeds": 0}, "at least one"),
    ({"seeds": [0, 1.5]}, "whole numbers"),
    ({"seeds": [1, 1]}, "seeds: 1 stands twice"),
    ({"zeroshot": {"a": 1}}, "zeroshot must be a list of folders"),
    ({"settings": ["epochs"]}, "settings must be names with values"),
    ({"zeroshot": ["nowhere"]}, "no folder 'nowhere'"),
    ({"zeroshot": ["Images"], "templates": "opnai"}, "no folder 'Images'"),
    ({"paraphrased": "rulez"}, "no paraphrases at 'rulez': give rules"),
    ({"equal": "pases"}, "equal: did you mean 'passes'?"),
    ({"equal": "passes", "variants": {"sogclr": None, "mine": {"epochs": 4}}}, "variant 'mine' sets epochs, which follow from equal: passes"),
    ({"cut": 5}, "cut must be names with values"),
    ({"cut": {"behnd": 5}}, "cut: unknown key 'behnd': did you mean 'behind'?"),
    ({"cut": {"behind": 0}}, "cut: behind must be a number of points above 0"),
    ({"cut": {"after": 1}}, "cut: behind must be a number of points above 0"),
    ({"cut": {"behind": 5, "after": 0}}, "cut: after must be a number of seeds, 1 at the least"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SLIPS)
def test_slips_show_before_anything_runs(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match=message) as slip:
        run(written(tmp_path / "small.yaml", folder, **changes))
    assert "\n" not in str(slip.value) and not (tmp_path / "out").exists()


def test_slips_in_the_file_itself(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "e.yaml"
    for text, message in (
        (None, "cannot read the experiment file"),
        ("variants: [a", "is no YAML"),
        ("- clip", "has no variants"),
        ("variants:\n  clip: {epochs: 2}\n  clip: {epochs: 3}\n", "'clip' stands twice"),
    ):
        if text:
            file.write_text(text)
        assert cli.main(["compare", str(file)]) == 1
        assert message in capsys.readouterr().err
    written(file, tmp_path / "nowhere")
    assert cli.main(["compare", str(file)]) == 1 and "no data set at" in capsys.readouterr().err
    written(file, folder)
    assert (
        cli.main(["compare", str(file), "--jobs", "0"]) == 1 and "--jobs must be 1 or more" in capsys.readouterr().err
    )
    assert cli.main(["compare", str(file), "--seeds", "none"]) == 1 and "--seeds 3" in capsys.readouterr().err
    assert cli.main(["compare", str(file), "--sedes", "2"]) == 1 and "did you mean --seeds?" in capsys.readouterr().err


def test_settings_in_any_form(tmp_path: Path, folder: Path) -> None:
    """Nested or dotted, numbers as people write them; the variant counts more than the settings."""
    file = tmp_path / "e.yaml"
    file.write_text(
        f"settings: {{data: {folder}, batch_size: 8, optim: {{lr: 3e-4}}, loss.temperature: 1}}\n"
        "variants: {clip: , hot: {objective: clip, loss: {temperature: 2e-1}, batch_size: 16}}\nseeds: 0,7\n"
    )
    first, second = plan(read(file), tmp_path / "out")
    configs = first.configs | {k + 100: v for k, v in second.configs.items()}
    assert [(c.seed, c.objective, c.optim.lr, c.loss.temperature, c.batch_size) for c in configs.values()] == [
        (0, "clip", 3e-4, 1, 8), (7, "clip", 3e-4, 1, 8), (0, "clip", 3e-4, 0.2, 16), (7, "clip", 3e-4, 0.2, 16)
    ]  # fmt: skip
    assert first.configs[7].out == str(tmp_path / "out/runs/clip/seed7")


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda f: f.stem)
def test_our_experiments_can_be_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "_check_data", lambda _: None)  # theirs is not here
    monkeypatch.chdir(tmp_path)
    if start := read(file).settings.get("init_from"):  # a run that the file says how to make
        assert re.search(rf"^# +amclr train .*--out {start}( |$)", file.read_text(), re.M)
        Path(start).mkdir(parents=True)
        (Path(start) / "config.yaml").write_text("")
    cells = plan(read(file), tmp_path)
    assert len(cells) >= 4 and all(len(c.configs) >= 1 for c in cells)
    assert read(file).baseline and read(file).regime and read(file).name == file.stem


@pytest.mark.slow
def test_the_example_of_the_guide_runs(tmp_path: Path) -> None:
    (text,) = re.findall(r"<!-- file: \S+ -->\n```yaml\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.S)
    (tmp_path / "experiment.yaml").write_text(text)
    found = run(tmp_path / "experiment.yaml")
    assert not found.failed and len(found.results["rows"]) == 4 and "own classes" in found.table


# -- the command line ----------------------------------------------------------------------------


def test_the_command(main: Command, experiment: Path, classes: Path, tmp_path: Path) -> None:
    done = main("compare", experiment, "--seeds", "1", "--zeroshot", classes)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "run 2 of 2: amclr, seed 0: text retrieval" in done.stderr
    assert f"Made by `amclr compare {experiment} --seeds 1 --zeroshot {classes}`" in done.stdout
    assert (tmp_path / "runs/compare-small/report.html").is_file() and "colours top-1" in done.stdout


def reworded(file: Path) -> str:
    """Paraphrases of some of the captions, as a file."""
    rows = [f"{w} {list(COLOURS)[k % 4]} patch number {k},I see {w} {list(COLOURS)[k % 4]} patch; its number is {k}"
            for k in range(0, 40, 2) for w in ("a", "one")]  # fmt: skip
    file.write_text("\n".join(["caption,paraphrase", *rows]))
    return str(file)


def test_prompts_and_paraphrased_queries(
    folder: Path, tmp_path: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measures of every run like the others: what `amclr evaluate` finds, tested, and measured once."""
    monkeypatch.setattr(report, "draw", lambda *_: {})
    asked = {"paraphrased": reworded(tmp_path / "mine.csv"), "zeroshot": [str(classes)], "templates": "simple"}
    file = written(tmp_path / "small.yaml", folder, **asked)
    found = run(file)
    assert not found.failed
    names = ("paraphrased img_r_mean", "paraphrased drop", "paraphrased overlap", "paraphrased rbo")
    for row in found.results["rows"]:
        one = row["runs"][1]
        own = evaluate_run(
            Path(one["folder"]), paraphrased=asked["paraphrased"], zeroshot=asked["zeroshot"], templates="simple",
            progress=False,
        )  # fmt: skip
        told = own["paraphrased"]
        assert (told["captions"], told["without"]) == (8, 8)
        drop = told["as_is"]["img_r_mean"] - told["paraphrased"]["img_r_mean"]
        expected = (told["paraphrased"]["img_r_mean"], drop, told["overlap"], 100 * told["rbo"])
        assert [one[name] for name in names] == pytest.approx(expected, abs=1e-3)
        assert one["zeroshot colours"] == pytest.approx(own["zeroshot_top1"], abs=1e-3)
    base, other = found.results["rows"]
    for name in names:
        test = other["against"][name]
        means = [row["measures"][name]["mean"] for row in (other, base)]
        assert test["difference"] == pytest.approx(means[0] - means[1]) and 0 < test["p_seeds"] <= 1
        assert test["images"] == 8 and test["seeds"] == 2
    assert "| image retrieval, paraphrased | RBO, paraphrased |" in found.table.replace("colours top-1 | ", "")
    about = "4 names (as its folders are called), 7 prompts (simple, by open_clip)"
    assert found.results["zeroshot"] == {"colours": about} and f"Zero-shot: colours: {about}." in found.table
    assert f"Paraphrased by {asked['paraphrased']}: captions that have a paraphrase ask with it." in found.table
    # Again: what is there is taken. With other prompts or paraphrases it is measured anew.
    times = {
        f: f.stat().st_mtime_ns
        for f in (tmp_path / "out" / "runs").rglob("*.npz")
        if "paraphrased" in f.name or "zeroshot" in f.name
    }
    assert len(times) == 8
    assert run(file).results == found.results and all(f.stat().st_mtime_ns == t for f, t in times.items())
    some = (tmp_path / "mine.csv").read_text().splitlines()[:8]
    (tmp_path / "mine.csv").write_text("\n".join(some))
    run(written(file, folder, **asked | {"templates": "amclr"}))
    assert all(f.stat().st_mtime_ns != t for f, t in times.items())


@pytest.mark.slow
def test_killed_and_gone_on_with(amclr: Command, folder: Path, tmp_path: Path) -> None:
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


# -- statistics ----------------------------------------------------------------------------------


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
    # Of n = 6 and 10 the p-values are whole multiples of 2 / 2^n, and the rate can be told exactly.
    rate = np.floor(0.05 * 2 ** (n - 1)) / 2 ** (n - 1) if n < 14 else 0.05
    assert abs((p <= 0.05).mean() - rate) < 3.5 * np.sqrt(rate * (1 - rate) / len(p))
    assert np.mean([sign_flip(draw.normal(2.0, 1, n)) <= 0.05 for _ in range(50)]) > 0.9, "and finds what is there"


def outcome(seed: int, hits: np.ndarray, asked: str = "q") -> Outcome:
    found = Outcome(None, seed, Path())  # type: ignore[arg-type]
    found.shares, found.asked = {"r_mean": 100 * hits / len(hits)}, {"r_mean": asked}
    return found


def test_seeds_are_clusters() -> None:
    """Runs that differ by their seeds alone: with seeds as clusters a difference is rarely claimed, with images often.

    This is why both are told, and what the second does not know.
    """
    draw, seeds, images = np.random.default_rng(0), 6, 60
    tests = []
    for _ in range(200):
        easy = draw.normal(0, 1, images)  # some images are found by all
        runs = [
            [outcome(s, (easy + draw.normal(0, 1) + draw.normal(0, 1, images) > 0).astype(float)) for s in range(seeds)]
            for _ in range(2)
        ]  # fmt: skip
        tests.append(against(*runs, "r_mean"))
    by_seeds, by_images = (np.mean([t[p] <= 0.05 for t in tests if t]) for p in ("p_seeds", "p_images"))
    assert by_seeds < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200) and by_images > 0.3


def test_what_is_paired_with_what() -> None:
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2, (5, 40)).astype(float)
    own = [outcome(2, rows[0]), outcome(0, rows[1]), outcome(5, rows[4])]
    base = [outcome(0, rows[2]), outcome(2, rows[3]), outcome(1, rows[4])]
    found = against(own, base, "r_mean")
    assert found is not None and (found["seeds"], found["images"]) == (2, 40)
    assert found["difference"] == pytest.approx(100 * np.mean([rows[0] - rows[3], rows[1] - rows[2]]))
    per_image = (rows[0] - rows[3] + rows[1] - rows[2]) / 2
    assert found["p_images"] == sign_flip(100 * per_image / 40)
    assert against(own, [outcome(0, rows[2], "other queries")], "r_mean") is None
    assert against(own, base, "zeroshot") is None
