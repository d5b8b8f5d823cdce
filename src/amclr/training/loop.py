"""`train`: assembly, the loop and the end of a run."""

from __future__ import annotations

import errno
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from amclr.config.checks import fixed_differences, problems
from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.data.batches import Batch, BatchPlan, ImageBatches
from amclr.data.images.duplicates import Duplicates
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policies
from amclr.data.manifest import Manifest, Sample
from amclr.data.sources.rows import append_rejects, write_rejects
from amclr.distributed.launch import Fabric, arithmetic, start_processes
from amclr.distributed.signals import (
    Interrupted,
    Signals,
    ending,
    leave_signals_to_the_trainer,
    no_handler_of_loaders,
)
from amclr.distributed.watchdog import Team
from amclr.distributed.world import average_statistics, process
from amclr.evaluation.classes import read_classes
from amclr.evaluation.embedding import model_reads_images
from amclr.evaluation.evaluator import Evaluator
from amclr.evaluation.gallery import draw_gallery
from amclr.evaluation.monitor import Monitor
from amclr.evaluation.zeroshot import measure_classes
from amclr.models.averaging import Averaging, kept_weights
from amclr.models.features import FeatureBatches
from amclr.objectives import Objective, backward_in_chunks, build
from amclr.runs.folder import Loggers, Pinned, Run, begin
from amclr.training.faults import Undo, keep_fault, out_of_memory
from amclr.training.optim import build_optimizer, choose_optimizer, learning_rate, set_lr
from amclr.training.state import Training
from amclr.training.timing import WAIT_MATTERS, Clock
from amclr.utils import figures
from amclr.utils.errors import UserError, require
from amclr.utils.files import write_arrays, write_text
from amclr.utils.randomness import derive

LOG_EVERY = 10
RESTARTS = 3
"""Times that the processes that prepare batches are started again at one step."""
POLL = 5.0
"""Seconds after which it is noticed that such a process has died."""
UNREACHABLE = (ConnectionError, EOFError, FileNotFoundError)
"""What fetching a batch raises where the process that made it died just then: it hands over open files, by a socket."""
STUCK = 600.0
"""Seconds after which a process that prepares batches is held to be stuck, and started again."""
LONGEST_EVALUATION = 3600.0
"""Seconds after which one of several processes is held to be stuck in an evaluation."""
TRACED = 10
"""Steps that `--profile` traces."""


class Stopped(Exception):
    """A run stopped by a signal; it can go on from its folder. Of several processes one says so."""

    def __init__(self, signum: int, folder: Path, says: bool = True) -> None:
        super().__init__(f"stopped; go on by: amclr train --resume {folder}" if says else "")
        self.code = 128 + signum


def train(
    config: Config | None = None, *, resume: Path | None = None, changed_data: bool = False, profile: bool = False,
    progress: bool = True,
) -> Run:  # fmt: skip
    """Train a dual encoder and leave a run folder; the Python form of `amclr train`.

    resume: a run folder to go on with, under its own settings; with a config, those that are `resumable`
    may differ in it. changed_data: go on even where samples were added or removed since; the others keep
    their estimates. profile: leave a trace of some steps under profile/ in the run folder. Started by
    torchrun or SLURM, the processes share every batch. Raises UserError for what the user can put right,
    and Stopped after a signal (Ctrl-C, SIGTERM, SIGUSR1), with a checkpoint written.
    """
    former = Run.open(resume) if resume else None
    settings = reconciled(former, config) if former else config or Config()
    if wrong := problems(settings):
        raise UserError("; ".join(wrong))
    fabric = launch(settings)
    folder = former.folder if former else Path(settings.out) if settings.out else None
    try:
        with (
            ending(), kept_random_state(), arithmetic(settings, fabric.device), Team(settings.watchdog_timeout) as team,
            team.telling(Stopped),
        ):  # fmt: skip
            if folder is None:
                folder = Path(team.share(str(default_folder(settings))))
            team.advice = f"; go on by: amclr train --resume {folder}, started as before"
            speaks = progress and team.first_rank
            training = assemble(settings, folder, former, speaks, changed_data, (fabric, team))
            if former:
                training.restore(changed_data)
            # Not before the checkpoint has been taken up: what could not be must be asked for again.
            if team.first_rank:
                training.run.pin_samples(training.pinned)
                training.run.write_config()
            fit(training, speaks, profile)
            finish(training, speaks)
    except KeyboardInterrupt as error:
        if folder and (folder / "config.yaml").is_file():  # features and checkpoints so far are there to go on from
            raise Stopped(getattr(error, "signum", signal.SIGINT), folder, process() == 0) from None
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full and folder and (folder / "config.yaml").is_file()):
            raise
        what = f"'{error.filename or folder}': {error.strerror}"
        raise UserError(f"{what}. Make room, then go on by: amclr train --resume {folder}") from None
    if team.size > 1 and dist.is_initialized():  # after an error, it might wait for processes that have gone
        dist.destroy_process_group()
    return training.run


def reconciled(former: Run, config: Config | None) -> Config:
    """The settings to go on with: the run's, or others given. Raises UserError, naming those that may not differ."""
    if config is None:
        return former.config
    kept = former.config.source.paraphrases
    config = replace(config, source=replace(config.source, paraphrases=config.source.paraphrases or kept))
    if fixed := fixed_differences(former.config, config):
        told = "; ".join(f"--{name} is {then} in this run, not {now}" for name, (then, now) in fixed.items())
        raise UserError(
            f"'{former.folder}' goes on with what it began with: {told}. Leave that out, or start another run by --out"
        )
    return replace(config, out=former.config.out)


def fit(t: Training, progress: bool, profile: bool = False) -> None:
    """The loop: from the steps done to the last."""
    with ExitStack() as stack:
        # Whatever ends the loop, a checkpoint under way is finished; what ended it is not hidden by that failing.
        stack.push(lambda kind, *_: t.run.wait_saved(raises=kind is None))
        t.team.before_end = t.run.wait_saved
        logs = stack.enter_context(Loggers(t.run, t.config, t.step, writes=t.team.first_rank))
        bar = stack.enter_context(
            tqdm(total=t.steps, initial=t.step, desc=t.config.objective, unit="step", disable=not progress)
        )
        signals = stack.enter_context(Signals(t.team.first_rank))
        trace = stack.enter_context(traced(t, profile))
        if t.config.on_nan == "rollback" and t.step == 0:
            t.save(passing=True)
        t.clock = Clock()
        written = time.monotonic()
        if not t.measured:
            t.save(is_best=evaluate(t, logs, signals, bar), wait=True)
            if not t.measured:
                raise Stopped(signals.caught, t.run.folder)  # of one process: several are not interrupted
        for batch in stream(t):
            t.lap("loader", "forward")
            made = advance(t, batch)
            if made.outcome == "rolled back":
                bar.n = t.step
                bar.refresh()
                continue
            t.step += 1
            t.clock.steps += 1
            t.team.step()
            trace()
            bar.update()
            list_replaced(t, batch)
            due = time.monotonic() - written > (60 * t.config.checkpoint_minutes or t.run.pace())
            stop, saves = t.team.agree(signals.caught, int(due and t.team.first_rank))
            t.measured = not t.measures
            logged = (t.step - 1) % LOG_EVERY == 0 or t.step == t.steps
            if made.outcome == "made" and (logged or t.measures or stop or saves):
                if not math.isfinite(made.metrics["loss"].item()):
                    leave_out(t, batch, made.metrics["loss"], None)
                if logged:
                    log_step(t, logs, made, bar)
            if t.measures or stop or saves:
                is_best = False
                if t.measures and not stop:
                    t.team.at("evaluation", LONGEST_EVALUATION)
                    is_best = evaluate(t, logs, signals, bar)
                    stop = signals.caught if t.team.size == 1 else stop
                ends = bool(stop) or t.step == t.steps
                t.save(is_best=is_best, wait=ends, passing=not (t.measures or ends))
            if t.measures or due:
                written = time.monotonic()
            if stop and not (t.step == t.steps and t.measured):
                t.team.meet()  # where one process ends, launchers end the others: not while one still writes
                raise Stopped(stop, t.run.folder, t.team.first_rank)
            t.lap("evaluation, logs and checkpoints", "loader")
    if progress and t.clock.steps:
        store = getattr(t.batches, "store", None)
        advice = t.clock.advice(t.config.workers, kept=store is None or store.kept_in != "none")
        print("\n".join([t.clock.report(), *advice]), file=sys.stderr)


def list_replaced(t: Training, batch: Batch) -> None:
    """Log which samples of a batch had to be replaced. Raises UserError beyond the limit on bad images."""
    for name, reason in batch.replaced.items():
        t.run.log({"kind": "replaced", "step": t.step, "sample": name, "reason": reason})
        t.lose(name, reason)


def log_step(t: Training, logs: Loggers, made: Made, bar: Any) -> None:
    """Log a step's metrics and what the steps since the last one that was logged spent their time on."""
    values = {k: float(v) for k, v in made.metrics.items()}
    time_spent = t.clock.since_last()
    values = {"gamma": t.objective.gamma} | values | {"lr": made.rate, **time_spent}
    logs.write("train", t.step, t.step / t.plan.steps_per_epoch, values)
    shown = {"loss": f"{values['loss']:.3f}"}
    if time_spent["wait_share"] > WAIT_MATTERS:
        shown["waits"] = f"{time_spent['wait_share']:.0%}"
    bar.set_postfix(shown, refresh=False)


def evaluate(t: Training, logs: Loggers, signals: Signals, bar: Any) -> bool:
    """Measure, and log it; whether the weights are the best so far. A signal puts it off to when the run goes on."""
    try:
        # Several processes end it together, and then stop.
        # Interrupted while the weights are exchanged, the model would be a mixture of both.
        with t.averaging.kept_in_model(), signals.interrupting(t.team.size == 1):
            recalls = t.evaluator() | (t.monitor() if t.monitor else {})
    except Interrupted:
        return False
    t.measured = True
    if not t.team.first_rank:
        return False
    # Where nothing aligns images with captions, recall is chance: the last is as good as any.
    is_best = recalls["r_mean"] > t.best or not t.objective.pairs
    t.best = max(t.best, recalls["r_mean"])
    epoch = t.step / t.plan.steps_per_epoch
    logs.write("eval", t.step, epoch, recalls)
    if not bar.disable:
        bar.write(_recall_line(math.ceil(epoch), t.config.epochs, recalls), file=sys.stderr)
    return is_best


def stream(t: Training) -> Iterator[Batch]:
    """The batches from the step reached on; started anew where the step is set back, or a worker process dies."""
    failed, times = -1, 0
    while t.step < t.steps:
        loader = DataLoader(
            t.batches, batch_size=None, sampler=range(t.step, t.steps), num_workers=t.config.workers,
            pin_memory=t.fabric.device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer,
            timeout=POLL if t.config.workers else 0,
        )  # fmt: skip
        with no_handler_of_loaders():
            batches = iter(loader)
        try:
            since = time.monotonic()
            while t.step < t.steps:
                step = t.step
                try:
                    batch = next(batches)
                except RuntimeError as error:
                    # That no worker has died is looked at each time.
                    if "timed out" in str(error) and time.monotonic() - since < STUCK:
                        continue
                    raise
                yield batch
                since = time.monotonic()
                if t.step != step + 1:
                    break
        except (RuntimeError, *UNREACHABLE) as error:
            if not (why := _gone(error, t.config.workers)):
                raise
            failed, times = step, times + 1 if step == failed else 1
            if times > RESTARTS:
                raise UserError(
                    f"the processes that prepare batches die again and again at step {step} ({why}). If "
                    "the system ends them because they take too much memory, lower --workers or --ram_cache; go "
                    f"on by: amclr train --resume {t.run.folder}"
                ) from None
            print(f"a process that prepares batches died ({why}): started again", file=sys.stderr)
            t.run.log({"kind": "fault", "step": step, "what": f"worker died: {why}"})
        finally:
            # They have nothing to finish, and one that is stuck would be waited for; SIGTERM they do not heed.
            for worker in getattr(batches, "_workers", ()):
                worker.kill()


def _gone(error: BaseException, workers: int) -> str:
    """How it shows that a worker process has gone; empty where it raised something, or there is none."""
    if isinstance(error, RuntimeError):
        return _first(error) if re.search(r"DataLoader (worker \(pid|timed out)", str(error)) else ""
    if not workers or "in DataLoader worker process" in str(error):  # torch's words around what a worker raised
        return ""
    return f"DataLoader worker has gone with its batch: {type(error).__name__}"


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:120].rstrip(". ")


@dataclass(frozen=True)
class Made:
    """What became of a step, with its metrics and learning rate."""

    outcome: Literal["made", "skipped", "rolled back"]
    metrics: dict[str, Tensor]
    rate: float


def advance(t: Training, batch: Batch) -> Made:
    """Make a step, or leave it out where its numbers are not finite."""
    config = t.config
    rate = learning_rate(config.optim, t.step, t.steps)
    if t.step in t.skipped:
        return Made("skipped", {}, rate)
    t.objective.start_epoch(t.step // t.plan.steps_per_epoch, config.epochs)
    set_lr(t.optimizer, rate)
    t.wrapped.train()
    t.objective.diagnose = t.step % LOG_EVERY == 0
    loss, metrics = gradient(t, batch)
    norm = None
    if config.optim.clip or config.on_nan != "stop":
        norm = t.fabric.clip_gradients(
            t.wrapped, t.optimizer, max_norm=config.optim.clip or math.inf, error_if_nonfinite=False
        )
    # Looking at a number waits for the GPU: where the run is to stop anyway, not at every step.
    looks = config.on_nan != "stop" or t.fabric.device.type == "cpu" or t.step % LOG_EVERY == 0
    if looks and not is_finite(t, loss, norm):
        return Made(leave_out(t, batch, loss, norm), metrics, rate)
    t.optimizer.step()
    t.optimizer.zero_grad()
    average_statistics(t.model)
    t.averaging.update()
    t.lap("optimiser", "logs and checkpoints", math.inf)
    return Made("made", metrics, rate)


def is_finite(t: Training, loss: Tensor, norm: Tensor | None) -> bool:
    """Whether a step may be made. With loss scaling, gradients that are not finite are the scaler's business."""
    if not math.isfinite(loss.item()):
        return False
    return norm is None or t.fabric.strategy.precision.precision == "16-mixed" or math.isfinite(float(norm))


def leave_out(t: Training, batch: Batch, loss: Tensor, norm: Tensor | None) -> Literal["skipped", "rolled back"]:
    """Deal with a step whose numbers are not finite as the settings say, with the batch kept to look into."""
    names = [t.pinned.train[i] for i in batch.ids.tolist()]
    folder = t.run.folder / "faults"
    what = keep_fault(folder, t.step, t.team.rank, batch.to(t.fabric.device), names, loss, norm, t.model)
    t.undo.back()
    t.optimizer.zero_grad()
    if (scaler := getattr(t.fabric.strategy.precision, "scaler", None)) is not None:
        scaler.update(scaler.get_scale())  # else it takes the next gradients for these; the scale stays
    told, kept = f"{what} at step {t.step}", f"samples and batch are in {folder}"
    hint = "lower --optim.lr or raise --loss.temperature"
    if t.config.on_nan == "stop":
        raise UserError(
            f"{told}: {hint}, or leave such steps out by --on_nan skip or rollback; {kept}, and {t.run.checkpoints} "
            "holds what was learned before"
        )
    row = {"kind": "fault", "step": t.step, "what": what, "done": t.config.on_nan, "samples": names}
    if len(t.skipped) >= t.config.nan_limit:
        raise UserError(f"{told}, after {len(t.skipped)} others, which is the limit (--nan_limit): {hint}; {kept}")
    t.skipped.add(t.step)
    if t.team.first_rank:
        print(f"{told}: {t.config.on_nan}; {kept}", file=sys.stderr)
    if t.config.on_nan == "skip":
        if t.team.first_rank:
            t.run.log(row)
        return "skipped"
    t.run.wait_saved(raises=False)
    t.team.meet()  # the first process's checkpoint is there for all
    state = t.run.load_last()
    if state is None:
        raise UserError(f"{told}, and there is no checkpoint to roll back to: {hint}; {kept}")
    t.take_up(state)
    if t.team.first_rank:
        t.run.forget_metrics_after(t.step, left_out=t.skipped)
        t.run.log(row)
    return "rolled back"


def gradient(t: Training, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, metrics and gradient of a batch; in smaller parts, from here on, where memory does not suffice."""
    rank = (t.team.rank,) if t.team.rank else ()
    while True:
        torch.manual_seed(derive(t.config.seed, "dropout", t.step, *rank))
        t.undo.mark()
        try:
            return backward(t, batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            told = _first(error)
        # Not while the error is at hand: what it came from holds the memory.
        halve(t, len(batch.ids), told)


def halve(t: Training, share: int, told: str) -> None:
    """Go on with half as many images at a time. Raises UserError where that is none, or others wait already."""
    size = t.micro_batch if 0 < t.micro_batch < share else share
    half = (size + 1) // 2
    if t.team.size > 1 or size == 1:
        hint = f"--micro_batch {half}" if size > 1 else "a smaller --model.image_size or --batch_size"
        raise UserError(f"out of memory at step {t.step} with {size} images at a time ({told}): go on with less by: "
                        f"amclr train --resume {t.run.folder} {hint}")  # fmt: skip
    t.undo.back()
    t.optimizer.zero_grad()
    if t.fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    t.micro_batch = half
    print(f"out of memory with {size} images at a time: {half} from here on (--micro_batch {half} says so from the "
          "start); the gradient stays that of the whole batch", file=sys.stderr)  # fmt: skip
    t.run.log({"kind": "fault", "step": t.step, "what": f"out of memory: {told}", "micro_batch": half})


def backward(t: Training, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, metrics and gradient of a batch, embedded at once or in parts."""
    device, size = t.fabric.device, t.micro_batch
    smallest, largest = t.plan.batch_size // t.team.size, -(-t.plan.batch_size // t.team.size)
    if 0 < size < largest:
        # As many parts on each process, since all wait for each other in the passes through a model they share.
        parts = batch.chunks(size, 0 if t.team.size == 1 else min(smallest, -(-largest // size)))
        with torch.profiler.record_function("amclr: forward and backward"):
            made = backward_in_chunks(
                lambda part: embed(t.wrapped, part.to(device)), parts, t.objective, batch.ids.to(device),
                groups=batch.groups, model=t.model, backward=t.fabric.backward,
                no_sync=lambda: t.fabric.no_backward_sync(t.wrapped),
            )  # fmt: skip
        t.lap("forward and backward", "optimiser")
        return made
    with torch.profiler.record_function("amclr: forward"):
        batch = batch.to(device)
        views = embed(t.wrapped, batch)
    t.lap("forward", "objective")
    with torch.profiler.record_function("amclr: objective"):
        loss, metrics = t.objective(views, batch.ids, batch.groups)
    t.lap("objective", "backward")
    with torch.profiler.record_function("amclr: backward"):
        t.fabric.backward(loss)
    t.lap("backward", "optimiser")
    return loss, metrics


@contextmanager
def traced(t: Training, wanted: bool) -> Iterator[Callable[[], None]]:
    """Trace some steps, once things run evenly, where that is wanted; call what it yields after each step."""
    if not wanted:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    folder = t.run.folder / "profile"
    folder.mkdir(exist_ok=True)
    warm = min(5, max(0, t.steps - t.step - TRACED))

    def write(found: Any) -> None:
        found.export_chrome_trace(str(folder / f"trace-rank{t.team.rank}.json.gz"))
        by = "self_cuda_time_total" if t.fabric.device.type == "cuda" else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60)
        write_text(folder / f"summary-rank{t.team.rank}.txt", table + "\n")
        if t.team.first_rank:
            print(f"trace of {TRACED} steps: {folder} (open trace-rank0.json.gz in ui.perfetto.dev)", file=sys.stderr)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (t.fabric.device.type == "cuda")
    plan = schedule(wait=max(0, warm - 2), warmup=min(2, warm), active=min(TRACED, max(1, t.steps - t.step)), repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as running:
        yield running.step


def embed(model: Any, batch: Batch) -> dict[str, Tensor]:
    """One pass per modality, its views stacked; a dict view -> (B, D) unit rows."""
    image, text = model(batch.images, batch.tokens)
    parts = ((batch.image_views, image), (batch.text_views, text))
    return {v: e for views, rows in parts if views for v, e in zip(views, rows.chunk(len(views)), strict=True)}


def launch(config: Config) -> Fabric:
    """The processes of a run, with their devices and arithmetic."""
    return start_processes(config, uses_all={"image", "text"} <= set(build_objective(config, 1).required_views))


def assemble(
    config: Config, folder: Path, former: Run | None, progress: bool, changed_data: bool = False,
    started: tuple[Fabric, Team] | None = None,
) -> Training:  # fmt: skip
    """Put a run together from its settings. Makes its folder only once all of it fits together."""
    fabric, team = started or (launch(config), Team(config.watchdog_timeout))
    return together(team.in_turn(lambda: prepare(config, folder, former, progress, changed_data, fabric, team)))


def prepare(
    config: Config, folder: Path, former: Run | None, progress: bool, changed_data: bool, fabric: Fabric, team: Team
) -> Training:
    """What each process does by itself, the first before the others: data, model, caches."""
    policies(config)  # a slip in the settings should show before the data is read
    choose_optimizer(config.optim)
    if not former and team.first_rank:
        Run.refuse_used(folder)
    if config.wandb:
        require("--wandb", "wandb", "wandb")
    cache = manifests.cache_folder(config)
    manifest = manifests.prepare(config, cache, progress)
    samples, held_out = manifest.split("train"), manifest.split("val")
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
    model = begin(config, [t for s in samples for t in s.texts], folder)
    if not held_out:
        raise UserError(f"{manifest.root} has no validation images: give it a val.txt or raise --source.val_fraction")

    pinned = Pinned([s.name for s in samples], [s.name for s in held_out], weights)
    if former and not changed_data:
        former.refuse_others(pinned)
    if former and changed_data and config.source.fold:
        raise UserError(
            "--changed_data: other data have other folds, and what this run has learned may be in what is kept aside: "
            "begin a new run"
        )
    if not former:
        config = _with_store(config, manifest)
    if team.first_rank:
        run = former or Run.create(folder, config)
        if config.model.text_tower == "small" and not (folder / "tokenizer").is_dir():
            model.tokenizer.save_pretrained(folder / "tokenizer.part")  # a kill here must leave none, or a whole one
            (folder / "tokenizer.part").rename(folder / "tokenizer")
        write_rejects(manifest.rejects, folder / "rejects.jsonl")
    else:
        run = Run.open(folder)
    run.config = config
    run.speaks = team.first_rank
    if manifest.rejects and progress:
        print(f"{len(manifest.rejects)} rows or images left out: {folder / 'rejects.jsonl'}", file=sys.stderr)
    for note in manifest.notes if progress else ():
        print(f"note: {note}", file=sys.stderr)
    fabric.to_device(model)
    fabric.to_device(objective)
    places, views = [s.image for s in samples], objective.required_views
    same = duplicates(samples, manifest, config)
    batches: Dataset[Batch]
    if model_reads_images(model):
        store = ImageStore.from_config(places, config, cache, progress)
        on_gpu = config.views.where == "auto" and fabric.device.type == "cuda"
        edited = not (on_gpu or config.views.where == "device")
        batches = ImageBatches(samples, store, plan, views, model.tokenize, config, same, edited)
    else:
        store = ImageStore(places, config.model.image_size)
        batches = FeatureBatches(model, samples, store, plan, views, config, cache, progress, same)
    evaluator = Evaluator(model, held_out, config, cache, progress, repeated=True)
    monitor = Monitor.of_run(model, run, config, progress) if config.monitor else None
    undo = Undo(model, objective)
    return Training(
        fabric, team, config, run, manifest, pinned, plan, model, model, objective, None, batches, evaluator, undo,
        config.micro_batch, monitor,
    )  # fmt: skip


def together(t: Training) -> Training:
    """What the processes do at the same time: wrap the model, and make the optimiser of what it then holds."""
    if t.config.sync_batchnorm and t.team.size > 1:
        if t.fabric.device.type != "cuda":
            raise UserError("--sync_batchnorm is for GPUs: leave it out")
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(t.model)
    t.wrapped = t.fabric.setup_module(t.model)
    t.averaging = Averaging(t.model, t.config)
    t.optimizer = t.fabric.setup_optimizers(build_optimizer(t.config.optim, t.model, t.objective))
    return t


def _with_store(config: Config, manifest: Manifest) -> Config:
    """The settings with the paraphrases that were found, so that a run that is gone on with has no others."""
    if config.source.paraphrases or (manifest.parts and manifest.paraphrases):
        return config
    return replace(config, source=replace(config.source, paraphrases=(*manifest.paraphrases, "none")[0]))


def duplicates(samples: Sequence[Sample], manifest: Manifest, config: Config) -> Duplicates:
    """What stands more than once among the training samples, as far as `source.duplicates` wants it known."""
    what = config.source.duplicates
    if what == "negatives":
        return Duplicates()
    hashes = [manifest.perceptual_hashes.get(s.image) for s in samples]
    return Duplicates.find([s.texts for s in samples], hashes if what == "positives" and any(hashes) else None)


def build_objective(config: Config, samples: int) -> Objective:
    """The objective that the settings name. Raises UserError naming what is wrong with them."""
    try:
        return build(
            config.objective, samples, config.loss, folder=manifests.cache_folder(config) / "tables", averaged=True,
            validate=False,  # embeddings made here are unit rows, and ids are the plan's own
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from None


def default_folder(config: Config) -> Path:
    """runs/DATA-OBJECTIVE-seedN, with a number behind it where that is taken."""
    name = f"{manifests.label(config.data)}-{config.objective}-seed{config.seed}"
    taken = (Path("runs") / f"{name}{suffix}" for suffix in ("", *(f"-{k}" for k in range(2, 10_000))))
    return next(folder for folder in taken if not folder.exists())


def finish(t: Training, progress: bool) -> None:
    """Put the best weights back and leave results.json, queries.npz, curves.png, gallery.png."""
    t.team.at("measuring the best weights", math.inf)
    t.team.meet()  # the first process's checkpoint is there for all
    best = t.run.load_best()
    t.load_model(kept_weights(best))
    t.model.eval()
    images, texts = t.evaluator.embeddings()
    if not t.team.first_rank:
        return
    results = {"split": "val", "best_step": round(best["step"] * t.stretch(best)), **t.evaluator.measure(images, texts)}
    if t.manifest.zeroshot:
        # Where the model is spread over the processes, the others would have to take part.
        alone = t.run.load_model().to(t.fabric.device) if t.config.strategy == "fsdp" else t.model
        hits = t.run.folder / "queries-zeroshot.npz"
        results |= measure_classes(alone, read_classes(t.manifest.zeroshot), t.config, progress, hits)
    write_arrays(t.run.folder / "queries.npz", t.evaluator.hits(images, texts))
    write_text(t.run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    title = f"{t.config.objective} on {manifests.label(t.config.data)}"
    figures.curves(t.run.metrics(), t.run.folder / "curves.png", title, t.evaluator.chance())
    draw_gallery(t.model, t.evaluator, images, texts, t.run.folder / "gallery.png", title)
    append_rejects(t.evaluator.rejects, t.run.folder / "rejects.jsonl")


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave torch's global generator as it was found."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _recall_line(epoch: int, epochs: int, recalls: dict[str, float]) -> str:
    return (
        f"epoch {epoch}/{epochs}: text retrieval {recalls['txt_r_mean']:.1f}, "
        f"image retrieval {recalls['img_r_mean']:.1f}, mean {recalls['r_mean']:.1f}{Monitor.summary(recalls)}"
    )
