"""The stream of batches that a training loop consumes, over worker processes that may die or get stuck."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator

from torch.utils.data import DataLoader

from amclr.data.batches import Batch
from amclr.distributed.signals import leave_signals_to_the_trainer, no_handler_of_loaders
from amclr.training.faults import short_message
from amclr.training.state import Training
from amclr.utils.errors import UserError

MAX_RESTARTS = 3
"""Times that workers are restarted at one step."""
POLL = 5.0
"""Seconds after which a dead worker is noticed."""
UNREACHABLE = (ConnectionError, EOFError, FileNotFoundError)
"""Raised on fetching a batch from a worker that has just died, since batches are passed as open files over a socket."""
STUCK = 600.0
"""Seconds without a batch after which workers are considered stuck, and restarted."""


def stream(t: Training) -> Iterator[Batch]:
    """The batches from the current step on. It restarts where the step is set back, or a worker dies."""
    failed_step, failures = -1, 0
    while t.step < t.steps:
        loader = DataLoader(
            t.batches, batch_size=None, sampler=range(t.step, t.steps), num_workers=t.config.workers,
            pin_memory=t.fabric.device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer,
            timeout=POLL if t.config.workers else 0,
        )  # fmt: skip
        with no_handler_of_loaders():
            batches = iter(loader)
        try:
            since = time.monotonic()
            while t.step < t.steps:
                step = t.step
                try:
                    batch = next(batches)
                except RuntimeError as error:
                    # The loader checks at each timeout that its workers are alive.
                    if "timed out" in str(error) and time.monotonic() - since < STUCK:
                        continue
                    raise
                yield batch
                since = time.monotonic()
                if t.step != step + 1:
                    break
        except (RuntimeError, *UNREACHABLE) as error:
            if not (reason := _worker_death(error, t.config.workers)):
                raise
            failed_step, failures = step, failures + 1 if step == failed_step else 1
            if failures > MAX_RESTARTS:
                raise UserError(
                    f"the worker processes that prepare batches keep dying at step {step} ({reason}). If they are "
                    "killed because memory runs out, lower --workers or --ram_cache; resume with: "
                    f"amclr train --resume {t.run.folder}"
                ) from None
            print(f"a worker process that prepares batches died ({reason}): restarted", file=sys.stderr)
            t.run.log({"kind": "fault", "step": step, "what": f"worker died: {reason}"})
        finally:
            # They have nothing to finish, ignore SIGTERM, and a stuck one would be waited for.
            for worker in getattr(batches, "_workers", ()):
                worker.kill()


def _worker_death(error: BaseException, workers: int) -> str:
    """How an error shows that a worker has died; empty where the worker raised it, or there is none."""
    if isinstance(error, RuntimeError):
        return short_message(error) if re.search(r"DataLoader (worker \(pid|timed out)", str(error)) else ""
    if not workers or "in DataLoader worker process" in str(error):  # torch's prefix for what a worker raised
        return ""
    return f"DataLoader worker is gone with its batch: {type(error).__name__}"
