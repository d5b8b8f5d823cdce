"""Signals that ask a run to stop, handled where it can stop."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers send before they kill; what SLURM can send ahead of that (`--signal=USR1@60`)."""

SAME_SIGNAL = 0.5
"""Seconds within which a second signal counts as the first."""


def leave_signals_to_the_trainer(worker: int) -> None:
    """Have worker processes ignore signals, which reach every process: the loop ends the workers."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class Interrupted(BaseException):
    """A signal during work that can be repeated. A BaseException, so that nothing on the way catches it."""


class Ended(KeyboardInterrupt):
    """Like Ctrl-C, after another signal."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


@contextmanager
def ending() -> Iterator[None]:
    """A block, in the main thread, where signals in STOPPING act like Ctrl-C rather than end the process at once."""
    process = os.getpid()

    def end(signum: int, frame: Any) -> None:
        if os.getpid() == process:
            raise Ended(signum)
        signal.signal(signum, signal.SIG_DFL)  # a forked process just ends
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
    """A context that records the first signal instead of ending the process; a second one acts as usual.

    Signals at the same time count as one, since launchers forward to their processes what these have received too.
    """

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self.caught = 0
        """The number of the signal; 0 while there is none."""
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
            if time.monotonic() - self._when > SAME_SIGNAL:
                self.__exit__()
                signal.raise_signal(signum)
            return
        self.caught, self._when = signum, time.monotonic()
        if self.verbose:
            print("\nstopping after this step, with a checkpoint (again: at once)", file=sys.stderr)
        if self._interrupts:
            raise Interrupted

    @contextmanager
    def interrupting(self, wanted: bool = True) -> Iterator[None]:
        """A block that a signal ends with Interrupted, if `wanted`."""
        self._interrupts = wanted
        try:
            if wanted and self.caught:
                raise Interrupted
            yield
        finally:
            self._interrupts = False


@contextmanager
def no_handler_of_loaders() -> Iterator[None]:
    """A block that creates a loader without torch's SIGCHLD handler, which raises anywhere in the main thread.

    That may be within the optimiser, and a worker's death is noticed at the next batch anyway. torch sets the handler
    with a process's first loader; if that was not ours, the handler is removed.
    """
    former = signal.getsignal(signal.SIGCHLD)
    if getattr(former, "__module__", "").startswith("torch."):
        former = signal.SIG_DFL
    yield
    with suppress(ValueError):  # not in the main thread: there, it has not been set
        signal.signal(signal.SIGCHLD, former)
