"""The text tower's tokenizer: a pretrained one, or for the small tower one trained on the captions."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amclr.config.schema import ModelConfig
from amclr.models.pretrained import import_transformers, text_source, text_tower_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Fast tokenizers must not be forked after use in threads, and worker processes tokenise the batches.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def build_tokenizer(config: ModelConfig, captions: Sequence[str], folder: Path | None = None) -> Any:
    """The text tower's tokenizer; for the small tower one trained on the captions.

    folder: the saved tokenizer of an earlier run, which is used if it exists. Raises UserError if it cannot be loaded.
    """
    if folder and folder.is_dir():
        return import_transformers().PreTrainedTokenizerFast.from_pretrained(folder)
    if config.text_tower == "small":
        return train_tokenizer(captions)
    try:
        return import_transformers().AutoTokenizer.from_pretrained(text_source(config))
    except Exception as error:
        raise text_tower_error(config, error) from None


def train_tokenizer(captions: Iterable[str], vocabulary: int = 8000) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE tokenizer trained on captions, with BERT's special tokens.

    Byte-level, so that every script is covered, and because training it is deterministic, unlike WordPiece.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(captions, trainer)
    ids = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
