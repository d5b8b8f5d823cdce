"""`--profile`: a trace of some steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from amclr.training.state import Training
from amclr.utils.files import write_text

TRACED_STEPS = 10


@contextmanager
def traced(t: Training, enabled: bool) -> Iterator[Callable[[], None]]:
    """Trace TRACED_STEPS steps after a few others, and write profile/; call what it yields after each step."""
    if not enabled:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    folder = t.run.folder / "profile"
    folder.mkdir(exist_ok=True)
    remaining = t.steps - t.step
    before = min(5, max(0, remaining - TRACED_STEPS))

    def write(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / f"trace-rank{t.team.rank}.json.gz"))
        by = "self_cuda_time_total" if t.fabric.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60)
        write_text(folder / f"summary-rank{t.team.rank}.txt", table + "\n")
        if t.team.first_rank:
            what = f"trace of {TRACED_STEPS} steps: {folder}"
            print(f"{what} (open trace-rank0.json.gz in ui.perfetto.dev)", file=sys.stderr)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (t.fabric.device.type == "cuda")
    active = min(TRACED_STEPS, max(1, remaining))
    plan = schedule(wait=max(0, before - 2), warmup=min(2, before), active=active, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        yield profiler.step
