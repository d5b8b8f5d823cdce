"""`amclr paraphrase`: paraphrases of a data set's captions, by a language model or by rules, into a store.

Captions are done in batches that follow from the list of captions alone; what is drawn in a batch
follows from its captions and the seed. So a store is the same, whatever kills and whatever number
of processes came between.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock, Timeout
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from amclr.config.schema import Config, ModelConfig, ParaphraseConfig, SourceConfig, paraphrase_problems
from amclr.data import manifest as manifests
from amclr.data.text.filters import REASONS, Filters, choose
from amclr.data.text.rules import RULES, reword
from amclr.data.text.store import FOLDER
from amclr.data.text.version import ParaphrasedCaption, Version
from amclr.distributed.world import Processes
from amclr.models.dual_encoder import build_text_tower, build_tokenizer
from amclr.utils.errors import UserError
from amclr.utils.randomness import derive

SEQ2SEQ_PROMPT = "paraphrase: {}"
CAUSAL_PROMPT = "Say in other words what this caption of a picture says, in one line.\nCaption: {}\nIn other words:"
CHAT_PROMPT = "Say in other words what this caption of a picture says. Answer with the new caption alone.\n\n{}"
SIMILARITY = 0.5
"""Least cosine for models. On Flickr8k with minilm, 0.7 % of the pairs of captions of different images reach it,
75 % of the pairs of different captions of one image, and all that the rules make."""
LONGEST = 500
"""Characters of a caption that a model is given; what is beyond them costs time and is no caption any more."""


class Paraphraser(Protocol):
    """What makes candidates. `settings` are all that its results depend on."""

    settings: dict[str, Any]

    def __call__(self, captions: list[str], count: int) -> list[list[str | None]]:
        """`count` candidates per caption, in order; None for one that was cut off before its end."""
        ...


class RuleParaphraser:
    """Candidates by the rules of `amclr.data.text.rules`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.settings: dict[str, Any] = {"model": "rules", "rules": RULES}

    def __call__(self, captions: list[str], count: int) -> list[list[str | None]]:
        """Up to `count` candidates per caption."""
        return [[*reword(c, count, self.seed)] for c in captions]


class ModelParaphraser:
    """Candidates sampled from a seq2seq or causal transformers model."""

    def __init__(self, config: ParaphraseConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        try:
            about = AutoConfig.from_pretrained(config.model, **where)
            self.seq2seq = bool(about.is_encoder_decoder)
            self.tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="right", **where)
            kind: Any = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
            model = kind.from_pretrained(config.model, dtype=getattr(torch, config.precision), **where)
        except Exception as error:  # transformers and the hub raise many kinds
            raise _load_error(config.model, error) from None
        self.model: Any = model
        self.model.to(device).eval()
        self.chat = not self.seq2seq and bool(getattr(self.tokenizer, "chat_template", None))
        # Padding goes where the text does not continue: before the prompt of a causal model.
        self.tokenizer.padding_side = "right" if self.seq2seq else "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.prompt = config.prompt or (SEQ2SEQ_PROMPT if self.seq2seq else CHAT_PROMPT if self.chat else CAUSAL_PROMPT)
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.settings: dict[str, Any] = {
            "model": Path(config.model).resolve().name if Path(config.model).is_dir() else config.model,
            "weights": _fingerprint(self.model), "prompt": self.prompt, "chat": self.chat,
            "top_k": config.top_k, "top_p": config.top_p, "temperature": config.temperature,
            "max_tokens": config.max_tokens, "batch_size": config.batch_size, "precision": config.precision,
            "device": device.type,
        }  # fmt: skip

    @torch.inference_mode()
    def __call__(self, captions: list[str], count: int) -> list[list[str | None]]:
        """`count` candidates per caption, drawn with a seed that follows from the captions."""
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
                    f"the GPU has no memory for {len(captions)} captions at once: give a smaller --batch_size"
                ) from None
        new = out[:, 1:] if self.seq2seq else out[:, inputs["input_ids"].shape[1] :]
        texts = [self._answer(row) for row in new.tolist()]
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def _prompted(self, caption: str) -> str:
        text = self.prompt.replace("{}", caption[:LONGEST])
        if not self.chat:
            return text
        messages = [{"role": "user", "content": text}]
        out: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(out)

    def _answer(self, row: list[int]) -> str | None:
        """The text of new tokens, up to their end; a causal model's ends with its line."""
        ended = any(t in self.ends for t in row)
        text = str(self.tokenizer.decode(row, skip_special_tokens=True)).strip()
        if not self.seq2seq and "\n" in text:
            text, ended = text.splitlines()[0], True
        return text if ended else None


class Encoder:
    """Cosines between texts by a text tower, for the filter on similarity."""

    def __init__(self, name: str, device: torch.device) -> None:
        config = ModelConfig(text_tower=name, max_tokens=128)
        if name == "small":
            raise UserError("--encoder small knows no words yet: give minilm, a transformers model or a folder")
        self.tokenizer = build_tokenizer(config, [])
        self.tower = build_text_tower(config, self.tokenizer).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, ones: Sequence[str], others: Sequence[str]) -> list[float]:
        """The cosine of each pair."""
        texts = list(dict.fromkeys([*ones, *others]))
        place = {text: i for i, text in enumerate(texts)}
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rows = torch.empty(len(texts), self.tower.width)
        for start in range(0, len(texts), 64):
            part = order[start : start + 64]
            tokens = self.tokenizer(
                [texts[i] for i in part], padding=True, truncation=True, max_length=128, return_tensors="pt"
            ).to(self.device)
            features = self.tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            rows[part] = F.normalize(features.float(), dim=-1).cpu()
        a, b = (rows[[place[t] for t in side]] for side in (ones, others))
        cosines: list[float] = (a * b).sum(-1).tolist()
        return cosines


def paraphrase(config: ParaphraseConfig, data: str, source: SourceConfig | None = None) -> str:
    """Paraphrase the captions of a data set into a store, or go on with it; return a report.

    Raises UserError for a data set, model or folder that cannot be used, saying what would do.
    """
    if found := paraphrase_problems(config):
        raise UserError("; ".join(found))
    if data == "scenes":
        raise UserError(
            "the captions of scenes are paraphrases of each other already, and `amclr train` draws second text "
            "views from them: nothing to do. Give a folder of captioned images"
        )
    store = _store_folder(config, data)
    processes = Processes.start()
    captions = _captions(data, source or SourceConfig(), config.progress and processes.rank == 0)
    device = _device(config)
    rules = config.model == "rules"
    paraphraser: Paraphraser = RuleParaphraser(config.seed) if rules else ModelParaphraser(config, device)
    least = config.similarity if config.similarity is not None else 0.0 if rules else SIMILARITY
    encoder = Encoder(config.encoder, device) if least > 0 else None
    filters = Filters(config.shortest, config.longest, config.keep_facts)
    candidates = config.candidates or (config.k if rules else config.k + 2)
    settings = paraphraser.settings | vars(filters) | {
        "k": config.k, "candidates": candidates, "seed": config.seed, "similarity": least,
        "encoder": f"{config.encoder} {_fingerprint(encoder.tower)}" if encoder else None,
    }  # fmt: skip
    version = Version(store, settings, processes.rank)

    def entries(batch: list[str]) -> list[ParaphrasedCaption]:
        made = paraphraser(batch, candidates)
        similar = _similar(encoder, least, filters, batch, made) if encoder else None
        return [
            ParaphrasedCaption(c, tuple(kept), rejected)
            for c, texts in zip(batch, made, strict=True)
            for kept, rejected in [
                choose(c, texts, config.k, filters, lambda c, t: similar is None or (c, t) in similar)
            ]
        ]

    with _alone(version.folder) if processes.rank == 0 else nullcontext():
        done = version.done()
        processes.wait()  # what others add from now on was not there before
        todo = version.todo(captions)
        size = config.batch_size
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]
        mine = batches[processes.rank :: processes.count]
        _work(version, mine, done, entries, config.progress and processes.rank == 0)
        processes.wait()
        report = version.finish() if processes.rank == 0 else {}
    return _report(report, version, len(captions), len(todo), len(done)) if report else ""


def _work(
    version: Version, batches: Sequence[list[str]], done: Mapping[str, ParaphrasedCaption],
    entries: Callable[[list[str]], list[ParaphrasedCaption]], progress: bool,
) -> None:  # fmt: skip
    captions = sum(map(len, batches))
    had = sum(c in done for batch in batches for c in batch)
    with tqdm(total=captions, initial=had, desc="Paraphrases", unit="caption", disable=not progress) as bar:
        for batch in batches:
            left = [c for c in batch if c not in done]
            if left:
                version.append(entries(left))
                bar.update(len(left))


def _similar(
    encoder: Encoder, least: float, filters: Filters, batch: list[str], made: list[list[str | None]]
) -> set[tuple[str, str]]:
    """The pairs of caption and candidate that are near enough, among those that the other filters let pass."""
    pairs = [
        (c, text)
        for c, texts in zip(batch, made, strict=True)
        for text in dict.fromkeys(" ".join(t.split()) for t in texts if t is not None)
        if filters.fault(c, text) is None
    ]
    cosines = encoder([c for c, _ in pairs], [t for _, t in pairs])
    return {pair for pair, cosine in zip(pairs, cosines, strict=True) if cosine >= least}


def _captions(data: str, source: SourceConfig, progress: bool) -> list[str]:
    config = Config(data=data, source=replace(source, paraphrases="none"))
    manifest = manifests.load(config, manifests.cache_folder(config), progress)
    manifest.enforce_limit(source.max_bad)
    return list(dict.fromkeys(c for s in manifest.samples for c in s.captions))


def _store_folder(config: ParaphraseConfig, data: str) -> Path:
    if config.out:
        return Path(config.out).expanduser()
    root = Path(data).expanduser()
    if not root.is_dir() and (root.exists() or ":" in data):
        raise UserError(
            f"'{data}' is no folder, so paraphrases have no place in it: give one with --out, and the same with "
            "--source.paraphrases to amclr train"
        )
    return root / FOLDER


def _device(config: ParaphraseConfig) -> torch.device:
    if config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--accelerator cuda: torch finds no GPU here; leave it out")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _alone(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another `amclr paraphrase` is at work in '{folder}': wait for it") from None
    return lock


def _fingerprint(module: torch.nn.Module) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _load_error(name: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = (lines[0] if lines else type(error).__name__).rstrip(".")
    return UserError(
        f"cannot load the language model '{name}': {reason}. Without a connection give --model FOLDER, a folder with "
        "config.json, weights and tokenizer, or --model rules, which needs no model"
    )


def _report(report: dict[str, Any], version: Version, captions: int, todo: int, before: int) -> str:
    k = version.settings["k"]
    full = report["captions_with"][str(k)]
    lines = [
        f"captions     {captions} different ones, {todo} new"
        + (f", {before} of them done before a stop" if before else ""),
        f"paraphrases  {report['paraphrases']} of {report['captions']} captions: {full} with {k}, "
        + ", ".join(f"{report['captions_with'][str(n)]} with {n}" for n in range(k - 1, -1, -1)),
    ]
    if report["rejected"]:
        lines.append("rejected     " + ", ".join(f"{report['rejected'][r]} {r} ({REASONS[r]})"
                                                 for r in REASONS if r in report["rejected"]))  # fmt: skip
    lines += [
        f"store        {version.folder}", f"look at      {version.folder / 'sample.txt'}",
        "drawn        for images with one caption; for those with more, too, by amclr train --views.paraphrases 1",
    ]  # fmt: skip
    return "\n".join(lines)
