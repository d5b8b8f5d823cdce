"""Signals that ask a run to stop, heard where it can."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers send before they kill; what SLURM can be asked to send (`--signal=USR1@60`)."""

SAME = 0.5
"""Seconds within which a second signal is taken for the first."""


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let processes that prepare batches go on until the loop ends: Ctrl-C and schedulers reach every process."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class Interrupted(BaseException):
    """A signal came during what can be done again. Nothing that catches errors on the way is to catch it."""


class Ended(KeyboardInterrupt):
    """As Ctrl-C, after another signal."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


@contextmanager
def ending() -> Iterator[None]:
    """A block, of the main thread, that signals end as Ctrl-C does, rather than the process without a word."""
    own = os.getpid()

    def end(signum: int, frame: Any) -> None:
        if os.getpid() == own:
            raise Ended(signum)
        signal.signal(signum, signal.SIG_DFL)  # a process forked meanwhile has nothing to say
        os.kill(os.getpid(), signum)

    former = {}
    try:
        with suppress(ValueError):  # not in the main thread
            for number in STOPPING:
                if signal.getsignal(number) is signal.SIG_DFL:
                    former[number] = signal.signal(number, end)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


class Signals:
    """As a context: note the first signal that asks to stop instead of dying at once; a second acts as usual.

    What comes at the same time counts as one: a launcher passes on what its processes have got as well.
    """

    def __init__(self, says: bool = True) -> None:
        self.says = says
        self.caught = 0
        """The number of the signal; 0 while there was none."""
        self._interrupts, self._when = False, 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        try:
            for number in STOPPING:
                self._former[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread: leave signals alone
            pass
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.caught:
            if time.monotonic() - self._when > SAME:
                self.__exit__()
                signal.raise_signal(signum)
            return
        self.caught, self._when = signum, time.monotonic()
        if self.says:
            print("\nstopping after this step, with a checkpoint (once more: at once)", file=sys.stderr)
        if self._interrupts:
            raise Interrupted

    @contextmanager
    def interrupting(self, wanted: bool = True) -> Iterator[None]:
        """A block that a signal ends by Interrupted."""
        self._interrupts = wanted
        try:
            if wanted and self.caught:
                raise Interrupted
            yield
        finally:
            self._interrupts = False


@contextmanager
def no_handler_of_loaders() -> Iterator[None]:
    """Make a loader without torch's handler of SIGCHLD, which raises wherever the main thread happens to be.

    That may be within the optimiser, and a worker that has died shows at the next batch too. torch sets the handler
    with a process's first loader, which need not be ours: then it is taken away.
    """
    former = signal.getsignal(signal.SIGCHLD)
    if getattr(former, "__module__", "").startswith("torch."):
        former = signal.SIG_DFL
    yield
    with suppress(ValueError):  # not in the main thread: there, it has not been set
        signal.signal(signal.SIGCHLD, former)
