"""`amclr paraphrase`: paraphrases of a data set's captions, written to a store.

The batches depend only on the list of captions, and what is sampled for a batch only on its captions and the seed. So
the store is the same after any interruptions and with any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from amclr.config.checks import problems
from amclr.config.schema import Config, ParaphraseConfig, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.text.filters import REASONS, Filters, choose
from amclr.data.text.store import FOLDER
from amclr.data.text.version import ParaphrasedCaption, Version
from amclr.distributed.world import Processes
from amclr.paraphrase.generators import ModelParaphraser, Paraphraser, RuleParaphraser, fingerprint
from amclr.paraphrase.similarity import SIMILARITY, TextSimilarity, similar_pairs
from amclr.utils.errors import UserError


def paraphrase(config: ParaphraseConfig, data: str, source: SourceConfig | None = None) -> str:
    """Paraphrase the captions of a data set into a store, or resume an interrupted one; return a report.

    Of several processes, only the first returns a report, the others "". Raises UserError, saying what to type, for a
    data set, model or folder that cannot be used.
    """
    if wrong := problems(config):
        raise UserError("; ".join(wrong))
    if data == "scenes":
        raise UserError(
            "the captions of scenes already paraphrase each other, and `amclr train` draws second text views from "
            "them: give a folder of captioned images instead"
        )
    store = _store_folder(config, data)
    processes = Processes.start()
    captions = _captions(data, source or SourceConfig(), config.progress and processes.rank == 0)
    device = _device(config)
    rules = config.model == "rules"
    paraphraser: Paraphraser = RuleParaphraser(config.seed) if rules else ModelParaphraser(config, device)
    threshold = config.similarity if config.similarity is not None else 0.0 if rules else SIMILARITY
    similarity = TextSimilarity(config.encoder, device) if threshold > 0 else None
    filters = Filters(config.shortest, config.longest, config.keep_facts)
    candidates = config.candidates or (config.k if rules else config.k + 2)
    settings = paraphraser.settings | vars(filters) | {
        "k": config.k, "candidates": candidates, "seed": config.seed, "similarity": threshold,
        "encoder": f"{config.encoder} {fingerprint(similarity.tower)}" if similarity else None,
    }  # fmt: skip
    version = Version(store, settings, processes.rank)

    def entries(batch: list[str]) -> list[ParaphrasedCaption]:
        generated = paraphraser(batch, candidates)
        similar = similar_pairs(similarity, threshold, filters, batch, generated) if similarity else None
        results = []
        for caption, texts in zip(batch, generated, strict=True):
            chosen, rejected = choose(
                caption, texts, config.k, filters, lambda c, t: similar is None or (c, t) in similar
            )
            results.append(ParaphrasedCaption(caption, tuple(chosen), rejected))
        return results

    with _lock(version.folder) if processes.rank == 0 else nullcontext():
        done = version.done()
        processes.wait()  # no process may read the store after another has added to it
        todo = version.todo(captions)
        size = config.batch_size
        batches = [todo[i : i + size] for i in range(0, len(todo), size)]
        mine = batches[processes.rank :: processes.count]
        _fill(version, mine, done, entries, config.progress and processes.rank == 0)
        processes.wait()
        report = version.finish() if processes.rank == 0 else {}
    return _report(report, version, len(captions), len(todo), len(done)) if report else ""


def _fill(
    version: Version, batches: Sequence[list[str]], done: Mapping[str, ParaphrasedCaption],
    entries: Callable[[list[str]], list[ParaphrasedCaption]], progress: bool,
) -> None:  # fmt: skip
    captions = sum(map(len, batches))
    initial = sum(c in done for batch in batches for c in batch)
    with tqdm(total=captions, initial=initial, desc="Paraphrases", unit="caption", disable=not progress) as bar:
        for batch in batches:
            remaining = [c for c in batch if c not in done]
            if remaining:
                version.append(entries(remaining))
                bar.update(len(remaining))


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
            f"'{data}' is not a folder, so paraphrases cannot be stored in it: give one with --out, and pass the same "
            "folder to amclr train with --source.paraphrases"
        )
    return root / FOLDER


def _device(config: ParaphraseConfig) -> torch.device:
    if config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--accelerator cuda: torch finds no GPU: leave it out")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another `amclr paraphrase` is writing to '{folder}': wait for it") from None
    return lock


def _report(report: dict[str, Any], version: Version, captions: int, new: int, resumed: int) -> str:
    k = version.settings["k"]
    full = report["captions_with"][str(k)]
    lines = [
        f"captions     {captions} different ones, {new} new"
        + (f", {resumed} of them done before an interruption" if resumed else ""),
        f"paraphrases  {report['paraphrases']} of {report['captions']} captions: {full} with {k}, "
        + ", ".join(f"{report['captions_with'][str(n)]} with {n}" for n in range(k - 1, -1, -1)),
    ]
    if report["rejected"]:
        lines.append("rejected     " + ", ".join(f"{report['rejected'][r]} {r} ({REASONS[r]})"
                                                 for r in REASONS if r in report["rejected"]))  # fmt: skip
    lines += [
        f"store        {version.folder}", f"look at      {version.folder / 'sample.txt'}",
        "used by      amclr train for images with one caption; with --views.paraphrases 1 for all images",
    ]  # fmt: skip
    return "\n".join(lines)
