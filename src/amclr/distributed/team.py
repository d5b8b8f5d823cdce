"""The processes of a run: they share values, agree on what to do next, and end together after an error."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from amclr.distributed.watchdog import BEAT, Watchdog
from amclr.distributed.world import process, processes
from amclr.utils.errors import UserError

T = TypeVar("T")

NO_TIMEOUT = timedelta(days=30)
"""For waits that the watchdog ends, rather than a timeout."""
CONNECTION_LOST = r"(?i)connection (was likely )?(closed|reset|refused)|peer|socket|NCCL|broken pipe|gloo"
"""Messages of errors that collectives raise when another process is gone."""


class Team:
    """The processes of a run, once torch.distributed is initialised; on one process it costs nothing.

    As a context it runs a `Watchdog` over them.
    """

    def __init__(self, watchdog_timeout: float) -> None:
        self.size = processes()
        self.rank = process()
        self._pending: tuple[Any, torch.Tensor] | None = None
        if self.size == 1:
            self.watchdog = Watchdog(0, 1, watchdog_timeout)
            return
        # A group of its own, since collectives of the default one may wait for a GPU.
        self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=NO_TIMEOUT))
        port = [0]
        if self.rank == 0:
            self._server = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=NO_TIMEOUT)
            port = [self._server.port]
        dist.broadcast_object_list(port, group=self._control)
        host = os.environ.get("MASTER_ADDR", "127.0.0.1") if self.rank else "127.0.0.1"
        # A client holds its lock while it waits: the thread that watches has one of its own.
        self._store, watched_store = (
            dist.TCPStore(host, port[0], is_master=False, wait_for_workers=False, timeout=NO_TIMEOUT) for _ in range(2)
        )
        self.watchdog = Watchdog(self.rank, self.size, watchdog_timeout, self._store, watched_store)
        dist.barrier(group=self._control)

    @property
    def first_rank(self) -> bool:
        """Whether this process is the one that writes files and prints messages."""
        return self.rank == 0

    def __enter__(self) -> Team:
        self.watchdog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watchdog.stop()

    def broadcast(self, value: T) -> T:
        """The first process's value, on all."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._control)
        return values[0]

    def first_then_others(self, function: Callable[[], T]) -> T:
        """Call a function on the first process, then on the others at once, which find what it has cached."""
        while self.rank and not self._store.check(["turn"]):
            if self._store.check(["failed"]):
                raise UserError("")
            time.sleep(0.1)
        result = function()
        if self.size > 1 and self.rank == 0:
            self._store.set("turn", "")
        return result

    def agree(self, *flags: int) -> tuple[int, ...]:
        """The maximum over the processes of each flag that was passed at the call before this one.

        All processes call it at the same step, so all learn of a flag at the same step; because they get the result of
        the previous call, none waits. On one process it returns what it is passed.
        """
        if self.size == 1:
            return flags
        previous, tensor = self._pending, torch.tensor(flags)
        self._pending = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._control, async_op=True), tensor
        if previous is None:
            return (0,) * len(flags)
        previous[0].wait()
        return tuple(previous[1].tolist())

    def barrier(self) -> None:
        """Wait until all processes have reached this call."""
        if self.size > 1:
            dist.barrier(group=self._control)

    @contextmanager
    def reporting_errors(self, *expected: type[BaseException]) -> Iterator[None]:
        """A block whose errors, except for expected ones, also end the other processes.

        The process that fails first reports its error. On the others UserError says so; its message is empty where no
        step has been made yet, since all have then met the same error.
        """
        try:
            yield
        except BaseException as error:
            if self.size == 1 or isinstance(error, expected):
                raise
            lost = isinstance(error, RuntimeError) and re.search(CONNECTION_LOST, str(error))
            if isinstance(error, KeyboardInterrupt):  # usually reaches all processes
                self.watchdog.report_failure("stopped by a signal")
                raise
            message = " ".join((str(error) or type(error).__name__).split())[:300]
            if lost:
                self.watchdog.wait_for_failure(3 * BEAT)
                message = f"the connection to another process is lost ({message}){self.watchdog.advice}"
            rank, reason = self.watchdog.report_failure(message)
            if rank != self.rank:
                stopped = f"process {rank} of {self.size} has stopped: {reason}"
                raise UserError(stopped if self.watchdog.steps else "") from None
            if lost:
                raise UserError(message) from None
            raise
