"""`Objective`: the terms of a method, its estimator tables and its temperature, as one module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from amclr.config.schema import LossConfig
from amclr.distributed.world import processes
from amclr.objectives import diagnostics
from amclr.objectives.adaptive import AdaptiveGamma
from amclr.objectives.batch import Checks, Scaled, agree, refuse, without_autocast
from amclr.objectives.contrasts import CONTRASTS
from amclr.objectives.estimators import ESTIMATORS, IndividualTemperatures, TermTables, make_tables
from amclr.objectives.methods import PAIRS, VIEWS, Method
from amclr.objectives.queue import Queue
from amclr.objectives.state import Overwritten, remapped
from amclr.objectives.step import Call, Parts, loss_and_metrics
from amclr.objectives.tables import Table


class Objective(nn.Module):
    """A contrastive objective over views of paired samples. Make one with `amclr.objectives.build`.

    Call it with a dict view -> (B, D) of unit rows and the sample ids. It returns the scalar loss and a dict of
    detached scalars. In training mode a call updates the estimators; in evaluation mode it does not. Arithmetic is in
    float32 (float64 if the views are float64), whatever autocast says. `state_dict()` carries the estimators, so it
    belongs in a checkpoint.

    Several rows with the same id are positives of each other, never negatives, and give their sample one averaged
    update. Rows of different samples that show the same (a copied image, a caption of two images) are made positives by
    `groups`: their estimates stay separate.

    If torch.distributed is initialised, the batch is that of all processes together: each passes its own rows, as many
    as it has, and gets the loss of the whole batch and its gradient with respect to its own rows. The estimators stay
    identical on all of them.

    `diagnose = True` adds to the metrics what one looks at when training goes wrong (`diagnostics.diagnose`).
    `remember = True` keeps what a step overwrites in tables and queue, so that `undo` can restore it.
    """

    def __init__(
        self, name: str, method: Method, num_samples: Mapping[str, int], settings: LossConfig, *,
        validate: bool | None = None, distributed: bool = True, averaged: bool = False, folder: Path | None = None,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        """settings: without empty ones; the others as of `build`."""
        super().__init__()
        self.name, self.method, self.settings = name, method, settings
        self.num_samples, self.distributed, self.averaged = dict(num_samples), distributed, averaged
        self.terms = method.terms(settings)
        self.pairs = PAIRS[settings.pairs or method.pairs]
        self.required_views = tuple(dict.fromkeys(v for t in self.terms for v in (t.anchor, t.candidate, *t.also)))
        self.gamma = settings.gamma
        self.diagnose, self.remember = False, False
        self._overwritten: Overwritten | None = None

        contrast = CONTRASTS[method.contrast]
        if settings.temperature_mode == "learnable":
            # As in CLIP: learned on a log scale, so that it stays positive.
            self.log_temperature = nn.Parameter(torch.tensor(math.log(settings.temperature or 1.0)))
        for parameter, start in contrast.learned.items():
            self.register_parameter(parameter, nn.Parameter(torch.tensor(start)))
        tables = TermTables(
            self.terms, make_tables(self.terms, settings, num_samples, folder) if contrast.has_estimates else {}
        )
        for table_name, table in tables.tables.items():
            self.add_module(table_name, table)
        views = tuple(v for v in VIEWS if v in self.required_views)
        self.queue = Queue(settings.queue, views) if settings.queue else None
        self.adaptive: AdaptiveGamma | None = None
        if settings.gamma_schedule == "adaptive" and contrast.has_estimates:
            self.adaptive = AdaptiveGamma(len(self.terms), settings.gamma)
        temperatures = IndividualTemperatures(tables, settings) if settings.temperature_mode == "individual" else None
        checks = Checks(name, self.required_views, num_samples, validate)
        estimator = ESTIMATORS[settings.estimator](tables, self.terms, self.adaptive)
        self.parts = Parts(
            self.terms, views, self.pairs, contrast, settings, checks, tables, estimator, temperatures, self.queue,
            backend,
        )  # fmt: skip
        if settings.gamma_schedule == "cosine":
            self.start_epoch(0, 1)

    # -- schedule ---------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Tell the objective where training is: the 0-based epoch of `epochs`.

        Sets gamma of the cosine schedule, from 1 in the first epoch to `gamma` in the last (FastCLIP, arXiv 2407.01445,
        section 4), and ends the reference estimator's first epoch. An objective with constant gamma does not need it.
        """
        self.parts.estimator.first_epoch = epoch == 0
        if self.settings.gamma_schedule == "cosine":
            progress, final = epoch / max(epochs - 1, 1), self.settings.gamma
            self.gamma = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def temperature(self) -> Tensor:
        """The shared temperature, or the mean of the individual ones, as a 0-dim tensor."""
        settings = self.settings
        if settings.temperature_mode == "learnable":
            # Only the value is clamped: clamp's own gradient is zero at a bound, from which there would be no return.
            value = self.log_temperature.exp()
            return value + (value.clamp(settings.temperature_min, settings.temperature_max) - value).detach()
        if settings.temperature_mode == "individual":
            tables = [t for name, t in self.tables.items() if name in ("tau_image", "tau_text")]
            return torch.cat([t.values.flatten() for t in tables]).mean()
        return torch.tensor(settings.temperature, dtype=torch.float64)

    # -- one step ---------------------------------------------------------------------------------

    def forward(
        self,
        views: Mapping[str, Tensor],
        ids: Tensor | Mapping[str, Tensor],
        groups: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its metrics.

        views: view name -> (B, D), unit rows. ids: (B,) int64 in [0, num_samples), or {"image": ids, "text": ids} if
        images have several captions. groups: view name -> (B,) int64, equal where views show the same, below 0 where a
        view is like no other; so are views left out. Rows i and j are positives of each other, in all terms and both
        directions, if they share an id, or if an image view of i and one of j share a group, or a text view of i and
        one of j (docs/method.md). Groups of views that the objective does not use are ignored.

        Raises ValueError, naming the view or argument, for missing views, different shapes, a batch of one, or ids of
        the wrong type; values are checked as `validate` says. Of several processes, all raise if one does. All must
        call, in evaluation too: build an objective for one process alone with `distributed=False`.
        """
        together = self.distributed and processes() > 1
        device = next((v.device for v in views.values() if isinstance(v, Tensor)), torch.device("cpu"))
        try:
            labels = self.parts.checks(views, ids, groups)
            used = [views[v] for v in self.parts.views]
            queued = 0 if self.queue is None else self.queue.check(used[0].shape[1])
        except Exception:
            if together:
                refuse(device)
            raise
        dtype = reduce(torch.promote_types, (v.dtype for v in used))
        gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (*used, *self.parameters()))
        world = agree(
            len(used[0]), device, together, used[0].shape[1], dtype, self.training, gradient, self.diagnose, labels,
            queued,
        )  # fmt: skip
        if self.training and self.settings.temperature_mode == "learnable":
            with torch.no_grad():
                bounds = self.settings.temperature_min, self.settings.temperature_max
                self.log_temperature.clamp_(*map(math.log, bounds))
        if sum(world.sizes) < 2:
            raise ValueError("a batch of 1 has no negatives: pass at least 2 samples")
        labels = labels.gather(world, device)
        if self.remember:
            self._overwritten = Overwritten(self.tables, self.adaptive, self.queue, labels)
        with without_autocast(device):
            if not self.parts.takes_halves(used, dtype, self.diagnose, self.averaged and together):
                used = [v.to(torch.promote_types(torch.float32, dtype)) for v in used]
            if self.averaged and not world.alone:
                used = [Scaled.apply(x, float(len(world.sizes))) for x in used]
            call = Call(
                used, labels, labels.positives(device), world, dtype, self.gamma, self.training, self.diagnose, gradient
            )  # fmt: skip
            learned = {name: self.get_parameter(name) for name in self.parts.contrast.learned}
            return loss_and_metrics(self.parts, call, self.temperature, learned)

    def undo(self) -> None:
        """Restore what the last call overwrote in tables and queue, if it was remembered; once."""
        if self._overwritten:
            self._overwritten.restore()
        self.commit()

    def commit(self) -> None:
        """Keep what the last call wrote: `undo` restores what later calls overwrite."""
        self._overwritten = None

    # -- state -------------------------------------------------------------------------------------

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by name: `log_u_image` and the like."""
        return {name: module for name, module in self.named_children() if isinstance(module, Table)}

    def save_tables(self, folder: str | Path) -> None:
        """Write all tables into a folder, in pieces with checksums: for tables too large for one checkpoint file.

        Of several processes, whose tables are identical, one should call it.
        """
        for name in self.tables:  # so that an interrupted save is not mistaken for a complete one
            (Path(folder) / f"{name}.json").unlink(missing_ok=True)
        for name, table in self.tables.items():
            table.save(Path(folder), name)

    def load_tables(self, folder: str | Path) -> None:
        """Load what `save_tables` wrote, whatever the storage. Raises ValueError if it is damaged or another's."""
        for name, table in self.tables.items():
            table.load(Path(folder), name)

    def load_rows(self, state: Mapping[str, Tensor], rows: Tensor) -> None:
        """Load the state dict of the same objective over other samples, such as after some were added or removed.

        rows: (num_samples,) int64: sample i takes row `rows[i]` of the state's tables; of -1 it starts afresh.
        """
        self.load_state_dict(remapped(self.tables, state, rows))
        if self.queue is not None:
            self.queue.clear()  # its ids are those of the other samples

    @torch.no_grad()
    def estimator_error(
        self, views: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor], probe: Tensor, chunk: int | None = None,
        groups: Mapping[str, Tensor] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """How far the estimates are from the truth: an exact pass of some anchors over a whole data set.

        views: view name -> (N, D), unit rows of all samples at the present weights. ids, groups: (N,), or by modality
        and by view, as in a step. probe: (P,) int64, rows of the anchors to look at. chunk: anchors at once; by default
        as many as have 2^26 similarities.

        Returns, by term and as the mean over terms, `bias` (mean of log u - log of the exact inner mean) and `rms` of
        the same over visited anchors, NaN if there are none; and `unseen`, the share of anchors not visited. Raises
        ValueError for an objective without estimates.
        """
        if not self.parts.contrast.has_estimates:
            raise ValueError(f"'{self.name}' keeps no estimates")
        first = views[self.parts.views[0]]
        labels = self.parts.checks(views, ids, groups).to(first.device)
        tau: float | Tensor | None = self.settings.temperature
        if self.settings.temperature_mode != "fixed":
            tau = self.temperature if self.settings.temperature_mode == "learnable" else None
        with without_autocast(first.device):
            return diagnostics.estimator_error(
                self.terms, self.parts.tables, views, labels, probe.to(first.device),
                chunk or max(1, (1 << 26) // len(first)), tau,
            )  # fmt: skip

    def extra_repr(self) -> str:
        """What `print(objective)` shows."""
        settings = self.settings
        return (
            f"{self.name}: {len(self.terms)} terms, {settings.temperature_mode} temperature {settings.temperature:g}, "
            f"gamma {self.gamma:g} ({settings.gamma_schedule}), {settings.estimator} estimator"
            + (f", consistency penalties at {settings.cyclic_weight:g}" if settings.cyclic_weight else "")
            + (f", a queue of {self.queue.size}" if self.queue is not None else "")
        )
