"""`amclr compare`: the runs of an experiment, one after the other or side by side.

    OUT/runs/VARIANT/seedN    run folders           OUT/table.md, table.csv    means and spread over the seeds
    OUT/results.json          all results, by run   OUT/report.html            tables and figures in one file
    OUT/side-by-side.json     how many runs there were at a time while each was trained

Runs with the same seed have the same order of samples, the same views and the same initial weights, whatever their
objective: all of these are functions of the seed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from amclr.compare import measures
from amclr.compare.experiment import Experiment, read_experiment
from amclr.compare.outcome import Extras, Outcome, collect
from amclr.compare.plan import Cell, passes_per_step, plan
from amclr.compare.results import Comparison, run_name, write_results
from amclr.compare.statistics import too_far_behind
from amclr.config.checks import fixed_differences
from amclr.config.schema import Config
from amclr.data.sources.rows import printable
from amclr.distributed.jobs import Call, Lost, side_by_side
from amclr.distributed.signals import ending
from amclr.runs.folder import Run
from amclr.training.loop import Stopped, train
from amclr.utils.errors import UserError
from amclr.utils.files import read_arrays, write_text

CONCURRENCY = "side-by-side.json"


def compare(
    file: Path, *, data: str = "", seeds: str = "", out: str = "", zeroshot: Sequence[str] = (), jobs: int = 1,
    progress: bool = True,
) -> Comparison:  # fmt: skip
    """Train the runs of an experiment file, and write their results; the Python form of `amclr compare`.

    Finished runs are taken as they are, unfinished ones are resumed, and a run that fails does not stop the others.

    Args:
        file: the experiment file.
        data: a data set instead of the file's.
        seeds: seeds instead of the file's: how many, or which, with commas.
        out: the folder to write; default: runs/compare-NAME.
        zeroshot: folders of images by class instead of the file's.
        jobs: how many runs to train at a time, each in its own process.
        progress: show progress.

    Raises:
        UserError: for a mistake in the file, before anything is trained.
        Stopped: after a signal.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be 1 or more, got {jobs}")
    experiment = read_experiment(file, data=data, seeds=seeds, zeroshot=zeroshot)
    name = re.sub(r"[^\w.=,+-]", "_", experiment.name)
    folder = Path(out or f"runs/compare-{name}")
    cells, extras = plan(experiment, folder), Extras.of(experiment)
    # Raises before anything is trained if a folder holds a run with other settings.
    done = sum(is_done(config) for cell in cells for config in cell.configs.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder '{folder}': {error.strerror}: give another --out") from None
    options = {"data": data, "seeds": seeds, "out": out, "jobs": str(jobs) if jobs > 1 else ""}
    parts = ["amclr", "compare", str(file), *(p for k, v in options.items() if v for p in (f"--{k}", v))]
    command = shlex.join([*parts, *(["--zeroshot", *zeroshot] if zeroshot else [])])
    try:
        with FileLock(folder / ".lock", timeout=0), ending():
            if progress and done:
                print(f"{done} of {len(cells) * len(experiment.seeds)} runs are already finished", file=sys.stderr)
            runner = Runner(folder, experiment, extras, jobs, progress)
            outcomes, cut = _run_all(experiment, cells, runner)
            return write_results(experiment, extras, cells, outcomes, cut, read_concurrency(folder), folder, command)
    except Timeout:
        raise UserError(f"another amclr compare is running in '{folder}': wait for it, or give another --out") from None
    except (Stopped, KeyboardInterrupt) as error:
        stopped = error if isinstance(error, Stopped) else Stopped(getattr(error, "signum", signal.SIGINT), folder)
        stopped.args = (f"interrupted; finished work is kept. To resume: {command}",)
        raise stopped from None


def _run_all(
    experiment: Experiment, cells: Sequence[Cell], runner: Runner
) -> tuple[list[Outcome], dict[str, dict[str, float]]]:
    """Train all runs, seed by seed; also return which variants were cut, by label.

    If variants may be cut, a seed starts only after all runs of the previous one have ended, so that `jobs` does not
    change which ones are cut.
    """
    seeds, outcomes = experiment.seeds, list[Outcome]()
    first = int(experiment.cut.get("after", len(seeds)))
    cut: dict[str, dict[str, float]] = {}
    for batch in (seeds[:first], *((seed,) for seed in seeds[first:])):
        seeds_done = seeds.index(batch[-1]) + 1
        remaining = [cell for cell in cells if cell.label not in cut]
        runner.total = len(outcomes) + len(remaining) * (len(batch) + len(seeds) - seeds_done)
        outcomes += runner.run([(cell, seed) for seed in batch for cell in remaining])
        if seeds_done < len(seeds):
            cut |= too_far_behind(outcomes, seeds_done, experiment.cut["behind"], experiment.baseline)
    return outcomes, cut


@dataclass
class Runner:
    """Trains runs, one after the other or side by side, and reports each."""

    folder: Path
    experiment: Experiment
    extras: Extras
    jobs: int
    progress: bool
    total: int = 0
    """How many runs there will be."""
    reported: int = 0
    """How many have ended."""

    def run(self, todo: Sequence[tuple[Cell, int]]) -> list[Outcome]:
        """Train the runs that are not finished; return the outcomes in the order of `todo`."""
        in_processes = [run for run in todo if not self._is_measured(run[0].configs[run[1]])] if self.jobs > 1 else []
        at_once = min(self.jobs, len(in_processes))
        self._record_concurrency([cell.configs[seed] for cell, seed in todo], at_once if in_processes else 1)
        outcomes = {
            (cell.label, seed): self._report(run_one(cell, seed, self.extras, self.progress))
            for cell, seed in todo if (cell, seed) not in in_processes
        }  # fmt: skip
        if in_processes:
            outcomes |= self._side_by_side(in_processes, at_once)
        return [outcomes[cell.label, seed] for cell, seed in todo]

    def _side_by_side(self, todo: Sequence[tuple[Cell, int]], at_once: int) -> dict[tuple[str, int], Outcome]:
        """Train runs in processes, `at_once` at a time, with one progress bar."""
        configs = [cell.configs[seed] for cell, seed in todo]
        logs = [Path(c.out).with_name(f"{Path(c.out).name}-output.txt") for c in configs]
        calls = [Call(_run_in_process, (*run, self.experiment), log) for run, log in zip(todo, logs, strict=True)]
        sizes = np.array([c.epochs * sum(passes_per_step(c)) for c in configs], dtype=float)
        shares = np.array([_share_done(c) for c in configs])
        outcomes: dict[tuple[str, int], Outcome] = {}

        def description() -> str:
            return f"{self.reported} of {self.total} runs finished, {at_once} at a time"

        bar = tqdm(
            total=float(sizes.sum()), initial=float(sizes @ shares), smoothing=0, miniters=0, disable=not self.progress,
            mininterval=1 if sys.stderr.isatty() else 60, leave=False,
            desc=description(), bar_format="{desc}: {percentage:.0f}%|{bar}| {elapsed} elapsed, {remaining} left",
        )  # fmt: skip

        def tick() -> None:
            for k, (cell, seed) in enumerate(todo):
                shares[k] = 1.0 if (cell.label, seed) in outcomes else _share_done(configs[k])
            bar.set_description_str(description(), refresh=False)
            bar.update(float(sizes @ shares) - bar.n)

        with bar, closing(side_by_side(calls, at_once, tick)) as ended:
            for k, result in ended:
                cell, seed = todo[k]
                outcome = result if isinstance(result, Outcome) else Outcome(cell, seed, Path(configs[k].out))
                outcome.cell = cell  # what came back from the process is a copy
                if isinstance(result, Lost):
                    see = f" (see {logs[k]})" if logs[k].is_file() else ""
                    outcome.failure = printable(f"{result}{see}")
                elif result is None:
                    outcome.failure = "its process was interrupted by a signal"
                outcomes[cell.label, seed] = self._report(outcome, bar)
        return outcomes

    def _report(self, outcome: Outcome, bar: Any = None) -> Outcome:
        """Print a line about a run that has ended."""
        self.reported += 1
        if self.progress:
            values = ", ".join(f"{measures.label(k)} {v:.1f}" for k, v in outcome.measures.items())
            text = f"failed: {outcome.failure}" if outcome.failure else values
            name = f"{printable(outcome.cell.label)}, seed {outcome.seed}"
            (tqdm if bar is None else bar).write(
                f"run {self.reported} of {self.total}: {name}: {text}", file=sys.stderr
            )
        return outcome

    def _is_measured(self, config: Config) -> bool:
        """Whether a run is finished and measured on the extras, so that reading it takes a moment."""
        files = [f"zeroshot-{label}.npz" for label in self.extras.classes]
        files += ["queries-paraphrased.npz"] if self.extras.rewording else []
        return is_done(config) and all((Path(config.out) / file).is_file() for file in files)

    def _record_concurrency(self, configs: Sequence[Config], at_once: int) -> None:
        """Record how many runs there are at a time: the seconds of a run cannot be judged without that."""
        before = read_concurrency(self.folder)
        after = dict(before)
        for config in configs:
            if not is_done(config):
                name, begun = run_name(config.out), (Path(config.out) / "config.yaml").is_file()
                after[name] = max(at_once, before.get(name, 1) if begun else 1)
        if after != before:
            write_text(self.folder / CONCURRENCY, json.dumps(after, indent=1) + "\n")


def read_concurrency(folder: Path) -> dict[str, int]:
    """How many runs there were at a time while a run was trained, by VARIANT/seedN."""
    file = folder / CONCURRENCY
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _run_in_process(cell: Cell, seed: int, experiment: Experiment) -> Outcome | None:
    """`run_one` in a process of its own; None after a signal."""
    try:
        return run_one(cell, seed, Extras.of(experiment), progress=False)
    except (Stopped, KeyboardInterrupt):
        return None


def _share_done(config: Config) -> float:
    """How much of a run's training is done, from 0 to 1, by the last rows of its metrics."""
    try:
        with (Path(config.out) / "metrics.jsonl").open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 4096))
            epochs = re.findall(rb'"epoch": ([\d.]+)', handle.read())
    except OSError:
        return 0.0
    return float(epochs[-1]) / config.epochs if epochs else 0.0


def is_done(config: Config) -> bool:
    """Whether a run is finished. Raises UserError if its folder holds a run with other settings."""
    folder = Path(config.out)
    if not (folder / "config.yaml").is_file():
        return False
    existing = Run.open(folder).config
    # A run records the paraphrases that it found.
    paraphrases = config.source.paraphrases or existing.source.paraphrases
    config = replace(config, source=replace(config.source, paraphrases=paraphrases))
    # A single run may be resumed with more epochs; in a comparison, all must be planned for the same number.
    differences = fixed_differences(existing, config) | {
        name: (getattr(existing, name), getattr(config, name))
        for name in ("epochs", "eval_every") if getattr(existing, name) != getattr(config, name)
    }  # fmt: skip
    if differences:
        listed = "; ".join(f"{name} is {there} there, {here} here" for name, (there, here) in differences.items())
        raise UserError(f"'{folder}' holds a run with other settings: {listed}. Give another --out, or remove that run")
    return (folder / "results.json").is_file() and read_arrays(folder / "queries.npz") is not None


def run_one(cell: Cell, seed: int, extras: Extras, progress: bool) -> Outcome:
    """Train a run, resume it, or take it as it is; measure it on the extras too. Errors become its failure."""
    config = cell.configs[seed]
    outcome = Outcome(cell, seed, Path(config.out))
    try:
        outcome.folder.parent.mkdir(parents=True, exist_ok=True)
        # If an earlier comparison was killed, its processes may still be at their last step.
        with FileLock(outcome.folder.with_name(f".{outcome.folder.name}.lock")):
            if not is_done(config):
                begun = (outcome.folder / "config.yaml").is_file()
                if not begun:
                    _remove_leftovers(outcome.folder)
                train(None if begun else config, resume=outcome.folder if begun else None, progress=progress)
            outcome = collect(cell, seed, extras, progress)
    except Stopped:
        raise
    except Exception as error:  # one run that fails should not cost the others
        outcome.failure = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, UserError):
            # Beside the run folder: a folder that holds no run yet has to stay empty.
            trace = outcome.folder.with_name(f"{outcome.folder.name}-error.txt")
            trace.parent.mkdir(parents=True, exist_ok=True)
            write_text(trace, traceback.format_exc())
            outcome.failure = f"{type(error).__name__}: {outcome.failure} (see {trace})"
    outcome.failure = printable(outcome.failure)
    return outcome


def _remove_leftovers(folder: Path) -> None:
    """Remove what remains of a run that was killed when it had only made its folder."""
    if folder.is_dir() and not any(f.is_file() and f.name != "environment.json" and f.suffix != ".part"
                                   for f in folder.rglob("*")):  # fmt: skip
        shutil.rmtree(folder)
