"""Assembly of a run from its settings: processes, data, model, objective, optimiser."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.data.batches import Batch, BatchPlan, ImageBatches
from amclr.data.images.duplicates import Duplicates
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policies
from amclr.data.manifest import Manifest, Sample
from amclr.data.sources.rows import write_rejects
from amclr.distributed.launch import Fabric, start_processes
from amclr.distributed.team import Team
from amclr.evaluation.evaluator import Evaluator, model_reads_images
from amclr.evaluation.monitor import Monitor
from amclr.models.averaging import Averaging
from amclr.models.dual_encoder import DualEncoder
from amclr.models.features import FeatureBatches
from amclr.objectives import Objective, build
from amclr.runs.folder import Run
from amclr.runs.loading import initial_model
from amclr.runs.samples import Pinned
from amclr.training.faults import Undo
from amclr.training.optim import build_optimizer, choose_optimizer
from amclr.training.state import Training
from amclr.utils.errors import UserError, require


def launch(config: Config) -> Fabric:
    """The processes of a run, with their devices and arithmetic."""
    return start_processes(config, uses_all={"image", "text"} <= set(build_objective(config, 1).required_views))


def assemble(
    config: Config, folder: Path, resumed: Run | None, progress: bool, changed_data: bool = False,
    processes: tuple[Fabric, Team] | None = None,
) -> Training:  # fmt: skip
    """Build everything that a run consists of. The run folder is created only once all settings fit together.

    resumed: the run to resume, if any, with `changed_data` on other samples than before. processes: those of `launch`,
    where they have been started already. Raises UserError for what the user can put right.
    """
    fabric, team = processes or (launch(config), Team(config.watchdog_timeout))
    parts = team.first_then_others(lambda: _prepare(config, folder, resumed, progress, changed_data, fabric, team))
    config, model, objective = parts.config, parts.model, parts.objective
    # From here on, all processes work at the same time.
    if config.sync_batchnorm and team.size > 1:
        if fabric.device.type != "cuda":
            raise UserError("--sync_batchnorm is for GPUs: leave it out")
        from timm.layers import convert_sync_batchnorm  # slow to import

        convert_sync_batchnorm(model)
    wrapped = fabric.setup_module(model)
    averaging = Averaging(model, config)
    optimizer = fabric.setup_optimizers(build_optimizer(config.optim, model, objective))
    return Training(
        fabric=fabric, team=team, config=config, run=parts.run, manifest=parts.manifest, pinned=parts.pinned,
        plan=parts.plan, model=model, wrapped=wrapped, objective=objective, optimizer=optimizer, averaging=averaging,
        batches=parts.batches, evaluator=parts.evaluator, monitor=parts.monitor, undo=parts.undo,
        micro_batch=config.micro_batch,
    )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """What each process prepares by itself: all of a run but what the processes set up together."""

    config: Config
    run: Run
    manifest: Manifest
    pinned: Pinned
    plan: BatchPlan
    model: DualEncoder
    objective: Objective
    batches: Dataset[Batch]
    evaluator: Evaluator
    monitor: Monitor | None
    undo: Undo


def _prepare(
    config: Config, folder: Path, resumed: Run | None, progress: bool, changed_data: bool, fabric: Fabric, team: Team
) -> Parts:
    """The parts of a run on this process: data, model, caches."""
    policies(config)  # reports mistakes in the settings before the data is read
    choose_optimizer(config.optim)
    if not resumed and team.first_rank:
        Run.check_unused(folder)
    if config.wandb:
        require("--wandb", "wandb", "wandb")
    cache = manifests.cache_folder(config)
    manifest = manifests.prepare(config, cache, progress)
    samples, val_samples = manifest.split("train"), manifest.split("val")
    weights = [s.weight for s in samples] if manifest.parts else []
    plan = BatchPlan(
        np.array([s.id for s in samples], dtype=np.int64), config.batch_size, config.seed,
        np.array(weights) if weights else None, (team.rank, team.size),
    )  # fmt: skip
    objective = build_objective(config, len(samples))
    if objective.pairs and len({t for s in samples for t in s.captions}) == 1:
        raise UserError(
            f"every training caption of '{config.data}' is '{samples[0].captions[0][:60]}': none tells images apart"
        )
    model = initial_model(config, [t for s in samples for t in s.texts], folder)
    if not val_samples:
        raise UserError(f"{manifest.root} has no validation images: give it a val.txt or raise --source.val_fraction")

    pinned = Pinned([s.name for s in samples], [s.name for s in val_samples], weights)
    if resumed and not changed_data:
        resumed.check_samples(pinned)
    if resumed and changed_data and config.source.fold:
        raise UserError(
            "--changed_data: changed data has other folds, so this run may have trained on images that are now held "
            "out: start a new run"
        )
    if not resumed:
        config = _with_paraphrases(config, manifest)
    run = _open_folder(config, folder, resumed, model, manifest, team.first_rank)
    if progress:
        _print_notes(manifest, folder)
    fabric.to_device(model)
    fabric.to_device(objective)
    batches = _batches(config, manifest, samples, plan, model, objective, cache, progress, fabric.device.type)
    evaluator = Evaluator(model, val_samples, config, cache, progress, repeated=True)
    monitor = Monitor.of_run(model, run, config, progress) if config.monitor else None
    undo = Undo(model, objective)
    return Parts(config, run, manifest, pinned, plan, model, objective, batches, evaluator, monitor, undo)


def _open_folder(
    config: Config, folder: Path, resumed: Run | None, model: DualEncoder, manifest: Manifest, first_rank: bool
) -> Run:
    """The run's folder: created by the first process, with the tokenizer and the rejects, and opened by the others."""
    if first_rank:
        run = resumed or Run.create(folder, config)
        if config.model.text_tower == "small" and not (folder / "tokenizer").is_dir():
            model.tokenizer.save_pretrained(folder / "tokenizer.part")  # so that a kill leaves none, or a whole one
            (folder / "tokenizer.part").rename(folder / "tokenizer")
        write_rejects(manifest.rejects, folder / "rejects.jsonl")
    else:
        run = Run.open(folder)
    run.config = config
    run.verbose = first_rank
    return run


def _print_notes(manifest: Manifest, folder: Path) -> None:
    if manifest.rejects:
        print(f"{len(manifest.rejects)} rows or images left out: {folder / 'rejects.jsonl'}", file=sys.stderr)
    for note in manifest.notes:
        print(f"note: {note}", file=sys.stderr)


def _batches(
    config: Config, manifest: Manifest, samples: Sequence[Sample], plan: BatchPlan, model: DualEncoder,
    objective: Objective, cache: Path, progress: bool, device: str,
) -> Dataset[Batch]:  # fmt: skip
    """The batches by step: of images, or where both towers are frozen, of cached features."""
    locations, views = [s.image for s in samples], objective.required_views
    duplicates = find_duplicates(samples, manifest, config)
    if model_reads_images(model):
        store = ImageStore.from_config(locations, config, cache, progress)
        edits_on_device = config.views.where == "device" or (config.views.where == "auto" and device == "cuda")
        return ImageBatches(samples, store, plan, views, model.tokenize, config, duplicates, edited=not edits_on_device)
    store = ImageStore(locations, config.model.image_size)
    return FeatureBatches(model, samples, store, plan, views, config, cache, progress, duplicates)


def _with_paraphrases(config: Config, manifest: Manifest) -> Config:
    """The settings with the paraphrase store that was found, so that the run is resumed with the same one."""
    if config.source.paraphrases or (manifest.parts and manifest.paraphrases):
        return config
    return replace(config, source=replace(config.source, paraphrases=(*manifest.paraphrases, "none")[0]))


def find_duplicates(samples: Sequence[Sample], manifest: Manifest, config: Config) -> Duplicates:
    """Which captions and images the training samples share, as far as `source.duplicates` uses it."""
    mode = config.source.duplicates
    if mode == "negatives":
        return Duplicates()
    hashes = [manifest.perceptual_hashes.get(s.image) for s in samples]
    return Duplicates.find([s.texts for s in samples], hashes if mode == "positives" and any(hashes) else None)


def build_objective(config: Config, samples: int) -> Objective:
    """The objective of a configuration. Raises UserError, naming what is wrong with the settings."""
    try:
        return build(
            config.objective, samples, config.loss, folder=manifests.cache_folder(config) / "tables", averaged=True,
            validate=False,  # the embeddings are unit rows, and the ids those of the plan, by construction
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def default_folder(config: Config) -> Path:
    """runs/DATA-OBJECTIVE-seedN, with a number appended where that exists."""
    name = f"{manifests.label(config.data)}-{config.objective}-seed{config.seed}"
    candidates = (Path("runs") / f"{name}{suffix}" for suffix in ("", *(f"-{k}" for k in range(2, 10_000))))
    return next(folder for folder in candidates if not folder.exists())
