"""How far the estimates of the inner means are from the truth while a model trains, by batch size and epoch.

    python -m benchmarks.estimators FLICKR8K [--batch_size 16 128]

SogCLR with gamma 1 trains heads on the frozen towers (recipe `frozen`, small heads, temperature 0.05); other estimators
look on, fed with the same embeddings, and have no say. At some steps of each epoch all training images and captions
are embedded, and the log u that each estimator would use for the anchors of that step is compared with the log of the
exact inner mean. Printed: root mean square of the differences, and in brackets their mean, over both terms. `as it was`
is what the anchor's last visit left, an epoch ago, with no look at this batch. Needs amclr[pretrained].
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import amclr.training.step
from amclr.config.recipes import frozen
from amclr.config.schema import LossConfig
from amclr.data.batches import BatchPlan
from amclr.models.features import FeatureBatches
from amclr.objectives import Objective, build
from amclr.training import loop
from amclr.training.assembly import assemble
from amclr.training.state import Training

ESTIMATORS: dict[str, dict[str, Any]] = {
    "gamma 1": {"gamma": 1.0},
    "gamma 0.8": {"gamma": 0.8},
    "gamma 0.5": {"gamma": 0.5},
    "gamma 0.2": {"gamma": 0.2},
    "adaptive": {"gamma": 0.05, "gamma_schedule": "adaptive"},
    "queue 112": {"gamma": 1.0, "queue": 112},
    "queue 496": {"gamma": 1.0, "queue": 496},
}
LOOKS = 8
"""Steps of an epoch at which is looked, or one more."""


class Watch:
    """Estimators that see what an objective sees; its `errors` are (epoch, estimator) -> [(mean, root mean square)]."""

    def __init__(self, training: Training) -> None:
        batches = training.batches
        assert isinstance(batches, FeatureBatches)
        self.training, self.size = training, len(training.plan.samples)
        self.everything = copy.copy(batches)
        self.everything.plan = BatchPlan(training.plan.samples, self.size, training.config.seed)
        loss = training.config.loss
        self.estimators = {
            name: build("sogclr", self.size, temperature=loss.temperature, **settings)
            for name, settings in ESTIMATORS.items()
        }
        self.errors: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
        training.objective.register_forward_pre_hook(self.look)

    @torch.no_grad()
    def look(self, _: object, given: tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]) -> None:
        """Before the objective's own step: update the estimators, at some steps with a look at how well they do."""
        views, ids, groups = given
        every = max(1, self.training.plan.steps_per_epoch // LOOKS)
        looks = self.training.step % every == every - 1
        exact: dict[str, Any] = {}
        if looks:
            exact = self.whole_set(views, ids)
            self.note("as it was", self.estimators["gamma 1"], exact)
        for name, estimator in self.estimators.items():
            estimator(views, ids, groups)
            if looks:
                self.note(name, estimator, exact)

    def whole_set(self, views: dict[str, Tensor], ids: Tensor) -> dict[str, Any]:
        """All samples as they look in this epoch to the present weights, and the batch as it has been embedded."""
        t = self.training
        batch = self.everything[t.step // t.plan.steps_per_epoch]
        with torch.random.fork_rng():
            found = amclr.training.step.embed(t.wrapped, batch)
        order = torch.argsort(batch.ids)
        found = {v: x[order] for v, x in found.items()}
        for v, x in found.items():
            x[ids] = views[v]
        groups = {v: g[order] for v, g in batch.groups.items()}
        return {"views": found, "ids": torch.arange(self.size), "probe": ids, "groups": groups}

    def note(self, name: str, estimator: Objective, exact: dict[str, Any]) -> None:
        """Keep by how much an estimator is off."""
        error = estimator.estimator_error(**exact)
        if math.isfinite(error["rms"]):
            epoch = self.training.step // self.training.plan.steps_per_epoch
            self.errors[epoch, name].append((error["bias"], error["rms"]))


def errors(data: Path, batch_size: int, epochs: int, seed: int, rate: float) -> dict[tuple[int, str], str]:
    """(epoch, estimator) -> what is printed."""
    base = frozen()
    config = replace(
        base, data=str(data), objective="sogclr", batch_size=batch_size, epochs=epochs, seed=seed, accelerator="cpu",
        model=replace(base.model, hidden=512, dim=256), loss=LossConfig(temperature=0.05, gamma=1.0),
        optim=replace(base.optim, lr=rate),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        training = assemble(config, Path(folder) / "run", None, progress=True)
        watch = Watch(training)
        for step in tqdm(range(training.steps), desc=f"batches of {batch_size}"):
            loop.advance(training, training.batches[step])
            training.step += 1
    rows = {}
    for key, found in watch.errors.items():
        mean = statistics.fmean(bias for bias, _ in found)
        square = statistics.fmean(rms**2 for _, rms in found) ** 0.5
        rows[key] = f"{square:.2f} ({mean:+.2f})"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Flickr8k, or any captioned images")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=7e-4, help="peak learning rate")
    options = parser.parse_args()
    names = ["as it was", *ESTIMATORS]
    lines = [f"| batch | epoch | {' | '.join(names)} |", f"|{'---|' * (2 + len(names))}"]
    for size in options.batch_size:
        found = errors(options.data, size, options.epochs, options.seed, options.rate)
        for epoch in sorted({0, 1, options.epochs // 2, options.epochs - 1} & {e for e, _ in found}):
            cells = (found.get((epoch, name), "") for name in names)
            lines.append(f"| {size} | {epoch + 1} | {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
