"""What goes wrong in the middle of a run: numbers, memory, worker processes, signals. Each is caused, not imagined."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import amclr.training.step
from amclr import cli
from amclr.config.schema import Config, LossConfig, OptimConfig
from amclr.data import manifest as manifests
from amclr.data.batches import ImageBatches
from amclr.data.images import decode as images
from amclr.distributed.signals import Interrupted, Signals
from amclr.models.features import FeatureBatches
from amclr.runs.folder import Run
from amclr.training import loop
from amclr.training.assembly import assemble
from amclr.training.loop import train
from amclr.training.state import Training
from amclr.utils.errors import UserError
from tests.conftest import SMALL, Command
from tests.training.configs import config_for, frozen, untimed

pytestmark = pytest.mark.usefixtures("undrawn")

Embed = Callable[[Any, Any], dict[str, torch.Tensor]]


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int], t: list[Any] | None = None) -> None:
    """Let the embeddings of some samples come out as NaN, in all batches of the given steps."""
    real = loop.advance

    def advance(training: Training, batch: Any) -> Any:
        if training.step in steps:
            # The images themselves are what is wrong, as they would be in life: with every view of them.
            batch.images = batch.images * torch.nan
        return real(training, batch)

    monkeypatch.setattr(loop, "advance", advance)


# -- numbers --------------------------------------------------------------------------------------


def test_nan_stops_and_its_batch_is_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {5})
    config = frozen(folder, epochs=3)
    with pytest.raises(UserError, match=r"the loss is nan at step 5: lower --optim.lr .*; samples and batch are in"):
        train(config, progress=False)
    run = Run.open(Path(config.out))
    report = json.loads((run.folder / "faults" / "step-00000005.json").read_text())
    assert report["step"] == 5 and len(report["samples"]) == 8 and report["loss"] == "nan"
    assert set(report["samples"]) <= set((folder / "train.txt").read_text().split())
    kept = torch.load(run.folder / "faults" / "step-00000005.pt", weights_only=True)
    assert kept["images"].isnan().all() and kept["ids"].shape == (8,)
    state = run.load_last()
    assert state is not None and state["step"] == 4
    assert all(bool(v.isfinite().all()) for v in state["model"].values())


@pytest.mark.parametrize("make", [frozen, pytest.param(config_for, marks=pytest.mark.slow)])
def test_a_skipped_step_leaves_no_trace(
    make: Callable[..., Config], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, batch norms and tables after it are as if that step had been passed over; it is counted and resumed."""
    if make is config_for:
        real = amclr.training.step.embed
        monkeypatch.setattr("amclr.training.step.embed", lambda m, b: {v: x * blot(v) for v, x in real(m, b).items()})
        where = {"step": -1}

        def blot(view: str) -> float:
            return float("nan") if where["step"] in (2, 5) and view == "image" else 1.0

        original = loop.advance
        monkeypatch.setattr(loop, "advance", lambda t, b: where.update(step=t.step) or original(t, b))
    else:
        poisoned(monkeypatch, {2, 5})
    config = make(folder, objective="iamclr", epochs=3, on_nan="skip")
    training = assemble(replace(config, out=str(folder.parent / "looked")), folder.parent / "looked", None, False)
    for step in range(3):
        before = {k: v.clone() for k, v in {**training.model.state_dict(), **training.objective.state_dict()}.items()}
        result = loop.advance(training, training.batches[step])
        assert result.outcome == ("skipped" if step == 2 else "done")
        training.step += 1
    after = {**training.model.state_dict(), **training.objective.state_dict()}
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    run = train(config, progress=False)
    faults = [r for r in run.metrics() if r["kind"] == "fault"]
    assert [r["step"] for r in faults] == [2, 5] and all(r["done"] == "skip" for r in faults)
    assert run.load_last()["skipped"] == [2, 5]  # type: ignore[index]
    with pytest.raises(UserError, match=r"at step 5, after 1 others, which is the limit \(--nan_limit\)"):
        train(replace(config, out=str(folder.parent / "limited"), nan_limit=1), progress=False)


def test_rolled_back_is_as_if_the_step_were_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run as one that was told beforehand to leave the step out; also where it is killed in between."""
    config = frozen(folder, objective="xamclr", epochs=3)
    real = loop.advance
    with monkeypatch.context() as patch:

        def recording(t: Training, batch: Any) -> Any:
            t.skipped.add(6)
            return real(t, batch)

        patch.setattr(loop, "advance", recording)
        known = train(replace(config, out=str(folder.parent / "known")), progress=False)
    poisoned(monkeypatch, {6})
    run = train(replace(config, on_nan="rollback"), progress=False)
    assert_same_run_but_for_faults(known, run)
    assert [(r["step"], r["done"]) for r in run.metrics() if r["kind"] == "fault"] == [(6, "rollback")]
    first = train(replace(config, on_nan="rollback", out=str(folder.parent / "first"), checkpoint_minutes=60),
                  progress=False)  # fmt: skip
    assert_same_run_but_for_faults(known, first)


def test_every_step_left_out_is_listed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps rolled back to the same checkpoint; a step skipped right after a checkpoint, and then a kill."""
    poisoned(monkeypatch, {5, 6})
    config = frozen(folder, epochs=3, checkpoint_minutes=60)
    run = train(replace(config, on_nan="rollback"), progress=False)
    assert [r["step"] for r in run.metrics() if r["kind"] == "fault"] == [5, 6]
    original = loop.advance

    def killed(t: Training, batch: Any) -> Any:
        result = original(t, batch)
        if t.step == 4:
            raise MemoryError
        return result

    poisoned(monkeypatch, {4})
    again = replace(config, on_nan="skip", out=str(folder.parent / "again"))
    with monkeypatch.context() as patch:
        original = loop.advance
        patch.setattr(loop, "advance", killed)
        with pytest.raises(MemoryError):
            train(again, progress=False)
    run = train(resume=Path(again.out), progress=False)
    assert [r["step"] for r in run.metrics() if r["kind"] == "fault"] == [4, 5, 6]


def assert_same_run_but_for_faults(a: Run, b: Run) -> None:
    first, second = a.load_last(), b.load_last()
    assert first is not None and second is not None
    for part in ("model", "objective"):
        assert all(torch.equal(v, second[part][k]) for k, v in first[part].items())
    assert untimed(a) == [r for r in untimed(b) if r["kind"] != "fault"]


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when",
    [pytest.param("forward", marks=pytest.mark.slow), "backward", pytest.param("allocator", marks=pytest.mark.slow)],
)
def test_out_of_memory_halves_the_micro_batches(
    when: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a device that holds three images' activations: the run equals one with --micro_batch 2 from that step on."""
    config = frozen(folder, objective="ixamclr", epochs=3, optim=OptimConfig(name="sgd", lr=0.1))
    config = replace(config, model=replace(config.model, dropout=0.0))
    whole = train(replace(config, out=str(folder.parent / "whole")), progress=False)
    real, count = amclr.training.step.embed, iter(range(1000))

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def embed(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        views = real(model, batch)
        if next(count) < 5 or len(batch.ids) <= 3:
            return views
        if when == "allocator":
            torch.empty(1 << 58)  # what no machine has: the allocator's own words
        if when == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return {v: Full.apply(x) for v, x in views.items()}

    monkeypatch.setattr("amclr.training.step.embed", embed)
    run = train(config, progress=False)
    said = capsys.readouterr().err
    assert "out of memory with 8 images at a time: 4 from here on" in said and "with 4 images at a time: 2" in said
    first, second = whole.load_last(), run.load_last()
    assert first is not None and second is not None and second["micro_batch"] == [0, 2]
    for part in ("model", "objective"):
        for name, tensor in first[part].items():
            torch.testing.assert_close(second[part][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert [r["micro_batch"] for r in run.metrics() if r["kind"] == "fault"] == [4, 2]
    # Gone on with, it does not try again what did not fit.
    further = train(replace(config, epochs=4), resume=run.folder, progress=False)
    assert "out of memory" not in capsys.readouterr().err and further.load_last()["micro_batch"] == [0, 2]  # type: ignore[index]


def test_out_of_memory_for_a_single_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(model: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("amclr.training.step.embed", embed)
    with pytest.raises(UserError, match="out of memory at step 0 with 1 images at a time .* a smaller"):
        train(frozen(folder), progress=False)


# -- processes that prepare batches ---------------------------------------------------------------


def test_a_worker_that_dies_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while it prepares a batch: the run ends with the same bits, and says what happened."""
    list(DataLoader([0], num_workers=1))  # type: ignore[arg-type]  # from a first loader on, torch would raise anywhere
    advance, handlers = loop.advance, set()

    def looks(*arguments: Any) -> Any:
        handlers.add(signal.getsignal(signal.SIGCHLD))
        return advance(*arguments)

    monkeypatch.setattr(loop, "advance", looks)
    whole = train(config_for(folder, "whole", workers=2), progress=False)
    real, trainer, marker = ImageBatches.__getitem__, os.getpid(), folder.parent / "died"

    def dies(self: ImageBatches, step: int) -> Any:
        if step == 5 and os.getpid() != trainer and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, step)

    monkeypatch.setattr(ImageBatches, "__getitem__", dies)
    run = train(config_for(folder, "parts", workers=2), progress=False)
    assert marker.exists() and handlers == {signal.SIG_DFL}
    assert re.search(
        r"a worker process that prepares batches died \(DataLoader worker .*\): restarted", capsys.readouterr().err
    )
    assert_same_run_but_for_faults(whole, run)


def test_a_worker_that_dies_before_its_batch_is_fetched_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it has told of, nobody can fetch any more."""
    whole = train(config_for(folder, "whole", workers=2), progress=False)
    real, calls = _MultiProcessingDataLoaderIter._try_get_data, []

    def late(self: Any, *arguments: Any) -> Any:
        calls.append(self)
        if len(calls) == 5:
            deadline = time.monotonic() + 60
            while self._data_queue.empty() and time.monotonic() < deadline:
                time.sleep(0.01)
            for worker in self._workers:
                worker.kill()
                worker.join()
            # As in the moment before the system says so: its sockets are closed, and to torch it still lives.
            self._workers_status = [False] * len(self._workers)
        return real(self, *arguments)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_get_data", late)
    run = train(config_for(folder, "parts", workers=2), progress=False)
    assert re.search(
        r"a worker process that prepares batches died \(DataLoader worker is gone with its batch: \w+\): restarted",
        capsys.readouterr().err,
    )
    assert_same_run_but_for_faults(whole, run)


@pytest.mark.parametrize(
    "raised", [ConnectionResetError(104, "reset"), FileNotFoundError(2, "no such file"), EOFError()]
)
def test_what_a_worker_raises_is_no_death(folder: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception) -> None:
    def fails(self: ImageBatches, step: int) -> Any:
        raise raised

    monkeypatch.setattr(ImageBatches, "__getitem__", fails)
    for workers in (0, 1):
        with pytest.raises(type(raised)):
            train(config_for(folder, f"run{workers}", workers=workers), progress=False)


@pytest.mark.slow
def test_workers_that_die_again_and_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, trainer = ImageBatches.__getitem__, os.getpid()

    def dies(self: ImageBatches, step: int) -> Any:
        if step == 3 and os.getpid() != trainer:
            os._exit(9)
        return real(self, step)

    monkeypatch.setattr(ImageBatches, "__getitem__", dies)
    with pytest.raises(UserError, match=r"keep dying at step \d .*lower --workers or --ram_cache"):
        train(config_for(folder, workers=2), progress=False)


@pytest.mark.slow
def test_a_worker_that_is_stuck_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config_for(folder, "whole"), progress=False)
    real, trainer, marker = ImageBatches.__getitem__, os.getpid(), folder.parent / "stuck"

    def stuck(self: ImageBatches, step: int) -> Any:
        if step == 2 and os.getpid() != trainer and not marker.exists():
            marker.touch()
            time.sleep(1000)
        return real(self, step)

    monkeypatch.setattr("amclr.training.loader.STUCK", 2)
    monkeypatch.setattr(ImageBatches, "__getitem__", stuck)
    assert_same_run_but_for_faults(whole, train(config_for(folder, "parts", workers=2), progress=False))


# -- going on with a run --------------------------------------------------------------------------


def test_resuming_with_other_settings(folder: Path) -> None:
    """What changes what is learned is refused, by name; more epochs, and how it runs, are taken up."""
    run = train(frozen(folder), progress=False)
    other = replace(run.config, batch_size=4, loss=LossConfig(temperature=0.2), workers=1)
    with pytest.raises(
        UserError,
        match=r"cannot change these settings: --batch_size is 8 in this run, not 4; --loss.temperature is 0.1",
    ):
        train(other, resume=run.folder, progress=False)
    assert Run.open(run.folder).config == run.config
    longer = train(replace(run.config, epochs=3, workers=1, keep=5), resume=run.folder, progress=False)
    assert longer.load_last()["step"] == 12  # type: ignore[index]
    assert (Run.open(run.folder).config.epochs, Run.open(run.folder).config.keep) == (3, 5)
    assert [r["epoch"] for r in longer.metrics() if r["kind"] == "eval"] == [1.0, 2.0, 3.0]
    with pytest.raises(UserError, match="has done 3 epochs: --epochs 2 would be fewer"):
        train(replace(run.config, epochs=2), resume=run.folder, progress=False)


def test_settings_of_the_source_that_may_change_do(folder: Path) -> None:
    run = train(frozen(folder), progress=False)
    source = replace(run.config.source, max_bad=0.5)
    assert train(replace(run.config, source=source), resume=run.folder, progress=False).config.source == source
    assert Run.open(run.folder).config.source == source


def test_settings_that_were_edited_by_hand(folder: Path) -> None:
    run = train(frozen(folder), progress=False)
    file = run.folder / "config.yaml"
    before = file.read_text()
    file.write_text(before.replace("seed: 0", "seed: 7", 1))
    with pytest.raises(
        UserError, match=r"config.yaml' is not what the newest checkpoint was made with: --seed is 0 there, 7"
    ):
        train(resume=run.folder, progress=False)
    file.write_text(before.replace("epochs: 2", "epochs: 3"))
    assert train(resume=run.folder, progress=False).load_last()["step"] == 12  # type: ignore[index]


def test_a_damaged_best_is_measured_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that is done, and of one that is not: the weights that are kept are the newest that are sound."""
    run = train(frozen(folder), progress=False)
    rows = untimed(run)
    assert json.loads((run.folder / "results.json").read_text())["best_step"] == 4
    for name in ("best.pt", "step-00000004.pt"):
        file = run.checkpoints.folder / name
        file.unlink()
        file.write_bytes(b"damaged")
    train(resume=run.folder, progress=False)
    assert untimed(run) == rows
    assert run.load_best()["step"] == 8 == json.loads((run.folder / "results.json").read_text())["best_step"]


@pytest.mark.slow
def test_resume_with_options(main: Command, folder: Path, tmp_path: Path) -> None:
    done = main("train", "--data", folder, *SMALL, "--out", "run")
    assert done.returncode == 0, done.stderr[-2000:]
    refused = main("train", "--resume", "run", "--epochs", "3", "--objective", "clip")
    objective = Run.open(tmp_path / "run").config.objective
    assert refused.returncode == 1 and f"--objective is {objective} in this run, not clip" in refused.stderr
    longer = main("train", "--resume", "run", "--epochs=3", "--profile")
    assert longer.returncode == 0, longer.stderr[-2000:]
    assert "epoch 3/3" in longer.stderr and Run.open(tmp_path / "run").config.epochs == 3
    import gzip

    with gzip.open(tmp_path / "run/profile/trace-rank0.json.gz") as handle:
        names = {e.get("name") for e in json.load(handle)["traceEvents"]}
    assert {"amclr: forward", "amclr: objective", "amclr: backward"} <= names
    assert "Self CPU" in (tmp_path / "run/profile/summary-rank0.txt").read_text()


@pytest.mark.parametrize("started", [False, True])
def test_a_signal_before_the_first_step(
    started: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scheduler's exit code, and how to resume if there is something to resume."""
    run = folder.parent / "run"
    place, name = (FeatureBatches, "__init__") if started else (manifests, "prepare")
    monkeypatch.setattr(place, name, lambda *_: signal.raise_signal(signal.SIGTERM))
    options = ["--model.image_lr", "0", "--model.text_lr", "0", "--out", str(run)]
    assert cli.main(["train", "--data", str(folder), *SMALL, *options]) == 143
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message == (f"amclr: stopped; resume with: amclr train --resume {run}" if started else "amclr: interrupted")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_while_an_image_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for an error of the image."""
    monkeypatch.setattr(images, "_open", lambda _: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(Interrupted), Signals(verbose=False) as signals, signals.interrupting():
        images.read_image(Path("image.png"), 32)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signals_leave_a_checkpoint(signum: int, folder: Path, tmp_path: Path) -> None:
    """As a scheduler sends it, to a process of its own: within seconds, with the conventional code."""
    command = [sys.executable, "-m", "amclr", "train", "--data", str(folder), *SMALL, "--epochs", "400", "--out", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_a_step(tmp_path / "run", process)
    process.send_signal(signum)
    began = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode == 128 + signum and "stopped; resume with: amclr train --resume run" in said
    run = Run.open(tmp_path / "run")
    state = run.load_last()
    assert state is not None and state["step"] >= max(r["step"] for r in run.metrics())


def wait_for_a_step(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
