"""Checkpoints of a run: written in the background, complete or absent, and verified when they are read.

step-00000008.pt     the newest ones, as many as `keep` says
passing-00000011.pt  temporary ones between evaluations, to resume from after a crash
last.pt, best.pt     hard links to two of these
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sys
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amclr.runs.serialization import Damaged, copy_to_cpu, read_state, tensor_bytes, walk, write_state
from amclr.utils.errors import UserError, first_line
from amclr.utils.files import free_memory, sync, written

MEMORY_SHARE = 4
"""A state of more than this fraction (1 / MEMORY_SHARE) of the free memory is written at once instead of copied."""
MIN_INTERVAL = 10.0
"""Least seconds between two checkpoints that are due by time."""
INTERVAL_FACTOR = 50.0
"""Least time between such checkpoints, in multiples of the time that writing took: at most 2 % of the time goes into
writing where nothing runs beside it."""
BYTES_PER_SECOND = 20e6
"""Average rate at which such checkpoints may write, since disks are shared."""
PASSING_KEPT = 2
"""Temporary checkpoints kept: where the newest is damaged, the one before is seconds older."""
EXIT_TIMEOUT = 60.0
"""Seconds that a process waits at its end for the checkpoint being written."""


@dataclass(frozen=True)
class WriteJob:
    """A checkpoint to write. names: what it is linked to; owned: `state` is a copy that nothing else changes."""

    state: dict[str, Any]
    step: int
    names: tuple[str, ...]
    keep: int
    passing: bool = False
    renumbered: bool = False
    owned: bool = False


class Checkpoints:
    """The checkpoints in a folder `checkpoints/` of a run: one process writes, any may read.

    sync_first: a file to flush to disk before each checkpoint, which relies on its content.
    """

    def __init__(self, folder: Path, sync_first: Path | None = None) -> None:
        self.folder, self.sync_first = folder, sync_first
        self._done: threading.Event | None = None
        """Set once the newest checkpoint has been written, or could not be."""
        self._process = os.getpid()
        self._failure = ""
        """Why the newest checkpoint could not be written; empty where it was."""
        self._last: int | None = None
        """The step of the newest checkpoint on disk, where it is known."""
        self._retry: WriteJob | None = None
        """The best checkpoint, where it could not be written."""
        self._seconds, self._bytes = 0.0, 0
        self._intact: set[tuple[int, ...]] = set()
        """Fingerprints of files that have been read and verified."""
        _OPEN.add(self)

    # -- writing ------------------------------------------------------------------------------------

    def save(
        self, state: dict[str, Any], step: int, *, best: bool, keep: int, renumbered: bool = False, wait: bool = False,
        passing: bool = False,
    ) -> None:  # fmt: skip
        """Write a checkpoint of a step, link `last.pt` (and `best.pt`) to it, and delete older ones beyond `keep`.

        The state is copied and written in the background. Where it is too large to copy, or with `wait`, it is on disk
        when this returns. renumbered: steps are counted differently from here on, so all older checkpoints are deleted.
        passing: a temporary checkpoint, which does not count towards `keep`. Each file is complete or absent at any
        moment. If writing fails, the older checkpoints stay; this is printed, or with `wait` raised as UserError.
        Raises TypeError for a state with anything but tensors, numbers, strings and containers of them.
        """
        self.wait(raises=False)
        start = time.monotonic()
        names = ("last.pt", "best.pt") if best else ("last.pt",)
        if wait or tensor_bytes(state) > free_memory() // MEMORY_SHARE:
            for _ in walk(state):  # raises TypeError here rather than report a failed write
                pass
            self._done = threading.Event()
            self._run(WriteJob(state, step, names, keep, passing, renumbered), start, self._done, verbose=not wait)
            if wait:
                self.wait()
            return
        job = WriteJob(copy_to_cpu(state), step, names, keep, passing, renumbered, owned=True)
        self._done = threading.Event()
        # A daemon: if the disk hangs, the process may exit without it, and leaves a partial file that is ignored.
        thread = threading.Thread(target=self._run, args=(job, start, self._done), name="checkpoint", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system cannot start another thread
            self._run(job, start, self._done)

    def wait(self, raises: bool = True) -> None:
        """Wait for the checkpoint being written; with `raises`, raise UserError if it could not be written."""
        self._wait()
        if raises and self._failure:
            raise UserError(
                f"cannot write a checkpoint in '{self.folder}' ({self._failure}): free some space, then resume with: "
                f"amclr train --resume {self.folder.parent}"
            )

    def _wait(self, seconds: float | None = None) -> None:
        if self._process != os.getpid():  # forked: the parent process writes
            self._process, self._done, self._failure = os.getpid(), None, ""
        # Not `Thread.join`: once Ctrl-C has interrupted that, Python 3.11 considers the thread finished.
        if self._done is not None:
            self._done.wait(seconds)

    def interval(self) -> float:
        """Least seconds between two checkpoints that are due by time, so that writing them costs little."""
        return max(MIN_INTERVAL, INTERVAL_FACTOR * self._seconds, self._bytes / BYTES_PER_SECOND)

    def _run(self, job: WriteJob, start: float, done: threading.Event, verbose: bool = True) -> None:
        """Write a checkpoint, and the best one if its writing failed before; sets `_failure`."""
        try:
            self._retry = None if job.renumbered or "best.pt" in job.names else self._retry
            for each in (job, self._retry) if self._retry else (job,):
                try:
                    self._bytes = self._write(each)
                except Exception as error:  # torch raises its own errors where a disk is full
                    self._failure = _reason(error)
                    if "best.pt" in each.names and each.owned:
                        self._retry = replace(each, names=("best.pt",))
                    if verbose:
                        self._print_failure(each.step)
                    return
                self._failure = ""
                if each is self._retry:
                    self._retry = None
                else:
                    self._last = each.step
            self._seconds = time.monotonic() - start
        finally:
            done.set()

    def _print_failure(self, step: int) -> None:
        last = "there is no earlier one" if self._last is None else f"the one of step {self._last} is kept"
        message = f"cannot write the checkpoint of step {step} ({self._failure}): {last}; the next one is tried again"
        print(message, file=sys.stderr)

    def _write(self, job: WriteJob) -> int:
        """Write a checkpoint and link its names; its bytes. Raises OSError, and what torch raises."""
        self.folder.mkdir(exist_ok=True)
        if self._last is None and (existing := self._all()):
            self._last = _step_of(existing[-1])
        for part in self.folder.glob("*.part"):  # left by a process that was killed
            part.unlink()
        self._prune(job.step, job.keep)  # a process may have been killed before it did
        file = self.folder / f"{'passing' if job.passing else 'step'}-{job.step:08d}.pt"
        with written(file) as handle:
            write_state(job.state, handle)
            if self.sync_first is not None and self.sync_first.exists():
                sync(self.sync_first)
                sync(self.sync_first.parent)
        for name in job.names:
            self._link(file, name)
        sync(self.folder)
        size = file.stat().st_size
        if job.renumbered:
            for old in self._all():
                if old != file:
                    old.unlink(missing_ok=True)
        self._prune(job.step if "last.pt" in job.names else self._last or 0, job.keep)
        return size

    def _prune(self, newest: int, keep: int) -> None:
        def oldest_first(files: list[Path]) -> list[Path]:
            # Steps after `newest` are from before a rollback: they go first.
            return sorted(files, key=lambda file: (_step_of(file) <= newest, _step_of(file)))

        steps, files = oldest_first(self._files("step")), oldest_first(self._all())
        for old in steps[: max(0, len(steps) - max(keep, 1))]:
            old.unlink(missing_ok=True)
        for old in files[: max(0, len(files) - PASSING_KEPT)]:
            if old.name.startswith("passing"):
                old.unlink(missing_ok=True)

    def _link(self, file: Path, name: str) -> None:
        link = self.folder / f"{name}.part"
        try:
            os.link(file, link)
        except OSError:  # a file system without hard links
            with file.open("rb") as source, written(self.folder / name) as handle:
                shutil.copyfileobj(source, handle, 1 << 20)
        else:
            os.replace(link, self.folder / name)
            # `replace` does nothing where both names are links to one file.
            link.unlink(missing_ok=True)

    # -- reading ------------------------------------------------------------------------------------

    def load_last(self, verbose: bool = True) -> dict[str, Any] | None:
        """The newest intact checkpoint, or None where there is none yet. Raises UserError where all are damaged.

        verbose: print which ones are damaged, and why.
        """
        damaged: list[Path] = []
        for file in (self.folder / "last.pt", *reversed(self._all()), self.folder / "best.pt"):
            if not file.is_file() or any(file.samefile(other) for other in damaged):
                continue
            try:
                state = self._read(file)
            except Damaged as why:
                damaged.append(file)
                if verbose:
                    print(f"checkpoint {file} is damaged ({why}): trying the one before", file=sys.stderr)
                continue
            self._last = state.get("step")
            return state
        if damaged:
            names = ", ".join(f.name for f in damaged)
            raise UserError(f"every checkpoint in '{self.folder}' is damaged: {names}")
        return None

    def load_best(self) -> dict[str, Any]:
        """The checkpoint with the best recall, or the last one where none has been evaluated.

        Raises UserError where it is damaged, or there is none.
        """
        file = next((f for f in (self.folder / "best.pt", self.folder / "last.pt") if f.is_file()), None)
        if file is None:
            run = self.folder.parent
            raise UserError(f"'{run}' has no checkpoint yet: resume it with: amclr train --resume {run}")
        try:
            return self._read(file)
        except Damaged as why:
            raise UserError(f"checkpoint '{file}' is damaged ({why})") from None

    def best_is_intact(self) -> bool:
        """Whether best.pt exists and is undamaged."""
        file = self.folder / "best.pt"
        try:
            if _fingerprint(file) not in self._intact:
                self._read(file)
        except (OSError, Damaged):
            return False
        return True

    def _read(self, file: Path) -> dict[str, Any]:
        state = read_state(file)
        self._intact.add(_fingerprint(file))
        return state

    def _all(self) -> list[Path]:
        return sorted([*self._files("step"), *self._files("passing")], key=_step_of)

    def _files(self, kind: str) -> list[Path]:
        files = (f for f in self.folder.glob(f"{kind}-*.pt") if re.fullmatch(rf"{kind}-\d+\.pt", f.name))
        return sorted(files, key=_step_of)


_OPEN: weakref.WeakSet[Checkpoints] = weakref.WeakSet()


@atexit.register
def _wait_at_exit() -> None:
    for checkpoints in _OPEN:
        checkpoints._wait(EXIT_TIMEOUT)


def _step_of(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def _fingerprint(file: Path) -> tuple[int, ...]:
    """Identifies a file and its version."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _reason(error: BaseException) -> str:
    """Why a write failed, in a few words: the system's message where there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return first_line(error)
