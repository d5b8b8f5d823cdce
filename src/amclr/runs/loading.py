"""Models from references: the model that a run starts with, and trained models for use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from amclr.config.schema import Config, ModelConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.models.hub import is_export
from amclr.models.tokenizer import build_tokenizer
from amclr.runs.folder import Run
from amclr.utils.errors import UserError, first_line
from amclr.utils.randomness import derive

SHAPE_SETTINGS = (
    "image_tower", "image_pretrained", "text_tower", "text_pretrained", "text_pooling", "head", "hidden", "dim",
)  # fmt: skip
"""Settings of a model that decide which weights fit it."""


def load(path: str | Path) -> DualEncoder:
    """Load a trained model: from a run folder, from what `save_pretrained` wrote, or by its name on the Hub.

    It comes in evaluation mode, on a GPU where there is one, for `encode_image` and `encode_text`. Raises UserError,
    saying what to do, where `path` is none of these.
    """
    folder = Path(path).expanduser()
    if is_export(folder):
        model = DualEncoder.from_folder(folder)
    elif not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not str(path).startswith("runs/"):
        model = _from_hub(str(path))
    else:
        model = Run.open(folder).load_model()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _from_hub(name: str) -> DualEncoder:
    try:
        return DualEncoder.from_pretrained(name)
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises many kinds
        raise UserError(
            f"there is no folder '{name}', and no such model can be downloaded from the Hub ({first_line(error)}): "
            "give a run folder, or what `amclr export RUN --to hf` wrote"
        ) from None


def initial_model(config: Config, captions: Sequence[str], folder: Path) -> DualEncoder:
    """The model that a run starts with: pretrained and random weights, or those of the run `config.init_from`.

    captions: train the tokenizer of a small text tower, where neither `folder` nor the other run has one.
    Raises UserError, saying what to type, where the other run does not exist or its model has another shape.
    """
    source = None
    if config.init_from:
        if not (Path(config.init_from) / "config.yaml").is_file():
            raise UserError(
                f"--init_from: run folder '{config.init_from}' does not exist (any more), and this run starts from its "
                "weights: put it back, or give the folder of another run"
            )
        source = Run.open(Path(config.init_from))
        _check_same_shape(config.model, source.config.model, config.init_from)
    folders = [folder / "tokenizer", *([source.folder / "tokenizer"] if source else [])]
    tokenizer = build_tokenizer(config.model, captions, next((f for f in folders if f.is_dir()), None))
    torch.manual_seed(derive(config.seed, "weights"))
    model = DualEncoder(config.model, tokenizer)
    if source:
        model.init_from(source.load_model().state_to_save())
    return model


def _check_same_shape(model: ModelConfig, source: ModelConfig, name: str) -> None:
    needed = {n: getattr(source, n) for n in SHAPE_SETTINGS if getattr(model, n) != getattr(source, n)}
    if model.head == source.head == "linear":
        needed.pop("hidden", None)
    if needed:
        options = " ".join(f"--model.{n} {str(v).lower() if isinstance(v, bool) else v}" for n, v in needed.items())
        raise UserError(f"the model of '{name}' has another shape than this run's: give {options}")
