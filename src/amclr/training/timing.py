"""Where the time of a training loop goes, and what would make it wait less."""

from __future__ import annotations

import os
import time
from collections import defaultdict

TIMES = ("seconds_per_step", "wait_share")
"""What rows of training metrics say of time: all in them that differs from run to run."""

WAIT_MATTERS, WAITED_LONG = 0.15, 10.0
"""Waiting for batches is worth a word above this share of the time, and advice above so many seconds of it."""


class Clock:
    """What a loop spends its time on, in seconds on the host by name; nothing waits for a GPU because of it."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._before: dict[str, float] = {}
        self._steps_before = 0
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Book the time since the last lap under a name."""
        now = time.perf_counter()
        self.spent[what] += now - self.last
        self.last = now

    def since_last(self) -> dict[str, float]:
        """Seconds a step and the share of them spent waiting for the loader, since this was last asked."""
        recent = {what: seconds - self._before.get(what, 0.0) for what, seconds in self.spent.items()}
        steps = self.steps - self._steps_before
        self._before, self._steps_before = dict(self.spent), self.steps
        whole = sum(recent.values())
        return dict(zip(TIMES, (whole / max(1, steps), recent["loader"] / whole), strict=True))

    def report(self) -> str:
        """The whole loop in a line, largest first."""
        whole = sum(self.spent.values())
        ranked = sorted(self.spent.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{what} {seconds / whole:.0%}" for what, seconds in ranked)
        return f"{whole / max(1, self.steps):.3g} s a step: {shares}"

    def advice(self, workers: int, kept: bool) -> list[str]:
        """What would make the loop wait less for images, where it waited long enough to matter.

        kept: whether decoded images are kept already.
        """
        waited = self.spent["loader"]
        share, cores = waited / sum(self.spent.values()), os.cpu_count() or 1
        if share < WAIT_MATTERS or waited < WAITED_LONG:
            return []
        options = [f"--workers {min(cores, max(2, 2 * workers))}"] if workers < cores else []
        if not kept:
            options.append("--decoded auto with a larger --ram_cache or --disk_cache")
        return [f"{share:.0%} of the time went into waiting for batches: try {' or '.join(options)}"] if options else []
