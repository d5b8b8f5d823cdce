"""amclr: image-text dual encoders trained with global contrastive objectives on small batches.

import amclr
objective = amclr.objectives.build("amclr", num_samples=n)
model = amclr.load("runs/my-run")

The parts are imported when first used, so `amclr.objectives` and `amclr.evaluate` need torch and numpy alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amclr import (
        classes,
        compare,
        config,
        data,
        engine,
        evaluate,
        figures,
        hub,
        index,
        measure,
        model,
        objectives,
        pretrained,
        recipes,
        run,
        search,
    )
    from amclr.config import Config
    from amclr.engine import train
    from amclr.model import DualEncoder
    from amclr.run import load

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DualEncoder",
    "classes",
    "compare",
    "config",
    "data",
    "engine",
    "evaluate",
    "figures",
    "hub",
    "index",
    "load",
    "measure",
    "model",
    "objectives",
    "pretrained",
    "recipes",
    "run",
    "search",
    "train",
]

_MEMBERS = {
    "Config": "amclr.config", "DualEncoder": "amclr.model", "load": "amclr.run", "train": "amclr.engine",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MEMBERS:
        return getattr(import_module(_MEMBERS[name]), name)
    if name in __all__:
        return import_module(f"amclr.{name}")
    raise AttributeError(f"module 'amclr' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
