"""`Objective`: the terms of a method, its estimator tables and its temperature, as one module."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from amclr.distributed.world import World, processes
from amclr.objectives import contrast as math_of
from amclr.objectives.adaptive import AdaptiveGamma, log_noise
from amclr.objectives.blocks import NEG_INF, Blocks, Layout, Positives, Workspace
from amclr.objectives.methods import PAIRS, VIEWS, Method, Pairs, Term, modality
from amclr.objectives.queue import Queue, QueuedNegatives
from amclr.objectives.tables import Table

UNIT_TOLERANCE = 2e-2
REFERENCE_EPS = 1e-8
SMALL = 1 << 18
"""Grids of at most this many similarities are worked on at once: there, calls cost more than arithmetic."""
QUANTILE_SAMPLE = 1 << 20
"""torch.quantile takes at most 2^24 numbers, and an even sample of them says as much."""
COMPARED = ("dimensions", "type", "training", "gradient", "diagnostics", "groups", "queued samples")
"""What the processes compare before a step, so that none waits for a collective that another does not call."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
DEAD = 0.01
"""An anchor whose weights sum to less than this gives next to no gradient."""


class Objective(nn.Module):
    """A contrastive objective over views of paired samples. Make one with `amclr.objectives.build`.

    Call it with a dict view -> (B, D) of unit rows and the sample ids; it returns the scalar loss
    and a dict of detached scalars. In training mode a call updates the estimators; in evaluation
    mode it leaves them alone. Arithmetic is in float32 (float64 where the views are float64), whatever
    autocast says. `state_dict()` carries the estimators, so it belongs in a checkpoint.

    Several rows with the same id are positives of each other, never negatives, and give their
    sample one averaged update. Rows of different samples that show the same (a copied image, a caption
    that stands under two) are made positives by `groups`: they keep their estimates to themselves.

    Where torch.distributed is initialised, the batch is that of all processes together: each passes
    its own rows, as many as it has, and gets the loss of the whole batch and the gradient of it with
    respect to its own rows. The estimators stay the same on all of them.

    `diagnose = True` adds to the metrics what one looks at when training goes wrong (see `_diagnose`).
    `remember = True` keeps what a step overwrites in tables and queue, so that `undo` can put it back.
    """

    def __init__(
        self,
        name: str,
        method: Method,
        num_samples: Mapping[str, int],
        *,
        temperature: float,
        gamma: float,
        gamma_schedule: str,
        temperature_mode: str,
        temperature_range: tuple[float, float],
        temperature_lr: float,
        temperature_momentum: float,
        rho: float,
        pairs: Pairs | None,
        weights: Mapping[str, float] | None,
        cyclic_weight: float,
        queue: int,
        estimator: str,
        validate: bool | None,
        distributed: bool,
        averaged: bool,
        storage: str,
        folder: Path | None,
        matmul_dtype: str,
        backend: str,
    ) -> None:
        super().__init__()
        self.name, self.method = name, method
        self.terms = method.terms(pairs, weights)
        self.pairs = PAIRS[pairs or method.pairs]
        self.required_views = tuple(dict.fromkeys(v for t in self.terms for v in (t.anchor, t.candidate, *t.also)))
        self.num_samples = dict(num_samples)
        self.gamma, self.gamma_final, self.gamma_schedule = gamma, gamma, gamma_schedule
        self.temperature_mode = temperature_mode
        self.tau_min, self.tau_max = temperature_range
        self.tau_lr, self.tau_momentum = temperature_lr, temperature_momentum
        self.rho = rho if temperature_mode != "fixed" else 0.0
        self.cyclic_weight = cyclic_weight
        self.estimator = estimator
        self.validate, self.distributed, self.averaged = validate, distributed, averaged
        self.matmul_dtype, self.backend = matmul_dtype, backend
        self.initial_temperature = temperature
        self.diagnose = False
        self.remember = False
        self._former: list[tuple[Table, Tensor, Tensor]] = []
        self._former_statistics: dict[str, Tensor] = {}
        self._former_queue: tuple[Tensor, Tensor, Tensor] | None = None
        self._first_epoch = True
        self._stacked = tuple(v for v in VIEWS if v in self.required_views)
        self._place = {v: k for k, v in enumerate(self._stacked)}
        self._layouts_of = {whole: self._layouts(whole) for whole in (True, False)}
        self._weight_tensors: dict[Any, Tensor] = {}
        self._workspace = Workspace()
        self._columns = {of: [t for t in self.terms if modality(t.anchor) == of] for of in ("image", "text")}

        if temperature_mode == "learnable":
            # As in CLIP: learned on a log scale, so that it stays positive.
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        if method.contrast == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-10.0))
        if method.contrast == "global":
            fills = {"log_u": NEG_INF}
            if temperature_mode == "individual":
                fills |= {"tau": temperature, "tau_velocity": 0.0}
            for of in sorted({modality(t.anchor) for t in self.terms}):
                for what, fill in fills.items():
                    columns = 1 if estimator == "reference" and what == "log_u" else len(self._columns[of])
                    self.add_module(f"{what}_{of}", Table(self.num_samples[of], columns, fill, storage, folder))
        self.queue = Queue(queue, self._stacked) if queue else None
        self.adaptive: AdaptiveGamma | None = None
        if gamma_schedule == "adaptive" and method.contrast == "global":
            self.adaptive = AdaptiveGamma(len(self.terms), gamma)
        if gamma_schedule == "cosine":
            self.start_epoch(0, 1)

    # -- schedule ---------------------------------------------------------------------------------

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Tell the objective where training stands (0-based epoch of `epochs`).

        Sets gamma of the cosine schedule, from 1 in the first epoch to `gamma` in the last (FastCLIP,
        arXiv 2407.01445, section 4), and ends the reference estimator's first epoch. A plain
        constant-gamma objective never needs it.
        """
        self._first_epoch = epoch == 0
        if self.gamma_schedule == "cosine":
            share = epoch / max(epochs - 1, 1)
            self.gamma = self.gamma_final + (1 - self.gamma_final) * 0.5 * (1 + math.cos(math.pi * share))

    @property
    def temperature(self) -> Tensor:
        """The shared temperature, or the mean of the individual ones, as a 0-dim tensor."""
        if self.temperature_mode == "learnable":
            # Clamped in value alone: clamp's own gradient is zero at a bound, from which there would be no way back.
            value = self.log_temperature.exp()
            return value + (value.clamp(self.tau_min, self.tau_max) - value).detach()
        if self.temperature_mode == "individual":
            every = [self._table("tau", of).values for of, columns in self._columns.items() if columns]
            return torch.cat([t.flatten() for t in every]).mean()
        return torch.tensor(self.initial_temperature, dtype=torch.float64)

    def undo(self) -> None:
        """Put back what the last call overwrote in tables and queue, if it was to be remembered; once."""
        for table, ids, former in self._former:
            table.write(ids, 0, table.values.shape[1], former)
        if self._former and self.adaptive:
            self.adaptive.load_state_dict(self._former_statistics)
        if self._former_queue is not None and self.queue is not None:
            self.queue.state = self._former_queue
        self.forget()

    def forget(self) -> None:
        """Let the last call stand: `undo` puts back what later ones overwrite."""
        self._former, self._former_queue = [], None

    # -- one step ---------------------------------------------------------------------------------

    def forward(
        self,
        views: Mapping[str, Tensor],
        ids: Tensor | Mapping[str, Tensor],
        groups: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its metrics.

        views: view name -> (B, D), unit rows. ids: (B,) int64 in [0, num_samples), or
        {"image": ids, "text": ids} where an image has several captions. groups: view name -> (B,) int64,
        equal where views show the same, below 0 where a view is like no other; views left out are so too.
        Rows i and j are positives of each other, in all terms and both directions, if they share an id, or
        if an image view of i and one of j are of a group, or a text view of i and one of j: what describes
        the one image describes the other (docs/method.md). Groups of views that the objective does not use
        are not looked at.
        Raises ValueError, naming the view or argument, for missing views, unlike shapes, a batch
        of one, or ids of the wrong type; values are checked as `validate` says. Of several processes,
        all raise if one does. They must all call, in evaluation too: an objective for one process alone
        is built with `distributed=False`.
        """
        together = self.distributed and processes() > 1
        device = next((v.device for v in views.values() if isinstance(v, Tensor)), torch.device("cpu"))
        try:
            id_of, shown = self._check(views, ids, groups)
        except Exception:
            if together:
                _tell_the_others(device)
            raise
        first = views[self._stacked[0]]
        source = reduce(torch.promote_types, (views[v].dtype for v in self._stacked))
        leaves = (*(views[v] for v in self._stacked), *self.parameters())
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
        grouped = sum(1 << VIEWS.index(v) for v in shown)
        held = 0 if self.queue is None else len(self.queue)
        same = (first.shape[1], DTYPES.index(source), self.training, wanted, self.diagnose, grouped, held)
        world = World.of(len(first), device, together, dict(zip(COMPARED, same, strict=True)) if together else {})
        if self.training and self.temperature_mode == "learnable":
            with torch.no_grad():
                self.log_temperature.clamp_(math.log(self.tau_min), math.log(self.tau_max))
        if sum(world.sizes) < 2:
            raise ValueError("a batch of 1 has no negatives: pass at least 2 samples")
        id_of, shown, positives = _together(id_of, shown, world, device)
        if self.remember:
            self._former = [(table, id_of[of], table.read(id_of[of], 0, table.values.shape[1], table.values))
                            for of, table in ((name.rpartition("_")[2], t) for name, t in self._tables())]  # fmt: skip
            if self.adaptive:
                self._former_statistics = {name: b.clone() for name, b in self.adaptive.state_dict().items()}
            if self.queue is not None:
                self._former_queue = self.queue.state
        with _without_autocast(device):
            by_autograd = self.method.contrast == "sigmoid" or any(t.also for t in self.terms)
            exact = torch.promote_types(torch.float32, source)
            as_they_are = not by_autograd and self._takes_halves(views, source)
            inputs = {v: views[v] if as_they_are else views[v].to(exact) for v in self._stacked}
            if self.averaged and len(world.sizes) > 1:
                inputs = {v: _Scaled.apply(x, float(len(world.sizes))) for v, x in inputs.items()}
            if by_autograd:
                total, metrics = self._autograd_loss(inputs, positives, world)
            else:
                total, metrics = self._closed_form_loss(inputs, id_of, shown, positives, world, wanted, source)
            if self.cyclic_weight:
                penalty = self._cyclic_penalty({v: world.gather_rows(x.to(exact)) for v, x in inputs.items()})
                total, metrics["loss_cyclic"] = total + penalty, penalty.detach()
        # Of its own storage: whoever divides the loss in place should not change what is logged.
        own = metrics.pop("loss", None)
        if own is None or self.cyclic_weight:
            own = total.detach().clone()
        return total, {"loss": own, **metrics}

    # -- the closed form --------------------------------------------------------------------------

    def _closed_form_loss(
        self, views: dict[str, Tensor], ids: dict[str, Tensor], groups: dict[str, Tensor], positives: Positives,
        world: World, wanted: bool, source: torch.dtype,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The loss of the terms. Its gradient is computed with it, if `wanted`; backward only multiplies.

        ids, groups, positives: of the whole batch. source: the type that the views came in.
        """
        metrics: dict[str, Tensor] = {}
        tau = self.temperature if self.temperature_mode == "learnable" else None

        def compute() -> tuple[Tensor, Tensor | None, Tensor | None]:
            own = [views[v].detach() for v in self._stacked]
            known = None if tau is None else tau.detach()
            found = self._closed_form(own, ids, groups, positives, known, world, wanted, source, metrics)
            metrics["loss"] = found[0]
            return found

        loss = _ClosedForm.apply(compute, tau, *views.values())  # fills in the metrics
        return loss, metrics

    def _closed_form(
        self,
        views: list[Tensor],
        ids: dict[str, Tensor],
        groups: dict[str, Tensor],
        positives: Positives,
        learned_tau: Tensor | None,
        world: World,
        wanted: bool,
        source: torch.dtype,
        metrics: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, gradient (V, M, D) of the views, and gradient of a learned temperature.

        views: V of (M, D), the rows of this process. Updates the tables; fills in the metrics.
        """
        matmul_dtype = self.matmul_dtype
        if matmul_dtype == "auto" and source in HALVES:
            matmul_dtype = str(source).removeprefix("torch.")
        if matmul_dtype in ("float16", "bfloat16"):
            views = [v.to(getattr(torch, matmul_dtype)).to(v.dtype) for v in views]
        every = views if world.alone else list(world.gather(torch.stack(views), 1))
        like, size = every[0], len(every[0])
        if self._uses_triton(like) and self._is_plain(like):
            return self._few_launches(every, ids, learned_tau, world, positives, wanted, matmul_dtype, metrics)
        queued: QueuedNegatives | None = None
        mine = world.mine
        if self.queue is not None:
            # Labels may be on the CPU, where it shows at no cost whether any match.
            there_ids, there_groups = (
                {k: x.to(like.device, non_blocking=True) for k, x in labels.items()} for labels in (ids, groups)
            )
            if len(self.queue):
                own_ids, own_groups = ({k: x[mine] for k, x in labels.items()} for labels in (there_ids, there_groups))
                queued = QueuedNegatives(self.queue, views, own_ids, own_groups)
        # Where no two rows are positives of each other, everybody has size - 1 negatives.
        in_batch = positives.negatives(like) if positives.matches or queued else None
        count = in_batch
        if queued and in_batch is not None:
            count = in_batch + world.gather(queued.counts())
        some = None if count is None or positives.matches is None else count > 0
        # Else the rows of a sample are averaged, without those that have no negative.
        simple = positives.unique and some is None
        if some is not None:
            self._require_negatives(some)
        log_n: Tensor | float = math.log(size - 1) if count is None else count.clamp(min=1).log()
        tau: float | Tensor = self.initial_temperature
        if learned_tau is not None:
            tau = float(learned_tau) if like.device.type == "cpu" else learned_tau.to(like.dtype)
        individual = self.temperature_mode == "individual"
        slopes = self.diagnose or (individual and self.training)
        loss = None
        queue_pull: float | Tensor = 0.0
        gradient = like.new_empty(len(views), len(views[0]), like.shape[1]) if wanted or slopes else None
        written: set[int] = set()

        for wave in self._waves(size, world, like):
            terms = [t for layout in wave for t in layout.terms]
            weights = self._weights(terms, like)
            taus = self._read("tau", wave, ids, like) if individual else tau
            blocks = self._blocks(every, world, wave, taus, positives, matmul_dtype)
            found = [*blocks.log_sums()]
            if queued:
                places = self._places(terms)
                own_taus = taus[:, mine] if individual and isinstance(taus, Tensor) else taus
                found.append(queued.log_sums(places, own_taus))
            if not world.alone:
                found = list(world.gather(torch.stack(found), 2))
            sums, positive = found[:2]
            every_sum = torch.logaddexp(sums, found[2]) if queued else sums
            log_g = (every_sum - positive / taus).sub_(log_n)
            if some is not None:
                log_g = torch.where(some, log_g, 0.0)
            if self.method.contrast == "batch":
                # Cross-entropy: -log softmax of the positive among itself and its negatives.
                values = torch.nn.functional.softplus(log_g + log_n)
                log_u = values - log_n
            else:
                noise = self._noise(terms, every, taus, positives) if self.adaptive and self.training else None
                if noise is not None and queued and in_batch is not None and count is not None:
                    noise = noise * (in_batch / count.clamp(min=1)).mean()  # that of a mean over so many more
                log_u = self._update_log_u(wave, log_g, ids, some, simple, noise)
                values = taus * (log_u + self.rho if self.rho else log_u)
            if some is not None:
                values = torch.where(some, values, 0.0)
            parts = values.sum(1) * (weights / size)
            value = parts.sum()
            loss = value if loss is None else loss + value
            self._report(metrics, terms, parts, value, positive, log_g, taus)
            if gradient is None:
                continue
            # The coefficient of the gradient goes into the exponents.
            coefficient = weights / size if self.method.contrast == "global" else weights / (size * tau)
            log_c = math.log(coefficient) if isinstance(coefficient, float) else coefficient.log()[..., None]
            share = log_g - log_u  # of an anchor, the log of the sum of its weights
            log_own = share + log_c
            # s_ii / tau + log n + log u - log c, since log g = log of the sum - s_ii / tau - log n.
            offsets, own = every_sum - log_own, log_own.exp()
            if some is not None:
                offsets, own = torch.where(some, offsets, math.inf), torch.where(some, own, 0.0)
            # The weights of anchors on the batch alone are what its candidates and its positives are moved by.
            pulls = blocks.gradients(offsets, (sums - offsets).exp() if queued else own, gradient, written, slopes)
            if queued:
                total = (found[2] - offsets)[:, mine].exp()
                further = queued.gradients(places, own_taus, offsets[:, mine], total, gradient)
                queue_pull = queue_pull + (further - total * positive[:, mine]).sum()
                pulls = None if pulls is None else pulls + further
            if pulls is not None:
                pulls = pulls if world.alone else world.gather(pulls, 1)
                pulls = (pulls - own * positive) / (math.exp(log_c) if isinstance(log_c, float) else log_c.exp()) / taus
                if isinstance(taus, Tensor) and individual and self.training:
                    slope = log_u + self.rho - pulls
                    self._update_temperatures(wave, slope, ids, some, taus, simple)
                if self.diagnose:
                    self._diagnose(metrics, terms, log_g, share, log_n, pulls, taus, some)

        assert loss is not None
        if self.adaptive and self.training:
            metrics["gamma"] = self.adaptive.gamma().mean()
        if self.queue is not None and self.training:
            self.queue.push(every, there_ids, there_groups)
        if gradient is None or not wanted:
            return loss, None, None
        return loss, gradient, self._tau_gradient(views, gradient, learned_tau, tau, loss, world, queue_pull)

    def _require_negatives(self, found: Tensor) -> None:
        """Raise ValueError, where values are checked, if nothing in `found` (bool) is True."""
        if self._validates(found) and not bool(found.any()):
            raise ValueError(
                "no row of the batch has a negative: all share an id or a group, so there is nothing to contrast"
            )

    def _is_plain(self, like: Tensor) -> bool:
        """Whether the step's numbers per anchor can stay in the Triton kernels."""
        on_device = all(t.storage == "device" and t.values.device == like.device for _, t in self._tables())
        return (
            on_device
            and self.estimator == "per-term"
            and self.temperature_mode != "individual"
            and not self.diagnose
            and not self.adaptive
            and self.queue is None
        )

    def _takes_halves(self, views: Mapping[str, Tensor], source: torch.dtype) -> bool:
        """Whether views in half precision go to the Triton kernels as they came, so that no copy in float32 is made."""
        first = views[self._stacked[0]]
        return (
            source in HALVES
            and self.matmul_dtype in ("auto", str(source).removeprefix("torch."))
            and all(views[v].dtype == source for v in self._stacked)
            # What is to be multiplied by the number of processes would first be rounded to float16.
            and not (source == torch.float16 and self.averaged and self.distributed and processes() > 1)
            and self._uses_triton(first)
            and self._is_plain(first)
        )

    def _few_launches(
        self, every: list[Tensor], ids: dict[str, Tensor], learned_tau: Tensor | None, world: World,
        positives: Positives, wanted: bool, matmul_dtype: str, metrics: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """`_closed_form` in a handful of launches: at small batches on a GPU, nothing else counts."""
        [wave] = self._waves(len(every[0]), world, every[0])
        terms = [t for layout in wave for t in layout.terms]
        tau = self.initial_temperature if learned_tau is None else learned_tau.float()
        blocks = self._blocks(every, world, wave, tau, positives, matmul_dtype)
        tables = [table for name, table in self._tables() if name.startswith("log_u")]
        modalities = list(ids)
        places = []
        for _, of, first, last in self._sides(wave):
            width = len(self._columns[of])
            places += [(modalities.index(of), column, width) for column in range(first, last)]
        here = {id(i): i.to(every[0].device) for i in ids.values()}
        anchors = world.gather(blocks.anchors(), 1)
        if self._validates(anchors):
            self._require_negatives(anchors[-1] > 0)
        offsets, own, found = blocks.estimate(
            anchors, [here[id(i)] for i in ids.values()], tuple(places), [t.weight for t in terms],
            [table.values for table in tables], self.gamma, self.rho, self.training,
        )  # fmt: skip
        loss = found[0].sum()
        self._report_losses(metrics, terms, found[0], loss)
        metrics["margin"], metrics["positive"] = found[1, 0], found[2, 0]
        metrics["temperature"] = torch.as_tensor(tau, dtype=torch.float32)
        if not wanted:
            return loss, None, None
        own_rows = world.mine
        # bfloat16 has float32's range. In float16 a gradient would be lost before loss scaling can lift it.
        kind = torch.bfloat16 if blocks.z.dtype == every[0].dtype == torch.bfloat16 else torch.float32
        shape = len(every), own_rows.stop - own_rows.start, every[0].shape[1]
        gradient = torch.empty(shape, dtype=kind, device=every[0].device)
        blocks.gradients_from(offsets, own, gradient, set(), False)
        return loss, gradient, self._tau_gradient([v[own_rows] for v in every], gradient, learned_tau, tau, loss, world)

    def _tau_gradient(
        self, views: list[Tensor], gradient: Tensor, learned_tau: Tensor | None, tau: float | Tensor, loss: Tensor,
        world: World, queue_pull: float | Tensor = 0.0,
    ) -> Tensor | None:  # fmt: skip
        """The derivative of the loss with respect to a learned temperature, from the views' gradient.

        With G of `blocks`, sum_ij G_ij s_ij is the sum over anchors of c sum_j w_ij d_ij: the part of the
        derivative that depends on similarities, times -tau. Every pair stands in the gradients of both its
        members: hence the half, but for `queue_pull`, the sum over the pairs with what is queued, which stand in
        their anchors' alone. A global term, tau (log u + rho), also has its own value over tau.
        """
        if learned_tau is None:
            return None
        pulls = torch.stack([(v.to(loss.dtype) * g).sum() for v, g in zip(views, gradient, strict=True)]).sum()
        slope = -world.sum((pulls + queue_pull) / 2) / tau
        return slope + loss / tau if self.method.contrast == "global" else slope

    def _layouts(self, whole: bool) -> list[Layout]:
        """The terms as grids of blocks. whole: all image-text pairs as one grid, where they make one."""
        place = self._place
        by_views = {(t.anchor, t.candidate): t for t in self.terms}
        images, texts = ([v for v in self._stacked if modality(v) == of] for of in ("image", "text"))
        cross = [(i, t) for i in images for t in texts if (i, t) in by_views]
        groups: list[tuple[list[str], list[str]]]
        if not cross or len(cross) < len(images) * len(texts):
            groups = [([i], [t]) for i, t in cross]
        else:
            groups = [(images, texts)] if whole else [([i], texts) for i in images]
        groups += [([v[0]], [v[1]]) for v in (images, texts) if len(v) == 2 and tuple(v) in by_views]
        found = []
        for rows, columns in groups:
            forth = [by_views[r, c] for r in rows for c in columns]
            back = [by_views[c, r] for r in rows for c in columns]
            found.append(Layout(
                range(place[rows[0]], place[rows[-1]] + 1), range(place[columns[0]], place[columns[-1]] + 1),
                (*forth, *back),
            ))  # fmt: skip
        return found

    def _waves(self, size: int, world: World, like: Tensor) -> list[list[Layout]]:
        """The layouts of all terms, in groups that are worked on at once, for a batch of `size`.

        The reference estimator's terms overwrite one table in their order, so it needs them all at
        once; so does a batch over several processes, to exchange all its numbers in one go.
        """
        small = len(self.terms) * size * size <= SMALL
        layouts = self._layouts_of[small]
        if small or self.estimator == "reference" or not world.alone or self._uses_triton(like):
            return [layouts]
        return [[layout] for layout in layouts]

    def _weights(self, terms: list[Term], like: Tensor) -> float | Tensor:
        """Weights of terms: one number where they are equal, else (T,)."""
        weights = tuple(t.weight for t in terms)
        if len(set(weights)) == 1:
            return weights[0]
        key = weights, like.dtype, like.device
        if key not in self._weight_tensors:  # made once: a copy to a device may not stand in a CUDA graph
            self._weight_tensors[key] = torch.tensor(weights, dtype=like.dtype, device=like.device)
        return self._weight_tensors[key]

    def _blocks(
        self, every: list[Tensor], world: World, wave: list[Layout], taus: float | Tensor, positives: Positives,
        matmul_dtype: str,
    ) -> Any:  # fmt: skip
        """The passes over some layouts' blocks, by the backend that this batch is for."""
        if not self._uses_triton(every[0]):
            return Blocks(every, world.mine, wave, taus, positives, self._workspace)
        from amclr.objectives.kernels import TritonBlocks

        # An anchor's weights sum to at most 1 / gamma, or 1 for a softmax; times the coefficient, times B, for two.
        largest = 2 * max(t.weight for t in self.terms)
        largest /= self.gamma if self.method.contrast == "global" else self._least_tau
        return TritonBlocks(every, world.mine, wave, taus, positives, matmul_dtype, largest)

    @property
    def _least_tau(self) -> float:
        return self.tau_min if self.temperature_mode == "learnable" else self.initial_temperature

    def _uses_triton(self, like: Tensor) -> bool:
        """Whether a batch goes to Triton. Raises ValueError where it was asked for and cannot run."""
        if self.backend == "eager" or like.dtype == torch.float64:
            return False
        if self.backend == "triton":
            if like.device.type == "cpu" and not os.environ.get("TRITON_INTERPRET"):
                raise ValueError("backend 'triton' needs views on a GPU (or TRITON_INTERPRET=1): use backend='auto'")
            return True
        return like.device.type == "cuda" and _triton_installed()

    # -- estimators and individual temperatures ----------------------------------------------------

    def _sides(self, wave: list[Layout]) -> Iterator[tuple[slice, str, int, int]]:
        """The terms of a wave by table: which of them, whose table, its first column and the one after the last."""
        start = 0
        for layout in wave:
            half = len(layout.terms) // 2
            for terms in (layout.terms[:half], layout.terms[half:]):
                of = modality(terms[0].anchor)
                first = self._columns[of].index(terms[0])
                yield slice(start, start + half), of, first, first + half
                start += half

    def _table(self, what: str, of: str) -> Table:
        table = self._modules[f"{what}_{of}"]
        assert isinstance(table, Table)
        return table

    def _read(self, what: str, wave: list[Layout], ids: dict[str, Tensor], like: Tensor) -> Tensor:
        """What the tables `what` hold for the terms of a wave and the samples of a batch, (T, N)."""
        found = [self._table(what, of).read(ids[of], first, last, like) for _, of, first, last in self._sides(wave)]
        return torch.cat(found)

    def _write(self, what: str, wave: list[Layout], ids: dict[str, Tensor], values: Tensor) -> None:
        for part, of, first, last in self._sides(wave):
            self._table(what, of).write(ids[of], first, last, values[part])

    def _mean_by_sample(
        self, wave: list[Layout], ids: dict[str, Tensor], values: Tensor, some: Tensor | None, log: bool
    ) -> Tensor:
        """Values (T, N) averaged over the rows of the batch that are the same sample and have negatives."""
        if len({id(i) for i in ids.values()}) == 1:
            return math_of.mean_by_id(next(iter(ids.values())), values, some, log)
        return torch.cat([math_of.mean_by_id(ids[of], values[part], some, log) for part, of, _, _ in self._sides(wave)])

    def _places(self, terms: list[Term]) -> list[tuple[int, int]]:
        """Where the anchor and the candidate of terms stand among the views."""
        return [(self._place[t.anchor], self._place[t.candidate]) for t in terms]

    def _noise(self, terms: list[Term], every: list[Tensor], taus: float | Tensor, positives: Positives) -> Tensor:
        """Variance of log g of some terms, (T,): what the adaptive gamma needs besides the estimates."""
        anchors, candidates = (list(places) for places in zip(*self._places(terms), strict=True))
        return log_noise(every, anchors, candidates, taus, positives)

    def _update_log_u(
        self, wave: list[Layout], log_g: Tensor, ids: dict[str, Tensor], some: Tensor | None, simple: bool,
        noise: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The anchors' updated log u (T, N), 0 where there is no negative; written to the tables when training.

        noise: where the adaptive gamma is to take up what this batch shows, before it is used.
        """
        if self.estimator == "reference":
            return self._update_reference(wave, log_g, ids, some, simple)
        before = self._read("log_u", wave, ids, log_g)
        expected: Tensor = before
        gamma: float | Tensor = self.gamma
        if self.adaptive:
            rows = [self.terms.index(t) for layout in wave for t in layout.terms]
            if noise is not None:
                self.adaptive.observe(rows, before, log_g, noise, some)
            expected, gamma = self.adaptive.expect(rows, before)
        after = math_of.update_log_u(expected, log_g, gamma)
        if self.training:
            mean = after if simple else self._mean_by_sample(wave, ids, after, some, log=True)
            self._write("log_u", wave, ids, _learned(mean, before, some))
        return after if some is None else torch.where(some, after, 0.0)

    def _update_reference(
        self, wave: list[Layout], log_g: Tensor, ids: dict[str, Tensor], some: Tensor | None, simple: bool
    ) -> Tensor:
        """As the public AmCLR code: the terms overwrite one estimate per sample in their order; u = g at first; eps."""
        found = torch.empty_like(log_g)
        place = {t: k for k, t in enumerate(t for layout in wave for t in layout.terms)}
        for term in self.terms:
            k, of = place[term], modality(term.anchor)
            table, g = self._table("log_u", of), log_g[k : k + 1]
            before = table.read(ids[of], 0, 1, g)
            after = math_of.update_log_u(
                torch.full_like(before, NEG_INF) if self._first_epoch else before, g, self.gamma
            )
            if self.training:
                mean = after if simple else math_of.mean_by_id(ids[of], after, some, log=True)
                table.write(ids[of], 0, 1, _learned(mean, before, some))
            found[k] = torch.logaddexp(after, torch.full_like(after, math.log(REFERENCE_EPS)))[0]
        return found if some is None else torch.where(some, found, 0.0)

    def _update_temperatures(
        self, wave: list[Layout], slope: Tensor, ids: dict[str, Tensor], some: Tensor | None, taus: Tensor, simple: bool
    ) -> None:
        """One step of iSogCLR's temperatures: momentum on d F_i / d tau_i, then a clamp to the range."""
        before = self._read("tau_velocity", wave, ids, taus)
        mean = slope if simple else self._mean_by_sample(wave, ids, slope, some, log=False)
        velocity = self.tau_momentum * before + (1 - self.tau_momentum) * mean
        moved = (taus - self.tau_lr * velocity).clamp(self.tau_min, self.tau_max)
        # NaN: of a sample without negatives, or from embeddings that are NaN.
        learned = ~mean.isnan()
        velocity, moved = torch.where(learned, velocity, before), torch.where(learned, moved, taus)
        self._write("tau_velocity", wave, ids, velocity)
        self._write("tau", wave, ids, moved)

    # -- what to look at ---------------------------------------------------------------------------

    def _report(
        self, metrics: dict[str, Tensor], terms: list[Term], parts: Tensor, value: Tensor, positive: Tensor,
        log_g: Tensor, taus: float | Tensor,
    ) -> None:  # fmt: skip
        """Losses by kind of term, the temperature, and what the first term says of its positives.

        positive: their mean similarity. margin: by how much it exceeds a soft maximum of the negatives'.
        """
        self._report_losses(metrics, terms, parts, value)
        if "margin" not in metrics:
            metrics["positive"] = positive[0].mean()
            if isinstance(taus, Tensor) and taus.dim():
                metrics["margin"], metrics["temperature"] = -(taus[0] * log_g[0]).mean(), taus.mean()
            else:
                metrics["margin"] = log_g[0].mean() * -taus
                metrics["temperature"] = taus.to(log_g) if isinstance(taus, Tensor) else log_g.new_full((), taus)

    @staticmethod
    def _report_losses(metrics: dict[str, Tensor], terms: list[Term], parts: Tensor, value: Tensor) -> None:
        kinds = [t.kind for t in terms]
        for kind in dict.fromkeys(kinds):
            own = value
            if kinds.count(kind) < len(kinds):
                own = parts[kinds.index(kind) : len(kinds) - kinds[::-1].index(kind)].sum()
            name = f"loss_{kind}"
            metrics[name] = metrics[name] + own if name in metrics else own

    def _diagnose(
        self, metrics: dict[str, Tensor], terms: list[Term], log_g: Tensor, log_share: Tensor, log_n: Tensor | float,
        pulls: Tensor, taus: float | Tensor, some: Tensor | None,
    ) -> None:  # fmt: skip
        """Add to the metrics, by kind of term, from sums that the gradient needs anyway.

        effective_negatives: exp of the entropy of an anchor's normalised weights: among how many negatives
        its gradient is shared. dead: share of anchors whose weights sum to less than DEAD: their estimate
        has run away from what the batch shows; they are left out of the first figure. share_p05, share_p95:
        quantiles of the sums of weights, g / u, which are 1 without memory. tau_p05, _p50, _p95: of
        individual temperatures.
        """
        kinds = [t.kind for t in terms]
        for kind in dict.fromkeys(kinds):
            rows = [k for k, of in enumerate(kinds) if of == kind]
            share = log_share[rows].exp()
            entropy = log_g[rows] + log_n - pulls[rows] / share.clamp(min=1e-30)
            alive = share >= DEAD if some is None else (share >= DEAD) & some
            # An anchor without weights has no entropy to speak of.
            effective = torch.where(alive, entropy.exp(), 0.0).sum() / alive.sum().clamp(min=1)
            quantiles = torch.quantile(_sample(share), share.new_tensor([0.05, 0.95]))
            metrics[f"effective_negatives_{kind}"] = effective
            metrics[f"dead_{kind}"] = 1 - alive.to(share.dtype).mean()
            metrics[f"share_p05_{kind}"], metrics[f"share_p95_{kind}"] = quantiles.unbind()
            if isinstance(taus, Tensor) and taus.dim():
                found = torch.quantile(_sample(taus[rows]), taus.new_tensor([0.05, 0.5, 0.95]))
                for name, value in zip(("p05", "p50", "p95"), found.unbind(), strict=True):
                    metrics[f"tau_{name}_{kind}"] = value

    @torch.no_grad()
    def estimator_error(
        self, views: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor], probe: Tensor, chunk: int | None = None,
        groups: Mapping[str, Tensor] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """How far the estimates are from the truth: an exact pass of some anchors over a whole data set.

        views: view name -> (N, D), unit rows of all samples, at the present weights. ids, groups: (N,) or by
        modality and by view, as in a step. probe: (P,) int64, rows of the anchors to look at. chunk: anchors at
        once; by default as many as have 2^26 similarities.

        Returns, by term and as the mean over terms, `bias` (mean of log u - log of the exact inner mean)
        and `rms` of the same, over the anchors that were visited, NaN where none was; and `unseen`, the
        share that was not. Raises ValueError for an objective without estimates.
        """
        if self.method.contrast != "global":
            raise ValueError(f"'{self.name}' keeps no estimates")
        device = views[self._stacked[0]].device
        own, shown = self._check(views, ids, groups)
        id_of, _, positives = _together(own, shown, World((len(next(iter(own.values()))),)), device)
        id_of = {of: i.to(device) for of, i in id_of.items()}
        probe = probe.to(device)
        chunk = chunk or max(1, (1 << 26) // len(views[self._stacked[0]]))
        with _without_autocast(device):
            return self._errors(views, id_of, positives, probe, chunk)

    def _errors(
        self, views: Mapping[str, Tensor], id_of: dict[str, Tensor], positives: Positives, probe: Tensor, chunk: int
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        totals: list[tuple[float, float, float]] = []
        for term in self.terms:
            of = modality(term.anchor)
            column = 0 if self.estimator == "reference" else self._columns[of].index(term)
            anchors, candidates = (v.to(torch.promote_types(torch.float32, v.dtype))
                                   for v in (views[term.anchor], views[term.candidate]))  # fmt: skip
            errors = []
            for rows in probe.split(chunk):
                tau: float | Tensor = self.initial_temperature
                if self.temperature_mode == "individual":
                    tau = self._table("tau", of).read(id_of[of][rows], column, column + 1, anchors).T
                elif self.temperature_mode == "learnable":
                    tau = self.temperature.to(anchors)
                s = anchors[rows] @ candidates.T
                own = (anchors[rows] * candidates[rows]).sum(1, keepdim=True)
                positive = positives.mask(rows, slice(None))
                if positive is None:
                    positive = rows[:, None] == torch.arange(positives.size, device=rows.device)
                exact = ((s - own) / tau).masked_fill(positive, NEG_INF).logsumexp(1)
                exact -= (~positive).sum(1).to(exact.dtype).log()
                errors.append(self._table("log_u", of).read(id_of[of][rows], column, column + 1, exact)[0] - exact)
            error = torch.cat(errors)
            seen = error[torch.isfinite(error)]
            row = (float(seen.mean()), float(seen.square().mean().sqrt()), 1 - len(seen) / len(error))
            totals.append(row)
            found |= {f"{name}/{term}": value for name, value in zip(("bias", "rms", "unseen"), row, strict=True)}
        means = (sum(column) / len(totals) for column in zip(*totals, strict=True))
        return found | dict(zip(("bias", "rms", "unseen"), means, strict=True))

    # -- the tables, apart from the state dict ------------------------------------------------------

    def save_tables(self, folder: str | Path) -> None:
        """Write all tables into a folder, in pieces with checksums: for tables too large for one checkpoint file.

        Of several processes, whose tables are the same, one alone should.
        """
        for name, _ in self._tables():  # what an interrupted save leaves should not be taken for whole
            (Path(folder) / f"{name}.json").unlink(missing_ok=True)
        for name, table in self._tables():
            table.save(Path(folder), name)

    def load_tables(self, folder: str | Path) -> None:
        """Take up what `save_tables` wrote, whatever the storage. Raises ValueError if it is damaged or another's."""
        for name, table in self._tables():
            table.load(Path(folder), name)

    def load_rows(self, state: Mapping[str, Tensor], rows: Tensor) -> None:
        """Take up the state dict of the same objective over other samples, such as after some were added or removed.

        rows: (num_samples,) int64: sample i takes row `rows[i]` of the state's tables; of -1 it starts afresh.
        """
        known = rows >= 0
        own = dict(state)
        for name, table in self._tables():
            key = f"{name}.values"
            values = table.values.detach().cpu().clone()
            values[known] = state[key].cpu()[rows[known]]
            own[key] = values
        self.load_state_dict(own)
        if self.queue is not None:
            self.queue.clear()  # its ids are those of the other samples

    def _tables(self) -> list[tuple[str, Table]]:
        return [(name, module) for name, module in self.named_children() if isinstance(module, Table)]

    # -- the other mini-batch objectives: autograd -------------------------------------------------

    def _autograd_loss(
        self, views: dict[str, Tensor], positives: Positives, world: World
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pairwise sigmoids, and terms with pooled negatives; every process works on the whole batch."""
        views = {v: world.gather_rows(x) for v, x in views.items()}
        mask = positives.mask(slice(None), slice(None))
        if mask is None:
            mask = torch.eye(positives.size, dtype=torch.bool, device=views[self._stacked[0]].device)
        negatives = ~mask
        self._require_negatives(negatives)
        total = zero = views[self._stacked[0]].new_zeros(())
        tau = self.temperature.to(total)
        metrics: dict[str, Tensor] = {}
        for term in self.terms:
            s = views[term.anchor] @ views[term.candidate].T
            if self.method.contrast == "sigmoid":
                per_anchor = math_of.sigmoid_terms(s, negatives, 1 / tau, self.bias.to(total))
            else:
                extra = (views[term.anchor] @ views[v].T for v in term.also)
                per_anchor = math_of.cross_entropy_terms(s, negatives, tau, *extra)
            value = term.weight * per_anchor.mean()
            total = total + value
            metrics[f"loss_{term.kind}"] = metrics.get(f"loss_{term.kind}", zero) + value.detach()
            metrics.setdefault("positive", s.detach().diagonal().mean())
        return total, {**metrics, "temperature": tau.detach()}

    def _cyclic_penalty(self, views: dict[str, Tensor]) -> Tensor:
        parts = [math_of.cyclic_penalty(views[i], views[t]) for i, t in self.pairs]
        return self.cyclic_weight * torch.stack(parts).mean()

    # -- arguments --------------------------------------------------------------------------------

    def _check(
        self, views: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor], groups: Mapping[str, Tensor] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Ids by modality, and the groups of the views that are used."""
        missing = [v for v in self.required_views if v not in views]
        if missing:
            raise ValueError(
                f"objective '{self.name}' needs the view{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                f"got {', '.join(views) or 'none'}"
            )
        for name in self.required_views:
            view = views[name]
            if not isinstance(view, Tensor) or view.dim() != 2 or not view.is_floating_point():
                raise ValueError(f"view '{name}' must be a floating-point (B, D) matrix, got {_describe(view)}")
            shape = tuple(views[self.required_views[0]].shape)
            if tuple(view.shape) != shape:
                raise ValueError(
                    f"view '{name}' has shape {tuple(view.shape)}, view '{self.required_views[0]}' has {shape}: "
                    "all views of a batch must agree"
                )
        if shape[0] < 1:
            raise ValueError("the batch is empty: pass at least 2 samples")
        if self.queue is not None and len(self.queue) and self.queue.rows.shape[2] != shape[1]:
            raise ValueError(
                f"views have {shape[1]} dimensions, and those of the batches before had {self.queue.rows.shape[2]}: "
                "build a new objective, or objective.queue.clear()"
            )
        id_of = self._ids_by_modality(ids, shape[0])
        shown = self._groups_of_used_views(groups, shape[0])
        if self._validates(views[self.required_views[0]]):
            self._check_values(views, id_of)
        return id_of, shown

    def _validates(self, like: Tensor) -> bool:
        """Whether values are checked: as asked for, else where it costs no synchronisation."""
        return like.device.type == "cpu" if self.validate is None else self.validate

    def _ids_by_modality(self, ids: Tensor | Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        used = sorted({modality(v) for v in self.required_views})
        if isinstance(ids, Tensor):
            named = {"ids": ids}
            found = dict.fromkeys(used, ids)
        elif not isinstance(ids, Mapping):
            raise ValueError(f"ids must be an int64 tensor, or a dict of them by modality, got {_describe(ids)}")
        else:
            absent = [m for m in used if m not in ids]
            if absent:
                raise ValueError(f"ids must hold {' and '.join(map(repr, used))}, got {sorted(ids)}")
            found = {m: ids[m] for m in used}
            named = {f"ids[{m!r}]": i for m, i in found.items()}
        for name, i in named.items():
            if not isinstance(i, Tensor) or i.dtype != torch.int64 or tuple(i.shape) != (batch,):
                raise ValueError(f"{name} must be an int64 tensor of shape ({batch},), got {_describe(i)}")
        # One tensor stays one, so that its work is done once.
        packed = {id(i): i.contiguous() for i in found.values()}
        return {of: packed[id(i)] for of, i in found.items()}

    def _groups_of_used_views(self, groups: Mapping[str, Tensor] | None, batch: int) -> dict[str, Tensor]:
        if groups is None:
            return {}
        if not isinstance(groups, Mapping) or not set(groups) <= set(VIEWS):
            got = sorted(map(str, groups)) if isinstance(groups, Mapping) else _describe(groups)
            raise ValueError(f"groups must be a dict of int64 tensors by view ({', '.join(VIEWS)}), got {got}")
        for name, g in groups.items():
            if not isinstance(g, Tensor) or g.dtype != torch.int64 or tuple(g.shape) != (batch,):
                raise ValueError(f"groups[{name!r}] must be an int64 tensor of shape ({batch},), got {_describe(g)}")
        return {v: groups[v].contiguous() for v in self._stacked if v in groups}

    def _check_values(self, views: Mapping[str, Tensor], ids: Mapping[str, Tensor]) -> None:
        # One look at all views tells whether a closer one is needed: comparisons with NaN are false.
        lengths = torch.cat([torch.linalg.vector_norm(views[v].detach(), dim=1).float() for v in self._stacked])
        low, high = (float(x) for x in lengths.aminmax())
        if not (low >= 1 - UNIT_TOLERANCE and high <= 1 + UNIT_TOLERANCE):
            for name in self.required_views:
                lengths = views[name].detach().float().norm(dim=1)
                if not bool(torch.isfinite(lengths).all()):
                    raise ValueError(f"view '{name}' holds NaN or infinite values")
                off = float((lengths - 1).abs().max())
                if off > UNIT_TOLERANCE:
                    raise ValueError(
                        f"rows of view '{name}' are not unit length (off by up to {off:.3g}): "
                        "pass torch.nn.functional.normalize(embeddings, dim=-1)"
                    )
        same = len({id(i) for i in ids.values()}) == 1
        least = min(self.num_samples[of] for of in ids)
        for of, i in list(ids.items())[: 1 if same else None]:
            low, high = (int(x) for x in i.aminmax())
            rows = least if same else self.num_samples[of]
            if low < 0 or high >= rows:
                raise ValueError(f"{of} ids must lie in [0, {rows}), got values from {low} to {high}")

    def extra_repr(self) -> str:
        """What `print(objective)` shows."""
        return (
            f"{self.name}: {len(self.terms)} terms, {self.temperature_mode} temperature "
            f"{self.initial_temperature:g}, gamma {self.gamma:g} ({self.gamma_schedule}), {self.estimator} estimator"
            + (f", consistency penalties at {self.cyclic_weight:g}" if self.cyclic_weight else "")
            + (f", a queue of {self.queue.size}" if self.queue is not None else "")
        )


class _ClosedForm(torch.autograd.Function):
    """A loss whose gradient is computed with its value: `compute` gives both."""

    @staticmethod
    def forward(ctx: Any, compute: Any, tau: Tensor | None, *views: Tensor) -> Tensor:
        loss, gradient, tau_gradient = compute()
        ctx.save_for_backward(gradient, tau_gradient)
        return loss.clone()  # what the metrics hold stays as it is, and without a graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        gradient, tau_gradient = ctx.saved_tensors
        return None, None if tau_gradient is None else tau_gradient * weight, *(gradient * weight).unbind()


class _Scaled(torch.autograd.Function):
    """The identity, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def _together(
    ids: dict[str, Tensor], groups: dict[str, Tensor], world: World, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor], Positives]:
    """Ids of the whole batch by modality, its groups by view, and who are positives of each other in it."""
    if not world.alone:
        gathered = {k: world.gather(i.to(device)) for k, i in {id(i): i for i in ids.values()}.items()}
        ids = {of: gathered[id(i)] for of, i in ids.items()}
        groups = {v: world.gather(g.to(device)) for v, g in groups.items()}
    views = ([g for v, g in groups.items() if modality(v) == of] for of in ids)
    return ids, groups, Positives.of(tuple(ids.values()), device, [g for g in views if g])


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where autocast is on, a context without it; entering one costs as much as several small operations."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _learned(mean: Tensor, before: Tensor, some: Tensor | None) -> Tensor:
    """What to write: a sample without negatives keeps what it had, and so does one whose embeddings are NaN."""
    keeps = mean.isnan() if some is None else mean.isnan() | (mean == NEG_INF)
    return torch.where(keeps, before, mean)


def _sample(numbers: Tensor) -> Tensor:
    flat = numbers.flatten()
    return flat[:: -(-len(flat) // QUANTILE_SAMPLE)]


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


def _tell_the_others(device: torch.device) -> None:
    """Let the other processes raise too, rather than wait for a batch that will not come."""
    with suppress(ValueError):
        World.of(-1, device, True, dict.fromkeys(COMPARED, 0))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
