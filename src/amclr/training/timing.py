"""What a training loop spends its time on, and how it could wait less."""

from __future__ import annotations

import os
import time
from collections import defaultdict

TIMES = ("seconds_per_step", "wait_share")
"""The training metrics that measure time: all that differ from run to run."""

WAIT_MATTERS, WAITED_LONG = 0.15, 10.0
"""Waiting for batches is shown above this share of the time, and advised on above so many seconds."""


class Clock:
    """Seconds on the host by activity, measured without synchronising with a GPU."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._before: dict[str, float] = {}
        self._steps_before = 0
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Record the time since the last lap under a name."""
        now = time.perf_counter()
        self.spent[what] += now - self.last
        self.last = now

    def since_last(self) -> dict[str, float]:
        """Seconds per step and the share of them spent waiting for the loader, since the last call."""
        recent = {what: seconds - self._before.get(what, 0.0) for what, seconds in self.spent.items()}
        steps = self.steps - self._steps_before
        self._before, self._steps_before = dict(self.spent), self.steps
        whole = sum(recent.values())
        return dict(zip(TIMES, (whole / max(1, steps), recent["loader"] / whole), strict=True))

    def report(self) -> str:
        """The whole loop in one line, the largest share first."""
        whole = sum(self.spent.values())
        ranked = sorted(self.spent.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{what} {seconds / whole:.0%}" for what, seconds in ranked)
        return f"{whole / max(1, self.steps):.3g} s a step: {shares}"

    def advice(self, workers: int, cached: bool) -> list[str]:
        """How to wait less for batches, where the waiting was long enough to matter.

        cached: whether decoded images are cached already.
        """
        waited = self.spent["loader"]
        share, cores = waited / sum(self.spent.values()), os.cpu_count() or 1
        if share < WAIT_MATTERS or waited < WAITED_LONG:
            return []
        options = [f"--workers {min(cores, max(2, 2 * workers))}"] if workers < cores else []
        if not cached:
            options.append("--decoded auto with a larger --ram_cache or --disk_cache")
        return [f"{share:.0%} of the time went into waiting for batches: try {' or '.join(options)}"] if options else []
