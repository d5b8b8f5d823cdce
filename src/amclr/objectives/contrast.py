"""The mathematics of directed terms once their log-sum-exps are known, as pure functions; and of the penalties.

Everything lives in log space: with d_ij = s_ij - s_ii and negatives N_i,

    log g_i = logsumexp_{j in N_i} s_ij / tau - s_ii / tau - log |N_i|

so no temperature overflows, and "not seen yet" is simply log u = -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def update_log_u(log_u: Tensor, log_g: Tensor, gamma: float | Tensor) -> Tensor:
    """Log of (1 - gamma) u + gamma g, or log g where u is not seen yet (log u = -inf). gamma: one, or (T, 1)."""
    kept: float | Tensor
    taken: float | Tensor
    if isinstance(gamma, Tensor):
        kept, taken = torch.log1p(-gamma), gamma.log()
    elif gamma >= 1:
        return log_g
    else:
        kept, taken = math.log1p(-gamma), math.log(gamma)
    return torch.where(log_u.isneginf(), log_g, torch.logaddexp(kept + log_u, taken + log_g))


def mean_by_id(ids: Tensor, values: Tensor, some: Tensor | None = None, log: bool = False) -> Tensor:
    """Replace every column by the mean over the columns with the same id; `log` means: of exp(values).

    A sample that stands twice in a batch gets one update, whatever the order of the rows.
    ids: (N,) int64. values: (T, N), a row per term. some: (N,) bool, which columns have something to say;
    where none of an id's has, the mean is NaN (or, `log`, -inf). Costs O(N log N) time and O(T N) memory.
    """
    ids = ids.to(values.device)
    order = ids.argsort(stable=True)
    sorted_ids = ids[order]
    starts = torch.ones_like(sorted_ids)
    starts[1:] = (sorted_ids[1:] != sorted_ids[:-1]).long()
    group = torch.empty_like(starts).scatter_(0, order, starts.cumsum(0) - 1)
    says = values.new_ones(len(ids)) if some is None else some.to(values.dtype)
    size = torch.zeros_like(says).index_add_(0, group, says)[group]
    if not log:
        return torch.zeros_like(values).index_add_(1, group, values * says)[:, group] / size
    if some is not None:
        values = torch.where(some, values, NEG_INF)
    top = torch.full_like(values, NEG_INF).scatter_reduce_(1, group.expand_as(values), values, "amax")[:, group]
    top = top.clamp(min=torch.finfo(values.dtype).min)
    total = torch.zeros_like(values).index_add_(1, group, (values - top).exp())[:, group]
    return top + total.log() - size.clamp(min=1).log()


def cross_entropy_terms(similarities: Tensor, negatives: Tensor, tau: Tensor, *extra: Tensor) -> Tensor:
    """Cross-entropy of each anchor's positive among itself and its negatives, 0 where there is none. (B,).

    similarities: (B, B), the positives on its diagonal. negatives: (B, B) bool. tau: (). extra: further
    (B, B) blocks whose other samples are negatives too (NT-Xent).
    """
    positive = similarities.diagonal()[:, None]
    # Masked after the division: -inf / tau has no gradient with respect to tau.
    logits = [((s - positive) / tau).masked_fill(~negatives, NEG_INF) for s in (similarities, *extra)]
    return torch.cat([torch.zeros_like(positive), *logits], dim=1).logsumexp(dim=1)


def sigmoid_terms(similarities: Tensor, negatives: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's pairwise loss per anchor row: -log sigmoid(z_ij (scale s_ij + bias)), summed over j. (B,)."""
    logits = scale * similarities + bias
    matched = torch.nn.functional.softplus(-logits.diagonal())
    unmatched = torch.nn.functional.softplus(logits).masked_fill(~negatives, 0.0)
    return matched + unmatched.sum(dim=1)


def cyclic_penalty(image: Tensor, text: Tensor) -> Tensor:
    """CyCLIP's in-modal and cross-modal inconsistency, added up: sums over (j, k) divided by B. Scalar.

    image, text: (B, D). With M = X - Y and P = X + Y, X X' - Y Y' = (M P' + P M') / 2 and X Y' - Y X' =
    (M P' - P M') / 2, whose squares add up to that of M P' alone: one product of (B, D) and (D, B), or, for large
    batches, two of (D, B) and (B, D), since |M P'|^2 = <M' M, P' P>. Goel et al. 2022, arXiv 2205.14459, section 3.
    """
    apart, common = image - text, image + text
    batch, width = image.shape
    if batch <= 2 * width:  # forward and backward 3 B^2 D against 6 B D^2
        return (apart @ common.T).square().sum() / batch
    return ((apart.T @ apart) * (common.T @ common)).sum() / batch
