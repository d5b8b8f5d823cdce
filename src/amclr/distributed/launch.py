"""Processes, devices and arithmetic of a run: the only file that uses the training engine (Lightning Fabric)."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from lightning.fabric.strategies.launchers import subprocess_script
from torch import nn
from torch.utils import deterministic

from amclr.config.schema import Config
from amclr.utils.errors import UserError

# Messages about how the processes connect are nothing that a user can act on.
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
# Newer versions of torch have renamed the argument; older ones do not know the new name.
warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")

FAILURE_TIMEOUT = 30.0
"""Seconds that processes have to end by themselves after one has failed."""

__all__ = ["Fabric", "arithmetic", "processes_started", "start_processes"]


def start_processes(config: Config, uses_all: bool) -> Fabric:
    """Fabric over the processes that a launcher or `--devices` starts, with their connection set up.

    uses_all: whether every step uses all trained parameters. Raises UserError for settings that cannot run here.
    """
    local, machines = processes_started() or (config.devices or 1, 1)
    strategy: Any = "auto"
    if local * machines > 1:
        if config.strategy == "fsdp":
            strategy = ModelParallelStrategy(shard, local * machines, 1, timeout=timedelta(days=1))
        else:  # batch norm statistics are averaged by `average_statistics`
            strategy = DDPStrategy(
                timeout=timedelta(days=1), broadcast_buffers=False, find_unused_parameters=not uses_all
            )
    elif config.strategy == "fsdp":
        raise UserError(
            "--strategy fsdp shards the model over several processes: start them with --devices or torchrun"
        )
    try:
        precision: Any = config.precision
        if precision == "auto":
            on_gpu = config.accelerator in ("auto", "cuda") and torch.cuda.is_available()
            precision = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(False) else "32-true"
        fabric = Fabric(
            accelerator=config.accelerator, devices=local, num_nodes=machines, strategy=strategy, precision=precision
        )
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        what = f"--accelerator {config.accelerator} --precision {config.precision} with {local} processes"
        raise UserError(f"{what} cannot run here: {' '.join(str(error).split())[:200]}") from None
    subprocess_script._ChildProcessObserver = _Observer  # type: ignore[misc]
    fabric.launch()
    return fabric


class _Observer(subprocess_script._ChildProcessObserver):
    """Ends the processes of `--devices` after one has failed, once they have had time to report and end themselves."""

    def _terminate_all(self) -> None:
        time.sleep(FAILURE_TIMEOUT)
        print("amclr: one process has failed and another does not end: killed", file=sys.stderr, flush=True)
        super()._terminate_all()


@contextmanager
def arithmetic(config: Config, device: torch.device) -> Iterator[None]:
    """Set how a GPU computes during a block: TF32 or not, deterministic algorithms or not."""
    if device.type != "cuda":
        yield
        return
    # Read when cuBLAS is first used; without it, results may differ from call to call.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fill: Any = deterministic
    before = (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        fill.fill_uninitialized_memory,
    )  # fmt: skip

    def apply(matmul: str, convolutions: bool, benchmark: bool, deterministic: bool, warns: bool, fills: bool) -> None:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = convolutions, benchmark
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        fill.fill_uninitialized_memory = fills

    apply(
        "high" if config.tf32 else "highest", config.tf32, not config.deterministic, config.deterministic, True, False
    )
    try:
        yield
    finally:
        apply(*before)


def processes_started() -> tuple[int, int] | None:
    """How many processes torchrun or SLURM started on this machine, and on how many machines; None without them."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        local = int(env["LOCAL_WORLD_SIZE"])
        return local, int(env["WORLD_SIZE"]) // local
    if SLURMEnvironment.detect():
        machines = int(env.get("SLURM_NNODES", "1"))
        return int(env["SLURM_NTASKS"]) // machines, machines
    return None


def shard(model: Any, mesh: Any) -> nn.Module:
    """Shard a model's weights over the processes (FSDP2): each block of a tower by itself, then the rest."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh["data_parallel"]
    for parameter in model.parameters():  # weights in channels-last order cannot be sharded
        parameter.data = parameter.data.contiguous()
    for tower in (model.image_tower, model.text_tower):
        for block in (m for stack in tower.modules() if isinstance(stack, nn.ModuleList) for m in stack):
            if not any(isinstance(m, nn.ModuleList) for m in block.modules()):
                fully_shard(block, mesh=mesh)
        fully_shard(tower, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
