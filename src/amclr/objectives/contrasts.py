"""Contrasts: how a directed term becomes a loss per anchor. One small class each, by name in `CONTRASTS`.

With d_ij = s_ij - s_ii and negatives N_i, everything is computed in log space from

    log g_i = logsumexp_{j in N_i} s_ij / tau - s_ii / tau - log |N_i|

so that no temperature overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

Estimate = Callable[[Tensor], Tensor]
"""log g (T, N) -> the updated estimate log u."""


class Contrast:
    """How a directed term becomes a loss per anchor, from its similarity block, by autograd."""

    averages_terms: ClassVar[bool] = True
    """Whether an objective is the mean of its terms, or else their sum."""
    has_estimates: ClassVar[bool] = False
    """Whether it keeps running estimates, and so has estimators and individual temperatures."""
    has_anchors: ClassVar[bool] = True
    """Whether anchors compete with negatives, so that a queue adds some."""
    learned: ClassVar[Mapping[str, float]] = {}
    """Learned scalars besides the temperature: their initial values by name."""

    def anchor_losses(
        self, similarities: Sequence[Tensor], negatives: Tensor, tau: Tensor, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of each anchor, (B,).

        similarities: (B, B) blocks, the positives on the diagonal of the first; the other samples of further ones are
        negatives too (NT-Xent). negatives: (B, B) bool. tau: (). learned: the contrast's own parameters.
        """
        raise NotImplementedError


class ClosedForm(Contrast):
    """A contrast of which loss and gradient follow from log g alone, so that similarity blocks need not be held."""

    def losses(
        self, log_g: Tensor, log_n: float | Tensor, tau: float | Tensor, rho: float, estimate: Estimate
    ) -> tuple[Tensor, Tensor]:
        """The loss of each anchor and the log of its denominator, log u, both (T, N). log_n: log |N_i|."""
        raise NotImplementedError

    def gradient_scale(self, weights: float | Tensor, size: int, tau: float | Tensor) -> float | Tensor:
        """The derivative of the loss by -d_ij per unit of w_ij = exp(d_ij / tau) / (|N_i| u_i)."""
        raise NotImplementedError

    def temperature_gradient(self, slope: Tensor, loss: Tensor, tau: float | Tensor) -> Tensor:
        """The derivative by the temperature, where `slope` is the part that depends on the similarities."""
        raise NotImplementedError

    def largest_weight(self, gamma: float, least_tau: float) -> float:
        """An upper bound on the sum of an anchor's weights, times its gradient scale."""
        raise NotImplementedError


class Global(ClosedForm):
    """F_i = tau (log u_i + rho), with u_i the running estimate of the inner mean over all other samples.

    SogCLR: Yuan et al. 2022, arXiv 2202.12387, eq. 4. rho: Qiu et al. 2023, arXiv 2305.11965, eq. 5.
    """

    averages_terms = False
    has_estimates = True

    def losses(
        self, log_g: Tensor, log_n: float | Tensor, tau: float | Tensor, rho: float, estimate: Estimate
    ) -> tuple[Tensor, Tensor]:
        """Tau (log u + rho), and the updated estimate log u."""
        log_u = estimate(log_g)
        return tau * (log_u + rho if rho else log_u), log_u

    def gradient_scale(self, weights: float | Tensor, size: int, tau: float | Tensor) -> float | Tensor:
        """Weight / B: d F_i = sum_j w_ij d d_ij."""
        return weights / size

    def temperature_gradient(self, slope: Tensor, loss: Tensor, tau: float | Tensor) -> Tensor:
        """The loss is proportional to tau as well."""
        return slope + loss / tau

    def largest_weight(self, gamma: float, least_tau: float) -> float:
        """u_i >= gamma g_i, so the weights sum to at most 1 / gamma."""
        return 1 / gamma


class CrossEntropy(ClosedForm):
    """-log softmax of the positive among itself and the negatives of the batch: CLIP, and NT-Xent by autograd.

    Radford et al. 2021, arXiv 2103.00020, figure 3; Chen et al. 2020, arXiv 2002.05709, eq. 1.
    """

    def losses(
        self, log_g: Tensor, log_n: float | Tensor, tau: float | Tensor, rho: float, estimate: Estimate
    ) -> tuple[Tensor, Tensor]:
        """log(1 + |N| g), and this less log |N|: the denominator contains the positive."""
        values = softplus(log_g + log_n)
        return values, values - log_n

    def gradient_scale(self, weights: float | Tensor, size: int, tau: float | Tensor) -> float | Tensor:
        """Weight / (B tau)."""
        return weights / (size * tau)

    def temperature_gradient(self, slope: Tensor, loss: Tensor, tau: float | Tensor) -> Tensor:
        """The similarities alone are divided by tau."""
        return slope

    def largest_weight(self, gamma: float, least_tau: float) -> float:
        """Softmax weights sum to at most 1; they are divided by tau."""
        return 1 / least_tau

    def anchor_losses(
        self, similarities: Sequence[Tensor], negatives: Tensor, tau: Tensor, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """The cross-entropy of each anchor's positive, 0 where it has no negative."""
        positive = similarities[0].diagonal()[:, None]
        # Masked after the division: -inf / tau has no gradient with respect to tau.
        logits = [((s - positive) / tau).masked_fill(~negatives, -math.inf) for s in similarities]
        return torch.cat([torch.zeros_like(positive), *logits], dim=1).logsumexp(dim=1)


class Sigmoid(Contrast):
    """SigLIP: -log sigmoid(z_ij (s_ij / tau + b)) summed over j, with z = 1 at the positive and -1 at negatives.

    Zhai et al. 2023, arXiv 2303.15343, algorithm 1.
    """

    has_anchors = False
    learned: ClassVar[Mapping[str, float]] = {"bias": -10.0}

    def anchor_losses(
        self, similarities: Sequence[Tensor], negatives: Tensor, tau: Tensor, learned: Mapping[str, Tensor]
    ) -> Tensor:
        """The sum over an anchor's pairs."""
        logits = (1 / tau) * similarities[0] + learned["bias"]
        matched = softplus(-logits.diagonal())
        unmatched = softplus(logits).masked_fill(~negatives, 0.0)
        return matched + unmatched.sum(dim=1)


CONTRASTS: Mapping[str, Contrast] = {"batch": CrossEntropy(), "sigmoid": Sigmoid(), "global": Global()}
"""Every contrast by the name that methods call it."""


def cyclic_penalty(image: Tensor, text: Tensor) -> Tensor:
    """CyCLIP's in-modal and cross-modal inconsistency, summed: sums over (j, k) divided by B. Scalar.

    image, text: (B, D). With M = X - Y and P = X + Y, X X' - Y Y' = (M P' + P M') / 2 and X Y' - Y X' =
    (M P' - P M') / 2, whose squares add up to that of M P' alone: one product of (B, D) and (D, B), or, for large
    batches, two of (D, B) and (B, D), since |M P'|^2 = <M' M, P' P>. Goel et al. 2022, arXiv 2205.14459, section 3.
    """
    difference, total = image - text, image + text
    batch, width = image.shape
    if batch <= 2 * width:  # forward and backward 3 B^2 D against 6 B D^2
        return (difference @ total.T).square().sum() / batch
    return ((difference.T @ difference) * (total.T @ total)).sum() / batch
