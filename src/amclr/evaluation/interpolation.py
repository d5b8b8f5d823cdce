"""Weight interpolation (WiSE-FT, Wortsman et al. 2022): models between the first and the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from amclr.models.averaging import (
    check_initial_weights,
    fine_tuned_weights,
    interpolate,
    interpolated_names,
    weights_digest,
)  # fmt: skip
from amclr.runs.folder import Run
from amclr.runs.loading import initial_model
from amclr.utils.errors import UserError


class WeightInterpolation:
    """A run's model with weights between those that it started from and those that it ended with.

    Raises UserError if the run started from random weights, or if its first weights are no longer available.
    """

    def __init__(self, run: Run, device: str) -> None:
        state = run.load_best()
        run.check_tokenizer()
        config = replace(run.config, model=replace(run.config.model, compile=False))
        self.model = initial_model(config, [], run.folder).to(device).eval()
        weights = self.model.state_dict()
        self.start = {k: weights[k].cpu().clone() for k in interpolated_names(self.model, config)}
        if not self.start:
            raise UserError(
                f"--wise interpolates between pretrained and trained weights, and '{run.folder}' trained only weights "
                "that started at random: leave out --wise"
            )
        check_initial_weights(weights_digest(self.start.values()), state, config)
        self.end = fine_tuned_weights(state)
        self.model.load_saved(self.end)

    def visit(self, shares: Sequence[float]) -> Iterator[float]:
        """Yield each share in turn, after giving the model (1 - share) * start + share * end."""
        for share in shares:
            self.model.load_state_dict(interpolate(self.start, self.end, share), strict=False)
            yield share
