"""`Objective`: the terms of a method, its estimator tables and its temperature, as one module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from amclr.objectives import contrast as math_of
from amclr.objectives.blocks import Block, Positives
from amclr.objectives.methods import PAIRS, Method, Pairs, Term, modality

UNIT_TOLERANCE = 2e-2
REFERENCE_EPS = 1e-8


class Objective(nn.Module):
    """A contrastive objective over views of paired samples. Make one with `amclr.objectives.build`.

    Call it with a dict view -> (B, D) of unit rows and the sample ids; it returns the scalar loss
    and a dict of detached scalars. In training mode a call updates the estimators; in evaluation
    mode it leaves them alone. All arithmetic is in float32 (float64 where the views are float64),
    whatever autocast says. `state_dict()` carries the estimators, so it belongs in a checkpoint.

    Several rows with the same id are positives of each other, never negatives, and give their
    sample one averaged update.
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
        estimator: str,
        validate: bool | None,
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
        self.cyclic_weight = cyclic_weight if method.cyclic else 0.0
        self.estimator = estimator
        self.validate = validate
        self.initial_temperature = temperature
        self._first_epoch = True

        if temperature_mode == "learnable":
            # As in CLIP: learned on a log scale, so that it stays positive.
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        if method.contrast == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-10.0))
        if method.contrast == "global":
            for of in sorted({modality(t.anchor) for t in self.terms}):
                self._make_tables(of)
        if gamma_schedule == "cosine":
            self.start_epoch(0, 1)

    def _make_tables(self, of: str) -> None:
        rows = self.num_samples[of]
        columns = 1 if self.estimator == "reference" else len(self._columns(of))
        self.register_buffer(f"log_u_{of}", torch.full((rows, columns), math_of.NEG_INF))
        if self.temperature_mode == "individual":
            self.register_buffer(f"tau_{of}", torch.full((rows, columns), self.initial_temperature))
            self.register_buffer(f"tau_velocity_{of}", torch.zeros(rows, columns))

    def _columns(self, of: str) -> list[Term]:
        return [t for t in self.terms if modality(t.anchor) == of]

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
            return self.log_temperature.exp().clamp(self.tau_min, self.tau_max)
        if self.temperature_mode == "individual":
            return torch.cat([b.flatten() for n, b in self.named_buffers() if n.startswith("tau_i")]).mean()
        return torch.tensor(self.initial_temperature, dtype=torch.float64)

    # -- one step ---------------------------------------------------------------------------------

    def forward(
        self, views: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its metrics.

        views: view name -> (B, D), unit rows. ids: (B,) int64 in [0, num_samples), or
        {"image": ids, "text": ids} where an image has several captions.
        Raises ValueError, naming the view or argument, for missing views, unlike shapes, a batch
        of one, or ids of the wrong type; values are checked as `validate` says.
        """
        id_of = self._check(views, ids)
        device_type = next(iter(views.values())).device.type
        with torch.autocast(device_type, enabled=False):
            dtype = torch.promote_types(torch.float32, views[self.required_views[0]].dtype)
            return self._loss({v: views[v].to(dtype) for v in self.required_views}, id_of)

    def _loss(self, views: dict[str, Tensor], ids: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.method.contrast == "global":
            total, metrics = self._global_loss(views, ids)
        else:
            total, metrics = self._batch_loss(views, ids)
        with torch.no_grad():
            first = self.terms[0]
            metrics["positive"] = (views[first.anchor] * views[first.candidate]).sum(1).mean()
            metrics["temperature"] = self.temperature.detach().to(total.dtype)
        return total, {"loss": total.detach(), **metrics}

    # -- global objectives: closed form ----------------------------------------------------------

    def _global_loss(self, views: dict[str, Tensor], ids: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the global terms. The gradient is known in the forward pass; backward only multiplies it."""
        tau = self.temperature.to(views[self.required_views[0]])
        metrics: dict[str, Tensor] = {}

        def compute(wanted: bool) -> tuple[Tensor, list[Tensor | None]]:
            values = {name: view.detach() for name, view in views.items()}
            loss, gradients, tau_gradient = self._closed_form(values, ids, tau.detach(), wanted, metrics)
            return loss, [gradients.get(name) for name in views] + [tau_gradient]

        return _ClosedForm.apply(compute, *views.values(), tau), metrics

    def _closed_form(
        self, views: dict[str, Tensor], ids: dict[str, Tensor], tau: Tensor, wanted: bool, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """Loss, gradient per view and gradient of a learned temperature; updates the tables, fills the metrics."""
        positives = Positives.of(tuple(ids.values()))
        first = views[self.required_views[0]]
        count = positives.negatives(first)
        some = count > 0
        batch = len(first)
        loss, gradients = first.new_zeros(()), dict[str, Tensor]()
        tau_gradient = first.new_zeros(()) if self.temperature_mode == "learnable" else None
        individual = self.temperature_mode == "individual" and self.training
        # The reference estimator's terms overwrite one table in their order, so it needs all blocks first.
        waves = [[pair] for pair in self._blocks] if self.estimator != "reference" else [self._blocks]
        for wave in waves:
            blocks: dict[Term, tuple[Block, Term]] = {}
            log_g: dict[Term, Tensor] = {}
            taus: dict[Term, Tensor] = {}
            for forth, back in wave:
                for term in (forth, back):
                    taus[term] = tau if self.temperature_mode != "individual" else self._row("tau", term, ids, first)
                block = Block(views[forth.anchor], views[forth.candidate], taus[forth], taus[back], positives, count)
                log_g[forth], log_g[back] = block.log_inner_means()
                blocks[forth] = (block, back)
            unique = positives.ids is None
            log_u = {t: self._update_log_u(t, log_g[t], ids, some, unique) for t in self.terms if t in log_g}
            for term, u in log_u.items():
                value = term.weight * torch.where(some, taus[term] * (u + self.rho), 0.0).mean()
                loss = loss + value
                metrics[f"loss_{term.kind}"] = metrics.get(f"loss_{term.kind}", 0.0) + value
            if "margin" not in metrics:
                lead = self.terms[0]
                metrics["margin"] = torch.where(some, -taus[lead] * log_g[lead], 0.0).mean()
            for forth, (block, back) in blocks.items() if wanted or individual else ():
                sums = {t: torch.where(some, (log_g[t] - log_u[t]).exp(), 0.0) for t in (forth, back)}
                slopes = individual or tau_gradient is not None
                d_rows, d_columns, *slope = block.gradients(
                    log_u[forth], log_u[back], sums[forth] + sums[back], forth.weight / batch, slopes
                )
                for view, gradient in ((forth.anchor, d_rows), (forth.candidate, d_columns)):
                    gradients[view] = gradients[view].add_(gradient) if view in gradients else gradient
                for term, pull in zip((forth, back), slope, strict=True) if slopes else ():
                    derivative = log_u[term] + self.rho - pull / taus[term]
                    if individual:
                        self._update_temperatures(term, derivative, ids, some, taus[term])
                    elif tau_gradient is not None:
                        tau_gradient += term.weight * torch.where(some, derivative, 0.0).mean()
        return loss, gradients, tau_gradient

    @property
    def _blocks(self) -> list[tuple[Term, Term]]:
        """The terms in pairs of opposite directions: each pair shares a similarity block."""
        by_views = {(t.anchor, t.candidate): t for t in self.terms}
        pairs = [(t, by_views[t.candidate, t.anchor]) for t in self.terms]
        return [p for k, p in enumerate(pairs) if p[::-1] not in pairs[:k]]

    def _table(self, name: str, term: Term) -> tuple[Tensor, int]:
        """The table of a term's anchors, and the term's column in it."""
        of = modality(term.anchor)
        return self.get_buffer(f"{name}_{of}"), 0 if self.estimator == "reference" else self._columns(of).index(term)

    def _row(self, name: str, term: Term, ids: dict[str, Tensor], like: Tensor) -> Tensor:
        table, column = self._table(name, term)
        return table[ids[modality(term.anchor)], column].to(like)

    def _update_log_u(self, term: Term, log_g: Tensor, ids: dict[str, Tensor], some: Tensor, unique: bool) -> Tensor:
        """The anchors' updated log u (B,), 0 where there is no negative; written to the table when training."""
        table, column = self._table("log_u", term)
        rows = ids[modality(term.anchor)]
        before = table[rows, column].to(log_g)
        # An anchor without negatives has learned nothing: it keeps what it had.
        log_g = torch.where(some, log_g, 0.0)
        fresh = self.estimator == "reference" and self._first_epoch
        after = math_of.update_log_u(torch.full_like(before, math_of.NEG_INF) if fresh else before, log_g, self.gamma)
        if self.training:
            mean = after if unique else math_of.mean_by_id(rows, after, log=True)
            table[rows, column] = torch.where(some, mean, before).to(table.dtype)
        if self.estimator == "reference":
            after = torch.logaddexp(after, torch.full_like(after, math.log(REFERENCE_EPS)))
        return torch.where(some, after, 0.0)

    def _update_temperatures(
        self, term: Term, derivative: Tensor, ids: dict[str, Tensor], some: Tensor, tau: Tensor
    ) -> None:
        """One step of iSogCLR's temperatures: momentum on d F_i / d tau_i, then a clamp to the range."""
        rows = ids[modality(term.anchor)]
        velocities, column = self._table("tau_velocity", term)
        temperatures, _ = self._table("tau", term)
        before = velocities[rows, column].to(tau)
        velocity = self.tau_momentum * before + (1 - self.tau_momentum) * math_of.mean_by_id(rows, derivative)
        moved = (tau - self.tau_lr * velocity).clamp(self.tau_min, self.tau_max)
        velocities[rows, column] = torch.where(some, velocity, before).to(velocities.dtype)
        temperatures[rows, column] = torch.where(some, moved, tau).to(temperatures.dtype)

    # -- mini-batch objectives: autograd ---------------------------------------------------------

    def _batch_loss(self, views: dict[str, Tensor], ids: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        negatives = self._negatives(ids)
        count = negatives.sum(dim=1)
        blocks: dict[tuple[str, str], Tensor] = {}

        def similarity(a: str, b: str) -> Tensor:
            if (b, a) in blocks:
                return blocks[b, a].T
            if (a, b) not in blocks:
                blocks[a, b] = views[a] @ views[b].T
            return blocks[a, b]

        total = zero = views[self.required_views[0]].new_zeros(())
        tau = self.temperature.to(total)
        metrics: dict[str, Tensor] = {}
        for term in self.terms:
            s = similarity(term.anchor, term.candidate)
            if self.method.contrast == "sigmoid":
                per_anchor = math_of.sigmoid_terms(s, negatives, 1 / tau, self.bias.to(total))
            else:
                extra = tuple(similarity(term.anchor, view) for view in term.also)
                log_g, some = math_of.log_inner_mean(s, negatives, tau, extra)
                per_anchor = math_of.cross_entropy_term(log_g, count * (1 + len(extra)), some)
                metrics.setdefault("margin", -(tau * log_g).detach().mean())
            value = term.weight * per_anchor.mean()
            total = total + value
            metrics[f"loss_{term.kind}"] = metrics.get(f"loss_{term.kind}", zero) + value.detach()
        if self.cyclic_weight:
            for image, text in self.pairs:
                in_modal, cross_modal = math_of.cyclic_penalties(views[image], views[text])
                penalty = self.cyclic_weight * (in_modal + cross_modal) / len(self.pairs)
                total = total + penalty
                metrics["loss_cyclic"] = metrics.get("loss_cyclic", zero) + penalty.detach()
        return total, metrics

    def _negatives(self, ids: Mapping[str, Tensor]) -> Tensor:
        """(B, B) bool: True where two rows share neither their image nor their text."""
        masks = [i[:, None] != i[None, :] for i in ids.values()]
        return masks[0] if len(masks) == 1 else masks[0] & masks[1]

    # -- arguments --------------------------------------------------------------------------------

    def _check(self, views: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        missing = [v for v in self.required_views if v not in views]
        if missing:
            raise ValueError(
                f"objective '{self.name}' needs the view{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                f"got {', '.join(views) or 'none'}"
            )
        shape = tuple(views[self.required_views[0]].shape)
        for name in self.required_views:
            view = views[name]
            if view.dim() != 2 or not view.is_floating_point():
                raise ValueError(f"view '{name}' must be a floating-point (B, D) matrix, got {_describe(view)}")
            if tuple(view.shape) != shape:
                raise ValueError(
                    f"view '{name}' has shape {tuple(view.shape)}, view '{self.required_views[0]}' has {shape}: "
                    "all views of a batch must agree"
                )
        if shape[0] < 2:
            raise ValueError(f"a batch of {shape[0]} has no negatives: pass at least 2 samples")
        id_of = self._ids_by_modality(ids, shape[0])
        on_cpu = views[self.required_views[0]].device.type == "cpu"
        if on_cpu if self.validate is None else self.validate:
            self._check_values(views, id_of)
        return id_of

    def _ids_by_modality(self, ids: Tensor | Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
        used = sorted({modality(v) for v in self.required_views})
        if isinstance(ids, Tensor):
            named = {"ids": ids}
            found = dict.fromkeys(used, ids)
        else:
            absent = [m for m in used if m not in ids]
            if absent:
                raise ValueError(f"ids must hold {' and '.join(map(repr, used))}, got {sorted(ids)}")
            found = {m: ids[m] for m in used}
            named = {f"ids[{m!r}]": i for m, i in found.items()}
        for name, i in named.items():
            if not isinstance(i, Tensor) or i.dtype != torch.int64 or tuple(i.shape) != (batch,):
                raise ValueError(f"{name} must be an int64 tensor of shape ({batch},), got {_describe(i)}")
        return found

    def _check_values(self, views: Mapping[str, Tensor], ids: Mapping[str, Tensor]) -> None:
        for name in self.required_views:
            lengths = views[name].detach().float().norm(dim=1)
            if not bool(torch.isfinite(lengths).all()):
                raise ValueError(f"view '{name}' holds NaN or infinite values")
            worst = float((lengths - 1).abs().max())
            if worst > UNIT_TOLERANCE:
                raise ValueError(
                    f"rows of view '{name}' are not unit length (off by up to {worst:.3g}): "
                    "pass torch.nn.functional.normalize(embeddings, dim=-1)"
                )
        for of, i in ids.items():
            low, high, n = int(i.min()), int(i.max()), self.num_samples[of]
            if low < 0 or high >= n:
                raise ValueError(f"{of} ids must lie in [0, {n}), got values from {low} to {high}")

    def extra_repr(self) -> str:
        """What `print(objective)` shows."""
        return (
            f"{self.name}: {len(self.terms)} terms, {self.temperature_mode} temperature "
            f"{self.initial_temperature:g}, gamma {self.gamma:g} ({self.gamma_schedule}), {self.estimator} estimator"
        )


class _ClosedForm(torch.autograd.Function):
    """A loss whose gradient is computed with its value: `compute(wanted)` gives both."""

    @staticmethod
    def forward(ctx: Any, compute: Any, *inputs: Tensor) -> Tensor:
        loss, gradients = compute(any(ctx.needs_input_grad))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(None if g is None else g * weight for g in ctx.saved_tensors))


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
