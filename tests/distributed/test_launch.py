"""Runs on several processes: the same as on one, and none waits for ever for another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import amclr.training.step
from amclr import cli
from amclr.config.schema import Config, OptimConfig
from amclr.distributed.team import Team
from amclr.distributed.watchdog import BEAT
from amclr.objectives import METHODS
from amclr.runs.folder import Run
from amclr.training import loop
from amclr.training.loop import Stopped, train
from amclr.training.state import Training
from amclr.utils.errors import UserError
from tests.conftest import SMALL
from tests.processes import Processes
from tests.training.configs import assert_same_run, config_for, frozen

pytestmark = pytest.mark.usefixtures("undrawn")


def on_two(folder: Path, out: str, **changes: Any) -> Config:
    """Frozen towers without dropout and plain gradient steps: what differs then is rounding alone."""
    base = frozen(folder, out, optim=OptimConfig(name="sgd", lr=0.1, clip=0.0), watchdog_timeout=20.0, **changes)
    return replace(base, model=replace(base.model, dropout=0.0))


def trained(rank: int, config: Config, resume: Path | None = None) -> None:
    try:
        train(None if resume else config, resume=resume, progress=True)
    except Stopped as stopped:
        raise SystemExit(stopped.code) from None


def assert_alike(a: Run, b: Run, exact: bool = False) -> None:
    """Weights, tables and logged losses are the same but for rounding."""
    first, second = a.load_last(), b.load_last()
    assert first is not None and second is not None and first["step"] == second["step"]
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    for part in ("model", "objective"):
        for name, tensor in first[part].items():
            torch.testing.assert_close(tensor, second[part][name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)
    rows = [[r for r in run.metrics() if r["kind"] != "fault"] for run in (a, b)]
    assert [(r["kind"], r["step"]) for r in rows[0]] == [(r["kind"], r["step"]) for r in rows[1]]
    for x, y in zip(*rows, strict=True):
        for key in {"loss", "margin", "r_mean"} & x.keys():
            assert x[key] == pytest.approx(y[key], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("objective", ["xamclr", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS)])
def test_two_processes_train_what_one_does(objective: str, folder: Path, tmp_path: Path) -> None:
    """Fifty steps, each process with its half of every batch: weights, tables, losses and recalls are the same."""
    changes: dict[str, Any] = {"objective": objective, "epochs": 13, "eval_every": 4}
    one = train(on_two(folder, "one", **changes), progress=False)
    Processes(2, trained, on_two(folder, "two", **changes), logs=tmp_path / "logs").succeed()
    assert one.load_last()["step"] == 52  # type: ignore[index]
    assert_alike(one, Run.open(tmp_path / "two"))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "micro_batch"), [(3, 0), (1, 3), (2, 3), (3, 2)])
def test_unequal_shares_and_parts_of_them_train_the_same(
    size: int, micro_batch: int, folder: Path, tmp_path: Path
) -> None:
    """Of a batch of 8, three processes have 2, 3 and 3; with parts of at most 3 or 2 on top."""
    changes: dict[str, Any] = {"objective": "ixamclr", "epochs": 4}
    one = train(on_two(folder, "one", **changes), progress=False)
    Processes(
        size, trained, on_two(folder, "more", micro_batch=micro_batch, **changes), logs=tmp_path / "logs"
    ).succeed()
    assert_alike(one, Run.open(tmp_path / "more"))


def towers(folder: Path, out: str, **changes: Any) -> Config:
    """Both towers trained, with batch norms and dropout, in parts."""
    return config_for(folder, out, watchdog_timeout=20.0, micro_batch=2, objective="iamclr", **changes)


@pytest.mark.slow
def test_a_sharded_model_trains_the_same(folder: Path, tmp_path: Path) -> None:
    """FSDP against DDP; its checkpoint is whole: one process goes on with it, and evaluates it."""
    runs = {}
    for strategy in ("ddp", "fsdp"):
        config = towers(folder, strategy, strategy=strategy)
        Processes(2, trained, config, logs=tmp_path / f"logs-{strategy}").succeed()
        runs[strategy] = Run.open(tmp_path / strategy)
    assert_alike(runs["ddp"], runs["fsdp"])
    further = replace(runs["fsdp"].config, epochs=3, strategy="auto")
    train(further, resume=runs["fsdp"].folder, progress=False)
    Processes(
        2, trained_further, replace(runs["ddp"].config, epochs=3, strategy="fsdp"), runs["ddp"].folder,
        logs=tmp_path / "logs-further",
    ).succeed()  # fmt: skip
    for run in runs.values():
        assert run.load_last()["step"] == 12  # type: ignore[index]


def trained_further(rank: int, config: Config, run: Path) -> None:
    train(config, resume=run, progress=True)


@pytest.mark.slow
@pytest.mark.parametrize("others", [1, 2, 4])
def test_a_checkpoint_of_two_processes_is_resumed_by_any_number(others: int, folder: Path, tmp_path: Path) -> None:
    """Stopped by a signal to one of them, both stop at the same step; tables and weights go on as on one process."""
    one = train(on_two(folder, "one", objective="xamclr", epochs=6), progress=False)
    config = on_two(folder, "two", objective="xamclr", epochs=6)
    Processes(2, stopped_by_a_signal, config, logs=tmp_path / "logs").succeed()
    run = Run.open(tmp_path / "two")
    state = run.load_last()
    assert state is not None and state["step"] == 12, "one step after the signal, which is when both know of it"
    if others == 1:
        train(resume=run.folder, progress=False)
    else:
        Processes(others, trained, config, run.folder, logs=tmp_path / "logs-again").succeed()
    assert_alike(one, run, exact=False)


def stopped_by_a_signal(rank: int, config: Config) -> None:
    original, step = amclr.training.step.embed, iter(range(10_000))

    def embed(model: Any, batch: Any) -> Any:
        if next(step) == 10 and rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(model, batch)

    amclr.training.step.embed = embed
    with pytest.raises(Stopped, match="resume with: amclr train --resume" if rank == 0 else "^$") as stopped:
        train(config, progress=True)
    assert stopped.value.code == 143


@pytest.mark.slow
def test_two_processes_resume_bit_by_bit(folder: Path, tmp_path: Path) -> None:
    """With towers, batch norms and dropout, the same number of processes ends with the same bits."""
    Processes(2, trained, towers(folder, "whole", epochs=6), logs=tmp_path / "logs").succeed()
    config = towers(folder, "parts", epochs=6)
    Processes(2, stopped_by_a_signal, config, logs=tmp_path / "logs-parts").succeed()
    Processes(2, trained, config, tmp_path / "parts", logs=tmp_path / "logs-again").succeed()
    assert_alike(Run.open(tmp_path / "whole"), Run.open(tmp_path / "parts"), exact=True)


# -- faults ---------------------------------------------------------------------------------------


def steps_slowly(rank: int, config: Config, where: str) -> None:
    """Train, marking each step in a file; process 1 does something to itself at step 6."""
    original, step = amclr.training.step.embed, iter(range(10_000))

    def embed(model: Any, batch: Any) -> Any:
        k = next(step)
        if k == 6 and rank == 1:
            if where == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if where == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            if where in ("stuck", "noticed by one"):
                time.sleep(1000)
            if where == "raises":
                raise ArithmeticError("the sum does not add up")
        return original(model, batch)

    amclr.training.step.embed = embed
    if where == "noticed by one" and rank == 0:
        config = replace(config, watchdog_timeout=100.0)
    file = Path(config.out).with_suffix(f".{rank}.yaml")
    file.write_text(yaml.safe_dump(asdict(config)))
    raise SystemExit(cli.main(["train", "--config", str(file)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("killed", "the connection to another process is lost|process 1 of 2 has sent no heartbeat"),
        ("frozen", "process 1 of 2 has sent no heartbeat for"),
        ("stuck", "process 1( of 2 has been)? in 'forward' for"),
        ("noticed by one", r"process 1 of 2 has stopped.* process 1 of 2 has been in 'forward' for"),
        ("raises", "ArithmeticError|the sum does not add up"),
    ],
)
def test_one_process_of_two_is_lost(where: str, message: str, folder: Path, tmp_path: Path) -> None:
    """The other says so, and ends, soon; and the run goes on from its last checkpoint, on one process too."""
    one = train(on_two(folder, "one", epochs=4), progress=False)
    config = replace(on_two(folder, "two", epochs=4), watchdog_timeout=8.0)
    began = time.monotonic()
    both = Processes(2, steps_slowly, config, where, logs=tmp_path / "logs")
    both.every[0].join(60)
    assert both.every[0].exitcode == 1, both.said(0)[-2000:]
    assert time.monotonic() - began < 60
    both.wait(20)
    said = both.said(0) + (both.said(1) if where == "raises" else "")
    assert re.search(message, said), said
    assert "amclr train --resume" in said or where == "raises"
    assert "Traceback" not in both.said(0)
    assert_alike(one, train(resume=tmp_path / "two", progress=False))


@pytest.mark.slow
def test_a_mistake_is_reported_by_one_process(folder: Path, tmp_path: Path) -> None:
    both = Processes(2, steps_slowly, on_two(folder, "run", batch_size=64), "", logs=tmp_path / "logs")
    assert both.wait(60) == [1, 1]
    said = [both.said(k) for k in range(2)]
    assert sum("32 training images are fewer than one batch of 64" in s for s in said) == 1, said
    assert not (tmp_path / "run").exists()
    few = Processes(3, steps_slowly, on_two(folder, "run", batch_size=2), "", logs=tmp_path / "logs-few")
    assert few.wait(60) == [1, 1, 1]
    assert "a batch of 2 is too small for 3 processes: raise --batch_size" in few.said(0) + few.said(1) + few.said(2)


@pytest.mark.slow
def test_images_that_one_process_cannot_read(folder: Path, tmp_path: Path) -> None:
    """Validation images that go bad are left out by all, and training ones listed, whoever met them."""
    for name in ("001.png", "020.png"):
        (folder / "Images" / name).write_bytes(b"bad")
    changes: dict[str, Any] = {"source": replace(Config().source, max_bad=0.2, scan_up_to=1), "decoded": "none"}
    changes["batch_size"] = 4
    Processes(2, trained, config_for(folder, "run", **changes), logs=tmp_path / "logs").succeed()
    run = Run.open(tmp_path / "run")
    assert {r["sample"] for r in run.metrics() if r["kind"] == "replaced"} == {"020.png"}
    rejects = (run.folder / "rejects.jsonl").read_text()
    assert "001.png" in rejects and "020.png" in rejects


def bytes_gathered(rank: int, objective: str, out: Path) -> None:
    import torch.distributed as dist

    from amclr.distributed.world import World
    from amclr.objectives import build

    dist.init_process_group("gloo")
    sent, gather = [], World.gather

    def counted(self: World, part: torch.Tensor, dim: int = 0) -> torch.Tensor:
        sent.append(part.numel() * part.element_size())
        return gather(self, part, dim)

    World.gather = counted  # type: ignore[method-assign]
    built = build(objective, 64, backend="eager")
    views = {v: torch.nn.functional.normalize(torch.randn(16, 32), dim=1) for v in built.required_views}
    built(views, torch.arange(16) + 16 * rank)[0]
    if rank == 0:
        out.write_text(str(sum(sent)))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sogclr", "amclr", "xamclr"])
def test_what_is_sent_is_what_the_docs_compute(objective: str, tmp_path: Path) -> None:
    from benchmarks.communication import step

    Processes(2, bytes_gathered, objective, tmp_path / "sent", logs=tmp_path / "logs").succeed()
    output = step(objective, 0, 32, 32, 2)
    assert int((tmp_path / "sent").read_text()) == pytest.approx(output.features + output.scalars, rel=0.01)


def watched(rank: int) -> None:
    """A team whose watch takes its time over every sign of life."""
    torch.distributed.init_process_group("gloo")
    with Team(60.0) as team:
        beat = team.watchdog._beat

        def slow(*arguments: Any) -> None:
            beat(*arguments)
            time.sleep(0.5)

        team.watchdog._beat = slow  # type: ignore[method-assign]
        time.sleep(1.2 * BEAT)
    assert "watchdog" not in {t.name for t in threading.enumerate()}


def test_the_watchdog_ends_before_the_process(tmp_path: Path) -> None:
    """Else the interpreter now and then aborts at its end, and a launcher takes a finished run for a failed one."""
    Processes(2, watched, logs=tmp_path / "logs").succeed()


# -- as users start them --------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_and_devices(folder: Path, tmp_path: Path) -> None:
    """Real launchers: the first process alone speaks, and both ways end with the same weights."""
    common = ["train", "--data", str(folder), *SMALL, "--objective", "sogclr"]
    launchers = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "amclr",
                     *common],
        "devices": [sys.executable, "-m", "amclr", *common, "--devices", "2"],
    }  # fmt: skip
    for name, command in launchers.items():
        done = subprocess.run(
            [*command, "--out", name], cwd=tmp_path, capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("text retrieval") == 1 and done.stdout.count("run folder:") == 1
        assert done.stderr.count("epoch 2/2") == 1
    assert_alike(*(Run.open(tmp_path / name) for name in launchers), exact=True)


def test_slurm_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    from amclr.distributed.launch import processes_started

    assert processes_started() is None
    for name, value in {"NTASKS": "16", "NNODES": "2", "JOB_NAME": "train", "PROCID": "3", "LOCALID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert processes_started() == (8, 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_started() == (4, 3)


def test_a_gpus_arithmetic_is_set_and_restored() -> None:
    from amclr.distributed.launch import arithmetic

    def now() -> tuple[Any, ...]:
        return (
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory,
        )  # fmt: skip

    before = now()
    with arithmetic(Config(), torch.device("cpu")):
        assert now() == before
    with arithmetic(Config(), torch.device("cuda")):
        assert now() == ("high", False, True, False)
    with arithmetic(Config(tf32=False, deterministic=False), torch.device("cuda")):
        assert now() == ("highest", True, False, False)
    assert now() == before


def test_settings_that_cannot_run_are_reported(folder: Path) -> None:
    with pytest.raises(UserError, match="--strategy fsdp shards the model over several processes: start them with"):
        train(frozen(folder, strategy="fsdp"), progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--accelerator cuda .* cannot run here"):
            train(replace(frozen(folder), accelerator="cuda"), progress=False)


def in_float16(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Let runs on the CPU compute in float16, with scaled losses."""
    from lightning.fabric.plugins.precision import MixedPrecision

    from amclr.distributed import launch as devices

    real = devices.Fabric

    def scaled(**settings: Any) -> Any:
        settings.pop("precision")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
        return real(**settings, plugins=MixedPrecision("16-mixed", "cpu", scaler))

    monkeypatch.setattr(devices, "Fabric", scaled)


@pytest.mark.parametrize("what", ["skip", "rollback"])
def test_a_step_left_out_of_scaled_ones(what: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scaler knows of its gradients is forgotten: the next step is made, with the scale of before."""
    in_float16(monkeypatch, 4.0)
    original, scales = loop.advance, {}

    def poisoned(t: Training, batch: Any) -> Any:
        batch.images = batch.images * torch.nan if t.step == 3 else batch.images
        scales[t.step] = t.fabric.strategy.precision.scaler.get_scale()
        return original(t, batch)

    monkeypatch.setattr(loop, "advance", poisoned)
    run = train(frozen(folder, on_nan=what), progress=False)
    assert run.load_last()["skipped"] == [3] and scales[4] == 4.0 and scales[5] == 8.0  # type: ignore[index]


def test_loss_scaling_resumes_bit_by_bit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, scaled: the first steps overflow, and the scale they come down to is part of the run."""
    in_float16(monkeypatch, 2.0**40)
    whole = train(frozen(folder, "whole", epochs=9, objective="amclr"), progress=False)
    state = whole.load_last()
    assert state is not None and 1 < state["precision"]["scale"] < 2.0**40
    original, count = amclr.training.step.embed, iter(range(1000))

    def interrupt(model: Any, batch: Any) -> Any:
        if next(count) == 5:
            signal.raise_signal(signal.SIGTERM)
        return original(model, batch)

    monkeypatch.setattr("amclr.training.step.embed", interrupt)
    with pytest.raises(Stopped):
        train(frozen(folder, "parts", epochs=9, objective="amclr"), progress=False)
    assert_same_run(whole, train(resume=folder.parent / "parts", progress=False))


SLOW_DISK = """
import sys, time
from amclr.runs import checkpoints
from amclr import cli
write = checkpoints.Checkpoints._write
checkpoints.Checkpoints._write = lambda self, job: time.sleep(8) or write(self, job)
sys.exit(cli.main())
"""


@pytest.mark.slow
def test_all_processes_wait_for_the_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches both processes of `--devices 2`: neither ends, and has the other ended, before it is written."""
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    command = [sys.executable, str(tmp_path / "slow.py"), "train", "--data", str(folder), *SMALL, "--devices", "2",
               "--epochs", "400", "--eval_every", "400", "--checkpoint_minutes", "60", "--out", "run"]  # fmt: skip
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    log = tmp_path / "run" / "metrics.jsonl"
    try:
        while not log.is_file() and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 130 and said.count("stopped; resume with: amclr train --resume run") == 1
    assert Run.open(tmp_path / "run").load_last()["step"] >= 1  # type: ignore[index]
