"""Checkpoints: damaged in every way, written while training goes on, on a full disk, in a process that is killed."""

from __future__ import annotations

import math
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
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import amclr.training.step
from amclr.config.schema import Config
from amclr.runs import checkpoints
from amclr.runs.checkpoints import Checkpoints
from amclr.runs.folder import Run
from amclr.runs.serialization import Damaged, copy_to_cpu, digest, read_state, tensor_bytes
from amclr.training.loop import Stopped, train
from amclr.utils import files
from amclr.utils.errors import UserError
from tests.training.test_loop import frozen

pytestmark = pytest.mark.usefixtures("undrawn")


def state_of(step: int, numbers: int = 40) -> dict[str, Any]:
    """A state with everything that one may hold, other values for every step."""
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(numbers, 3, generator=draw)
    module = nn.BatchNorm1d(3).state_dict()
    module["running_mean"] += step
    return {
        "model": {"weight": weight, "half": weight.to(torch.bfloat16), "turned": weight.T, "none": torch.empty(0, 4)},
        "norm": module,
        "optimizer": {
            "state": {0: {"step": torch.tensor(float(step)), "tied": weight}},
            "param_groups": [{"lr": 1e-3 * step, "betas": (0.9, math.nan), "fused": None, "params": [0, 1]}],
        },
        "mask": weight > 0, "ids": torch.arange(numbers), "step": step, "best": -math.inf, "measured": True,
        "skipped": [step, -1], "text": "ä \n" + str(step), "raw": b"\x00" + bytes([step % 256]),
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal in every bit, without what is tested."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad and bits(a) == bits(b)
    if isinstance(a, dict):
        attributes = not isinstance(a, OrderedDict) or same(vars(a), vars(b))
        return attributes and same(list(a), list(b)) and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return bool(a == b)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).untyped_storage().tolist())


def names(saved: Checkpoints) -> list[str]:
    return sorted(f.name for f in saved.folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    (tmp_path / "run").mkdir()
    return Checkpoints(tmp_path / "run" / "checkpoints")


@contextmanager
def full_disk(limit: int = 1 << 12) -> Iterator[None]:
    """No file may grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    event = threading.Event()

    def waits(state: Any) -> str:
        assert event.wait(60)
        return digest(state)

    monkeypatch.setattr("amclr.runs.serialization.digest", waits)
    return event


# -- content --------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(saved: Checkpoints) -> None:
    wanted = state_of(7)
    for wait in (False, True):
        saved.save(state_of(7), 7, best=True, keep=1, wait=wait)
        saved.wait()
        for found in (saved.load_last(), saved.load_best()):
            assert same(found, wanted), "and nothing besides, such as the digest"
    assert saved.best_is_intact()


@pytest.mark.parametrize("before", [None, 1, "1", 1.5, b"1", True, (1, 2), [1], {"a": 1}, torch.ones(2)])
@pytest.mark.parametrize(
    "after",
    [0, "2", 1.25, b"2", False, [1, 2], (1,), {"a": 2}, {"b": 1}, {1: 1}, OrderedDict(a=1), torch.ones(1, 2), torch.ones(2).double(),
     torch.ones(2, dtype=torch.bfloat16), torch.ones(2).requires_grad_(), torch.tensor([1.0, -1.0])],
)  # fmt: skip
def test_the_digest_tells_everything_apart(before: Any, after: Any) -> None:
    assert digest({"x": before}) != digest({"x": after})


def test_the_digest_tells_structure_order_and_small_numbers_apart() -> None:
    norm = nn.BatchNorm1d(3).state_dict()
    other = copy_to_cpu(norm)
    other._metadata[""]["version"] = 1
    for a, b in [
        ([[1], 2], [[1, 2]]), ([], [[]]), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), (0.0, -0.0), (1, True), ("", None),
        (norm, dict(norm)), (norm, other), (["a", "b"], ["a/b"]), (torch.empty(0, 3), torch.empty(3, 0)),
    ]:  # fmt: skip
        assert digest(a) != digest(b), (a, b)
    assert digest(norm) == digest(copy_to_cpu(norm))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    ],
)
def test_the_digest_is_of_values_however_they_lie(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randint(0, 2, (6, 5, 4)).to(dtype)
    wanted = digest(values)
    assert digest(values.transpose(0, 2).contiguous().transpose(0, 2)) == wanted
    assert digest(torch.cat([values, values])[6:]) == wanted and digest(values[:3]) != wanted
    mapped = torch.from_file(str(tmp_path / "table"), shared=True, size=values.numel(), dtype=dtype)
    assert digest(mapped.view(6, 5, 4).copy_(values)) == wanted
    monkeypatch.setattr("amclr.runs.serialization.PIECE_BYTES", 7)
    assert digest(values.transpose(0, 2).contiguous().transpose(0, 2)) == wanted
    assert digest(torch.tensor(1).to(dtype)) != digest(torch.tensor([1]).to(dtype))


@pytest.mark.parametrize("wait", [False, True])
@pytest.mark.parametrize("value", [np.float64(1), {1, 2}, {(1, 2): 3}, object(), torch.eye(2).to_sparse()])
def test_what_cannot_be_kept_is_a_mistake(value: Any, wait: bool, saved: Checkpoints) -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold"):
        saved.save({"model": {"x": value}}, 1, best=False, keep=1, wait=wait)
    assert saved.load_last() is None


def test_tensors_that_stand_in_a_state_twice_are_copied_once(saved: Checkpoints) -> None:
    tensor, other = torch.zeros(1000), torch.zeros(1000)
    state = {"a": tensor, "b": [tensor.view(1000), other], "c": {"d": tensor[:500]}}
    assert tensor_bytes(state) == 4 * 2500
    found = copy_to_cpu(state)
    assert found["a"].data_ptr() == found["b"][0].data_ptr() != tensor.data_ptr()
    assert len({t.data_ptr() for t in (tensor, found["a"], found["b"][1], found["c"]["d"])}) == 4
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


# -- damage ---------------------------------------------------------------------------------------


def flipped(file: Path, copy: Path, positions: Any, wanted: Any) -> dict[str, int]:
    """How often a changed byte was found out, and how often it did not matter."""
    content, draw = file.read_bytes(), random.Random(1)
    counts = {"found": 0, "harmless": 0}
    for position in positions:
        changed = bytearray(content)
        changed[position] ^= draw.randrange(1, 256)
        copy.write_bytes(changed)
        try:
            state = read_state(copy)
        except Damaged:
            counts["found"] += 1
        else:
            assert same(state, wanted), f"byte {position} of {len(content)}"
            counts["harmless"] += 1
    return counts


def test_a_changed_byte_is_found_or_harmless(saved: Checkpoints, tmp_path: Path) -> None:
    saved.save(state_of(1, 3), 1, best=False, keep=1, wait=True)
    file = saved.folder / "last.pt"
    total = file.stat().st_size
    counts = flipped(file, tmp_path / "copy.pt", random.Random(0).sample(range(total), 1500), state_of(1, 3))
    assert counts["found"] > 300, counts


@pytest.mark.slow
def test_every_changed_byte_is_found_or_harmless(saved: Checkpoints, tmp_path: Path) -> None:
    saved.save(state_of(1, 3), 1, best=False, keep=1, wait=True)
    file = saved.folder / "last.pt"
    for _ in range(2):
        flipped(file, tmp_path / "copy.pt", range(file.stat().st_size), state_of(1, 3))
    saved.save(state_of(2, 5000), 2, best=False, keep=1, wait=True)
    positions = [random.Random(2).randrange(file.stat().st_size) for _ in range(500)]
    assert flipped(file, tmp_path / "copy.pt", positions, state_of(2, 5000))["found"] > 450


def test_a_file_cut_off_anywhere_is_damaged(saved: Checkpoints, tmp_path: Path) -> None:
    saved.save(state_of(1, 3), 1, best=False, keep=1, wait=True)
    content = (saved.folder / "last.pt").read_bytes()
    for length in [*range(0, 40), *range(40, len(content), 23), *range(len(content) - 40, len(content))]:
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(Damaged):
            read_state(tmp_path / "cut.pt")


def test_the_newest_sound_one_is_loaded_and_what_is_wrong_is_told(
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
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2, "one line for each file, whatever its names"
    assert re.search(r"checkpoint .*last.pt is damaged \(its content is not what was written\)", told[0])
    assert re.search(r"checkpoint .*step-00000002.pt is damaged \(\w+\)", told[1])
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


def test_a_payload_is_refused_and_not_executed(
    saved: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Payload:
        def __init__(self, *call: Any) -> None:
            self.call = call

        def __reduce__(self) -> tuple[Any, ...]:
            return self.call[0], self.call[1:]

    saved.save(state_of(1), 1, best=True, keep=5, wait=True)
    saved.save(state_of(2), 2, best=False, keep=5, wait=True)
    for what, protocol, told in [
        (os.mkdir, 2, "Trying to load unsupported GLOBAL posix.mkdir"), (os.mkdir, 4, "Unsupported operand 149"),
        (Path.mkdir, 2, "Unsupported global: GLOBAL"),
    ]:  # fmt: skip
        content = {**state_of(3), "model": Payload(what, tmp_path / "executed")}
        torch.save(content, saved.folder / "step-00000002.pt", pickle_protocol=protocol)
        assert same(saved.load_last(), state_of(1))
        assert f"is damaged (refused: {told}" in capsys.readouterr().err
    (saved.folder / "best.pt").write_bytes((saved.folder / "step-00000002.pt").read_bytes())
    with pytest.raises(UserError, match=r"damaged \(refused: "):
        saved.load_best()
    assert not saved.best_is_intact() and not (tmp_path / "executed").exists()


def test_files_of_the_first_format_have_no_digest(saved: Checkpoints) -> None:
    saved.folder.mkdir()
    torch.save(state_of(4), saved.folder / "last.pt")
    assert same(saved.load_last(), state_of(4)) and same(saved.load_best(), state_of(4))
    for lost in ("sha256", "format"):
        saved.save(state_of(5), 5, best=False, keep=1, wait=True)
        content = torch.load(saved.folder / "last.pt", weights_only=True)
        del content[lost]
        torch.save(content, saved.folder / "step-00000005.pt")
        with pytest.raises(Damaged, match="not what was written"):
            read_state(saved.folder / "step-00000005.pt")


# -- while training goes on -----------------------------------------------------------------------


def test_training_may_go_on_while_a_checkpoint_is_written(saved: Checkpoints, gate: threading.Event) -> None:
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

    def told(name: str, path: Any) -> None:
        if threading.current_thread().name == "checkpoint":
            seen.append(f"{name} {Path(path).name}")

    monkeypatch.setattr(files.os, "fsync", lambda h: (told("sync", os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (told("rename", b), replace(a, b)))
    monkeypatch.setattr(Path, "unlink", lambda p, **options: (told("unlink", p), unlink(p, **options)))
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
    tensors, begun = {"x": torch.zeros(10_000_000)}, time.monotonic()
    saved.save(tensors, 2, best=False, keep=1)
    saved.wait()
    taken = time.monotonic() - begun
    monkeypatch.setattr(checkpoints, "MIN_INTERVAL", 0.0)
    assert 0.5 * taken < saved.interval() / 50 <= taken


# -- a disk that is full --------------------------------------------------------------------------


def test_a_full_disk_is_told_and_training_goes_on(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
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
        told = capsys.readouterr().err
        assert told.count("(File too large): the one of step 2 is kept; the next one is tried again\n") == 2
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


def test_a_process_that_goes_on_knows_which_one_stays(saved: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
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


# -- processes and signals ------------------------------------------------------------------------


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


def saves_until_killed(folder: Path, told: int) -> None:
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
            os.write(told, struct.pack("q", step))


def killed(folder: Path, rounds: int, seed: int) -> int:
    """Kill a process that saves, so many times, at random moments; the last step that it had told of."""
    draw, acknowledged, half = random.Random(seed), 0, 0
    for _ in range(rounds):
        ends, told = os.pipe()
        child = os.fork()
        if not child:
            try:
                saves_until_killed(folder, told)
            finally:
                os._exit(1)
        os.close(told)
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
        found = names(saved) if folder.is_dir() else []
        half += any(n.endswith(".part") for n in found)
        assert len([n for n in found if n.endswith(".part")]) <= 1
        # One that had been renamed, before the oldest went.
        assert len([n for n in found if n.startswith("step-") and n.endswith(".pt")]) <= 3
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


# -- a run ----------------------------------------------------------------------------------------


def fails_at(step: int, monkeypatch: pytest.MonkeyPatch, what: Any) -> None:
    """Call something in place of the forward pass of a step."""
    taken, calls = amclr.training.step.embed, iter(range(1000))

    def embed(model: Any, batch: Any) -> Any:
        if next(calls) == step:
            what()
        return taken(model, batch)

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


def test_a_run_goes_on_while_the_disk_is_full(
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
    told = capsys.readouterr().err
    assert re.search(r"cannot write the checkpoint of step 3 \(File too large\): the one of step \d is kept", told)
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
