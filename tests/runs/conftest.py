"""Checkpoints in a temporary folder, and a gate that holds their writing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from amclr.runs.checkpoints import Checkpoints
from amclr.runs.serialization import digest


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    (tmp_path / "run").mkdir()
    return Checkpoints(tmp_path / "run" / "checkpoints")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Nothing is written before it is set."""
    event = threading.Event()

    def waits(state: Any) -> str:
        assert event.wait(60)
        return digest(state)

    monkeypatch.setattr("amclr.runs.serialization.digest", waits)
    return event
