"""How much of the batch a running estimate should take: gamma from what is known of noise and change.

The log of an anchor's inner mean moves between two visits, and a batch shows it with noise. Take the noise's
variance R, that of the log of a mean over the batch's negatives, and the variance S of the innovations
log g - (log u + drift), where the drift is what all anchors of a term have in common. An estimate that is
rarely right to begin with, or has aged, has S far above R, and the batch should be believed; where noise is
most of what is seen, the memory should. The steady Kalman gain says by how much:

    gamma = 1 - R / S

The memory is moved by the drift before it is averaged with the batch, so that a common change of all
similarities, of which early training has plenty, does not make it stale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from amclr.objectives.blocks import NEG_INF, Positives

RATE = 1 / 32
"""Of the running means of noise, innovation and drift, per step."""
ROWS = 16
"""Anchors of a batch that noise is estimated from."""


class AdaptiveGamma(nn.Module):
    """Drift, noise and innovation of each term, as running means, and the gamma that follows. All buffers: (T,).

    terms: how many there are. least: the least that gamma may be.
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
        """Gamma of every term, (T,): 1 until some samples have been seen a second time."""
        found = 1 - self.noise / self.innovation.clamp(min=1e-12)
        return torch.where(self.steps > 0, found, 1.0).clamp(self.least, 1.0)

    def expect(self, rows: list[int], log_u: Tensor) -> tuple[Tensor, Tensor]:
        """What to update with a batch, and by how much: of the terms `rows`, (t, N) and (t, 1).

        log_u (t, N): estimates, which are moved by the drift since they were made; -inf where there is none.
        """
        drift, gamma = (x[rows, None].to(log_u.dtype) for x in (self.drift, self.gamma()))
        return log_u + drift, gamma

    def observe(self, rows: list[int], log_u: Tensor, log_g: Tensor, noise: Tensor, some: Tensor | None) -> None:
        """Take up what a batch shows of the terms `rows`. log_u, before the update, and log_g: (t, N); noise: (t,)."""
        seen = log_u != NEG_INF if some is None else (log_u != NEG_INF) & some
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
        fine = (count > 0) & torch.isfinite(drift + square + noise)
        for mean, now in ((self.drift, drift), (self.innovation, square), (self.noise, noise)):
            mean[rows] = torch.where(fine, now, mean[rows])
        self.steps[rows] = steps + fine.to(steps.dtype)


def log_noise(
    views: list[Tensor], anchors: list[int], candidates: list[int], taus: float | Tensor, positives: Positives
) -> Tensor:
    """Variance of log g of terms, (t,), from the spread of its own summands, for the first ROWS anchors of a batch.

    By the delta method, with e_j = exp(s_ij / tau) over n negatives: (sum e^2 / (sum e)^2 - 1 / n) n / (n - 1).
    anchors, candidates: (t,) places in `views`. taus: one, or (t, N).
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
    s = s.masked_fill(mask, NEG_INF)
    n = (~mask).sum(1).to(s.dtype)
    ratio = ((2 * s).logsumexp(2) - 2 * s.logsumexp(2)).exp()
    several = n > 1
    noise = torch.where(several, (ratio - 1 / n) * n / (n - 1), 0.0)
    return noise.sum(1) / several.sum().clamp(min=1)
