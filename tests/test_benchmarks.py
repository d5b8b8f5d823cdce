"""Benchmarks that others' figures come from, at sizes of a second: they run, and print a row for each case."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = {
    "objectives": ("--sizes 16 --dims 8 --seconds 0.05 --methods sogclr,amclr --cyclic 0.1", 2),
    "tables": ("--samples 100 --batch 8 --dim 8 --steps 30", 3),
    "precision": ("--batch 16 --dim 8 --seeds 1", 6),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark(name: str) -> None:
    arguments, rows = COMMANDS[name]
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + rows, done.stdout
    assert len({line.count("|") for line in table}) == 1, done.stdout
