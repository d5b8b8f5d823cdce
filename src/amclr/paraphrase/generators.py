"""Generators of candidate paraphrases: rules, and language models of transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch

from amclr.config.schema import ParaphraseConfig
from amclr.data.text.rules import RULES, reword
from amclr.utils.errors import UserError, first_line
from amclr.utils.randomness import derive

SEQ2SEQ_PROMPT = "paraphrase: {}"
CAUSAL_PROMPT = "Say in other words what this caption of a picture says, in one line.\nCaption: {}\nIn other words:"
CHAT_PROMPT = "Say in other words what this caption of a picture says. Answer with the new caption alone.\n\n{}"
MAX_CHARACTERS = 500
"""Characters of a caption that a model sees; longer ones only cost time."""


class Paraphraser(Protocol):
    """Generates candidate paraphrases. `settings` is everything that its results depend on."""

    settings: dict[str, Any]

    def __call__(self, captions: list[str], count: int) -> list[list[str | None]]:
        """Generate `count` candidates per caption, in order; None for one that did not finish."""
        ...


class RuleParaphraser:
    """Generates candidates by the rules of `amclr.data.text.wording`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.settings: dict[str, Any] = {"model": "rules", "rules": RULES}

    def __call__(self, captions: list[str], count: int) -> list[list[str | None]]:
        """Generate up to `count` candidates per caption."""
        return [[*reword(c, count, self.seed)] for c in captions]


class ModelParaphraser:
    """Samples candidates from a seq2seq or causal transformers model."""

    def __init__(self, config: ParaphraseConfig, device: torch.device) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        self.config, self.device = config, device
        source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        try:
            model_config = AutoConfig.from_pretrained(config.model, **source)
            self.seq2seq = bool(model_config.is_encoder_decoder)
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="right", **source)
            architecture: Any = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
            model = architecture.from_pretrained(config.model, dtype=getattr(torch, config.precision), **source)
        except Exception as error:  # transformers and the hub raise many kinds
            raise _load_error(config.model, error) from None
        self.model: Any = model
        self.model.to(device).eval()
        self.chat = not self.seq2seq and bool(getattr(self.tokenizer, "chat_template", None))
        # A causal model continues its prompt, so its padding must come before it.
        self.tokenizer.padding_side = "right" if self.seq2seq else "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.prompt = config.prompt or (SEQ2SEQ_PROMPT if self.seq2seq else CHAT_PROMPT if self.chat else CAUSAL_PROMPT)
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.settings: dict[str, Any] = {
            "model": Path(config.model).resolve().name if Path(config.model).is_dir() else config.model,
            "weights": fingerprint(self.model), "prompt": self.prompt, "chat": self.chat,
            "top_k": config.top_k, "top_p": config.top_p, "temperature": config.temperature,
            "max_tokens": config.max_tokens, "batch_size": config.batch_size, "precision": config.precision,
            "device": device.type,
        }  # fmt: skip

    @torch.inference_mode()
    def __call__(self, captions: list[str], count: int) -> list[list[str | None]]:
        """Sample `count` candidates per caption, with a seed derived from the captions."""
        tokens = self.tokenizer(
            [self._prompted(c) for c in captions], padding=True, add_special_tokens=not self.chat, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        inputs = {k: tokens[k] for k in ("input_ids", "attention_mask")}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derive("paraphrase", self.config.seed, *captions))
            try:
                out = self.model.generate(
                    **inputs, do_sample=True, num_beams=1, num_return_sequences=count, top_k=self.config.top_k,
                    top_p=self.config.top_p, temperature=self.config.temperature,
                    max_new_tokens=self.config.max_tokens, pad_token_id=self.tokenizer.pad_token_id,
                )  # fmt: skip
            except torch.cuda.OutOfMemoryError:
                raise UserError(
                    f"the GPU runs out of memory with {len(captions)} captions at once: give a smaller --batch_size"
                ) from None
        new = out[:, 1:] if self.seq2seq else out[:, inputs["input_ids"].shape[1] :]
        texts = [self._answer(row) for row in new.tolist()]
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def _prompted(self, caption: str) -> str:
        text = self.prompt.replace("{}", caption[:MAX_CHARACTERS])
        if not self.chat:
            return text
        messages = [{"role": "user", "content": text}]
        out: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(out)

    def _answer(self, row: list[int]) -> str | None:
        """Decode new tokens, or None if they have no end; a causal model's answer also ends with its line."""
        ended = any(t in self.ends for t in row)
        text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()
        if not self.seq2seq and "\n" in text:
            text, ended = text.splitlines()[0], True
        return text if ended else None


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _load_error(name: str, error: Exception) -> UserError:
    return UserError(
        f"cannot load the language model '{name}': {first_line(error)}. Without a connection give "
        "--model FOLDER, a folder with config.json, weights and tokenizer, or --model rules, which needs no model"
    )
