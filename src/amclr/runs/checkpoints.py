"""Checkpoints of a run: written beside the training, whole or absent, and known to be what was written.

step-00000008.pt     the newest ones, as many as are kept
passing-00000011.pt  the newest ones that were written for the case that something happens; they do not stay
last.pt, best.pt     two of these, by hard links

A file is a dict as `torch.save` writes it: the state, the number of its format, and a digest of both.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import struct
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from amclr.utils.errors import UserError
from amclr.utils.files import free_memory, sync, written

FORMAT = 2
"""Files without a number are of the first format: they have no digest."""
PIECE_BYTES = 1 << 26
"""What cannot be hashed in place is copied in pieces of this size."""
SHARE = 4
"""A state that takes more than this part of the free memory is not copied to be written later."""
SHORTEST = 10.0
"""Seconds between two checkpoints written by time, at least."""
WORTH = 50.0
"""So many times as long as writing took, the training then goes on: that costs 2 % if nothing runs beside it."""
PASSING = 2
"""Passing checkpoints that are there at once: where the newest is damaged, the one before is seconds older."""
RATE = 20e6
"""Bytes per second that checkpoints may write on average: disks and those who share them have other uses."""
AT_EXIT = 60.0
"""Seconds that a process that ends waits for a checkpoint under way."""


class Damaged(Exception):
    """A file is not what was written; the message says why that is thought."""


@dataclass(frozen=True)
class Job:
    """A checkpoint to write. to: the names that it gets besides its own; owns: nobody else changes the state."""

    state: dict[str, Any]
    step: int
    to: tuple[str, ...]
    keep: int
    passing: bool = False
    renumbered: bool = False
    owns: bool = False


class Checkpoints:
    """The checkpoints in a folder `checkpoints/` of a run: one process writes, any may read.

    before: a file that is to be on the disk before a checkpoint is, since that counts on it.
    """

    def __init__(self, folder: Path, before: Path | None = None) -> None:
        self.folder, self.before = folder, before
        self._done: threading.Event | None = None
        """Of the newest one: set once it has been written, or could not be."""
        self._process = os.getpid()
        self._failure = ""
        """Why the newest checkpoint could not be written; empty where it could."""
        self._last: int | None = None
        """The step of the newest one on the disk, where that is known."""
        self._owed: Job | None = None
        """The best one, where it could not be written."""
        self._seconds, self._bytes = 0.0, 0
        self._sound: set[tuple[int, ...]] = set()
        """Files that have been read whole."""
        _OPEN.add(self)

    # -- writing ----------------------------------------------------------------------------------

    def save(
        self, state: dict[str, Any], step: int, *, best: bool, keep: int, renumbered: bool = False, wait: bool = False,
        passing: bool = False,
    ) -> None:  # fmt: skip
        """Write a checkpoint of a step; `last.pt` (and `best.pt`) become it, older ones beyond `keep` go.

        The state is copied, and written while the caller goes on; where it is too large for that, or with `wait`,
        it is on the disk when this returns. renumbered: steps are no longer counted as they were, so that all
        those before it go. passing: it takes no place of those that are kept, and goes soon. Each file is complete
        or absent at any moment. Where it cannot be written, those before it are still there: this is told, or with
        `wait` raised as UserError. Raises TypeError for a state with anything but tensors, numbers, texts and
        containers of them.
        """
        self.wait(raises=False)
        begun = time.monotonic()
        to = ("last.pt", "best.pt") if best else ("last.pt",)
        if wait or size(state) > free_memory() // SHARE:
            for _ in _walk(state):  # what cannot be kept is a mistake, and no matter of the disk
                pass
            self._done = threading.Event()
            self._do(Job(state, step, to, keep, passing, renumbered), begun, self._done, tells=not wait)
            if wait:
                self.wait()
            return
        job = Job(copied(state), step, to, keep, passing, renumbered, owns=True)
        self._done = threading.Event()
        # Where the disk hangs, the process may end without it: that leaves a part of which nobody takes note.
        thread = threading.Thread(target=self._do, args=(job, begun, self._done), name="checkpoint", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no room for a thread
            self._do(job, begun, self._done)

    def wait(self, raises: bool = True) -> None:
        """Wait for what is being written, on any thread; raises UserError if it could not be written."""
        self._wait()
        if raises and self._failure:
            raise UserError(
                f"cannot write a checkpoint in '{self.folder}' ({self._failure}): make room, then go on by: "
                f"amclr train --resume {self.folder.parent}"
            )

    def _wait(self, seconds: float | None = None) -> None:
        if self._process != os.getpid():  # forked: what was being written is the other process's
            self._process, self._done, self._failure = os.getpid(), None, ""
        # Not `Thread.join`: once Ctrl-C has interrupted that, Python 3.11 takes the thread for ended.
        if self._done is not None:
            self._done.wait(seconds)

    def pace(self) -> float:
        """Seconds that should lie between two checkpoints, so that writing them costs little."""
        return max(SHORTEST, WORTH * self._seconds, self._bytes / RATE)

    def _do(self, job: Job, begun: float, done: threading.Event, tells: bool = True) -> None:
        """Write a checkpoint, and the best one if that is still to be written; `_failure` says how that went."""
        try:
            self._owed = None if job.renumbered or "best.pt" in job.to else self._owed
            for each in (job, self._owed) if self._owed else (job,):
                try:
                    self._bytes = self._write(each)
                except Exception as error:  # torch's writer has errors of its own for a disk that is full
                    self._failure = _reason(error)
                    if "best.pt" in each.to and each.owns:
                        self._owed = replace(each, to=("best.pt",))
                    if tells:
                        self._tell(each.step)
                    return
                self._failure = ""
                if each is self._owed:
                    self._owed = None
                else:
                    self._last = each.step
            self._seconds = time.monotonic() - begun
        finally:
            done.set()

    def _tell(self, step: int) -> None:
        before = "there is none before it" if self._last is None else f"the one of step {self._last} stays"
        told = f"cannot write the checkpoint of step {step} ({self._failure}): {before}; trying again at the next"
        print(told, file=sys.stderr)

    def _write(self, job: Job) -> int:
        """Write one and name it; the bytes that it takes. Raises what files and torch's writer raise."""
        self.folder.mkdir(exist_ok=True)
        if self._last is None and (written_before := self._all()):
            self._last = _step_of(written_before[-1])
        for part in self.folder.glob("*.part"):  # of a process that was killed
            part.unlink()
        self._prune(job.step, job.keep)  # one that was killed before it came to that
        content = {**job.state, "format": FORMAT}
        file = self.folder / f"{'passing' if job.passing else 'step'}-{job.step:08d}.pt"
        with written(file) as handle:
            torch.save({**content, "sha256": digest(content)}, handle)
            if self.before is not None and self.before.exists():
                sync(self.before)
                sync(self.before.parent)
        for name in job.to:
            self._name(file, name)
        sync(self.folder)
        taken = file.stat().st_size
        if job.renumbered:
            for old in self._all():
                if old != file:
                    old.unlink(missing_ok=True)
        self._prune(job.step if "last.pt" in job.to else self._last or 0, job.keep)
        return taken

    def _prune(self, newest: int, keep: int) -> None:
        def oldest(files: list[Path]) -> list[Path]:
            # Those of later steps are of before a step back: the first to go.
            return sorted(files, key=lambda file: (_step_of(file) <= newest, _step_of(file)))

        steps, every = oldest(self._found("step")), oldest(self._all())
        for old in steps[: max(0, len(steps) - max(keep, 1))]:
            old.unlink(missing_ok=True)
        for old in every[: max(0, len(every) - PASSING)]:
            if old.name.startswith("passing"):
                old.unlink(missing_ok=True)

    def _name(self, file: Path, name: str) -> None:
        fresh = self.folder / f"{name}.part"
        try:
            os.link(file, fresh)
        except OSError:  # a file system without hard links
            with file.open("rb") as source, written(self.folder / name) as handle:
                shutil.copyfileobj(source, handle, 1 << 20)
        else:
            os.replace(fresh, self.folder / name)
            # Of two names of one file, renaming one to the other does nothing.
            fresh.unlink(missing_ok=True)

    # -- reading ----------------------------------------------------------------------------------

    def load_last(self, tells: bool = True) -> dict[str, Any] | None:
        """The newest checkpoint that is sound, or None where there is none yet.

        tells: say which ones are damaged, and why.

        Raises UserError where all of them are.
        """
        damaged: list[Path] = []
        for file in (self.folder / "last.pt", *reversed(self._all()), self.folder / "best.pt"):
            if not file.is_file() or any(file.samefile(other) for other in damaged):
                continue
            try:
                state = self._read(file)
            except Damaged as why:
                damaged.append(file)
                if tells:
                    print(f"checkpoint {file} is damaged ({why}): trying the one before", file=sys.stderr)
                continue
            self._last = state.get("step")
            return state
        if damaged:
            names = ", ".join(f.name for f in damaged)
            raise UserError(f"every checkpoint in '{self.folder}' is damaged: {names}")
        return None

    def load_best(self) -> dict[str, Any]:
        """The checkpoint with the best recall, or the last one where no evaluation has been made.

        Raises UserError where it is damaged, or there is none.
        """
        file = next((f for f in (self.folder / "best.pt", self.folder / "last.pt") if f.is_file()), None)
        if file is None:
            run = self.folder.parent
            raise UserError(f"'{run}' has no checkpoint yet: go on with it by: amclr train --resume {run}")
        try:
            return self._read(file)
        except Damaged as why:
            raise UserError(f"checkpoint '{file}' is damaged ({why})") from None

    def best_is_sound(self) -> bool:
        """Whether best.pt is there, and what was written."""
        file = self.folder / "best.pt"
        try:
            if _mark(file) not in self._sound:
                self._read(file)
        except (OSError, Damaged):
            return False
        return True

    def _read(self, file: Path) -> dict[str, Any]:
        state = read(file)
        self._sound.add(_mark(file))
        return state

    def _all(self) -> list[Path]:
        return sorted([*self._found("step"), *self._found("passing")], key=_step_of)

    def _found(self, kind: str) -> list[Path]:
        found = (f for f in self.folder.glob(f"{kind}-*.pt") if re.fullmatch(rf"{kind}-\d+\.pt", f.name))
        return sorted(found, key=_step_of)


_OPEN: weakref.WeakSet[Checkpoints] = weakref.WeakSet()


@atexit.register
def _end() -> None:
    for each in _OPEN:
        each._wait(AT_EXIT)


def _step_of(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def _mark(file: Path) -> tuple[int, ...]:
    """Tells a file from others, and from itself after a change."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _reason(error: BaseException) -> str:
    """Why something could not be written, in a few words: what the system said, if it said anything."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


def read(file: Path) -> dict[str, Any]:
    """The state in a file, on the CPU; nothing in it is executed. Raises Damaged where it is not what was written."""
    try:
        # Not mapped into memory: what is looked at here could then still change before it is used.
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        # Around it, torch tells how to load the file all the same.
        inner = error.__context__ if isinstance(error.__context__, UnpicklingError) else None
        told = re.split(r" was not | whose |\. |\n", str(inner))[0]
        raise Damaged(f"refused: {told}" if inner else type(error).__name__) from None
    if type(state) is not dict:
        raise Damaged("it holds no state")
    if not {"format", "sha256"} & state.keys():
        return state  # of the first format
    told = state.pop("sha256", None)
    try:
        found = digest(state)
    except TypeError as error:
        raise Damaged(str(error)) from None
    # With two entries that say so, damage to one of them does not make it a file of the first format.
    if told != found or state.pop("format", None) != FORMAT:
        raise Damaged("its content is not what was written")
    return state


# -- a state: nested containers of tensors, numbers and texts ----------------------------------------


def digest(state: Any) -> str:
    """SHA-256 of the content: where each value stands, its type, and its bits. Strides and devices do not count."""
    found = hashlib.sha256()
    for where, what, value in _walk(state):
        for text in (where, what):
            encoded = text.encode("utf-8", "surrogatepass")
            found.update(b"%d:%b" % (len(encoded), encoded))
        for piece in _pieces(value) if value is not None else ():
            found.update(piece)
    return found.hexdigest()


def size(state: Any) -> int:
    """Bytes of the tensors of a state, those that stand in it more than once counted once."""
    tensors = {_place(value): value for _, _, value in _walk(state) if value is not None}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def copied(state: Any) -> Any:
    """A copy of a state, its tensors on the CPU; those that stand in it more than once are copied once."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        place = _place(tensor)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True).requires_grad_(tensor.requires_grad)
        return copies[place]

    return _changed(state, copy)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad,
    )  # fmt: skip


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        found = type(value)((k, _changed(v, change)) for k, v in value.items())
        if isinstance(value, OrderedDict):  # a module's has the versions of its parts as an attribute
            vars(found).update(_changed(vars(value), change))
        return found
    if isinstance(value, list | tuple):
        return type(value)(_changed(v, change) for v in value)
    return value


def _walk(value: Any, where: str = "") -> Iterator[tuple[str, str, Tensor | None]]:
    """Each value in a state, in order: the keys that lead to it, what it is, and the tensor if it is one."""
    kind = type(value)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        yield where, f"{value.dtype} {tuple(value.shape)} {value.requires_grad}", value
    elif kind in (dict, OrderedDict):
        yield where, f"{kind.__name__} {len(value)}", None
        for key, each in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"a checkpoint cannot hold the key {key!r} (at '{where}')")
            yield from _walk(each, f"{where}/{key!r}")
        if kind is OrderedDict and vars(value):
            yield from _walk(vars(value), f"{where}.")
    elif kind in (list, tuple, torch.Size):
        yield where, f"{kind.__name__} {len(value)}", None
        for index, each in enumerate(value):
            yield from _walk(each, f"{where}/{index}")
    elif kind in (type(None), bool, int, str, bytes):
        yield where, f"{kind.__name__} {value!r}", None
    elif kind is float:
        yield where, f"float {struct.pack('<d', value).hex()}", None
    else:
        raise TypeError(f"a checkpoint cannot hold a {kind.__module__}.{kind.__qualname__} (at '{where}')")


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its indices; of one that lies so in memory, without a copy."""
    tensor = tensor.detach()
    held = tensor.device.type == "cpu" and tensor.is_contiguous()
    total = tensor.numel() * tensor.element_size()
    if held or total <= PIECE_BYTES:
        # A dimension of size 1 may have any stride in a contiguous tensor, which `view` minds.
        flat = tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,))
        yield flat.view(torch.uint8).numpy().data
    elif len(tensor) == 1:
        yield from _pieces(tensor[0])
    else:
        for part in tensor.split(max(1, PIECE_BYTES * len(tensor) // total)):
            yield from _pieces(part)
