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
        compare,
        config,
        data,
        evaluation,
        export,
        inspection,
        models,
        objectives,
        paraphrase,
        runs,
        search,
        serve,
        training,
    )
    from amclr.config.schema import Config
    from amclr.evaluation import metrics as evaluate
    from amclr.models.dual_encoder import DualEncoder
    from amclr.runs.folder import Run
    from amclr.runs.loading import load
    from amclr.training.loop import train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DualEncoder",
    "Run",
    "compare",
    "config",
    "data",
    "evaluate",
    "evaluation",
    "export",
    "inspection",
    "load",
    "models",
    "objectives",
    "paraphrase",
    "runs",
    "search",
    "serve",
    "train",
    "training",
]

_MEMBERS = {
    "Config": "amclr.config.schema:Config",
    "DualEncoder": "amclr.models.dual_encoder:DualEncoder",
    "Run": "amclr.runs.folder:Run",
    "evaluate": "amclr.evaluation.metrics",
    "load": "amclr.runs.loading:load",
    "train": "amclr.training.loop:train",
}
"""Public names that are no packages, and where each is: a module, or module:name."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'amclr' has no attribute '{name}'")
    module, _, member = _MEMBERS.get(name, f"amclr.{name}").partition(":")
    found = import_module(module)
    return getattr(found, member) if member else found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
