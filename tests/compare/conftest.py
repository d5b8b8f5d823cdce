"""Fixtures of the tests of comparisons."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from amclr.training import loop as engine
from tests.compare.experiments import written
from tests.conftest import COLOURS, paint


@pytest.fixture
def experiment(folder: Path, tmp_path: Path) -> Path:
    """An experiment file on the small folder."""
    return written(tmp_path / "small.yaml", folder)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Patches by colour."""
    for colour in COLOURS:
        (tmp_path / "colours" / "test" / colour).mkdir(parents=True)
        for k in range(3):
            paint(colour, 300 + k).save(tmp_path / "colours" / "test" / colour / f"{k}.png")
    return tmp_path / "colours" / "test"


@pytest.fixture
def steps_made(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """Steps that were made, by objective and seed."""
    made, advance = Counter[tuple[str, int]](), engine.advance

    def counted(t: Any, batch: Any) -> Any:
        made[t.config.objective, t.config.seed] += 1
        return advance(t, batch)

    monkeypatch.setattr(engine, "advance", counted)
    return made


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """What processes of runs have too, whatever the machine: sums then round alike."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
