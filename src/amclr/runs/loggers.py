"""Where a run's metrics go while it trains: metrics.jsonl, TensorBoard and, on request, Weights & Biases."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from amclr.config.schema import Config
from amclr.runs.folder import Run
from amclr.utils.randomness import derive


class Loggers:
    """All loggers of a run, as a context that closes them and writes metrics.csv."""

    def __init__(self, run: Run, config: Config, step: int = 0, enabled: bool = True) -> None:
        """step: steps done before, when a run is resumed. enabled: false on all processes but the first."""
        self.run, self.enabled = run, enabled
        self.wandb: Any = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # Hides what an interrupted run logged of later steps.
        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=step + 1 if step else None)
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project="amclr", name=run.folder.name, config=asdict(config), resume="allow",
                                    id=f"{derive(str(run.folder.resolve())):x}")  # fmt: skip

    def write(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        """Log the values of a step. kind: train or eval."""
        if not self.enabled:
            return
        self.run.log({"kind": kind, "step": step, "epoch": round(epoch, 4), **values})
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.enabled:
            return
        self.board.close()
        self.run.write_csv()
        if self.wandb is not None:
            self.wandb.finish()
