"""What to look at while an objective trains: metrics of a step, and how far estimates are from the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from amclr.objectives.estimators import TermTables
from amclr.objectives.methods import Term, modality
from amclr.objectives.positives import Labels

QUANTILE_SAMPLE = 1 << 20
"""torch.quantile takes at most 2^24 numbers; a regular sample of this many serves as well."""
DEAD = 0.01
"""An anchor whose weights sum to less than this gives next to no gradient."""

Metrics = dict[str, Tensor]


def report(
    metrics: Metrics, terms: Sequence[Term], term_losses: Tensor, loss: Tensor, positive: Tensor, log_g: Tensor,
    taus: float | Tensor,
) -> None:  # fmt: skip
    """Add losses by kind of term, the temperature, and the first term's positives.

    positive: their mean similarity. margin: by how much it exceeds a soft maximum of the negatives'.
    """
    report_losses(metrics, terms, term_losses, loss)
    if "margin" not in metrics:
        metrics["positive"] = positive[0].mean()
        if isinstance(taus, Tensor) and taus.dim():
            metrics["margin"], metrics["temperature"] = -(taus[0] * log_g[0]).mean(), taus.mean()
        else:
            metrics["margin"] = log_g[0].mean() * -taus
            metrics["temperature"] = taus.to(log_g) if isinstance(taus, Tensor) else log_g.new_full((), taus)


def report_losses(metrics: Metrics, terms: Sequence[Term], term_losses: Tensor, loss: Tensor) -> None:
    """Add losses by kind of term. term_losses: (T,), terms of a kind next to each other. loss: their sum."""
    kinds = [t.kind for t in terms]
    for kind in dict.fromkeys(kinds):
        value = loss
        if kinds.count(kind) < len(kinds):
            value = term_losses[kinds.index(kind) : len(kinds) - kinds[::-1].index(kind)].sum()
        name = f"loss_{kind}"
        metrics[name] = metrics[name] + value if name in metrics else value


def diagnose(
    metrics: Metrics, terms: Sequence[Term], log_g: Tensor, log_share: Tensor, log_n: Tensor | float, pulls: Tensor,
    taus: float | Tensor, has_negatives: Tensor | None,
) -> None:  # fmt: skip
    """Add figures by kind of term, from sums (T, N) that the gradient needs anyway.

    effective_negatives: exp of the entropy of an anchor's normalised weights, the number of negatives that share its
    gradient. dead: share of anchors whose weights sum to less than DEAD, because their estimate has run away from what
    the batch shows; they are left out of the first figure. share_p05, share_p95: quantiles of the sums of weights,
    g / u, which are 1 without memory. tau_p05, _p50, _p95: of individual temperatures.
    """
    kinds = [t.kind for t in terms]
    for kind in dict.fromkeys(kinds):
        rows = [k for k, of in enumerate(kinds) if of == kind]
        share = log_share[rows].exp()
        entropy = log_g[rows] + log_n - pulls[rows] / share.clamp(min=1e-30)
        alive = share >= DEAD if has_negatives is None else (share >= DEAD) & has_negatives
        # An anchor without weights has no entropy to speak of.
        effective = torch.where(alive, entropy.exp(), 0.0).sum() / alive.sum().clamp(min=1)
        quantiles = torch.quantile(_sample(share), share.new_tensor([0.05, 0.95]))
        metrics[f"effective_negatives_{kind}"] = effective
        metrics[f"dead_{kind}"] = 1 - alive.to(share.dtype).mean()
        metrics[f"share_p05_{kind}"], metrics[f"share_p95_{kind}"] = quantiles.unbind()
        if isinstance(taus, Tensor) and taus.dim():
            tau_quantiles = torch.quantile(_sample(taus[rows]), taus.new_tensor([0.05, 0.5, 0.95]))
            for name, value in zip(("p05", "p50", "p95"), tau_quantiles.unbind(), strict=True):
                metrics[f"tau_{name}_{kind}"] = value


def estimator_error(
    terms: Sequence[Term], tables: TermTables, views: Mapping[str, Tensor], labels: Labels, probe: Tensor, chunk: int,
    shared_tau: float | Tensor | None,
) -> dict[str, float]:  # fmt: skip
    """See `Objective.estimator_error`. labels: on the views' device. shared_tau: None for individual temperatures."""
    positives = labels.positives(probe.device)
    errors: dict[str, float] = {}
    summaries: list[tuple[float, float, float]] = []
    for term in terms:
        of = modality(term.anchor)
        log_u_table = tables.tables[f"log_u_{of}"]
        column = tables.columns[of].index(term)
        log_u_column = column if log_u_table.values.shape[1] > 1 else 0
        anchors, candidates = (
            v.to(torch.promote_types(torch.float32, v.dtype)) for v in (views[term.anchor], views[term.candidate])
        )
        differences = []
        for rows in probe.split(chunk):
            ids = labels.ids[of][rows]
            if shared_tau is None:
                tau: float | Tensor = tables.tables[f"tau_{of}"].read(ids, column, column + 1, anchors).T
            else:
                tau = shared_tau.to(anchors) if isinstance(shared_tau, Tensor) else shared_tau
            s = anchors[rows] @ candidates.T
            own = (anchors[rows] * candidates[rows]).sum(1, keepdim=True)
            positive = positives.mask(rows, slice(None))
            if positive is None:
                positive = rows[:, None] == torch.arange(positives.size, device=rows.device)
            exact = ((s - own) / tau).masked_fill(positive, -math.inf).logsumexp(1)
            exact -= (~positive).sum(1).to(exact.dtype).log()
            differences.append(log_u_table.read(ids, log_u_column, log_u_column + 1, exact)[0] - exact)
        error = torch.cat(differences)
        visited = error[torch.isfinite(error)]
        summary = (float(visited.mean()), float(visited.square().mean().sqrt()), 1 - len(visited) / len(error))
        summaries.append(summary)
        errors |= {f"{name}/{term}": value for name, value in zip(("bias", "rms", "unseen"), summary, strict=True)}
    means = (sum(column) / len(summaries) for column in zip(*summaries, strict=True))
    return errors | dict(zip(("bias", "rms", "unseen"), means, strict=True))


def _sample(numbers: Tensor) -> Tensor:
    flat = numbers.flatten()
    return flat[:: -(-len(flat) // QUANTILE_SAMPLE)]
