"""The mathematics of one directed term, as pure functions of a similarity block.

Everything lives in log space: with d_ij = s_ij - s_ii and negatives N_i,

    log g_i = logsumexp_{j in N_i} d_ij / tau - log |N_i|

so no temperature overflows, and "not seen yet" is simply log u = -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEG_INF = float("-inf")


def log_inner_mean(
    similarities: Tensor, negatives: Tensor, tau: Tensor, extra: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """Log of the mean over each anchor's negatives of exp((s_ij - s_ii) / tau), and which anchors have any.

    similarities: (B, B), the positives on its diagonal. negatives: (B, B) bool. tau: () or (B,).
    extra: further (B, B) blocks whose other samples are negatives too.
    Returns log g (B,), 0 where an anchor has no negative, and a bool (B,).
    """
    positive = similarities.diagonal()
    blocks = torch.cat([similarities, *extra], dim=1)
    allowed = negatives.repeat(1, 1 + len(extra))
    scale = tau.reshape(-1, 1)
    scaled = ((blocks - positive[:, None]) / scale).masked_fill(~allowed, NEG_INF)
    count = allowed.sum(dim=1)
    some = count > 0
    # A row of -inf alone has a NaN gradient: give it zeros, and drop it below.
    log_sum = scaled.masked_fill(~some[:, None], 0.0).logsumexp(dim=1)
    return torch.where(some, log_sum - log_count(count, log_sum.dtype), 0.0), some


def log_count(count: Tensor, dtype: torch.dtype) -> Tensor:
    """Log of a number of negatives, 0 where there is none; in `dtype`, for the log of an int64 is float32."""
    return count.clamp(min=1).to(dtype).log()


def update_log_u(log_u: Tensor, log_g: Tensor, gamma: float) -> Tensor:
    """Log of (1 - gamma) u + gamma g, or log g where u is not seen yet (log u = -inf)."""
    if gamma >= 1:
        return log_g
    mixed = torch.logaddexp(math.log1p(-gamma) + log_u, math.log(gamma) + log_g)
    return torch.where(log_u == NEG_INF, log_g, mixed)


def mean_by_id(ids: Tensor, values: Tensor, log: bool = False) -> Tensor:
    """Replace every row's value by the mean over the rows with the same id; `log` means: of exp(values).

    A sample that stands twice in a batch gets one update, whatever the order of the rows.
    ids: (B,) int64. values: (B,). Costs O(B log B) time and O(B) memory.
    """
    order = ids.argsort(stable=True)
    sorted_ids = ids[order]
    starts = torch.ones_like(sorted_ids)
    starts[1:] = (sorted_ids[1:] != sorted_ids[:-1]).long()
    group = torch.empty_like(starts).scatter_(0, order, starts.cumsum(0) - 1)
    size = torch.zeros_like(values).index_add_(0, group, torch.ones_like(values))[group]
    if not log:
        return torch.zeros_like(values).index_add_(0, group, values)[group] / size
    top = torch.full_like(values, NEG_INF).scatter_reduce_(0, group, values, "amax")[group]
    top = top.clamp(min=torch.finfo(values.dtype).min)
    total = torch.zeros_like(values).index_add_(0, group, (values - top).exp())[group]
    return top + total.log() - size.log()


def cross_entropy_term(log_g: Tensor, count: Tensor, some: Tensor) -> Tensor:
    """-log softmax of the positive among itself and its negatives, from log g: softplus(log g + log |N_i|). (B,)."""
    return torch.where(some, torch.nn.functional.softplus(log_g + log_count(count, log_g.dtype)), 0.0)


def sigmoid_terms(similarities: Tensor, negatives: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's pairwise loss per anchor row: -log sigmoid(z_ij (scale s_ij + bias)), summed over j. (B,)."""
    logits = scale * similarities + bias
    matched = torch.nn.functional.softplus(-logits.diagonal())
    unmatched = torch.nn.functional.softplus(logits).masked_fill(~negatives, 0.0)
    return matched + unmatched.sum(dim=1)


def cyclic_penalties(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """CyCLIP's in-modal and cross-modal inconsistencies, each sum over (j, k) divided by B."""
    cross = image @ text.T
    in_modal = (image @ image.T - text @ text.T).square().sum() / len(image)
    return in_modal, (cross - cross.T).square().sum() / len(image)
