"""A small experiment whose runs take a second, for the tests of comparisons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from amclr.compare import Comparison, compare
from tests.conftest import COLOURS

# Both towers frozen at random weights: a run takes a second.
BASE: dict[str, Any] = {
    "recipe": "scratch",
    "settings": {
        "epochs": 2, "batch_size": 8, "accelerator": "cpu", "views.image": "weak",
        "model": {"image_size": 32, "dim": 16, "image_lr": 0, "text_lr": 0, "head": "residual", "hidden": 32},
    },
    "variants": ["sogclr", "amclr"], "seeds": 2, "baseline": "sogclr",
}  # fmt: skip  # fmt: skip


STEPS = 8


def written(file: Path, folder: Path, **changes: Any) -> Path:
    values = BASE | changes
    if isinstance(values["settings"], dict):
        values["settings"] = {**values["settings"], "data": str(folder)}
    file.write_text(yaml.safe_dump(values))
    return file


def run(file: Path, **changes: Any) -> Comparison:
    return compare(file, out=str(file.parent / "out"), progress=False, **changes)


def measured(comparison: Comparison | Path) -> list[Any]:
    """What must not depend on how many runs there were at a time."""
    rows = (
        json.loads((comparison / "results.json").read_text())["rows"]
        if isinstance(comparison, Path)
        else comparison.results["rows"]
    )
    return [(row["variant"], row["grid"], row["measures"], row["against"], row["cut"]) for row in rows]


def paraphrases_file(file: Path) -> str:
    """Paraphrases of some of the captions, as a file."""
    rows = [f"{w} {list(COLOURS)[k % 4]} patch number {k},I see {w} {list(COLOURS)[k % 4]} patch; its number is {k}"
            for k in range(0, 40, 2) for w in ("a", "one")]  # fmt: skip
    file.write_text("\n".join(["caption,paraphrase", *rows]))
    return str(file)
