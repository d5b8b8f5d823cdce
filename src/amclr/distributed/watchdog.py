"""The processes of a run: they agree on what to do next, and none waits for ever for one that is gone."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from amclr.distributed.world import process, processes
from amclr.utils.errors import UserError

T = TypeVar("T")

BEAT = 1.0
"""Seconds between two signs of life of a process."""
LONG = timedelta(days=30)
"""For waits that the watch, and no timeout, puts an end to."""
BEGINNING = 10.0
"""The first steps, and what is no part of a step, may take so many times longer: kernels are compiled, data read."""
USUAL = 10.0
"""No step is held to be stuck before it has taken so many times as long as the longest one so far."""
LOST = r"(?i)connection (was likely )?(closed|reset|refused)|peer|socket|NCCL|broken pipe|gloo"
"""What errors of collectives say when another process has gone."""


class Team:
    """The processes of a run, after torch.distributed has been set up; on one process nothing that costs.

    As a context it watches: a thread gives a sign of life and looks for those of the others. Where one is
    silent or makes no progress for `watchdog_timeout` seconds, this process says so and ends, since its main thread
    waits in a collective that nothing else ends. Set `before_end` to what has to be done first, and `advice`
    to what the user may do then.
    """

    def __init__(self, watchdog_timeout: float) -> None:
        self.size = processes()
        self.rank = process()
        self.watchdog_timeout = watchdog_timeout
        self.before_end: Callable[[], None] = lambda: None
        self.advice = ""
        self._place, self._since, self._limit, self._longest = "start", time.monotonic(), 0.0, 0.0
        self._steps = 0
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="team", daemon=True)
        self._pending: tuple[Any, torch.Tensor] | None = None
        if self.size == 1:
            return
        # Its own channel: the main one may be of GPUs, whose collectives wait for the device.
        self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=LONG))
        port = [0]
        if self.rank == 0:
            self._server = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=LONG)
            port = [self._server.port]
        dist.broadcast_object_list(port, group=self._control)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1") if self.rank else "127.0.0.1"
        # A client waits with its lock held: the thread that watches has one of its own.
        self._store, self._watched = (
            dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False, timeout=LONG) for _ in range(2)
        )
        self._beat(self._store, 0)
        dist.barrier(group=self._control)

    @property
    def first_rank(self) -> bool:
        """Whether this process is the one that writes, and speaks for all."""
        return self.rank == 0

    # -- doing things together ----------------------------------------------------------------------

    def share(self, value: T) -> T:
        """The first process's value, on all."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._control)
        return box[0]

    def in_turn(self, make: Callable[[], T]) -> T:
        """Call `make` on the first process, then on the others at once: what it caches is there for them."""
        while self.rank and not self._store.check(["turn"]):
            if self._store.check(["failed"]):
                raise UserError("")
            time.sleep(0.1)
        made = make()
        if self.size > 1 and self.rank == 0:
            self._store.set("turn", "")
        return made

    def agree(self, *flags: int) -> tuple[int, ...]:
        """The largest of each flag over the processes, of those passed at the call before this one.

        Everybody calls it at the same step, so all learn of it at the same step; since it is the result of the
        call before, nobody waits for it. On one process it is what is passed.
        """
        if self.size == 1:
            return flags
        before, tensor = self._pending, torch.tensor(flags)
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True), tensor
        if before is None:
            return (0,) * len(flags)
        before[0].wait()
        return tuple(before[1].tolist())

    def meet(self) -> None:
        """Wait until all processes have come here."""
        if self.size > 1:
            dist.barrier(group=self._control)

    # -- ending together ----------------------------------------------------------------------------

    @contextmanager
    def telling(self, *expected: type[BaseException]) -> Iterator[None]:
        """A block whose errors, but for expected ones, end the others too.

        The process that met one first reports it; on the others UserError says so, without a message where no step
        has been made yet: then all have met the same.
        """
        try:
            yield
        except BaseException as error:
            if self.size == 1 or isinstance(error, expected):
                raise
            lost = isinstance(error, RuntimeError) and re.search(LOST, str(error))
            if isinstance(error, KeyboardInterrupt):  # it mostly reaches all
                self.fail("stopped by a signal")
                raise
            message = " ".join((str(error) or type(error).__name__).split())[:300]
            if lost:
                with suppress(RuntimeError):
                    self._await(["failed"], within=3 * BEAT)
                message = f"the connection to another process is lost ({message}){self.advice}"
            rank, said = self.fail(message)
            if rank != self.rank:
                told = f"process {rank} of {self.size} has stopped: {said}" if self._steps else ""
                raise UserError(told) from None
            if lost:
                raise UserError(message) from None
            raise

    def fail(self, message: str) -> tuple[int, str]:
        """Tell the others why this process ends; which process told that first, and what."""
        own = self.rank, message
        try:
            rank, said = json.loads(self._store.compare_set("failed", "", json.dumps(own)))
        except RuntimeError:  # the process that keeps the store has gone
            return own
        return rank, said

    def _await(self, keys: list[str], within: float) -> None:
        """Wait until these are in the store, but not for long."""
        # Not `wait` of the store: where the time is up, it prints warnings.
        end = time.monotonic() + within
        while not self._store.check(keys) and time.monotonic() < end:
            time.sleep(0.1)

    # -- watching ------------------------------------------------------------------------------------

    def at(self, place: str, limit: float = 0.0) -> None:
        """Say what this process turns to now. limit: seconds that it may take; 0 is what parts of a step may."""
        now = time.monotonic()
        if not self._limit:
            self._longest = max(self._longest, now - self._since)
        self._place, self._since, self._limit = place, now, limit

    def step(self) -> None:
        """Say that a step has been made."""
        self._steps += 1

    def __enter__(self) -> Team:
        if self.size > 1:
            self.at("start", float("inf"))
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self.size > 1:
            with suppress(RuntimeError):  # of a store whose process has gone
                self._store.set(f"done/{self.rank}", "")
                if self.rank == 0:  # the store of all goes with this process, and what it failed of with that
                    watchdog_timeout = 6 * BEAT if self._store.check(["failed"]) else self.watchdog_timeout
                    self._await([f"done/{rank}" for rank in range(self.size)], watchdog_timeout)
            # An interpreter that ends while the thread is within torch's store aborts the process. It asks nothing
            # more now, and what it has asked is answered soon, unless the connection has gone silent.
            self._watcher.join(10 * BEAT)

    def _beat(self, store: Any, count: int) -> None:
        taken = round(time.monotonic() - self._since, 1)
        store.set(f"beat/{self.rank}", json.dumps([count, self._place, taken, self._limit > 0]))

    def _watch(self) -> None:
        heard = dict.fromkeys(range(self.size), (-1, time.monotonic()))
        at: dict[int, list[Any]] = {}
        count = 0
        while not self._done.wait(BEAT):
            count += 1
            now = time.monotonic()
            try:
                self._beat(self._watched, count)
                if self._watched.check(["failed"]):
                    return self._follow(self._watched.get("failed").decode())
                for rank in range(self.size):
                    at[rank] = json.loads(self._watched.get(f"beat/{rank}"))
                    if at[rank][0] != heard[rank][0] or self._watched.check([f"done/{rank}"]):
                        heard[rank] = at[rank][0], now
            except RuntimeError:  # the first process keeps the store
                if not self._done.wait(5 * BEAT):
                    self._leave(f"process 0 of {self.size} is gone: process {self.rank} stops too{self.advice}")
                return None
            for rank, (_, when) in heard.items():
                # What is no part of a step may keep the interpreter, and with it this thread, busy for long.
                if now - when > max(3 * BEAT, self.watchdog_timeout / 2) * (BEGINNING if at[rank][3] else 1.0):
                    self._end(f"nothing has been heard of process {rank} of {self.size} for {now - when:.0f} s; it was "
                              f"in '{at[rank][1]}'")  # fmt: skip
            taken = now - self._since
            if taken > self._allowed():
                others = "; ".join(f"process {r} in '{at[r][1]}' for {at[r][2]:.0f} s" for r in at if r != self.rank)
                self._end(f"process {self.rank} of {self.size} has been in '{self._place}' for {taken:.0f} s, "
                          f"and {others}")  # fmt: skip

    def _allowed(self) -> float:
        if self._limit:
            return self._limit
        return max(self.watchdog_timeout * (BEGINNING if self._steps < 2 else 1.0), USUAL * self._longest)

    def _end(self, why: str) -> None:
        """End this process, whatever its main thread waits for."""
        self.fail(f"{why}{self.advice}")  # the others may learn of the end from this before their own watch acts
        self._leave(f"{why}: process {self.rank} stops too{self.advice}")

    def _follow(self, said: str) -> None:
        """End this process because another does, unless its main thread ends by itself, as it mostly will."""
        rank, message = json.loads(said)
        if rank != self.rank and not self._done.wait(5 * BEAT):
            self._leave(f"process {rank} of {self.size} has stopped ({message}): process {self.rank} stops too")

    def _leave(self, message: str) -> None:
        with suppress(Exception):
            self.before_end()
        print(f"amclr: {message}", file=sys.stderr, flush=True)
        os._exit(1)
