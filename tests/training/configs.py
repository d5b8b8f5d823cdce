"""Configurations of small runs, and what tests compare of runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from amclr.config.schema import (
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ViewsConfig,
)
from amclr.runs.folder import Run
from amclr.training import timing as clock


def config_for(folder: Path, out: str = "run", **changes: Any) -> Config:
    base = Config(
        data=str(folder), out=str(folder.parent / out), epochs=2, batch_size=8, accelerator="cpu",
        model=ModelConfig(image_size=32, dim=16), optim=OptimConfig(lr=1e-3), views=ViewsConfig(image="weak"),
        loss=LossConfig(temperature=0.1),
    )  # fmt: skip
    return replace(base, **changes)


def frozen(folder: Path, out: str = "run", **changes: Any) -> Config:
    """Both towers frozen at random weights: the cached path in seconds."""
    model = ModelConfig(image_size=32, dim=16, image_lr=0, text_lr=0, head="residual", hidden=32)
    return config_for(folder, out, model=model, **changes)


def queued(folder: Path, out: str = "run", **changes: Any) -> Config:
    return frozen(folder, out, loss=LossConfig(temperature=0.1, queue=20), **changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.load_last()["model"]  # type: ignore[index]


def assert_same_run(a: Run, b: Run) -> None:
    first, second = a.load_last(), b.load_last()
    assert first is not None and second is not None
    assert first["step"] == second["step"] and first["best"] == second["best"]
    for part in ("model", "objective"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), f"{part} {name}"
    assert untimed(a) == untimed(b)


def untimed(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in clock.TIMES} for row in run.metrics()]
