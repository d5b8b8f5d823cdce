"""The objectives' benchmarks, at sizes that take a second: they run, and print a row for each case."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from benchmarks import objectives

COMMANDS = {
    "objectives": ("--sizes 16 --dims 8 --seconds 0.05 --methods sogclr,amclr --cyclic 0.1", 2),
    "tables": ("--samples 100 --batch 8 --dim 8 --steps 30", 3),
    "precision": ("--batch 16 --dim 8 --seeds 1", 6),
    "kernels": ("--time 16 --dims 16 --kinds ieee --seconds 0.05 --device cpu", 3),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark(name: str) -> None:
    if name == "kernels" and (find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("needs Triton's interpreter")
    arguments, rows = COMMANDS[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + rows, done.stdout
    assert len({line.count("|") for line in table}) == 1, done.stdout


def test_what_does_not_fit_says_so() -> None:
    """A GPU's memory runs out at another size for each rival; the rest of the table is made all the same."""
    views = objectives.views_of(8, 4, "cpu")
    options = argparse.Namespace(seconds=0.01, device="cpu", tau=0.05, cyclic=0.0)

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    steps = {"ours": objectives.ours("sogclr", views, 0.05), "floor": too_large, "plain": too_large}
    found = {name: step for name, step in steps.items() if objectives.fits(step)}
    assert list(found) == ["ours"]
    row = objectives.measured("sogclr", found, {"no such loss": "-"}, views, options)
    assert float(row[0]) > 0
    assert row[1:3] + row[4:] == ["does not fit"] * 3 + ["-"]
