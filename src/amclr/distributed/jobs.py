"""Calls that run side by side, each in a process of its own: a fresh interpreter, since torch has threads.

Each has a device to itself as far as there are enough, or its part of the cores. Nothing is left behind: a process
whose socket to this one closes, whatever ended this one, takes it for SIGTERM.
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
"""Seconds between two looks at what is not told: signals, processes that have died."""
LAST = 300.0
"""Seconds that a process which is to stop may take for its last step and checkpoint."""


@dataclass(frozen=True)
class Call:
    """A function that can be imported, its arguments, and a file for what the process prints."""

    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    output: Path


@dataclass(frozen=True)
class Lost:
    """What there is of a process that ended without a result: its exit code, or minus the signal that ended it."""

    code: int

    def __str__(self) -> str:
        if self.code >= 0:
            return f"its process ended with code {self.code}"
        name = signal.Signals(-self.code).name
        hint = ": memory may have run out, which fewer --jobs need less of" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"


def side_by_side(calls: Sequence[Call], at_once: int, tick: Callable[[], None]) -> Generator[tuple[int, Any]]:
    """Make calls, so many at a time; yield the number of each with what it returned, or Lost, as they end.

    tick: called every half second. After a signal (Ctrl-C, SIGTERM, SIGUSR1), or where this is closed before its end,
    all processes get SIGTERM and are waited for; after a signal, Ended is raised then. A second signal kills them.
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
                # A process may have died while one that it forked still holds its end of the socket.
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
    """What each of so many processes has in its environment: a GPU in turn, if there are any; its share of cores."""
    import torch  # not in the processes: what is set here has to be there before

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(torch.get_num_threads(), max(1, cores // at_once))
    found = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (named.split(",") if named else list(map(str, range(found))))[:found]
    return [
        {"OMP_NUM_THREADS": str(threads), **({"CUDA_VISIBLE_DEVICES": devices[k % found]} if found else {})}
        for k in range(at_once)
    ]


def _start(call: Call, share: dict[str, str]) -> tuple[Connection, subprocess.Popen[bytes]]:
    here, there = Pipe()
    call.output.parent.mkdir(parents=True, exist_ok=True)
    # It finds what this process finds, and no more: -P, or the working directory would come first.
    environment = {**os.environ, **share, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with there, call.output.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(there.fileno())], env=environment, pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,  # a terminal's Ctrl-C is for this process, which stops the others
        )  # fmt: skip
    with suppress(OSError):  # it has died already
        here.send((sys.argv, call.work, call.arguments))
    return here, process


def _result(channel: Connection, process: subprocess.Popen[bytes]) -> Any:
    """What a process returned; it ends."""
    try:
        found = [channel.recv()] if channel.poll() else []
    except (EOFError, OSError):
        found = []
    try:
        code = process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    return found[0] if found else Lost(code)


def _stop(running: dict[Connection, tuple[int, dict[str, str], subprocess.Popen[bytes]]]) -> None:
    """Let processes stop by themselves; kill them where the wait is interrupted."""
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
    """Stop this process, as by SIGTERM, where the one that started it closes the socket or has gone."""
    channel.poll(None)  # nothing more is sent
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(LAST)
    os._exit(1)


def main() -> None:
    """What each of the processes does: `python -m amclr.jobs SOCKET`."""
    channel = Connection(int(sys.argv[1]))
    try:
        call = channel.recv_bytes()
    except (EOFError, OSError):
        return
    threading.Thread(target=_end_with, args=(channel,), daemon=True).start()
    sys.argv, work, arguments = pickle.loads(call)
    result = work(*arguments)
    with suppress(OSError):
        channel.send(result)


if __name__ == "__main__":
    main()
