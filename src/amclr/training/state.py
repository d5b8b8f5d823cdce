"""`Training`: everything that a run consists of, its state, and how that is saved and restored."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from amclr.config.checks import fixed_differences, from_dict
from amclr.config.schema import Config
from amclr.data.batches import Batch, BatchPlan
from amclr.data.manifest import Manifest
from amclr.data.sources.rows import Reject, append_rejects
from amclr.distributed.launch import Fabric
from amclr.distributed.team import Team
from amclr.distributed.world import shard_like, whole
from amclr.evaluation.evaluator import Evaluator
from amclr.evaluation.monitor import Monitor
from amclr.models.averaging import Averaging
from amclr.models.dual_encoder import DualEncoder
from amclr.objectives import Objective
from amclr.runs.folder import Run
from amclr.runs.samples import Pinned
from amclr.training.faults import Undo
from amclr.training.timing import Clock
from amclr.utils.errors import UserError


@dataclass
class Training:
    """Everything that a run consists of, on its device; `assemble` builds it."""

    fabric: Fabric
    team: Team
    config: Config
    run: Run
    manifest: Manifest
    pinned: Pinned
    plan: BatchPlan
    model: DualEncoder
    """The bare model, for state, evaluation and checkpoints."""
    wrapped: Any
    """The model as Fabric wraps it, for the forward pass."""
    objective: Objective
    optimizer: Any
    averaging: Averaging
    """The weights to evaluate and save."""
    batches: Dataset[Batch]
    evaluator: Evaluator
    monitor: Monitor | None
    """Zero-shot accuracy on images by class, where `monitor` is set."""
    undo: Undo
    micro_batch: int
    """Images embedded at a time; 0 is all."""
    step: int = 0
    """Steps done."""
    best: float = -math.inf
    """Best mean recall so far."""
    measured: bool = True
    """Whether the evaluation due at this step has been made."""
    skipped: set[int] = field(default_factory=set)
    """Steps skipped because their numbers were not finite."""
    clock: Clock = field(default_factory=Clock)
    """What this process spends its time on."""
    rejected: set[str] = field(default_factory=set)
    """Samples whose images turned out to be bad since the run was started or resumed."""
    listed: set[str] = field(default_factory=set)
    """Samples whose images turned out to be bad before it was resumed."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.steps_per_epoch * self.config.epochs

    @property
    def measures(self) -> bool:
        """Whether an evaluation is due after the steps done."""
        return self.step == self.steps or self.step % (self.plan.steps_per_epoch * self.config.eval_every) == 0

    def lap(self, done: str, then: str, limit: float = 0.0) -> None:
        """Record the time since the last lap as `done`; tell the watchdog what follows, for at most `limit` seconds."""
        self.clock.lap(done)
        self.team.watchdog.at(then, limit)

    def save(
        self, *, is_best: bool = False, renumbered: bool = False, wait: bool = False, passing: bool = False
    ) -> None:
        """Write a checkpoint, as `Checkpoints.save` says. All processes call it; the first writes."""
        writes = self.team.first_rank
        precision = self.fabric.strategy.precision.state_dict()
        state = {
            "model": whole(self.model.state_to_save(), writes),
            "optimizer": whole(self.optimizer.optimizer.state_dict(), writes),
            **whole(self.averaging.state_dict(), writes),
            "objective": self.objective.state_dict(), "step": self.step, "best": self.best,
            "samples": torch.from_numpy(self.plan.samples), "steps_per_epoch": self.plan.steps_per_epoch,
            "held_out": self.pinned.val_digest, "measured": self.measured, "skipped": sorted(self.skipped),
            "micro_batch": [self.config.micro_batch, self.micro_batch], "config": json.dumps(asdict(self.config)),
            **({"precision": precision} if precision else {}),
        }  # fmt: skip
        if writes:
            self.run.checkpoints.save(
                state, self.step, best=is_best, keep=self.config.keep, renumbered=renumbered, wait=wait, passing=passing
            )

    def reject(self, name: str, reason: str) -> None:
        """List a sample whose image has turned out to be bad. Raises UserError beyond the limit on bad images."""
        if name in self.rejected:
            return
        self.rejected.add(name)
        if name not in self.listed:
            self.list_rejects({name: reason})
        if len(self.rejected) * self.team.size > self.config.source.max_bad * len(self.plan.samples):
            raise UserError(
                f"{len(self.rejected)} of {len(self.plan.samples)} training images can no longer be read, over the "
                f"limit of {self.config.source.max_bad:.1%}; the last: {name}: {reason}. Repair them, then resume "
                f"with: amclr train --resume {self.run.folder}"
            )

    def list_rejects(self, reasons: Mapping[str, str]) -> None:
        """Add samples whose images have turned out to be bad, and why, to rejects.jsonl."""
        rejects = [Reject("", 0, f"while training: {reason}", name) for name, reason in reasons.items()]
        append_rejects(rejects, self.run.folder / "rejects.jsonl")

    def restore(self, changed_data: bool = False) -> None:
        """Restore the run's newest checkpoint, if it has one. Raises UserError where it has other training samples.

        changed_data: restore it even so. The epochs done stay; the steps are renumbered for the present samples.
        """
        state = self.run.load_last()
        if state:
            self.check_settings(state)
            old_samples = state.get("samples", torch.from_numpy(self.plan.samples)).numpy()
            same = np.array_equal(old_samples, self.plan.samples)
            step_scale = self.step_scale(state)
            if not (changed_data or (same and step_scale == 1)):
                raise UserError(
                    f"the newest checkpoint in '{self.run.checkpoints.folder}' has other training images, or other "
                    "weights of them: restore those, or resume with: "
                    f"amclr train --resume {self.run.folder} --changed_data"
                )
            self.load_state(state, None if same else rows_among(old_samples, self.plan.samples))
            self.step, val_digest = round(state["step"] * step_scale), self.pinned.val_digest
            if state.get("held_out", val_digest) != val_digest:  # recalls on other images are not comparable
                self.best = -math.inf
            elif self.best > -math.inf and not self.run.checkpoints.best_is_intact():
                # A damaged checkpoint is no longer the best. If this is the last evaluation, it is repeated.
                self.best, self.measured = -math.inf, not self.measures
            if not same or step_scale != 1:
                self.skipped = set()
                self.team.barrier()  # until all have read the checkpoint, which is now replaced
                # Before the metrics are renumbered: a kill in between may lose some, but renumbers none twice.
                self.save(renumbered=True, wait=True)
            if self.team.first_rank:
                self.run.drop_metrics_after(state["step"], step_scale, self.measured, self.skipped)
        elif self.team.first_rank:
            self.run.drop_metrics_after(0)
        if not self.team.first_rank:
            return
        # Earlier bad images stay listed, but count towards the limit only once they are found bad again.
        reasons = {row["sample"]: row["reason"] for row in self.run.metrics() if row["kind"] == "replaced"}
        trained = frozenset(self.pinned.train)
        self.list_rejects({name: reason for name, reason in reasons.items() if name in trained})
        self.listed = set(reasons)

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load weights into the model, sharded over the processes as its own are."""
        own = self.model.state_dict()
        self.model.load_saved({k: shard_like(v, own[k]) if k in own else v for k, v in state.items()})

    def check_settings(self, state: Mapping[str, Any]) -> None:
        """Raise UserError where config.yaml differs from a checkpoint's settings, as after an edit by hand."""
        saved = from_dict(json.loads(state["config"])) if "config" in state else self.config
        fixed = fixed_differences(saved, self.config)
        if fixed:
            changes = "; ".join(f"--{name} is {old} there, {new} here" for name, (old, new) in fixed.items())
            raise UserError(
                f"'{self.run.folder / 'config.yaml'}' is not what the newest checkpoint was made with: {changes}. "
                "Restore it, or start another run with --out"
            )
        done = state["step"] / float(state.get("steps_per_epoch", self.plan.steps_per_epoch))
        if done > self.config.epochs:
            raise UserError(
                f"'{self.run.folder}' has done {done:g} epochs: --epochs {self.config.epochs} would be fewer"
            )

    def load_state(self, state: Mapping[str, Any], rows: Tensor | None = None) -> None:
        """Load a checkpoint's state. rows: as in `Objective.load_rows`."""
        self.load_weights(state["model"])
        self.averaging.load_state_dict(state)
        load_optimizer(self.optimizer.optimizer, state["optimizer"])
        if rows is None:
            self.objective.load_state_dict(state["objective"])
        else:
            self.objective.load_rows(state["objective"], rows)
        if "precision" in state:
            self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step, self.best = state["step"], state["best"]
        self.measured, self.skipped = state.get("measured", True), self.skipped | set(state.get("skipped", ()))
        configured, used = state.get("micro_batch", [self.config.micro_batch, self.micro_batch])
        if configured == self.config.micro_batch:  # what ran out of memory before is not tried again
            self.micro_batch = used

    def step_scale(self, state: dict[str, Any]) -> float:
        """Steps per epoch now, over those of a checkpoint."""
        return self.plan.steps_per_epoch / float(state.get("steps_per_epoch", self.plan.steps_per_epoch))


def rows_among(before: np.ndarray, now: np.ndarray) -> Tensor:
    """The position of each of the ids `now` among the ids `before`: (N,) int64, -1 where it is missing."""
    order = np.argsort(before)
    place = np.minimum(np.searchsorted(before, now, sorter=order), len(before) - 1)
    return torch.from_numpy(np.where(before[order[place]] == now, order[place], -1))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, sharded over the processes as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        k: {name: shard_like(v, parameters[k]) if isinstance(v, Tensor) and v.dim() else v for name, v in entry.items()}
        for k, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})
