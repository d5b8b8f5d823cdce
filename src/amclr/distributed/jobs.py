"""Function calls in parallel, each in a process of its own: a fresh interpreter, since torch has threads.

Each gets a GPU of its own where there are enough, or its share of the cores. No process is left behind: one whose
socket to this process closes, for whatever reason, handles that like SIGTERM.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from amclr.distributed.signals import Ended, Signals

TICK = 0.5
"""Seconds between two checks for signals and for processes that have died."""
STOP_TIMEOUT = 300.0
"""Seconds that a process may take for its last step and checkpoint after it was told to stop."""


@dataclass(frozen=True)
class Call:
    """An importable function, its arguments, and a file for what the process prints."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    output: Path


@dataclass(frozen=True)
class Lost:
    """The result of a process that ended without one: its exit code, or minus the signal that ended it."""

    code: int

    def __str__(self) -> str:
        if self.code >= 0:
            return f"its process ended with code {self.code}"
        name = signal.Signals(-self.code).name
        hint = ": memory may have run out; fewer --jobs need less" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"


def side_by_side(calls: Sequence[Call], at_once: int, tick: Callable[[], None]) -> Generator[tuple[int, Any]]:
    """Make calls, `at_once` at a time; yield the number of each with its result, or Lost, as they end.

    tick: called every half second. After a signal (Ctrl-C, SIGTERM, SIGUSR1), or if the generator is closed early, all
    processes get SIGTERM and are waited for; after a signal, Ended is raised then. A second signal kills them.
    """
    waiting, free = deque(enumerate(calls)), deque(shares(at_once))
    running: dict[Connection, tuple[int, dict[str, str], subprocess.Popen[bytes]]] = {}
    with Signals() as signals:
        try:
            while waiting or running:
                while waiting and free:
                    number, call = waiting.popleft()
                    share = free.popleft()
                    channel, process = _start(call, share)
                    running[channel] = number, share, process
                wait(list(running), TICK)
                if signals.caught:
                    raise Ended(signals.caught)
                # A process may have died while its own children still hold its end of the socket.
                for channel in [c for c, (*_, process) in running.items() if c.poll() or process.poll() is not None]:
                    number, share, process = running[channel]
                    result = _result(channel, process)
                    del running[channel]
                    channel.close()
                    free.append(share)
                    if not (output := calls[number].output).stat().st_size:
                        output.unlink()
                    yield number, result
                tick()
        finally:
            _stop(running)


def shares(at_once: int) -> list[dict[str, str]]:
    """The environment variables of `at_once` processes: their GPUs in turn, if there are any, and number of threads."""
    import torch  # not at the top: a process imports this file before its environment variables may be changed

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(torch.get_num_threads(), max(1, cores // at_once))
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (visible.split(",") if visible else list(map(str, range(gpus))))[:gpus]
    return [
        {"OMP_NUM_THREADS": str(threads), **({"CUDA_VISIBLE_DEVICES": devices[k % gpus]} if gpus else {})}
        for k in range(at_once)
    ]


def _start(call: Call, share: dict[str, str]) -> tuple[Connection, subprocess.Popen[bytes]]:
    parent, child = Pipe()
    call.output.parent.mkdir(parents=True, exist_ok=True)
    # It imports from the same paths as this process. -P, because otherwise the working directory would come first.
    environment = {**os.environ, **share, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with child, call.output.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(child.fileno())], env=environment, pass_fds=[child.fileno()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which stops the others
        )  # fmt: skip
    with suppress(OSError):  # it has died already
        parent.send((sys.argv, call.function, call.arguments))
    return parent, process


def _result(channel: Connection, process: subprocess.Popen[bytes]) -> Any:
    """The result of a process, after waiting for its end."""
    try:
        results = [channel.recv()] if channel.poll() else []
    except (EOFError, OSError):
        results = []
    try:
        code = process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return results[0] if results else Lost(code)


def _stop(running: dict[Connection, tuple[int, dict[str, str], subprocess.Popen[bytes]]]) -> None:
    """Let processes stop by themselves; kill them if the wait is interrupted."""
    for channel in running:
        channel.close()
    try:
        for *_, process in running.values():
            process.wait()
    finally:
        for *_, process in running.values():
            process.kill()
            process.wait()


def _end_with(channel: Connection) -> None:
    """Stop this process, as by SIGTERM, once the one that started it closes the socket or is gone."""
    channel.poll(None)  # nothing more is sent
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(STOP_TIMEOUT)
    os._exit(1)


def main() -> None:
    """Run one call in this process: `python -m amclr.distributed.jobs SOCKET`."""
    channel = Connection(int(sys.argv[1]))
    try:
        call = channel.recv_bytes()
    except (EOFError, OSError):
        return
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    sys.argv, function, arguments = pickle.loads(call)
    result = function(*arguments)
    with suppress(OSError):
        channel.send(result)


if __name__ == "__main__":
    main()
