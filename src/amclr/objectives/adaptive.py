"""Experimental: gamma from the noise of batches and the age of estimates. It gains nothing so far (docs/results.md).

The log of an anchor's inner mean moves between two visits, and a batch measures it with noise. Let R be the variance
of that noise, the variance of the log of a mean over the batch's negatives. Let S be the variance of the innovations
log g - (log u + drift), where the drift is the mean over a term's anchors. If S is far above R, estimates are stale and
the batch should be trusted; if noise dominates, the memory should. The steady-state Kalman gain is

    gamma = 1 - R / S

The memory is moved by the drift before it is averaged with the batch, so that a common change of all similarities,
frequent early in training, does not make it stale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from amclr.objectives.positives import Positives

RATE = 1 / 32
"""Rate per step of the running means of noise, innovation and drift."""
ROWS = 16
"""Anchors of a batch from which the noise is estimated."""


class AdaptiveGamma(nn.Module):
    """Running means of drift, noise and innovation of each term, and the resulting gamma. All buffers: (T,).

    terms: T. least: lower bound of gamma.
    """

    drift: Tensor
    noise: Tensor
    innovation: Tensor
    steps: Tensor

    def __init__(self, terms: int, least: float) -> None:
        super().__init__()
        self.least = least
        for name in ("drift", "noise", "innovation", "steps"):
            self.register_buffer(name, torch.zeros(terms))

    def gamma(self) -> Tensor:
        """Gamma of every term, (T,): 1 until some samples have been visited twice."""
        gain = 1 - self.noise / self.innovation.clamp(min=1e-12)
        return torch.where(self.steps > 0, gain, 1.0).clamp(self.least, 1.0)

    def expect(self, rows: list[int], log_u: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates moved by the drift, (t, N), and gamma, (t, 1), of terms `rows`. log_u: (t, N), -inf if unseen."""
        drift, gamma = (x[rows, None].to(log_u.dtype) for x in (self.drift, self.gamma()))
        return log_u + drift, gamma

    def observe(self, rows: list[int], log_u: Tensor, log_g: Tensor, noise: Tensor, valid: Tensor | None) -> None:
        """Update the means from a batch. log_u (before the update), log_g: (t, N). noise: (t,). valid: (N,) bool."""
        seen = log_u != -math.inf if valid is None else (log_u != -math.inf) & valid
        count = seen.sum(1)
        innovation = torch.where(seen, log_g - log_u, 0.0)
        drift = innovation.sum(1) / count.clamp(min=1)
        steps = self.steps[rows]
        rate = torch.clamp(1 / (steps + 1), min=RATE)
        drift = self.drift[rows] + rate * (drift.to(rate.dtype) - self.drift[rows])
        rest = torch.where(seen, innovation - drift[:, None].to(innovation.dtype), 0.0)
        square = rest.square().sum(1) / count.clamp(min=1)
        square = self.innovation[rows] + rate * (square.to(rate.dtype) - self.innovation[rows])
        noise = self.noise[rows] + rate * (noise.to(rate.dtype) - self.noise[rows])
        finite = (count > 0) & torch.isfinite(drift + square + noise)
        for mean, now in ((self.drift, drift), (self.innovation, square), (self.noise, noise)):
            mean[rows] = torch.where(finite, now, mean[rows])
        self.steps[rows] = steps + finite.to(steps.dtype)


def log_noise(
    views: list[Tensor], anchors: list[int], candidates: list[int], taus: float | Tensor, positives: Positives
) -> Tensor:
    """Variance of log g of terms, (t,), from the spread of its summands, over the first ROWS anchors of a batch.

    By the delta method, with e_j = exp(s_ij / tau) over n negatives: (sum e^2 / (sum e)^2 - 1 / n) n / (n - 1).
    anchors, candidates: (t,) indices into `views`. taus: one, or (t, N).
    """
    every = torch.stack(views)
    count, size = len(views), len(views[0])
    rows = slice(0, min(ROWS, size))
    s = every[:, rows].flatten(0, 1) @ every.flatten(0, 1).T
    s = s.view(count, -1, count, size)[anchors, :, candidates]
    s = s / (taus[:, rows, None] if isinstance(taus, Tensor) and taus.dim() else taus)
    mask = positives.mask(torch.arange(size, device=s.device)[rows], slice(None))
    if mask is None:
        mask = torch.eye(size, dtype=torch.bool, device=s.device)[rows]
    s = s.masked_fill(mask, -math.inf)
    n = (~mask).sum(1).to(s.dtype)
    ratio = ((2 * s).logsumexp(2) - 2 * s.logsumexp(2)).exp()
    several = n > 1
    noise = torch.where(several, (ratio - 1 / n) * n / (n - 1), 0.0)
    return noise.sum(1) / several.sum().clamp(min=1)
