"""`Training`: everything that a run is made of, its state, and how that is written and taken up again."""

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
from amclr.distributed.watchdog import Team
from amclr.distributed.world import spread, whole
from amclr.evaluation.evaluator import Evaluator
from amclr.evaluation.monitor import Monitor
from amclr.models.averaging import Averaging
from amclr.models.dual_encoder import DualEncoder
from amclr.objectives import Objective
from amclr.runs.folder import Pinned, Run
from amclr.training.faults import Undo
from amclr.training.timing import Clock
from amclr.utils.errors import UserError


@dataclass
class Training:
    """Everything that a run is made of, on its device."""

    fabric: Fabric
    team: Team
    config: Config
    run: Run
    manifest: Manifest
    pinned: Pinned
    plan: BatchPlan
    model: DualEncoder
    """The bare model: for states, evaluation and checkpoints."""
    wrapped: Any
    """The model as Fabric wraps it: for the forward pass under its precision."""
    objective: Objective
    optimizer: Any
    batches: Dataset[Batch]
    evaluator: Evaluator
    undo: Undo
    micro_batch: int
    """Images embedded at a time; 0 is all."""
    averaging: Averaging = field(init=False)
    """What is evaluated and kept; made where the model is wrapped."""
    monitor: Monitor | None = None
    """Zero-shot accuracy on images by class, where that is asked for."""
    step: int = 0
    """Steps done."""
    best: float = -math.inf
    """Best mean recall so far."""
    measured: bool = True
    """Whether the evaluation due at this step has been made."""
    skipped: set[int] = field(default_factory=set)
    """Steps left out after a loss that was not finite."""
    clock: Clock = field(default_factory=Clock)
    """What this process spent its time on."""
    lost: set[str] = field(default_factory=set)
    """Samples whose images were found bad while training, since it was last taken up."""
    listed: set[str] = field(default_factory=set)
    """Samples whose images were found bad while training before that."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.steps_per_epoch * self.config.epochs

    @property
    def measures(self) -> bool:
        """Whether an evaluation is due after the steps done."""
        return self.step == self.steps or self.step % (self.plan.steps_per_epoch * self.config.eval_every) == 0

    def lap(self, done: str, then: str, limit: float = 0.0) -> None:
        """Book the time since the last lap, and tell the others what comes now, for `limit` seconds at most."""
        self.clock.lap(done)
        self.team.at(then, limit)

    def save(
        self, *, is_best: bool = False, renumbered: bool = False, wait: bool = False, passing: bool = False
    ) -> None:
        """Write a checkpoint; all processes call it, and the first writes.

        renumbered: its steps are counted otherwise than in those before it. wait: until it is on the disk.
        passing: it is only for the case that something happens.
        """
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
            keep = self.config.keep
            self.run.save(state, self.step, best=is_best, keep=keep, renumbered=renumbered, wait=wait, passing=passing)

    def lose(self, name: str, reason: str) -> None:
        """List a sample whose image went bad. Raises UserError beyond the limit on bad images."""
        if name in self.lost:
            return
        self.lost.add(name)
        if name not in self.listed:
            self.list_lost({name: reason})
        if len(self.lost) * self.team.size > self.config.source.max_bad * len(self.plan.samples):
            raise UserError(
                f"{len(self.lost)} of {len(self.plan.samples)} training images can no longer be read, over the limit "
                f"of {self.config.source.max_bad:.1%}; the last: {name}: {reason}. Mend them, then go on by: "
                f"amclr train --resume {self.run.folder}"
            )

    def list_lost(self, reasons: Mapping[str, str]) -> None:
        """Add samples whose images went bad, and why, to rejects.jsonl."""
        rejects = [Reject("", 0, f"while training: {reason}", name) for name, reason in reasons.items()]
        append_rejects(rejects, self.run.folder / "rejects.jsonl")

    def restore(self, changed_data: bool = False) -> None:
        """Take up the run's newest checkpoint, if it has one. Raises UserError where it is of other samples.

        changed_data: take it up even so. As many epochs are done as were, of the samples that there are now.
        """
        state = self.run.load_last()
        if state:
            self.refuse_other_settings(state)
            before = state.get("samples", torch.from_numpy(self.plan.samples)).numpy()
            same = np.array_equal(before, self.plan.samples)
            stretch = self.stretch(state)
            if not (changed_data or (same and stretch == 1)):
                raise UserError(
                    f"the newest checkpoint in '{self.run.checkpoints}' is of other training images, or weights of "
                    f"them: put those back, or go on by: amclr train --resume {self.run.folder} --changed_data"
                )
            self.take_up(state, None if same else rows_among(before, self.plan.samples))
            self.step, held_out = round(state["step"] * stretch), self.pinned.val_digest
            if state.get("held_out", held_out) != held_out:  # recalls on other images are no measure of the best
                self.best = -math.inf
            elif self.best > -math.inf and not self.run.best_is_sound():
                # What is damaged is not the best any more; where the run would end without another, measure again.
                self.best, self.measured = -math.inf, not self.measures
            if not same or stretch != 1:
                self.skipped = set()
                self.team.meet()  # all have taken it up before it goes
                # Before the metrics are numbered anew: a kill in between may lose some, but never counts twice.
                self.save(renumbered=True, wait=True)
            if self.team.first_rank:
                self.run.forget_metrics_after(state["step"], stretch, self.measured, self.skipped)
        elif self.team.first_rank:
            self.run.forget_metrics_after(0)
        if not self.team.first_rank:
            return
        # What went bad before stays listed, but counts towards the limit only if it is found bad again.
        found = {row["sample"]: row["reason"] for row in self.run.metrics() if row["kind"] == "replaced"}
        trained = frozenset(self.pinned.train)
        self.list_lost({name: reason for name, reason in found.items() if name in trained})
        self.listed = set(found)

    def load_model(self, state: Mapping[str, Tensor]) -> None:
        """Put weights into the model, spread over the processes as its own are."""
        own = self.model.state_dict()
        self.model.load_saved({k: spread(v, own[k]) if k in own else v for k, v in state.items()})

    def refuse_other_settings(self, state: Mapping[str, Any]) -> None:
        """Raise UserError where config.yaml is not what a checkpoint was made with, as after an edit by hand."""
        then = from_dict(json.loads(state["config"])) if "config" in state else self.config
        fixed = fixed_differences(then, self.config)
        if fixed:
            told = "; ".join(f"--{name} is {was} there, {now} here" for name, (was, now) in fixed.items())
            raise UserError(
                f"'{self.run.folder / 'config.yaml'}' is not what the newest checkpoint was made with: {told}. Put it "
                "back, or start another run with --out"
            )
        done = state["step"] / float(state.get("steps_per_epoch", self.plan.steps_per_epoch))
        if done > self.config.epochs:
            raise UserError(
                f"'{self.run.folder}' has made {done:g} epochs: --epochs {self.config.epochs} would be fewer"
            )

    def take_up(self, state: Mapping[str, Any], rows: Tensor | None = None) -> None:
        """Put everything as it was when a checkpoint was written. rows: as of `Objective.load_rows`."""
        self.load_model(state["model"])
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
        asked, used = state.get("micro_batch", [self.config.micro_batch, self.micro_batch])
        if asked == self.config.micro_batch:  # what memory did not suffice for before should not be tried again
            self.micro_batch = used

    def stretch(self, state: dict[str, Any]) -> float:
        """Steps an epoch now, by those that a checkpoint was counted in."""
        return self.plan.steps_per_epoch / float(state.get("steps_per_epoch", self.plan.steps_per_epoch))


def rows_among(before: np.ndarray, now: np.ndarray) -> Tensor:
    """Where each of the ids `now` stands among the ids `before`: (N,) int64, -1 where it does not."""
    order = np.argsort(before)
    place = np.minimum(np.searchsorted(before, now, sorter=order), len(before) - 1)
    return torch.from_numpy(np.where(before[order[place]] == now, order[place], -1))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up an optimiser's state, spread over the processes as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        k: {name: spread(v, parameters[k]) if isinstance(v, Tensor) and v.dim() else v for name, v in entry.items()}
        for k, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})
