"""The examples run as their headers say, and learn."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def example(name: str, *arguments: object, cwd: Path) -> str:
    """What a script prints."""
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def recall(printed: str, when: str) -> float:
    return float(re.findall(rf"^{when}: mean recall ([\d.]+) %$", printed, re.M)[0])


@pytest.mark.slow
def test_plain_pytorch_learns_and_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    whole = example("plain_pytorch.py", "--epochs", 3, "--checkpoint", "whole.pt", cwd=tmp_path)
    assert recall(whole, "before") < 6 and recall(whole, "after") > 60
    example("plain_pytorch.py", "--epochs", 1, "--checkpoint", "parts.pt", cwd=tmp_path)
    rest = example("plain_pytorch.py", "--epochs", 3, "--checkpoint", "parts.pt", cwd=tmp_path)
    # Losses are of the estimates, so they tell if these had begun anew.
    assert rest.splitlines()[1:] == ["going on after epoch 1", *whole.splitlines()[2:]]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_lightning_module_learns_and_keeps_the_estimates(devices: int, tmp_path: Path) -> None:
    given = ("--epochs", 6, "--checkpoint", "run.ckpt", "--devices", devices)
    printed = example("lightning_module.py", *given, cwd=tmp_path)
    assert "in the checkpoint of epoch 3: estimates of 864 of 864 samples" in printed
    assert recall(printed, "before") < 6 and recall(printed, "after") > 60


@pytest.mark.slow
def test_open_clip_model_learns(tmp_path: Path) -> None:
    printed = example("open_clip_model.py", "--epochs", 8, cwd=tmp_path)
    assert recall(printed, "before") < 6 and recall(printed, "after") > 30
