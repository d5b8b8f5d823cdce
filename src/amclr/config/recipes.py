"""Recipes: named full sets of settings, each a short function. `amclr train --recipe NAME`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from amclr.config.schema import Config, LossConfig, ModelConfig, OptimConfig, SourceConfig, ViewsConfig


def scenes() -> Config:
    """Small towers from scratch on generated scenes: minutes on two CPU cores.

    amclr train
    """
    return Config(
        data="scenes",
        # Of xAmCLR's intra-modal terms, those between texts help a text tower that starts from scratch; those between
        # images cost accuracy here.
        objective="xamclr-text",
        epochs=16,
        batch_size=64,
        # Scenes on one background look alike, but differ in the objects that captions name.
        source=SourceConfig(duplicates="captions"),
        # Captions say left and right, so views must not mirror images.
        views=ViewsConfig(image="weak", image_aug="single", flip=False),
        # From scratch, the small text tower collapses unless its learning rate is lower.
        model=ModelConfig(image_size=64, dim=128, max_tokens=40, text_lr=0.3),
        # Towers from scratch change too fast for estimates from an epoch ago.
        loss=LossConfig(temperature=0.05, gamma=1.0),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05),
    )


def frozen() -> Config:
    """Heads on the packaged pretrained encoders, frozen, with cached views: minutes on a CPU.

    amclr train --data FOLDER
    """
    return Config(
        # Of xAmCLR's intra-modal terms, those between texts cost accuracy here: their tower already embeds sentences
        # well, and an image's captions say different things.
        objective="xamclr-image",
        epochs=8,
        batch_size=128,
        views=ViewsConfig(image="weak", image_aug="weak", cached=4),
        model=ModelConfig(
            image_tower="efficientnet-lite0", image_size=128, image_lr=0.0,
            text_tower="minilm", text_lr=0.0, text_pooling="mean", head="residual", hidden=2048, dropout=0.2, dim=512,
        ),
        # A sample's estimate is an epoch old when it is used again, and heads learn fast: a batch of this size
        # estimates the denominator better on its own (docs/results.md).
        loss=LossConfig(temperature=0.07, gamma=1.0),
        optim=OptimConfig(lr=2e-3, weight_decay=0.02, warmup=0.1),
    )  # fmt: skip


def finetune() -> Config:
    """The packaged pretrained encoders end to end, from the heads of a `frozen` run: a GPU, or patience.

    amclr train --recipe finetune --data FOLDER --init_from RUN
    """
    base = frozen()
    return replace(
        base,
        objective="amclr",
        views=ViewsConfig(image="paper", image_aug="single"),
        # Trained heads need a lower learning rate. Batch norm statistics of a small data set are worse than those of
        # the tower's pretraining images.
        model=replace(base.model, image_lr=0.1, text_lr=0.05, freeze_norms=True),
        optim=replace(base.optim, lr=5e-4),
    )


def scratch() -> Config:
    """Small towers from scratch on your own images: for much data that pretrained encoders have never seen.

    amclr train --recipe scratch --data FOLDER
    """
    base = scenes()
    return replace(
        # On real images all of xAmCLR's terms help, those between images too.
        base, objective="xamclr", epochs=30, source=SourceConfig(), views=ViewsConfig(),
        model=replace(base.model, image_size=96),
    )  # fmt: skip


def paper() -> Config:
    """The setting of arXiv 2412.07979: ResNet-50 and DistilBERT, linear projections, batch 128, 30 epochs.

    amclr train --recipe paper --data FOLDER
    """
    return Config(
        epochs=30,
        batch_size=128,
        views=ViewsConfig(image="paper", image_aug="single"),
        model=ModelConfig(
            image_tower="resnet50", image_size=256, text_tower="distilbert-base-uncased", text_pooling="first",
            max_tokens=30, head="linear", dim=256,
        ),
        loss=LossConfig(temperature=0.01, gamma=0.8),
        optim=OptimConfig(lr=2e-4, weight_decay=0.02, warmup=5 / 30, warmup_lr=1e-5, min_lr=1e-6, clip=0.0),
    )  # fmt: skip


RECIPES: dict[str, Callable[[], Config]] = {f.__name__: f for f in (scenes, frozen, finetune, scratch, paper)}
"""Every recipe by name."""
