"""The promises of docs/reliability.md that take long to keep: many kills, many signals, many steps."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amclr.config.schema import Config, ModelConfig
from amclr.runs.folder import Run
from amclr.training import loop
from amclr.training.loop import Stopped, train
from amclr.training.state import Training
from tests.conftest import make_folder
from tests.training.configs import assert_same_run, config_for

pytestmark = pytest.mark.usefixtures("undrawn")


def begin(config: Config, steps: Any) -> None:
    """Start a run or go on with it, in a forked process that tells how many steps are done."""
    torch.set_num_threads(1)
    original = loop.advance

    def advance(t: Training, batch: Any) -> Any:
        steps.value = t.step
        return original(t, batch)

    loop.advance = advance
    there = (Path(config.out) / "config.yaml").is_file()
    code = 0
    try:
        train(None if there else config, resume=Path(config.out) if there else None, progress=False)
    except Stopped as stopped:
        code = stopped.code
    os._exit(code)


def started(config: Config) -> tuple[Any, Any]:
    context = multiprocessing.get_context("fork")
    steps = context.Value("i", -1)
    process = context.Process(target=begin, args=(config, steps))
    process.start()
    return process, steps


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills_at_random_steps_change_nothing(workers: int, precision: Any, folder: Path) -> None:
    """Both towers trained, individual temperatures: weights, tables, metrics and results are those of the run in one."""
    changes: dict[str, Any] = {
        "epochs": 25, "objective": "ixamclr", "workers": workers, "precision": precision, "checkpoint_minutes": 0.002,
    }  # fmt: skip
    whole = train(config_for(folder, "whole", **changes), progress=False)
    config = config_for(folder, "parts", **changes)
    draw, kills, where = random.Random(workers), 0, []
    while kills < 20:
        process, steps = started(config)
        # From where it is taken up on, a few steps: what is done by then grows from kill to kill.
        while steps.value < 0 and process.is_alive():
            time.sleep(0.002)
        last = steps.value + draw.randrange(0, 9)
        while steps.value < last and process.is_alive():
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.03)
        assert process.is_alive(), f"it ended at step {steps.value}, before {kills} kills"
        process.kill()
        process.join()
        kills += 1
        where.append(steps.value)
    assert len(set(where)) > 5
    process, _ = started(config)
    process.join(300)
    assert process.exitcode == 0
    run = Run.open(Path(config.out))
    assert_same_run(whole, run)
    assert (run.folder / "results.json").read_text() == (whole.folder / "results.json").read_text()


@pytest.mark.slow
def test_ten_signals_leave_ten_checkpoints_within_ten_seconds(folder: Path) -> None:
    """SIGTERM at random moments: each time the last step made is in the checkpoint, and the run ends as it would."""
    changes: dict[str, Any] = {"epochs": 40, "workers": 2}
    whole = train(config_for(folder, "whole", **changes), progress=False)
    config = config_for(folder, "parts", **changes)
    draw, times = random.Random(0), []
    for _ in range(10):
        process, steps = started(config)
        while steps.value < 0:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.4)
        began = time.monotonic()
        process.terminate()
        process.join(60)
        times.append(time.monotonic() - began)
        assert process.exitcode == 143
        state = Run.open(Path(config.out)).load_last()
        assert state is not None and state["step"] == steps.value + 1
    assert max(times) < 10, times
    process, _ = started(config)
    process.join(300)
    assert_same_run(whole, Run.open(Path(config.out)))


@pytest.mark.slow
def test_a_second_signal_acts_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step that takes a minute: the first Ctrl-C waits for it, the second does not; nothing is lost but the step."""
    whole = train(config_for(folder, "whole"), progress=False)
    original = loop.advance

    def takes_long(t: Training, batch: Any) -> Any:
        if t.step == 6:
            time.sleep(60)
        return original(t, batch)

    config = config_for(folder, "parts")
    monkeypatch.setattr(loop, "advance", takes_long)
    process, steps = started(config)
    monkeypatch.setattr(loop, "advance", original)
    while steps.value < 6:
        time.sleep(0.01)
    for _ in range(2):  # as a launcher does: it passes on what reaches all its processes by itself
        os.kill(process.pid, signal.SIGINT)
        process.join(0.2)
    process.join(0.8)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    assert Run.open(Path(config.out)).load_last()["step"] == 4  # type: ignore[index]
    assert_same_run(whole, train(resume=Path(config.out), progress=False))


TWENTY_THOUSAND = 20_000


@pytest.mark.slow
def test_twenty_thousand_steps_take_no_more_memory(tmp_path: Path) -> None:
    """Less than 1 MiB per 10,000 steps, with a worker, logs and checkpoints; no file or process is left open."""
    folder = make_folder(tmp_path / "patches", images=50)
    model = ModelConfig(image_size=32, dim=16, image_lr=0, text_lr=0, head="residual", hidden=16)
    config = replace(
        config_for(folder, "run", epochs=TWENTY_THOUSAND // 5, eval_every=500, model=model, workers=1),
        objective="xamclr", checkpoint_minutes=0.05,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(_as_dict(config)))
    code = (
        "import amclr, json, sys; from amclr.config.checks import from_dict; "
        "amclr.train(from_dict(json.load(open(sys.argv[1]))), progress=False)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "config.json")], env=environment)
    result: dict[int, tuple[int, int, int]] = {}
    log = tmp_path / "run" / "metrics.jsonl"
    try:
        while process.poll() is None:
            time.sleep(0.05)
            step = json.loads(_last_line(log) or "{}").get("step", 0) // 1000
            if step < 5:
                continue
            with suppress(StopIteration, OSError):  # what is ending has no memory any more
                now = _memory(process.pid), len(os.listdir(f"/proc/{process.pid}/fd")), _children(process.pid)
                # The least of each stretch: a checkpoint that is being written has files, and pages, of its own.
                result[step] = tuple(map(min, now, result.get(step, now)))  # type: ignore[assignment]
    finally:
        process.kill()
    assert process.returncode == 0
    print(result)
    steps = sorted(result)[:-1]  # during the last one it ends
    assert steps[-1] >= 17
    half = len(steps) // 2
    early, late = (min(result[s][0] for s in part) for part in (steps[:half], steps[half:]))
    growth = (late - early) / 2**20 / half * 10
    assert growth < 1.0, f"{growth:.2f} MiB per 10,000 steps: {result}"
    assert result[steps[-1]][1:] == result[steps[0]][1:], result


def _as_dict(config: Config) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(config)


def _last_line(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as handle:
        handle.seek(max(0, file.stat().st_size - 4096))
        lines = handle.read().decode().splitlines(keepends=True)
    return next((line for line in reversed(lines) if line.startswith("{") and line.endswith("\n")), "")


def _memory(pid: int) -> int:
    """Bytes of a process's own memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def _children(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
