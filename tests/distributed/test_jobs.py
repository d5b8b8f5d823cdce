"""Calls side by side in processes of their own: what comes back, what each is given, how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from amclr.distributed.jobs import Call, Lost, side_by_side
from amclr.distributed.signals import Ended


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and not been waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(there: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fail(reason: str) -> None:
    print("so far so good", flush=True)
    raise RuntimeError(reason)


def stay(file: Path, heeds: bool = True) -> str:
    """Stay for two minutes; where a signal ends that, tell it in a file."""

    def end(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(signum).name)

    signal.signal(signal.SIGTERM, end if heeds else signal.SIG_IGN)
    file.write_text(str(os.getpid()))
    try:
        time.sleep(120)
    except KeyboardInterrupt as told:
        time.sleep(0.3)  # a last step
        file.with_suffix(".ended").write_text(str(told))
    return "stayed"


def built(calls: list[Call], at_once: int) -> dict[int, Any]:
    with closing(side_by_side(calls, at_once, lambda: None)) as ended:
        return dict(ended)


def stays(folder: Path, heeds: bool = True) -> list[Call]:
    return [Call(stay, (folder / f"{k}.pid", heeds), folder / f"{k}.txt") for k in range(2)]


def test_results_losses_and_what_was_printed(tmp_path: Path) -> None:
    calls = [
        Call(work, arguments, tmp_path / "outputs" / f"{k}.txt")
        for k, (work, arguments) in enumerate(
            [
                (divmod, (17, 5)),
                (fail, ("no luck",)),
                (signal.raise_signal, (signal.SIGKILL,)),
                (os._exit, (3,)),
                (os.getpid, ()),
            ]
        )
    ]
    result = built(calls, 2)
    assert result[0] == (3, 2) and result[4] != os.getpid()
    assert (result[1], result[2], result[3]) == (Lost(1), Lost(-signal.SIGKILL), Lost(3))
    assert "SIGKILL: memory may have run out" in str(result[2]) and str(result[3]) == "its process ended with code 3"
    assert [f.name for f in (tmp_path / "outputs").iterdir()] == ["1.txt"]
    said = calls[1].output.read_text()
    assert said.startswith("so far so good") and "RuntimeError: no luck" in said


def test_so_many_at_a_time(tmp_path: Path) -> None:
    """Of four naps two overlap, and never three."""
    times = built([Call(nap, (0.5,), tmp_path / f"{k}.txt") for k in range(4)], 2).values()
    most = max(sum(start <= other < end for start, end in times) for other, _ in times)
    assert most == 2


def nap(seconds: float) -> tuple[float, float]:
    start = time.monotonic()
    time.sleep(seconds)
    return start, time.monotonic()


@pytest.mark.parametrize(("visible", "devices"), [(None, ["0", "1", "0"]), ("5,GPU-a", ["5", "GPU-a", "5"])])
def test_devices_go_round(
    visible: str | None, devices: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process finds in its environment from the start, before anything has been imported."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    calls = [Call(os.getenv, ("CUDA_VISIBLE_DEVICES",), tmp_path / f"{k}.txt") for k in range(3)]
    assert [given for _, given in sorted(built(calls, 3).items())] == devices


def test_cores_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    calls = [Call(os.getenv, ("OMP_NUM_THREADS",), tmp_path / f"{k}.txt") for k in range(3)]
    assert set(built(calls, 3).values()) == {"2"} and set(built(calls[:1], 1).values()) == {"8"}
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # where it was asked for
    assert set(built(calls[:1], 1).values()) == {"1"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_and_waits(number: signal.Signals, tmp_path: Path) -> None:
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]

    def tick() -> None:
        if all(f.is_file() and f.read_text() for f in files):
            signal.raise_signal(number)

    with pytest.raises(Ended) as ended, closing(side_by_side(stays(tmp_path), 2, tick)) as results:
        assert not list(results)
    assert ended.value.signum == number
    assert all(f.with_suffix(".ended").read_text() == "SIGTERM" for f in files), "each was given time for its end"
    assert not any(alive(int(f.read_text())) for f in files)


def test_a_second_signal_kills(tmp_path: Path) -> None:
    """Processes that heed no SIGTERM: the first Ctrl-C waits for them, the second does not."""
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]

    def tick() -> None:
        if all(f.is_file() and f.read_text() for f in files) and not armed:
            armed.append(True)
            signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, 1.5)
            signal.raise_signal(signal.SIGINT)

    armed: list[bool] = []
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), closing(side_by_side(stays(tmp_path, heeds=False), 2, tick)) as results:
        list(results)
    assert time.monotonic() - start < 60 and not any(alive(int(f.read_text())) for f in files)


def test_nothing_stays_where_the_first_process_is_killed(tmp_path: Path) -> None:
    files = [tmp_path / "0.pid", tmp_path / "1.pid"]
    parent = multiprocessing.get_context("fork").Process(target=built, args=(stays(tmp_path), 2))
    parent.start()
    until(lambda: all(f.is_file() and f.read_text() for f in files))
    pids = [int(f.read_text()) for f in files]
    assert all(map(alive, pids))
    parent.kill()
    parent.join()
    until(lambda: not any(map(alive, pids)), 30)
    assert all(f.with_suffix(".ended").read_text() == "SIGTERM" for f in files)
