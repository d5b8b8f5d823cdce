"""Low-rank adapters (LoRA, arXiv 2106.09685) for the towers."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from amclr.utils.errors import UserError


def add_adapters(trunk: nn.Module, rank: int, kind: str) -> Any:
    """Freeze a trunk and add low-rank adapters to it; returns peft's handle, which can merge them.

    A trunk with most of its weights in linear layers (transformers, ConvNeXt) gets adapters there; any other also in
    its convolutions, except for depthwise ones, which have low rank already. kind: image or text, for messages. Raises
    UserError where peft is not installed or there is nothing to adapt.
    """
    option = f"--model.{kind}_adapters"
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise UserError(f"{option} needs the package peft: pip install 'amclr[adapters]'") from None
    linear = {n: m for n, m in trunk.named_modules() if isinstance(m, nn.Linear)}
    convolutions = {n: m for n, m in trunk.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    sizes = [sum(m.weight.numel() for m in layers.values()) for layers in (linear, convolutions)]
    targets = linear if sizes[0] > sizes[1] else linear | convolutions
    if not targets:
        raise UserError(f"{option}: {type(trunk).__name__} has no linear or convolution layers; leave it out")
    trunk.requires_grad_(False)
    # Twice the rank as scale: peft's rule of thumb, with which the best learning rate depends little on the rank.
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="|".join(map(re.escape, targets)))
    return LoraModel(trunk, settings, "default")
