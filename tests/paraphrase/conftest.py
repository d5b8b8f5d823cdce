"""Captioned folders, and tiny language models built here."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from amclr import cli
from amclr.config.schema import ParaphraseConfig

WORDS = [
    "dog",
    "cat",
    "man",
    "child",
    "runs",
    "sits",
    "plays",
    "holds",
    "ball",
    "stick",
    "grass",
    "water",
    "street",
    "near",
    "the",
    "under",
    "over",
    "happy",
    "wet",
    "old",
]


def captioned(root: Path, count: int = 24, seed: int = 0) -> Path:
    """A folder of captioned images; the captions are random words, of many lengths, and some occur twice."""
    (root / "Images").mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    rows = ["image,caption"]
    for i in range(count):
        Image.new("RGB", (8, 8)).save(root / "Images" / f"{i}.png")
        rows.append(f"{i}.png,{' '.join(draw.choices(WORDS, k=draw.randint(3, 9)))}")
    rows.append(rows[1])
    rows.append(f"1.png,{rows[1].split(',')[1]}")
    (root / "captions.txt").write_text("\n".join(rows) + "\n")
    return root


def word_tokenizer(end: str = "</s>") -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "paraphrase", ":", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two layers that knows the words and nothing else."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = word_tokenizer(end="")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path | str, **settings: Any) -> ParaphraseConfig:
    base = ParaphraseConfig(
        model=str(model), k=2, candidates=6, batch_size=4, max_tokens=12, similarity=0.0, shortest=0.2, longest=4.0,
        accelerator="cpu", progress=False,
    )  # fmt: skip
    return replace(base, **settings)


def bytes_of(store: Path) -> dict[str, bytes]:
    """Every file of a store, but for the lock."""
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file() and p.name != ".lock"}


def child(work: Callable[[], object]) -> int:
    """Run something in a fork of this process, which has imported all there is; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def parts(store: Path) -> int:
    """Batches that are done."""
    return sum(p.read_bytes().count(b"]\n") for p in store.glob("*/parts/*.jsonl"))


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["paraphrase", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("amclr: ") and "\n" not in error
    return error
