"""Kills, cuts, Ctrl-C and several processes leave no trace in a store."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from amclr import cli
from amclr.config.schema import Config, ParaphraseConfig
from amclr.data import manifest as manifests
from amclr.data.text.store import read_store
from amclr.data.text.version import Version
from amclr.paraphrase import paraphrase
from amclr.paraphrase.generators import ModelParaphraser, RuleParaphraser
from amclr.utils.errors import UserError
from tests.conftest import Command
from tests.paraphrase.conftest import bytes_of, captioned, child, options, parts


def kill_and_resume(start: Callable[[], int], store: Path, kills: int, seed: int) -> int:
    """Kill a job at random moments, some before it is done; then let it end. Returns the kills that hit it at work."""
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        had = parts(store)
        pid = start()
        deadline = time.monotonic() + 60
        while parts(store) == had and os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.15)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            break
        hits += not list(store.glob("*/paraphrases.jsonl"))
    assert os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]) == 0
    return hits


def test_two_kills_leave_no_trace(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data", 120)
    paraphrase(options(seq2seq, out=str(tmp_path / "whole")), str(data))
    store = tmp_path / "killed"
    start = lambda: child(lambda: paraphrase(options(seq2seq, out=str(store)), str(data)))  # noqa: E731
    assert kill_and_resume(start, store, kills=2, seed=0) == 2
    assert bytes_of(store) == bytes_of(tmp_path / "whole")


@pytest.mark.slow
def test_ten_kills_of_the_command_leave_no_trace(seq2seq: Path, tmp_path: Path, amclr: Command) -> None:
    """The real command, in processes of its own."""
    data = captioned(tmp_path / "data", 600)
    chosen = {k: v for k, v in vars(options(seq2seq)).items() if v != getattr(ParaphraseConfig(), k)}
    arguments = ["paraphrase", str(data), *(f"--{k}={str(v).lower() if v is False else v}" for k, v in chosen.items())]
    whole = amclr(*arguments, "--out", "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    store = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start() -> int:
        command = [sys.executable, "-m", "amclr", *arguments, "--out", str(store)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL).pid

    assert kill_and_resume(start, store, kills=10, seed=1) == 10
    assert bytes_of(store) == bytes_of(tmp_path / "whole")


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("operation", ["fsync", "replace", "unlink"])
def test_a_cut_at_any_write_leaves_no_trace(
    operation: str, seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is cut at its first, second, ... write in turn, then resumed, until one is not cut any more."""
    data = captioned(tmp_path / "data", 12)
    paraphrase(options("rules", out=str(tmp_path / "whole")), str(data))
    module = Path if operation == "unlink" else os
    real = getattr(module, operation)
    for n in range(1, 40):
        store, calls = tmp_path / f"cut{n}", 0

        def cut(*arguments: Any, n: int = n) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                raise PowerCut
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, operation, cut)
            with suppress(PowerCut):
                paraphrase(options("rules", out=str(store)), str(data))
        if calls < n:
            break
        paraphrase(options("rules", out=str(store)), str(data))
        assert bytes_of(store) == bytes_of(tmp_path / "whole"), n
    assert n > (1 if operation == "unlink" else 4) and calls < n


@pytest.mark.parametrize("process", [0, 7])
def test_a_line_cut_anywhere_is_done_again(process: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the part of this process, and in that of one which this time does not take part."""
    data = captioned(tmp_path / "data", 12)
    settings = options("rules", out=str(tmp_path / "store"))
    with monkeypatch.context() as patch:
        patch.setattr(Version, "finish", lambda self: {})
        paraphrase(settings, str(data))
    (part,) = (tmp_path / "store").glob("*/parts/*.jsonl")
    whole = part.read_bytes()
    paraphrase(settings, str(data))
    expected = bytes_of(tmp_path / "store")
    for cut in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1):
        for name in ("paraphrases.jsonl", "report.json", "sample.txt"):
            next((tmp_path / "store").glob(f"*/{name}")).unlink()
        part.parent.mkdir()
        part.with_name(f"{process:05d}.jsonl").write_bytes(whole[:cut])
        paraphrase(settings, str(data))
        assert bytes_of(tmp_path / "store") == expected


def test_captions_added_during_an_interruption_keep_what_is_done(
    seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = captioned(tmp_path / "data")
    real, seen = ModelParaphraser.__call__, []

    def stops(self: ModelParaphraser, captions: list[str], count: int) -> list[list[str | None]]:
        if len(seen) >= 8:
            raise KeyboardInterrupt
        seen.extend(captions)
        return real(self, captions, count)

    with monkeypatch.context() as patch:
        patch.setattr(ModelParaphraser, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            paraphrase(options(seq2seq), str(data))
    assert len(seen) == 8
    with pytest.raises(UserError, match="are not complete: give the same `amclr paraphrase` command again"):
        manifests.load(Config(data=str(data)), tmp_path)
    with (data / "captions.txt").open("a") as handle:
        handle.write("0.png,the wet old dog plays over the old street near the happy cat\n")
    again: list[str] = []
    monkeypatch.setattr(ModelParaphraser, "__call__", lambda self, c, n: again.extend(c) or real(self, c, n))
    report = paraphrase(options(seq2seq), str(data))
    assert not set(again) & set(seen) and "8 of them done before an interruption" in report
    assert len(read_store(data / "paraphrases").texts) == len(again) + 8


def test_two_processes_make_the_store_of_one(seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = captioned(tmp_path / "data")
    paraphrase(options(seq2seq, out=str(tmp_path / "one")), str(data))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        paraphrase(options(seq2seq, out=str(tmp_path / "two")), str(data))

    pids = [child(lambda r=r: work(r)) for r in range(2)]  # type: ignore[misc]
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0, 0]
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_resumes_where_one_process_was_killed(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data", 200)
    paraphrase(options(seq2seq, out=str(tmp_path / "one")), str(data))
    store = tmp_path / "store"
    pid = child(lambda: paraphrase(options(seq2seq, out=str(store)), str(data)))
    while parts(store) < 5:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    had = parts(store)
    chosen = {k: v for k, v in vars(options(seq2seq)).items() if v != getattr(ParaphraseConfig(), k)}
    arguments = [f"--{k}={str(v).lower() if v is False else v}" for k, v in chosen.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "amclr"]
    done = subprocess.run(
        [*command, "paraphrase", str(data), *arguments, "--out", str(store)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("paraphrases  ") == 1 and had >= 5
    assert bytes_of(store) == bytes_of(tmp_path / "one")


def test_ctrl_c_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = captioned(tmp_path / "data")
    real, batches = RuleParaphraser.__call__, []

    def stops(self: RuleParaphraser, captions: list[str], count: int) -> list[list[str | None]]:
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(captions)
        return real(self, captions, count)

    with monkeypatch.context() as patch:
        patch.setattr(RuleParaphraser, "__call__", stops)
        command = ["paraphrase", str(data), "--model", "rules", "--batch_size", "4", "--progress", "false"]
        assert cli.main(command) == 130
    assert capsys.readouterr().err == (
        "amclr: interrupted; finished batches are kept: rerun the same command to resume\n"
    )
    assert parts(data / "paraphrases") == 3 and cli.main(command) == 0
    assert "12 of them done before an interruption" in capsys.readouterr().out


def test_one_process_at_a_time(tmp_path: Path) -> None:
    data = captioned(tmp_path / "data")
    version = Version(data / "paraphrases", {"model": "rules", "k": 2})
    from amclr.paraphrase.generate import _lock

    with _lock(version.folder), pytest.raises(UserError, match="another `amclr paraphrase` is writing to"):
        _lock(version.folder)
    with _lock(version.folder):
        pass
