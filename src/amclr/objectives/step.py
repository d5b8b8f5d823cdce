"""One step of an objective: similarities -> log g -> log u -> losses -> weights -> gradient.

The closed form computes the gradient with the loss, so that backward only multiplies. It walks the terms in waves; of
each wave, with T terms over a batch of N rows, M of them on this process:

    log_sums   log sum_{j in N_i} exp(s_ij / tau)                          blocks.log_sums
    log_g      log_sums - s_ii / tau - log |N_i|                           this batch's inner mean
    log_u      log((1 - gamma) u + gamma g)                                estimator.update
    F          tau (log u + rho)                                           contrast.losses
    w_ij       c exp(s_ij / tau - s_ii / tau) / (|N_i| u_i)                offsets of blocks.gradients
    gradient   sum_j w_ij (c_j - c_i) for anchors, likewise for candidates

`amclr.objectives.reference` is the same in plain autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from amclr.config.schema import LossConfig
from amclr.distributed.world import World
from amclr.objectives import backends, diagnostics
from amclr.objectives.adaptive import log_noise
from amclr.objectives.backends.base import BlockInputs, Workspace
from amclr.objectives.batch import HALVES, Checks
from amclr.objectives.contrasts import ClosedForm, Contrast, cyclic_penalty
from amclr.objectives.estimators import Anchors, IndividualTemperatures, PerTermEstimator, TermTables
from amclr.objectives.layout import Layout, layouts
from amclr.objectives.methods import Term
from amclr.objectives.positives import Labels, Positives
from amclr.objectives.queue import Queue, QueuedNegatives

SMALL = 1 << 18
"""Grids of at most this many similarities are computed at once: there, calls cost more than arithmetic."""

Result = tuple[Tensor, Tensor | None, Tensor | None]
"""Loss, gradient (V, M, D) of the views, gradient of a learned temperature."""


@dataclass(frozen=True)
class Parts:
    """What an objective is made of. settings: without empty ones. views: in the order in which they are stacked."""

    terms: tuple[Term, ...]
    views: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    contrast: Contrast
    settings: LossConfig
    checks: Checks
    tables: TermTables
    estimator: PerTermEstimator
    temperatures: IndividualTemperatures | None
    queue: Queue | None
    backend: str
    workspace: Workspace = field(default_factory=Workspace)

    @property
    def rho(self) -> float:
        """Of the objective's loss: a fixed temperature needs none."""
        return 0.0 if self.settings.temperature_mode == "fixed" else self.settings.rho

    @property
    def least_tau(self) -> float:
        """The least that the shared temperature can be."""
        s = self.settings
        assert s.temperature is not None
        return s.temperature_min if s.temperature_mode == "learnable" else s.temperature

    def places(self, terms: Sequence[Term]) -> list[tuple[int, int]]:
        """Indices of the anchor and the candidate view of terms."""
        return [(self.views.index(t.anchor), self.views.index(t.candidate)) for t in terms]

    @property
    def by_autograd(self) -> bool:
        """Whether the terms have no closed form."""
        return not isinstance(self.contrast, ClosedForm) or any(t.also for t in self.terms)

    def takes_halves(self, views: Sequence[Tensor], dtype: torch.dtype, diagnose: bool, multiplied: bool) -> bool:
        """Whether views in half precision go to the Triton kernels as they are, without a copy in float32.

        multiplied: their gradients are multiplied by the number of processes, for which float16 has no room.
        """
        return (
            not self.by_autograd
            and dtype in HALVES
            and self.settings.matmul_dtype in ("auto", str(dtype).removeprefix("torch."))
            and all(v.dtype == dtype for v in views)
            and not (dtype == torch.float16 and multiplied)
            and backends.uses_triton(self.backend, views[0])
            and self.is_fused_on(views[0].device, diagnose)
        )

    def is_fused_on(self, device: torch.device, diagnose: bool) -> bool:
        """Whether the numbers per anchor of a step can stay in the Triton kernels, from first to last."""
        return (
            type(self.estimator) is PerTermEstimator
            and not self.estimator.adaptive
            and self.temperatures is None
            and self.queue is None
            and not diagnose
            and all(t.storage == "device" and t.values.device == device for t in self.tables.tables.values())
        )


@dataclass(frozen=True)
class Call:
    """One call of an objective. views: V of (M, D). labels, positives: of the whole batch. dtype: the views' own."""

    views: list[Tensor]
    labels: Labels
    positives: Positives
    world: World
    dtype: torch.dtype
    gamma: float
    training: bool
    diagnose: bool
    wants_gradient: bool


def loss_and_metrics(
    parts: Parts, call: Call, tau: Tensor, learned: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch and its metrics. tau: the temperature, with its graph. learned: the contrast's parameters."""
    if parts.by_autograd:
        loss, metrics = _autograd(parts, call, tau, learned)
    else:
        loss, metrics = _closed_form(parts, call, tau if parts.settings.temperature_mode == "learnable" else None)
    if weight := parts.settings.cyclic_weight:
        exact = torch.promote_types(torch.float32, call.dtype)
        views = {v: call.world.gather_rows(x.to(exact)) for v, x in zip(parts.views, call.views, strict=True)}
        penalties = [cyclic_penalty(views[image], views[text]) for image, text in parts.pairs]
        penalty = weight * torch.stack(penalties).mean()
        loss, metrics["loss_cyclic"] = loss + penalty, penalty.detach()
    # In storage of its own: whoever divides the loss in place must not change what is logged.
    logged = metrics.pop("loss", None)
    if logged is None or weight:
        logged = loss.detach().clone()
    return loss, {"loss": logged, **metrics}


def _closed_form(parts: Parts, call: Call, tau: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms in closed form. tau: a learned temperature."""
    metrics: dict[str, Tensor] = {}

    def compute() -> Result:
        step = _Step(parts, call, None if tau is None else tau.detach(), metrics)
        result = step.fused() if step.is_fused else step.run()
        metrics["loss"] = result[0]
        return result

    loss = _ClosedForm.apply(compute, tau, *call.views)  # fills in the metrics
    return loss, metrics


def _autograd(parts: Parts, call: Call, tau: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Terms without a closed form; every process works on the whole batch."""
    views = {v: call.world.gather_rows(x) for v, x in zip(parts.views, call.views, strict=True)}
    mask = call.positives.mask(slice(None), slice(None))
    if mask is None:
        mask = torch.eye(call.positives.size, dtype=torch.bool, device=call.views[0].device)
    negatives = ~mask
    parts.checks.some_negative(negatives)
    total = zero = call.views[0].new_zeros(())
    tau, learned = tau.to(total), {name: p.to(total) for name, p in learned.items()}
    metrics: dict[str, Tensor] = {}
    for term in parts.terms:
        similarities = [views[term.anchor] @ views[v].T for v in (term.candidate, *term.also)]
        value = term.weight * parts.contrast.anchor_losses(similarities, negatives, tau, learned).mean()
        total = total + value
        metrics[f"loss_{term.kind}"] = metrics.get(f"loss_{term.kind}", zero) + value.detach()
        metrics.setdefault("positive", similarities[0].detach().diagonal().mean())
    return total, {**metrics, "temperature": tau.detach()}


class _Step:
    """The closed form of one call. Updates the tables and the queue, and fills in the metrics."""

    def __init__(self, parts: Parts, call: Call, learned_tau: Tensor | None, metrics: dict[str, Tensor]) -> None:
        assert isinstance(parts.contrast, ClosedForm)
        self.parts, self.call, self.metrics, self.contrast = parts, call, metrics, parts.contrast
        self.learned_tau = learned_tau
        self.queue_pull: float | Tensor = 0.0
        self.matmul_dtype: str = parts.settings.matmul_dtype
        if self.matmul_dtype == "auto" and call.dtype in HALVES:
            self.matmul_dtype = str(call.dtype).removeprefix("torch.")
        self.own = [v.detach() for v in call.views]
        if self.matmul_dtype in ("float16", "bfloat16"):
            self.own = [v.to(getattr(torch, self.matmul_dtype)).to(v.dtype) for v in self.own]
        self.every = self.own if call.world.alone else list(call.world.gather(torch.stack(self.own), 1))
        self.size = len(self.every[0])
        self.uses_triton = backends.uses_triton(parts.backend, self.every[0])
        self.is_fused = self.uses_triton and parts.is_fused_on(self.every[0].device, call.diagnose)

    @property
    def like(self) -> Tensor:
        """A tensor of the step's type and device."""
        return self.every[0]

    def waves(self) -> list[tuple[Layout, ...]]:
        """The layouts of all terms, in groups that are computed at once.

        The reference estimator's terms overwrite one table in their order, so it needs them all at once; so does a
        batch over several processes, to exchange all its numbers in one go.
        """
        small = len(self.parts.terms) * self.size * self.size <= SMALL
        grids = layouts(self.parts.terms, self.parts.views, small)
        at_once = small or not self.parts.estimator.columns_per_term or not self.call.world.alone or self.uses_triton
        return [grids] if at_once else [(layout,) for layout in grids]

    def inputs(self, wave: Sequence[Layout], taus: float | Tensor) -> BlockInputs:
        """What the similarity blocks of a wave are made from."""
        # Two anchors' weights, times the gradient's coefficient, times B.
        largest = 2 * max(t.weight for t in self.parts.terms)
        largest *= self.contrast.largest_weight(self.call.gamma, self.parts.least_tau)
        return BlockInputs(
            self.every, self.call.world.mine, wave, taus, self.call.positives, self.matmul_dtype, largest,
            self.parts.workspace,
        )  # fmt: skip

    # -- one pass after the other --------------------------------------------------------------------

    def run(self) -> Result:
        """Wave by wave."""
        parts, call, like = self.parts, self.call, self.like
        labels = call.labels if parts.queue is None else call.labels.to(like.device)
        self.queued: QueuedNegatives | None = None
        if parts.queue is not None and len(parts.queue):
            self.queued = QueuedNegatives(parts.queue, self.own, labels.rows(call.world.mine))
        self._count_negatives()
        self.tau: float | Tensor = parts.settings.temperature or 0.0
        if self.learned_tau is not None:
            on_cpu = like.device.type == "cpu"
            self.tau = float(self.learned_tau) if on_cpu else self.learned_tau.to(like.dtype)
        self.weighted_sums = call.diagnose or (parts.temperatures is not None and call.training)
        shape = len(self.own), len(self.own[0]), like.shape[1]
        self.gradient = like.new_empty(shape) if call.wants_gradient or self.weighted_sums else None
        self.written: set[int] = set()
        loss = None
        for wave in self.waves():
            value = self._wave(wave)
            loss = value if loss is None else loss + value
        assert loss is not None
        if parts.estimator.adaptive and call.training:
            self.metrics["gamma"] = parts.estimator.adaptive.gamma().mean()
        if parts.queue is not None and call.training:
            parts.queue.push(self.every, labels)
        if self.gradient is None or not call.wants_gradient:
            return loss, None, None
        return loss, self.gradient, self._tau_gradient(self.own, self.gradient, self.tau, loss)

    def _count_negatives(self) -> None:
        """How many negatives each row has: `log_n`, and `anchors`, which says who has any."""
        positives, like = self.call.positives, self.like
        # If no two rows are positives of each other, all have size - 1 negatives.
        self.in_batch = positives.negatives(like) if positives.matches or self.queued else None
        self.count = self.in_batch
        if self.queued and self.in_batch is not None:
            self.count = self.in_batch + self.call.world.gather(self.queued.counts())
        has_negatives = None if self.count is None or positives.matches is None else self.count > 0
        if has_negatives is not None:
            self.parts.checks.some_negative(has_negatives)
        self.anchors = Anchors(self.call.labels, has_negatives, positives.unique and has_negatives is None)
        self.log_n: float | Tensor = math.log(self.size - 1) if self.count is None else self.count.clamp(min=1).log()

    def _wave(self, wave: Sequence[Layout]) -> Tensor:
        """The loss of a wave's terms; their gradient is added to `gradient`."""
        parts, call, anchors = self.parts, self.call, self.anchors
        terms = [t for layout in wave for t in layout.terms]
        weights = _weights(tuple(t.weight for t in terms), self.like.dtype, self.like.device)
        taus = parts.temperatures.read(wave, call.labels, self.like) if parts.temperatures else self.tau
        blocks = backends.similarity_blocks(self.inputs(wave, taus), self.uses_triton)
        passes = [*blocks.log_sums()]
        if self.queued:
            passes.append(self.queued.log_sums(parts.places(terms), self._of_own_rows(taus)))
        if not call.world.alone:
            passes = list(call.world.gather(torch.stack(passes), 2))
        sums, positive = passes[:2]
        all_sums = torch.logaddexp(sums, passes[2]) if self.queued else sums
        log_g = anchors.masked((all_sums - positive / taus).sub_(self.log_n))

        def estimate(log_g: Tensor) -> Tensor:
            return parts.estimator.update(
                wave, log_g, anchors, call.gamma, call.training, lambda: self._noise(terms, taus)
            )

        losses, log_u = self.contrast.losses(log_g, self.log_n, taus, parts.rho, estimate)
        term_losses = anchors.masked(losses).sum(1) * (weights / self.size)
        loss = term_losses.sum()
        diagnostics.report(self.metrics, terms, term_losses, loss, positive, log_g, taus)
        if self.gradient is None:
            return loss

        # The coefficient c of the gradient goes into the exponents.
        scale = self.contrast.gradient_scale(weights, self.size, self.tau)
        log_c = math.log(scale) if isinstance(scale, float) else scale.log()[..., None]
        log_share = log_g - log_u  # log of the sum of an anchor's weights
        log_weights = log_share + log_c
        # s_ii / tau + log n + log u - log c, since log g = log_sums - s_ii / tau - log n.
        offsets = anchors.masked(all_sums - log_weights, math.inf)
        weight_sums = anchors.masked(log_weights.exp())
        # Candidates and positives in the batch move by the anchors' weights on the batch alone.
        in_batch = (sums - offsets).exp() if self.queued else weight_sums
        pulls = blocks.gradients(offsets, in_batch, self.gradient, self.written, self.weighted_sums)
        if self.queued:
            mine = call.world.mine
            total = (passes[2] - offsets)[:, mine].exp()
            pulls_of_queue = self.queued.gradients(
                parts.places(terms), self._of_own_rows(taus), offsets[:, mine], total, self.gradient
            )
            self.queue_pull = self.queue_pull + (pulls_of_queue - total * positive[:, mine]).sum()
            pulls = None if pulls is None else pulls + pulls_of_queue
        if pulls is None:
            return loss
        # sum_j w_ij d_ij / tau, without the coefficient
        pulls = call.world.gather(pulls, 1)
        pulls = (pulls - weight_sums * positive) / (math.exp(log_c) if isinstance(log_c, float) else log_c.exp()) / taus
        if parts.temperatures and call.training:
            assert isinstance(taus, Tensor)
            parts.temperatures.step(wave, log_u + parts.rho - pulls, anchors, taus)
        if call.diagnose:
            diagnostics.diagnose(
                self.metrics, terms, log_g, log_share, self.log_n, pulls, taus, anchors.has_negatives
            )  # fmt: skip
        return loss

    def _of_own_rows(self, taus: float | Tensor) -> float | Tensor:
        """Temperatures of this process's anchors."""
        return taus[:, self.call.world.mine] if self.parts.temperatures and isinstance(taus, Tensor) else taus

    def _noise(self, terms: Sequence[Term], taus: float | Tensor) -> Tensor:
        """Variance of log g of terms, (t,), for the adaptive gamma."""
        anchors, candidates = (list(places) for places in zip(*self.parts.places(terms), strict=True))
        noise = log_noise(self.every, anchors, candidates, taus, self.call.positives)
        if self.queued and self.in_batch is not None and self.count is not None:
            noise = noise * (self.in_batch / self.count.clamp(min=1)).mean()  # of a mean over so many more
        return noise

    def _tau_gradient(
        self, views: Sequence[Tensor], gradient: Tensor, tau: float | Tensor, loss: Tensor
    ) -> Tensor | None:
        """The derivative of the loss by a learned temperature, from the views' gradient.

        With G of the blocks, sum_ij G_ij s_ij is the sum over anchors of c sum_j w_ij d_ij: the part of the derivative
        that depends on similarities, times -tau. Every pair is in the gradients of both its members: hence the half,
        except for `queue_pull`, the sum over pairs with queued samples, which are in their anchors' alone.
        """
        if self.learned_tau is None:
            return None
        pulls = torch.stack([(v.to(loss.dtype) * g).sum() for v, g in zip(views, gradient, strict=True)]).sum()
        slope = -self.call.world.sum((pulls + self.queue_pull) / 2) / tau
        return self.contrast.temperature_gradient(slope, loss, tau)

    # -- all in the kernels ---------------------------------------------------------------------------

    def fused(self) -> Result:
        """The whole step by the Triton backend: at small batches on a GPU, only launches count."""
        from amclr.objectives.backends.triton_kernels import TritonBlocks

        parts, call = self.parts, self.call
        [wave] = self.waves()
        terms = [t for layout in wave for t in layout.terms]
        tau = self.learned_tau.float() if self.learned_tau is not None else parts.settings.temperature or 0.0
        modalities = list(call.labels.ids)
        columns = []
        for _, of, first, last in parts.tables.sides(wave):
            width = len(parts.tables.columns[of])
            columns += [(modalities.index(of), column, width) for column in range(first, last)]
        log_u = [table.values for name, table in parts.tables.tables.items() if name.startswith("log_u")]
        sums, gradient = TritonBlocks(self.inputs(wave, tau)).fused_step(
            call.world, call.labels.to(self.like.device).distinct_ids, tuple(columns), [t.weight for t in terms], log_u,
            call.gamma, parts.rho, write=call.training, wants_gradient=call.wants_gradient,
            check=parts.checks.some_negative if parts.checks.looks_at(self.like) else None,
        )  # fmt: skip
        loss = sums[0].sum()
        diagnostics.report_losses(self.metrics, terms, sums[0], loss)
        self.metrics["margin"], self.metrics["positive"] = sums[1, 0], sums[2, 0]
        self.metrics["temperature"] = torch.as_tensor(tau, dtype=torch.float32)
        if gradient is None:
            return loss, None, None
        own = [v[call.world.mine] for v in self.every]
        return loss, gradient, self._tau_gradient(own, gradient, tau, loss)


@cache
def _weights(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> float | Tensor:
    """Weights of terms: one number if they are equal, else (T,). Made once: a copy may not stand in a CUDA graph."""
    return values[0] if len(set(values)) == 1 else torch.tensor(values, dtype=dtype, device=device)


class _ClosedForm(torch.autograd.Function):
    """A loss whose gradient is computed with its value: `compute` gives both."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Result], tau: Tensor | None, *views: Tensor) -> Tensor:
        loss, gradient, tau_gradient = compute()
        ctx.save_for_backward(gradient, tau_gradient)
        return loss.clone()  # what the metrics hold stays as it is, and without a graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        gradient, tau_gradient = ctx.saved_tensors
        return None, None if tau_gradient is None else tau_gradient * weight, *(gradient * weight).unbind()
