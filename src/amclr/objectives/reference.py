"""The objectives as the papers write them, in plain autograd: to read, and to test the fast path against.

Views are (B, D) matrices of unit rows. A directed term contrasts anchor i of view a with the candidates j of view c:

    s_ij = <a_i, c_j>        d_ij = s_ij - s_ii        N_i: samples j with another id

    global    F_i = tau log u_i + tau rho,   u_i <- (1 - gamma) u_i + gamma g_i,   g_i = mean_{j in N_i} exp(d_ij / tau)
              with gradient  dF_i = tau dg_i / u_i   (SogCLR, arXiv 2202.12387, eq. 4 and 6; rho: arXiv 2305.11965)
    batch     F_i = log(1 + sum_{j in N_i} exp(d_ij / tau))        (CLIP, arXiv 2103.00020; NT-Xent, arXiv 2002.05709)
    sigmoid   F_i = softplus(-l_ii) + sum_{j in N_i} softplus(l_ij),  l_ij = s_ij / tau + bias    (SigLIP, 2303.15343)

An objective is the weighted sum over its terms of the mean of F_i. SogCLR has the terms image -> text and
text -> image; AmCLR has all four image-text pairs of two views each, both ways; xAmCLR also has each modality with its
own second view.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import softplus

from amclr.objectives.methods import Term

Estimates = dict[tuple[Term, int], Tensor]
"""The running estimate u of each term and sample id that has been visited."""


def reference_loss(
    contrast: str, terms: Iterable[Term], views: Mapping[str, Tensor], ids: Tensor, tau: Tensor, *,
    u: Estimates | None = None, gamma: float = 1.0, rho: float = 0.0, bias: float | Tensor = -10.0,
) -> Tensor:  # fmt: skip
    """The loss of a batch, by autograd alone; updates `u` in place. ids: (B,). tau: (). Each id occurs once."""
    negative = ids[:, None] != ids[None, :]
    loss = views[next(iter(views))].new_zeros(())
    for term in terms:
        s = views[term.anchor] @ views[term.candidate].T  # (B, B)
        e = ((s - s.diagonal()[:, None]) / tau).exp() * negative  # exp(d_ij / tau), 0 at positives
        if contrast == "global":
            g = e.sum(1) / negative.sum(1)
            u = {} if u is None else u
            for i, new in zip(ids.tolist(), g.detach(), strict=True):
                u[term, i] = (1 - gamma) * u[term, i] + gamma * new if (term, i) in u else new
            estimate = torch.stack([u[term, i] for i in ids.tolist()])
            gradient = tau.detach() * g / estimate  # stands for its gradient: its value is taken off again
            f = tau * (estimate.log() + rho) + gradient - gradient.detach()
        elif contrast == "batch":
            pooled = [(views[term.anchor] @ views[v].T - s.diagonal()[:, None]) / tau for v in term.also]
            f = (1 + e.sum(1) + sum((p.exp() * negative).sum(1) for p in pooled)).log()
        else:
            logits = s / tau + bias
            f = softplus(-logits.diagonal()) + (softplus(logits) * negative).sum(1)
        loss = loss + term.weight * f.mean()
    return loss
