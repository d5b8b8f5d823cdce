"""A watchdog over the processes of a run: none waits for ever for one that is gone or stuck."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

BEAT = 1.0
"""Seconds between two heartbeats of a process."""
START_FACTOR = 10.0
"""The first steps, and what is outside of steps, may take so many times longer: kernels are compiled, data is read."""
LONGEST_FACTOR = 10.0
"""A step is not considered stuck before it has taken so many times as long as the longest one so far."""


class Watchdog:
    """Ends this process where another is gone, or one makes no progress for `timeout` seconds.

    A thread sends heartbeats to a TCPStore and checks those of the others. It has to end the process itself, because
    the main thread waits in a collective that nothing else interrupts. Set `before_end` to what must be done first, and
    `advice` to what the user may do then. With one process nothing is watched.
    """

    def __init__(self, rank: int, size: int, timeout: float, store: Any = None, thread_store: Any = None) -> None:
        """store, thread_store: clients of one store, for the main thread and for the watching one."""
        self.rank, self.size, self.timeout = rank, size, timeout
        self.before_end: Callable[[], None] = lambda: None
        self.advice = ""
        self.steps = 0
        """Steps done since the start."""
        self._store, self._thread_store = store, thread_store
        self._activity, self._since, self._limit, self._longest = "start", time.monotonic(), 0.0, 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if size > 1:
            self._beat(store, 0)

    def start(self) -> None:
        """Start to watch."""
        if self.size > 1:
            self.at("start", float("inf"))
            self._thread.start()

    def stop(self) -> None:
        """Stop to watch, at the end of this process's work."""
        self._done.set()
        if self.size > 1:
            with suppress(RuntimeError):  # the process that holds the store is gone
                self._store.set(f"done/{self.rank}", "")
                if self.rank == 0:  # the store ends with this process, and the others' failures with it
                    timeout = 6 * BEAT if self._store.check(["failed"]) else self.timeout
                    self._wait_for([f"done/{rank}" for rank in range(self.size)], timeout)
            # An interpreter that exits while the thread is inside torch's store aborts. The thread sends no further
            # requests, and its last one is answered soon, unless the connection hangs.
            self._thread.join(10 * BEAT)

    def at(self, activity: str, limit: float = 0.0) -> None:
        """Say what this process does from now on. limit: seconds that it may take; 0 for parts of a step."""
        now = time.monotonic()
        if not self._limit:
            self._longest = max(self._longest, now - self._since)
        self._activity, self._since, self._limit = activity, now, limit

    def step(self) -> None:
        """Say that a step has been done."""
        self.steps += 1

    def report_failure(self, message: str) -> tuple[int, str]:
        """Tell the others why this process ends; returns which process reported first, and what."""
        report = self.rank, message
        try:
            rank, reason = json.loads(self._store.compare_set("failed", "", json.dumps(report)))
        except RuntimeError:  # the process that holds the store is gone
            return report
        return rank, reason

    def wait_for_failure(self, seconds: float) -> None:
        """Wait for another process to report a failure, for at most some seconds."""
        with suppress(RuntimeError):
            self._wait_for(["failed"], seconds)

    def _wait_for(self, keys: list[str], seconds: float) -> None:
        # Not the store's `wait`, which prints warnings when the time is up.
        end = time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < end:
            time.sleep(0.1)

    # -- the thread ---------------------------------------------------------------------------------

    def _beat(self, store: Any, count: int) -> None:
        seconds = round(time.monotonic() - self._since, 1)
        store.set(f"beat/{self.rank}", json.dumps([count, self._activity, seconds, self._limit > 0]))

    def _watch(self) -> None:
        last_beat = dict.fromkeys(range(self.size), (-1, time.monotonic()))
        beats: dict[int, list[Any]] = {}
        count = 0
        while not self._done.wait(BEAT):
            count += 1
            now = time.monotonic()
            try:
                self._beat(self._thread_store, count)
                if self._thread_store.check(["failed"]):
                    return self._follow(self._thread_store.get("failed").decode())
                for rank in range(self.size):
                    beats[rank] = json.loads(self._thread_store.get(f"beat/{rank}"))
                    if beats[rank][0] != last_beat[rank][0] or self._thread_store.check([f"done/{rank}"]):
                        last_beat[rank] = beats[rank][0], now
            except RuntimeError:  # the first process holds the store
                if not self._done.wait(5 * BEAT):
                    self._exit(f"process 0 of {self.size} is gone: process {self.rank} stops too{self.advice}")
                return None
            for rank, (_, when) in last_beat.items():
                # Outside of steps, the interpreter, and with it this thread, may be blocked for long.
                if now - when > max(3 * BEAT, self.timeout / 2) * (START_FACTOR if beats[rank][3] else 1.0):
                    self._end(f"process {rank} of {self.size} has sent no heartbeat for {now - when:.0f} s; it was "
                              f"in '{beats[rank][1]}'")  # fmt: skip
            seconds = now - self._since
            if seconds > self._allowed():
                others = "; ".join(
                    f"process {r} in '{beats[r][1]}' for {beats[r][2]:.0f} s" for r in beats if r != self.rank
                )
                self._end(f"process {self.rank} of {self.size} has been in '{self._activity}' for {seconds:.0f} s, "
                          f"and {others}")  # fmt: skip

    def _allowed(self) -> float:
        if self._limit:
            return self._limit
        return max(self.timeout * (START_FACTOR if self.steps < 2 else 1.0), LONGEST_FACTOR * self._longest)

    def _end(self, reason: str) -> None:
        """End this process, whatever its main thread waits for."""
        self.report_failure(f"{reason}{self.advice}")  # the others may learn of it before their own watchdog acts
        self._exit(f"{reason}: process {self.rank} stops too{self.advice}")

    def _follow(self, report: str) -> None:
        """End this process because another has failed, unless its main thread ends by itself, as it usually does."""
        rank, message = json.loads(report)
        if rank != self.rank and not self._done.wait(5 * BEAT):
            self._exit(f"process {rank} of {self.size} has stopped ({message}): process {self.rank} stops too")

    def _exit(self, message: str) -> None:
        with suppress(Exception):
            self.before_end()
        print(f"amclr: {message}", file=sys.stderr, flush=True)
        os._exit(1)
