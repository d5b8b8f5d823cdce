"""Optimisers by name, their parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from amclr.config.schema import OptimConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.utils.errors import UserError

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "radam": torch.optim.RAdam,
    "nadam": torch.optim.NAdam,
    "sgd": lambda groups, **kw: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **kw),
    "adamp": lambda groups, **kw: _of_timm("AdamP")(groups, **kw),
    "sgdp": lambda groups, **kw: _of_timm("SGDP")(groups, momentum=0.9, nesterov=True, **kw),
    "lamb": lambda groups, **kw: _of_timm("Lamb")(groups, **kw),
    "lion": lambda groups, **kw: _of_timm("Lion")(groups, **kw),
    "novograd": lambda groups, **kw: _of_timm("NvNovoGrad")(groups, **kw),
}


def _of_timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    import timm.optim  # slow to import

    optimizer: Callable[..., torch.optim.Optimizer] = getattr(timm.optim, name)
    return optimizer


def choose_optimizer(config: OptimConfig) -> Callable[..., torch.optim.Optimizer]:
    """The constructor of an optimiser by name. Raises UserError for an unknown one."""
    if config.name not in OPTIMIZERS:
        raise UserError(f"unknown optimiser '--optim.name {config.name}': choose from {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[config.name]


def build_optimizer(config: OptimConfig, model: DualEncoder, objective: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all trained parameters: towers with their factors, heads, and learned temperatures.

    Each group has an `lr_factor`, by which `set_lr` multiplies the schedule. Weight decay applies to matrices, but not
    to norms, biases and the objective's own parameters.
    """
    parts: list[tuple[Iterable[nn.Parameter], float, bool]] = [
        (model.image_tower.parameters(), model.config.image_lr, True),
        (model.text_tower.parameters(), model.config.text_lr, True),
        (model.image_head.parameters(), 1.0, True),
        (model.text_head.parameters(), 1.0, True),
        (objective.parameters(), 1.0, False),
    ]
    groups: list[dict[str, Any]] = []
    for parameters, factor, may_decay in parts:
        trained = [p for p in parameters if p.requires_grad]
        decayed = [p for p in trained if may_decay and p.dim() > 1]
        plain = [p for p in trained if not (may_decay and p.dim() > 1)]
        for members, decay in ((decayed, config.weight_decay), (plain, 0.0)):
            if members:
                groups.append({"params": members, "weight_decay": decay, "lr_factor": factor})
    return choose_optimizer(config)(groups, lr=config.lr)


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Linear warm-up from `warmup_lr`, then a cosine to `min_lr`, as a pure function of the step."""
    warm = max(1, round(config.warmup * total))
    if step < warm:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warm
    share = (step - warm) / max(1, total - 1 - warm)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
