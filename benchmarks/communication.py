"""What the processes of a run send each other in a step, computed from the sizes of model, batch and objective.

    python -m benchmarks.communication
    python -m benchmarks.communication --model ViT-B-32 --batch 4096 --devices 1 8 64 --link 50

Nothing is sent: the figures are those of ring collectives, in which each process sends (W - 1) / W of what is
gathered or reduced, and twice that of what is summed on all. `--link` is the bandwidth per process in GB/s that
the times are computed with: about 300 for NVLink within a machine, 25 to 50 for 200 to 400 Gbit/s between machines.
`tests/distributed/test_launch.py` compares the objective's bytes with those that it really hands to the collectives.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from amclr.objectives import build


def _paper() -> tuple[int, int]:
    import timm
    from transformers import DistilBertConfig, DistilBertModel

    towers = timm.create_model("resnet50", num_classes=0), DistilBertModel(DistilBertConfig())
    return sum(map(_count, (*towers, nn.Linear(2048, 256), nn.Linear(768, 256)))), 256


def _clip(name: str) -> tuple[int, int]:
    import open_clip

    return _count(open_clip.create_model(name, device="meta")), int(open_clip.get_model_config(name)["embed_dim"])


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


MODELS: dict[str, Callable[[], tuple[int, int]]] = {
    "paper": _paper,
    "ViT-B-32": partial(_clip, "ViT-B-32"),
    "ViT-L-14": partial(_clip, "ViT-L-14"),
}
"""By name: how to count the parameters, on no device; and the dimension of the shared space."""


@dataclass(frozen=True)
class Step:
    """Bytes that each process sends in a step, by what for."""

    gradients: float
    weights: float
    features: float
    scalars: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.gradients + self.weights + self.features + self.scalars


def step(objective: str, parameters: int, dim: int, batch: int, devices: int, strategy: str = "ddp") -> Step:
    """The bytes of a step: gradients summed (DDP) or reduced and weights gathered twice (FSDP); float32.

    features: V views x D float32 of each sample, gathered once, with a 64-bit id. scalars: of each sample and
    term a log-sum-exp and a positive, gathered once; gradients of features are not sent at all.
    """
    made = build(objective, 2)
    around = (devices - 1) / devices
    weights = 4.0 * parameters
    views, terms = len(made.required_views), len(made.terms)
    return Step(
        gradients=around * weights * (1 if strategy == "fsdp" else 2),
        weights=around * weights * 2 if strategy == "fsdp" else 0.0,
        features=around * batch * (views * dim * 4 + 8),
        scalars=around * batch * terms * 8 if made.method.contrast != "sigmoid" else 0.0,
    )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--objective", default="amclr")
    parser.add_argument("--batch", type=int, nargs="*", default=[1024, 8192], help="images per step, over all")
    parser.add_argument("--devices", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--link", type=float, default=25.0, help="GB/s per process")
    options = parser.parse_args()
    print(f"{options.objective}, MB that each process sends in a step; time at {options.link:g} GB/s\n")
    print("| model | batch | devices | gradients (ddp) | features | scalars | in all, ddp | in all, fsdp | time, ddp |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.model:
        with torch.device("meta"):
            parameters, dim = MODELS[name]()
        for batch in options.batch:
            for devices in options.devices:
                ddp, fsdp = (step(options.objective, parameters, dim, batch, devices, s) for s in ("ddp", "fsdp"))
                mb = [x / 1e6 for x in (ddp.gradients, ddp.features, ddp.scalars, ddp.total, fsdp.total)]
                print(f"| {name}, {parameters / 1e6:.0f} M | {batch:,} | {devices} | {mb[0]:.1f} | {mb[1]:.2f} | {mb[2]:.2f} | {mb[3]:.1f} "
                      f"| {mb[4]:.1f} | {ddp.total / options.link / 1e6:.1f} ms |")  # fmt: skip


if __name__ == "__main__":
    main()
