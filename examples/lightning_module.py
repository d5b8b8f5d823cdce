"""AmCLR in a LightningModule: the estimates are in Lightning's checkpoints, and several processes share them.

    python examples/lightning_module.py                # half a minute on one core
    python examples/lightning_module.py --devices 2    # the same, over two processes (DDP)

The objective is a part of the module, so Lightning saves, loads and moves it. Under DDP every process passes its own
rows, and the objective makes them one batch: DDP then averages the gradients, hence `averaged=True`; and the tables
are the same everywhere already, hence `broadcast_buffers=False`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from shapes import Encoders, Shapes, recall
from torch import Tensor
from torch.utils.data import DataLoader

import amclr


class Contrast(pl.LightningModule):
    """Two encoders and the objective that trains them."""

    def __init__(self, samples: int, averaged: bool) -> None:
        super().__init__()
        self.encoders = Encoders()
        # averaged=True on one process changes nothing; it says that the gradients will be averaged over all there are.
        self.objective = amclr.objectives.build(
            "amclr", num_samples=samples, temperature=0.05, gamma_schedule="cosine", gamma=0.5, averaged=averaged
        )

    def on_train_epoch_start(self) -> None:
        """Tell the objective where training stands: its gamma falls along a cosine."""
        self.objective.start_epoch(self.current_epoch, self.trainer.max_epochs)

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """The loss of the batch of all processes. The metrics are for `self.log_dict`, where there is a logger."""
        loss, _ = self.objective(self.encoders(batch), batch["id"])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Encoders, and the objective where it has something to learn."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    """Train half of the epochs, then all of them with a new module, from the checkpoint."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--devices", type=int, default=1)
    options.add_argument("--accelerator", default="cpu", help="gpu for GPUs")
    options.add_argument("--checkpoint", type=Path, default=Path("runs/lightning.ckpt"))
    given = options.parse_args()

    pl.seed_everything(0, verbose=False)
    data, several = Shapes("train"), given.devices > 1
    # 64 rows in all: Lightning's sampler gives each process its part, and the objective takes them as one batch.
    batches = DataLoader(data, batch_size=64 // given.devices, shuffle=True, drop_last=True)

    def fit(module: Contrast, epochs: int, checkpoint: Path | None = None) -> pl.Trainer:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator=given.accelerator, devices=given.devices, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            strategy=DDPStrategy(broadcast_buffers=False) if several else "auto",
        )  # fmt: skip
        trainer.fit(module, batches, ckpt_path=checkpoint, weights_only=True)
        return trainer

    first = Contrast(len(data), averaged=several)
    before = recall(first.encoders)["r_mean"]
    fit(first, given.epochs // 2).save_checkpoint(given.checkpoint)

    second = Contrast(len(data), averaged=several)
    trainer = fit(second, given.epochs, given.checkpoint)
    if trainer.is_global_zero:
        saved = torch.load(given.checkpoint, weights_only=True)
        seen = (saved["state_dict"]["objective.log_u_image.values"] > -torch.inf).all(dim=1).sum()
        print(f"before: mean recall {before:.1f} %")
        print(f"in the checkpoint of epoch {saved['epoch']}: estimates of {seen} of {len(data)} samples")
        print(f"after: mean recall {recall(second.encoders.cpu())['r_mean']:.1f} %")


if __name__ == "__main__":
    main()
