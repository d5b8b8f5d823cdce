"""Checkpoints: which ones are kept, written while training goes on, and on a full disk."""

from __future__ import annotations

import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from amclr.config.schema import Config
from amclr.runs import checkpoints
from amclr.runs.checkpoints import Checkpoints
from amclr.runs.folder import Run
from amclr.runs.serialization import copy_to_cpu, digest, read_state, tensor_bytes
from amclr.utils import files
from amclr.utils.errors import UserError
from tests.runs.states import full_disk, names, same, state_of


def test_what_is_loaded_is_what_was_saved(saved: Checkpoints) -> None:
    wanted = state_of(7)
    for wait in (False, True):
        saved.save(state_of(7), 7, best=True, keep=1, wait=wait)
        saved.wait()
        for result in (saved.load_last(), saved.load_best()):
            assert same(result, wanted), "and nothing besides, such as the digest"
    assert saved.best_is_intact()


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("value", [np.float64(1), {1, 2}, {(1, 2): 3}, object(), torch.eye(2).to_sparse()])
def test_what_cannot_be_saved_is_a_mistake(value: Any, wait: bool, saved: Checkpoints) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        saved.save({"model": {"x": value}}, 1, best=False, keep=1, wait=wait)
    assert saved.load_last() is None


def test_tensors_that_occur_twice_are_copied_once(saved: Checkpoints) -> None:
    tensor, other = torch.zeros(1000), torch.zeros(1000)
    state = {"a": tensor, "b": [tensor.view(1000), other], "c": {"d": tensor[:500]}}
    assert tensor_bytes(state) == 4 * 2500
    result = copy_to_cpu(state)
    assert result["a"].data_ptr() == result["b"][0].data_ptr() != tensor.data_ptr()
    assert len({t.data_ptr() for t in (tensor, result["a"], result["b"][1], result["c"]["d"])}) == 4
    saved.save({"a": tensor, "b": tensor.view(1000)}, 1, best=False, keep=1)
    saved.wait()
    assert (saved.folder / "last.pt").stat().st_size < 6000
    loaded = saved.load_last()
    assert loaded is not None and loaded["a"].data_ptr() == loaded["b"].data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("wait", [False, True])
def test_a_state_on_a_gpu(wait: bool, saved: Checkpoints) -> None:
    state = {"x": torch.randn(300, 300, device="cuda"), "half": torch.randn(5, device="cuda").bfloat16(), "step": 1}
    wanted = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}
    assert digest(state) == digest(wanted)
    saved.save(state, 1, best=False, keep=1, wait=wait)
    state["x"].zero_()
    state["half"].zero_()
    saved.wait()
    assert same(saved.load_last(), wanted)


def test_the_newest_intact_one_is_loaded_and_damage_is_reported(
    saved: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2, 3):
        saved.save(state_of(step), step, best=step == 1, keep=5, wait=True)
    file = saved.folder / "step-00000003.pt"
    content = bytearray(file.read_bytes())
    place = content.index(state_of(3)["ids"].numpy().tobytes())
    content[place] ^= 1
    file.write_bytes(content)  # last.pt is the same file
    (saved.folder / "step-00000002.pt").write_bytes(b"")
    fresh = Checkpoints(saved.folder)
    assert same(fresh.load_last(), state_of(1))
    output = capsys.readouterr().err.splitlines()
    assert len(output) == 2, "one line for each file, whatever its names"
    assert re.search(r"checkpoint .*last.pt is damaged \(its content is not what was written\)", output[0])
    assert re.search(r"checkpoint .*step-00000002.pt is damaged \(\w+\)", output[1])
    assert fresh.best_is_intact() and same(fresh.load_best(), state_of(1))
    (saved.folder / "best.pt").write_bytes(b"rubbish")
    assert not fresh.best_is_intact(), "also where it has been read before"
    with pytest.raises(UserError, match=r"best.pt' is damaged"):
        fresh.load_best()
    with pytest.raises(
        UserError, match=r"every checkpoint in .* is damaged: last.pt, step-00000002.pt, step-00000001.pt"
    ):
        fresh.load_last()
    (saved.folder / "best.pt").unlink()
    assert not fresh.best_is_intact()


def test_training_continues_while_a_checkpoint_is_written(saved: Checkpoints, gate: threading.Event) -> None:
    before = {t.name for t in threading.enumerate()}
    model = nn.Linear(50, 50)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 50)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "list": [1]}
    wanted = copy_to_cpu(state)
    saved.save(state, 1, best=True, keep=1)
    assert not (saved.folder / "last.pt").exists() and "checkpoint" not in before
    for _ in range(3):
        model(torch.ones(1, 50)).sum().backward()
        optimizer.step()
    state["list"].append(2)
    state["more"] = 1
    gate.set()
    saved.wait()
    assert same(saved.load_last(), wanted)
    assert not same(saved.load_last(), state)


def test_a_state_too_large_to_copy_is_written_at_once(
    saved: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_of(1)
    monkeypatch.setattr(checkpoints, "free_memory", lambda: 4 * tensor_bytes(state) - 1)
    monkeypatch.setattr(checkpoints, "copy_to_cpu", lambda _: pytest.fail("there is no room for a copy"))
    saved.save(state, 1, best=False, keep=1)
    assert same(read_state(saved.folder / "last.pt"), state) and "checkpoint" not in {
        t.name for t in threading.enumerate()
    }
    with full_disk():
        saved.save(state_of(2), 2, best=False, keep=1)
    assert "the checkpoint of step 2 (File too large): the one of step 1 is kept" in capsys.readouterr().err


def test_a_system_without_room_for_a_thread(saved: Checkpoints) -> None:
    former = threading.stack_size(1 << 46)
    try:
        with pytest.raises(RuntimeError, match="start new thread"):
            threading.Thread(target=print).start()
        saved.save(state_of(1), 1, best=False, keep=1)
    finally:
        threading.stack_size(former)
    assert same(read_state(saved.folder / "last.pt"), state_of(1))
    saved.wait()


def test_several_saves_in_quick_succession(saved: Checkpoints) -> None:
    for step in range(1, 21):
        saved.save(state_of(step), step, best=step == 7, keep=3)
    saved.wait()
    assert same(saved.load_last(), state_of(20)) and same(saved.load_best(), state_of(7))
    assert names(saved) == ["best.pt", "last.pt", *(f"step-{k:08d}.pt" for k in (18, 19, 20))]


def test_what_is_kept(saved: Checkpoints) -> None:
    for step in (1, 2, 3, 4):
        saved.save(state_of(step), step, best=step == 1, keep=2, wait=True)
    assert names(saved) == ["best.pt", "last.pt", "step-00000003.pt", "step-00000004.pt"]
    assert (saved.folder / "last.pt").samefile(saved.folder / "step-00000004.pt")
    saved.save(state_of(3), 3, best=False, keep=2, wait=True)  # after a step back
    assert names(saved) == ["best.pt", "last.pt", "step-00000003.pt", "step-00000004.pt"]
    saved.save(state_of(3), 3, best=False, keep=2, wait=True)
    saved.save(state_of(5), 5, best=False, keep=3, wait=True)
    saved.save(state_of(4), 4, best=False, keep=2, wait=True)
    assert names(saved) == ["best.pt", "last.pt", "step-00000003.pt", "step-00000004.pt"], "later ones go first"
    saved.save(state_of(6), 6, best=False, keep=2, passing=True, wait=True)
    saved.save(state_of(2), 2, best=False, keep=2, renumbered=True, wait=True)
    assert names(saved) == ["best.pt", "last.pt", "step-00000002.pt"]
    assert same(saved.load_best(), state_of(1)) and same(saved.load_last(), state_of(2))


def test_passing_ones_take_no_place_of_those_that_are_kept(saved: Checkpoints) -> None:
    """Two at most, and none once newer ones that stay are there; the newest is the last one whatever it is."""

    def names() -> list[str]:
        return sorted(f.name for f in saved.folder.iterdir() if f.name[0] in "ps")

    for step in (10, 20):
        saved.save(state_of(step), step, best=False, keep=2, wait=True)
    for step in (21, 22, 23):
        saved.save(state_of(step), step, best=False, keep=2, passing=True, wait=True)
    assert names() == ["passing-00000022.pt", "passing-00000023.pt", "step-00000010.pt", "step-00000020.pt"]
    loaded = saved.load_last()
    assert loaded is not None and loaded["step"] == 23
    (saved.folder / "last.pt").unlink()
    (saved.folder / "passing-00000023.pt").write_bytes(b"damaged")
    loaded = Checkpoints(saved.folder).load_last()
    assert loaded is not None and loaded["step"] == 22
    for step in (30, 40):
        saved.save(state_of(step), step, best=False, keep=2, wait=True)
    assert names() == ["step-00000030.pt", "step-00000040.pt"]


def test_older_ones_go_also_after_one_that_was_killed_before_that(saved: Checkpoints) -> None:
    for step in (1, 2, 3, 4):
        saved.save(state_of(step), step, best=False, keep=4, wait=True)
    with full_disk():
        saved.save(state_of(5), 5, best=False, keep=2)
        saved.wait(raises=False)
    assert names(saved) == ["last.pt", "step-00000003.pt", "step-00000004.pt"], "they make room"


def test_without_hard_links(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        saved.save(state_of(step), step, best=step == 1, keep=1)
    saved.wait()
    assert names(saved) == ["best.pt", "last.pt", "step-00000002.pt"]
    assert same(saved.load_best(), state_of(1)) and same(saved.load_last(), state_of(2))


def test_what_a_killed_process_left_goes(saved: Checkpoints) -> None:
    saved.folder.mkdir()
    for name in ("step-00000009.pt.part", "last.pt.part", "best.pt.part"):
        (saved.folder / name).write_bytes(b"half of it")
    saved.save(state_of(1), 1, best=True, keep=1, wait=True)
    assert names(saved) == ["best.pt", "last.pt", "step-00000001.pt"]


def test_metrics_are_on_the_disk_before_the_checkpoint_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", Config())
    run.log({"step": 1})
    run.checkpoints.save(state_of(1), 1, best=True, keep=1, wait=True)
    seen: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def record(name: str, path: Any) -> None:
        if threading.current_thread().name == "checkpoint":
            seen.append(f"{name} {Path(path).name}")

    monkeypatch.setattr(files.os, "fsync", lambda h: (record("sync", os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (record("rename", b), replace(a, b)))
    monkeypatch.setattr(Path, "unlink", lambda p, **options: (record("unlink", p), unlink(p, **options)))
    run.checkpoints.save(state_of(2), 2, best=False, keep=1)
    run.checkpoints.wait()
    assert [s for s in seen if s != "unlink last.pt.part"] == [
        "sync metrics.jsonl", "sync run", "sync step-00000002.pt.part", "rename step-00000002.pt", "rename last.pt",
        "sync checkpoints", "unlink step-00000001.pt",
    ]  # fmt: skip


def test_how_often_checkpoints_are_written(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    assert saved.interval() == 10
    saved.save(state_of(1), 1, best=False, keep=1, wait=True)
    assert saved.interval() == 10, "a small one takes no fifth of a second"
    monkeypatch.setattr(checkpoints, "BYTES_PER_SECOND", 100.0)
    assert saved.interval() == (saved.folder / "last.pt").stat().st_size / 100
    monkeypatch.setattr(checkpoints, "BYTES_PER_SECOND", 1e12)
    tensors, started = {"x": torch.zeros(10_000_000)}, time.monotonic()
    saved.save(tensors, 2, best=False, keep=1)
    saved.wait()
    original = time.monotonic() - started
    monkeypatch.setattr(checkpoints, "MIN_INTERVAL", 0.0)
    assert 0.5 * original < saved.interval() / 50 <= original


def test_a_full_disk_is_reported_and_training_continues(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    message = (
        r"cannot write a checkpoint in '.*checkpoints' \(File too large\): free some space, then resume with: "
        rf"amclr train --resume {re.escape(str(saved.folder.parent))}$"
    )
    with full_disk():
        saved.save(state_of(1), 1, best=False, keep=1)
        with pytest.raises(UserError, match=message):
            saved.wait()
    assert capsys.readouterr().err == (
        "cannot write the checkpoint of step 1 (File too large): there is no earlier one; the next one is tried again\n"
    )
    saved.save(state_of(2), 2, best=True, keep=1)
    saved.wait()
    there = names(saved)
    with full_disk():
        saved.save(state_of(3), 3, best=False, keep=1)
        saved.save(state_of(4, 3000), 4, best=False, keep=1)  # the failure before does not stop this one
        with pytest.raises(UserError, match=message):
            saved.wait()
        output = capsys.readouterr().err
        assert output.count("(File too large): the one of step 2 is kept; the next one is tried again\n") == 2
        with pytest.raises(UserError, match=message):
            saved.save(state_of(5), 5, best=False, keep=1, wait=True)
        assert not capsys.readouterr().err, "what is raised is not told besides"
    assert names(saved) == there and same(saved.load_last(), state_of(2)), "nothing half written, nothing lost"
    saved.save(state_of(6), 6, best=False, keep=1)
    saved.wait()
    assert same(saved.load_last(), state_of(6))
    saved.save(state_of(7), 7, best=False, keep=1, wait=True)
    assert same(saved.load_last(), state_of(7)) and same(saved.load_best(), state_of(2))
    assert not capsys.readouterr().err


def test_a_resumed_process_knows_which_one_is_kept(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    saved.save(state_of(8), 8, best=False, keep=1, wait=True)
    fresh = Checkpoints(saved.folder)
    with full_disk():
        fresh.save(state_of(9), 9, best=False, keep=1)
        fresh.wait(raises=False)
    assert "step 9 (File too large): the one of step 8 is kept" in capsys.readouterr().err


def test_the_best_one_is_written_once_there_is_room_again(saved: Checkpoints) -> None:
    saved.save(state_of(1), 1, best=True, keep=1, wait=True)
    with full_disk():
        saved.save(state_of(2), 2, best=True, keep=1)
        saved.save(state_of(3), 3, best=False, keep=1)
        saved.wait(raises=False)
    assert same(saved.load_best(), state_of(1))
    saved.save(state_of(4), 4, best=False, keep=1)
    saved.wait()
    assert same(saved.load_best(), state_of(2)) and same(saved.load_last(), state_of(4))
    saved.save(state_of(5), 5, best=False, keep=1, wait=True)
    assert names(saved) == ["best.pt", "last.pt", "step-00000005.pt"] and same(saved.load_best(), state_of(2))
    with full_disk():
        saved.save(state_of(6), 6, best=True, keep=1)
        saved.wait(raises=False)
    saved.save(state_of(7), 7, best=True, keep=1)
    saved.wait()
    assert same(saved.load_best(), state_of(7)), "one that is better takes its place"


def test_a_folder_that_cannot_be_written(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    saved.folder.write_text("a file")
    saved.save(state_of(1), 1, best=False, keep=1)
    with pytest.raises(UserError, match=r"\(File exists\)"):
        saved.wait()
    assert "cannot write the checkpoint of step 1 (File exists): there is no earlier one" in capsys.readouterr().err
    saved.folder.unlink()
    saved.save(state_of(2), 2, best=False, keep=1)
    saved.wait()
    assert same(saved.load_last(), state_of(2))
