"""`train`: a run from its settings to its results, and the loop over its steps."""

from __future__ import annotations

import errno
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from amclr.config.checks import fixed_differences, problems
from amclr.config.schema import Config
from amclr.data.batches import Batch
from amclr.distributed.launch import arithmetic
from amclr.distributed.signals import Signals, ending
from amclr.distributed.team import Team
from amclr.distributed.world import process
from amclr.runs.folder import Run
from amclr.runs.loggers import Loggers
from amclr.training.assembly import assemble, default_folder, launch
from amclr.training.loader import stream
from amclr.training.state import Training
from amclr.training.step import LOG_EVERY, StepResult, advance, handle_nonfinite
from amclr.training.timing import WAIT_MATTERS, Clock
from amclr.training.tracing import traced
from amclr.training.validation import evaluate, finish
from amclr.utils.errors import UserError

EVALUATION_TIMEOUT = 3600.0
"""Seconds after which one of several processes is considered stuck in an evaluation."""


class Stopped(Exception):
    """A run was stopped by a signal; it can be resumed from its folder. Of several processes one says so."""

    def __init__(self, signum: int, folder: Path, verbose: bool = True) -> None:
        super().__init__(f"stopped; resume with: amclr train --resume {folder}" if verbose else "")
        self.code = 128 + signum


def train(
    config: Config | None = None, *, resume: Path | None = None, changed_data: bool = False, profile: bool = False,
    progress: bool = True,
) -> Run:  # fmt: skip
    """Train a dual encoder and leave a run folder; the Python form of `amclr train`.

    resume: a run folder to resume, with its own settings; with a config, those in `config.MAY_CHANGE` may differ from
    them. changed_data: resume even where samples were added or removed; the others keep their estimates. profile: leave
    a trace of some steps under profile/ in the run folder. Started by torchrun or SLURM, the processes share every
    batch. Raises UserError for what the user can put right, and Stopped after a signal (Ctrl-C, SIGTERM, SIGUSR1), with
    a checkpoint written.
    """
    resumed = Run.open(resume) if resume else None
    settings = resumed_settings(resumed, config) if resumed else config or Config()
    if wrong := problems(settings):
        raise UserError("; ".join(wrong))
    fabric = launch(settings)
    folder = resumed.folder if resumed else Path(settings.out) if settings.out else None
    try:
        with (
            ending(), preserved_random_state(), arithmetic(settings, fabric.device),
            Team(settings.watchdog_timeout) as team, team.reporting_errors(Stopped),
        ):  # fmt: skip
            if folder is None:
                folder = Path(team.broadcast(str(default_folder(settings))))
            team.watchdog.advice = f"; resume with: amclr train --resume {folder}, started as before"
            verbose = progress and team.first_rank
            training = assemble(settings, folder, resumed, verbose, changed_data, (fabric, team))
            if resumed:
                training.restore(changed_data)
            # After the restore: where it fails, these must not have changed.
            if team.first_rank:
                training.run.record_samples(training.pinned)
                training.run.write_config()
            fit(training, verbose, profile)
            finish(training, verbose)
    except KeyboardInterrupt as error:
        if folder and (folder / "config.yaml").is_file():  # it can be resumed from features and checkpoints so far
            raise Stopped(getattr(error, "signum", signal.SIGINT), folder, process() == 0) from None
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full and folder and (folder / "config.yaml").is_file()):
            raise
        what = f"'{error.filename or folder}': {error.strerror}"
        raise UserError(f"{what}. Free some space, then resume with: amclr train --resume {folder}") from None
    if team.size > 1 and dist.is_initialized():  # not after an error, when it might wait for processes that are gone
        dist.destroy_process_group()
    return training.run


def resumed_settings(resumed: Run, config: Config | None) -> Config:
    """The settings to resume with: the run's, or those given. Raises UserError, naming those that may not differ."""
    if config is None:
        return resumed.config
    paraphrases = config.source.paraphrases or resumed.config.source.paraphrases
    config = replace(config, source=replace(config.source, paraphrases=paraphrases))
    if fixed := fixed_differences(resumed.config, config):
        changes = "; ".join(f"--{name} is {old} in this run, not {new}" for name, (old, new) in fixed.items())
        raise UserError(
            f"'{resumed.folder}' cannot change these settings: {changes}. Leave them out, or start another run by --out"
        )
    return replace(config, out=resumed.config.out)


def fit(t: Training, progress: bool, profile: bool = False) -> None:
    """The loop: from the current step to the last."""
    with ExitStack() as stack:
        # However the loop ends, the checkpoint being written is finished; its failure does not hide another error.
        stack.push(lambda kind, *_: t.run.checkpoints.wait(raises=kind is None))
        t.team.watchdog.before_end = t.run.checkpoints.wait
        logs = stack.enter_context(Loggers(t.run, t.config, t.step, enabled=t.team.first_rank))
        bar = stack.enter_context(
            tqdm(total=t.steps, initial=t.step, desc=t.config.objective, unit="step", disable=not progress)
        )
        signals = stack.enter_context(Signals(t.team.first_rank))
        trace = stack.enter_context(traced(t, profile))
        if t.config.on_nan == "rollback" and t.step == 0:
            t.save(passing=True)
        t.clock = Clock()
        last_save = time.monotonic()
        if not t.measured:
            t.save(is_best=evaluate(t, logs, signals, bar), wait=True)
            if not t.measured:
                raise Stopped(signals.caught, t.run.folder)  # of one process: several are not interrupted
        for batch in stream(t):
            t.lap("loader", "forward")
            result = advance(t, batch)
            if result.outcome == "rolled back":
                bar.n = t.step
                bar.refresh()
                continue
            t.step += 1
            t.clock.steps += 1
            t.team.watchdog.step()
            trace()
            bar.update()
            log_replaced(t, batch)
            due = time.monotonic() - last_save > (60 * t.config.checkpoint_minutes or t.run.checkpoints.interval())
            stop, saves = t.team.agree(signals.caught, int(due and t.team.first_rank))
            t.measured = not t.measures
            logged = (t.step - 1) % LOG_EVERY == 0 or t.step == t.steps
            if result.outcome == "done" and (logged or t.measures or stop or saves):
                if not math.isfinite(result.metrics["loss"].item()):
                    handle_nonfinite(t, batch, result.metrics["loss"], None)
                if logged:
                    log_step(t, logs, result, bar)
            if t.measures or stop or saves:
                is_best = False
                if t.measures and not stop:
                    t.team.watchdog.at("evaluation", EVALUATION_TIMEOUT)
                    is_best = evaluate(t, logs, signals, bar)
                    stop = signals.caught if t.team.size == 1 else stop
                ends = bool(stop) or t.step == t.steps
                t.save(is_best=is_best, wait=ends, passing=not (t.measures or ends))
            if t.measures or due:
                last_save = time.monotonic()
            if stop and not (t.step == t.steps and t.measured):
                t.team.barrier()  # launchers end all processes once one has ended, and one may still be writing
                raise Stopped(stop, t.run.folder, t.team.first_rank)
            t.lap("evaluation, logs and checkpoints", "loader")
    if progress and t.clock.steps:
        store = getattr(t.batches, "store", None)
        advice = t.clock.advice(t.config.workers, cached=store is None or store.kept_in != "none")
        print("\n".join([t.clock.report(), *advice]), file=sys.stderr)


def log_replaced(t: Training, batch: Batch) -> None:
    """Log which samples of a batch had to be replaced. Raises UserError beyond the limit on bad images."""
    for name, reason in batch.replaced.items():
        t.run.log({"kind": "replaced", "step": t.step, "sample": name, "reason": reason})
        t.reject(name, reason)


def log_step(t: Training, logs: Loggers, result: StepResult, bar: Any) -> None:
    """Log a step's metrics, and the time of the steps since the last one logged."""
    values = {k: float(v) for k, v in result.metrics.items()}
    times = t.clock.since_last()
    values = {"gamma": t.objective.gamma} | values | {"lr": result.rate, **times}
    logs.write("train", t.step, t.step / t.plan.steps_per_epoch, values)
    postfix = {"loss": f"{values['loss']:.3f}"}
    if times["wait_share"] > WAIT_MATTERS:
        postfix["waits"] = f"{times['wait_share']:.0%}"
    bar.set_postfix(postfix, refresh=False)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore torch's global generator at the end of a block."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
