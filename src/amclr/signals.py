"""Signals that ask a run to stop, heard where it can."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers send before they kill; what SLURM can be asked to send (`--signal=USR1@60`)."""


def leave_signals_to_the_trainer(worker: int) -> None:
    """Let processes that prepare batches go on until the loop ends: Ctrl-C and schedulers reach every process."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class Interrupted(Exception):
    """A signal came during what can be done again."""


class Signals:
    """As a context: note the first signal that asks to stop instead of dying at once; a second acts as usual."""

    def __init__(self) -> None:
        self.caught = 0
        """The number of the signal; 0 while there was none."""
        self._interrupts = False
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
        self.caught = signum
        print("\nstopping after this step, with a checkpoint (once more: at once)", file=sys.stderr)
        self.__exit__()
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
def kept_handler(number: int) -> Iterator[None]:
    """Put a signal's handler back afterwards.

    torch's loader has one for SIGCHLD that raises wherever the main thread happens to be, such as within
    the optimiser. A worker that has died shows at the next batch too.
    """
    former = signal.getsignal(number)
    yield
    with suppress(ValueError):  # not in the main thread: there, it has not been set
        signal.signal(number, former)
