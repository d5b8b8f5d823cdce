"""Several runs of a comparison at a time: the same results, kills and signals, shared caches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from amclr import cli
from amclr.compare import compare, report, runner
from amclr.compare.experiment import read_experiment
from amclr.compare.plan import plan
from amclr.data import manifest as manifests
from amclr.data.images import scan as image_scan
from amclr.data.images import store as image_store
from amclr.models.features import caption_features, image_features
from amclr.runs.loading import initial_model
from tests.compare.experiments import BASE, measured, paraphrases_file, run, written
from tests.processes import Processes

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.slow
def test_two_at_a_time_are_the_same(
    experiment: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(report, "draw", lambda *_: {})
    experiment.write_text(f"{experiment.read_text()}\nparaphrased: {paraphrases_file(tmp_path / 'mine.csv')}\n")
    assert cli.main(["compare", str(experiment), "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "two")]) == 0
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("run ")]
    assert [line[:11] for line in lines] == ["run 1 of 2:", "run 2 of 2:"] and "2 at a time" in output.err
    assert {line.split()[4] for line in lines} == {"sogclr,", "amclr,"}
    assert "Runs were trained 2 at a time: do not compare their seconds" in output.out and "--jobs 2`" in output.out
    one = run(experiment, seeds="1")
    assert measured(tmp_path / "two") == measured(one) and "at a time" not in one.table
    assert not list((tmp_path / "two").rglob("*output.txt"))
    # Taken as they are, whatever the number now is; how many ran at a time before is not forgotten.
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("trained a run that was done"))
    monkeypatch.setattr(runner, "side_by_side", lambda *_: pytest.fail("started a process for a run that was done"))
    for jobs in (1, 3):
        again = compare(experiment, seeds="1", out=str(tmp_path / "two"), jobs=jobs, progress=False)
        assert measured(again) == measured(one) and "trained 2 at a time" in again.table


class SideBySide:
    """`amclr compare FILE --jobs 2 --out out` in a process of its own, with those that it started."""

    def __init__(self, file: Path) -> None:
        self.out, self.output = file.parent / "out", file.parent / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "amclr", "compare", str(file), "--jobs", "2", "--out", "out"],
                cwd=file.parent, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def workers(self) -> dict[int, Path]:
        """The processes of its runs, and where these lie: what they print goes next to that."""
        found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
        found = [pid for pid in found if parent_of(pid) == self.process.pid]
        return {pid: Path(os.readlink(f"/proc/{pid}/fd/1").replace("-output.txt", "")) for pid in found}

    def until_they_train(self) -> dict[int, Path]:
        """Wait until two runs train at a time, and have made steps."""
        deadline = time.monotonic() + 300
        while len(running := self.workers()) < 2 or not all((f / "metrics.jsonl").is_file() for f in running.values()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()[-2000:]
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
    """Whether a comparison that is resumed, its runs side by side, is the same as with one run after the other."""
    again = compare(file, out=str(out), jobs=2, progress=False)
    assert not again.failed
    assert all(steps_logged(f) == [*range(1, 160, 10), 160] for f in (out / "runs").glob("*/seed?"))
    return measured(again) == measured(compare(file, out=str(file.parent / "whole"), progress=False))


@pytest.mark.slow
def test_a_run_whose_process_is_killed_is_named(longer: Callable[[int], Path], one_thread: None) -> None:
    command = SideBySide(file := longer(2))
    pid, victim = next(iter(command.until_they_train().items()))
    os.kill(pid, signal.SIGKILL)
    assert command.process.wait(timeout=300) == 1
    output, name = command.output.read_text(), f"{victim.parent.name}, seed {victim.name[-1]}"
    assert f": {name}: failed: its process was ended by SIGKILL: memory may have run out" in output
    assert f"- {name}: its process was ended by SIGKILL" in output and "amclr: 1 of 4 runs failed" in output
    rows = json.loads((command.out / "results.json").read_text())["rows"]
    assert sorted(len(row["measures"]["r_mean"]["values"]) for row in rows) == [1, 2], "the others have finished"
    assert as_one_after_the_other(file, command.out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_runs_are_interrupted_and_resumed(
    number: signal.Signals, longer: Callable[[int], Path], one_thread: None
) -> None:
    """After SIGTERM the command waits for the two; killed, it cannot, and they end by themselves. Neither is lost."""
    command = SideBySide(file := longer(1))
    running = command.until_they_train()
    command.process.send_signal(number)
    code = command.process.wait(timeout=60)
    if number == signal.SIGTERM:
        assert code == 143 and not any(map(parent_of, running))
        assert "To resume: amclr compare" in command.output.read_text().splitlines()[-1]
    else:
        deadline = time.monotonic() + 60
        while any(map(parent_of, running)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    for folder in running.values():
        assert (folder / "checkpoints" / "last.pt").is_file() and not (folder / "results.json").is_file()
    assert as_one_after_the_other(file, command.out)


def test_runs_that_want_the_same_at_once(folder: Path, own_cache: Path, tmp_path: Path) -> None:
    """Features and verdicts on images: of two processes one computes them, and the other waits."""
    config = plan(read_experiment(written(tmp_path / "e.yaml", folder, variants=["sogclr"])), tmp_path)[0].configs[0]
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
        image_store.read_image = counted("decoded", image_store.read_image)
        image_scan.read_image = counted("decoded", image_scan.read_image)
        samples = manifests.prepare(config, own_cache, False).split("train")
        store = image_store.ImageStore([s.image for s in samples], 32, progress=False)
        made = image_features(model, samples, "weak", 2, config, own_cache, store, False)
        rows = caption_features(model, texts, own_cache, False)
        assert made.readable().all() and len(rows) == 300

    Processes(2, work, logs=tmp_path / "logs").succeed()
    calls = Counter(log.read_text().split())
    # 40 images are looked at, and 32 decoded again for their features of 64 views; 300 captions are 3 chunks.
    assert calls["decoded"] == 40 + 32 and calls["captions"] == 3 and calls["images"] == -(-64 // model.images_at_once)
