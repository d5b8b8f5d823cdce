"""Checkpoints of processes that are interrupted, forked and killed, and of runs."""

from __future__ import annotations

import os
import random
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import amclr.training.step
from amclr.runs import checkpoints
from amclr.runs.checkpoints import Checkpoints
from amclr.runs.folder import Run
from amclr.runs.serialization import digest
from amclr.training.loop import Stopped, train
from amclr.utils.errors import UserError
from tests.runs.states import names, same, state_of
from tests.training.configs import frozen

pytestmark = pytest.mark.usefixtures("undrawn")


def test_ctrl_c_is_heard_while_waiting_and_the_checkpoint_is_not_lost(
    saved: Checkpoints, gate: threading.Event
) -> None:
    saved.save(state_of(1), 1, best=False, keep=1)
    for wait in (saved.wait, lambda: saved.save(state_of(2), 2, best=False, keep=1)):
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            wait()
        timer.join()
    gate.set()
    saved.wait()
    assert same(saved.load_last(), state_of(1))


def ends_well(child: int, within: float = 30.0) -> bool:
    handle = os.pidfd_open(child)
    try:
        if not select.select([handle], [], [], within)[0]:
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1] == 0
    finally:
        os.close(handle)


def test_a_process_forked_while_one_is_written_does_not_hang(
    saved: Checkpoints, gate: threading.Event, tmp_path: Path
) -> None:
    saved.save(state_of(1), 1, best=False, keep=1)
    child = os.fork()
    if not child:
        try:
            saved.wait()
            gate.set()
            own = Checkpoints(tmp_path / "own")
            own.save(state_of(2), 2, best=False, keep=1)
            own.wait()
            saved.folder = tmp_path / "other"
            saved.save(state_of(3), 3, best=False, keep=1)
            saved.wait()
            checkpoints._wait_at_exit()
            os._exit(0 if same(own.load_last(), state_of(2)) and same(saved.load_last(), state_of(3)) else 1)
        finally:
            os._exit(2)
    assert ends_well(child)
    batches = DataLoader(list(range(8)), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=30)
    assert [b.tolist() for b in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not (saved.folder / "last.pt").exists()
    gate.set()
    saved.wait()
    assert same(saved.load_last(), state_of(1))


@pytest.mark.parametrize(
    "ending", ["sys.exit(3)", *(pytest.param(e, marks=pytest.mark.slow) for e in ("", "raise ValueError"))]
)
def test_a_process_that_ends_finishes_its_checkpoint(ending: str, tmp_path: Path) -> None:
    script = f"""
import sys, time, torch
from pathlib import Path
from amclr.runs import checkpoints, serialization
real = serialization.digest
serialization.digest = lambda state: (time.sleep(1), real(state))[1]
checkpoints.Checkpoints(Path({str(tmp_path / "c")!r})).save({{"x": torch.ones(9), "step": 1}}, 1, best=True, keep=1)
{ending}
"""
    subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True)
    state = Checkpoints(tmp_path / "c").load_last()
    assert state is not None and state["x"].tolist() == [1.0] * 9


def saves_until_killed(folder: Path, output: int) -> None:
    """Save step after step, and tell of those that are said to be on the disk."""
    saved = Checkpoints(folder)
    state = saved.load_last()
    step = state["step"] if state else 0
    while True:
        step += 1
        wait = step % 4 == 0
        saved.save(state_of(step, 20_000), step, best=step % 3 == 0, keep=2, wait=wait)
        if wait or step % 2:
            saved.wait()
            os.write(output, struct.pack("q", step))


def killed(folder: Path, rounds: int, seed: int) -> int:
    """Kill a process that saves, so many times, at random moments; the last step that it had told of."""
    draw, acknowledged, half = random.Random(seed), 0, 0
    for _ in range(rounds):
        ends, output = os.pipe()
        child = os.fork()
        if not child:
            try:
                saves_until_killed(folder, output)
            finally:
                os._exit(1)
        os.close(output)
        time.sleep(draw.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it was still at it"
        with os.fdopen(ends, "rb") as handle:
            content = handle.read()
        if content:
            acknowledged = struct.unpack("q", content[-8:])[0]
        saved = Checkpoints(folder)
        state = saved.load_last()
        if state is not None:
            assert state["step"] >= acknowledged and same_quickly(state, state_of(state["step"], 20_000))
        else:
            assert acknowledged == 0
        if (folder / "best.pt").exists():
            assert saved.best_is_intact() and saved.load_best()["step"] % 3 == 0
        result = names(saved) if folder.is_dir() else []
        half += any(n.endswith(".part") for n in result)
        assert len([n for n in result if n.endswith(".part")]) <= 1
        # One that had been renamed, before the oldest went.
        assert len([n for n in result if n.startswith("step-") and n.endswith(".pt")]) <= 3
    assert half > rounds // 20, "some were killed within the writing of a file"
    return acknowledged


def same_quickly(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return torch.equal(a["model"]["weight"], b["model"]["weight"]) and same(a["optimizer"]["param_groups"], b["optimizer"]["param_groups"])  # fmt: skip


def test_killed_while_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert killed(tmp_path / "c", 20, 1) > 0
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.slow
def test_killed_a_hundred_times_while_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert killed(tmp_path / "c", 100, 2) > 10  # how far it comes between the kills is up to the machine
    assert "damaged" not in capsys.readouterr().err


def fails_at(step: int, monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    """Call something in place of the forward pass of a step."""
    original, calls = amclr.training.step.embed, iter(range(1000))

    def embed(model: Any, batch: Any) -> Any:
        if next(calls) == step:
            what()
        return original(model, batch)

    monkeypatch.setattr("amclr.training.step.embed", embed)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_whatever_ends_a_run_the_checkpoint_under_way_is_finished(
    error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises() -> None:
        raise error

    monkeypatch.setattr(Checkpoints, "interval", lambda self: 0.0)
    monkeypatch.setattr("amclr.runs.serialization.digest", lambda state: (time.sleep(0.3), digest(state))[1])
    fails_at(3, monkeypatch, raises)
    with pytest.raises((RuntimeError, Stopped), match="a bug|stopped"):
        train(frozen(folder), progress=False)
    state = Run.open(folder.parent / "run").load_last()
    assert state is not None and state["step"] == 3


def test_a_run_continues_while_the_disk_is_full(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(Checkpoints, "interval", lambda self: 0.0)
    fails_at(2, monkeypatch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    fails_at(5, monkeypatch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard)))
    try:
        run = train(frozen(folder), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    output = capsys.readouterr().err
    assert re.search(r"cannot write the checkpoint of step 3 \(File too large\): the one of step \d is kept", output)
    state = run.load_last()
    assert state is not None and state["step"] == 8 and run.checkpoints.best_is_intact()


def test_what_ended_a_run_is_not_hidden_by_a_disk_that_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail() -> None:
        raise UserError("something else")

    monkeypatch.setattr(Checkpoints, "interval", lambda self: 0.0)
    fails_at(2, monkeypatch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard)))
    fails_at(3, monkeypatch, fail)
    try:
        with pytest.raises(UserError, match="something else"):
            train(frozen(folder), progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Run.open(folder.parent / "run").load_last() is not None
