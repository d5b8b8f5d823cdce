"""Weight interpolation (WiSE-FT, Wortsman et al. 2022): models between the first and the trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from amclr.models.averaging import check_start, digest, end_of_line, line_names, mixed
from amclr.runs.folder import Run, begin
from amclr.utils.errors import UserError


class WeightInterpolation:
    """A run's model with weights between those that it started from and those that it ended with.

    Raises UserError if the run started from random weights, or if its first weights are no longer available.
    """

    def __init__(self, run: Run, device: str) -> None:
        state = run.load_best()
        run.refuse_without_tokenizer()
        config = replace(run.config, model=replace(run.config.model, compile=False))
        self.model = begin(config, [], run.folder).to(device).eval()
        weights = self.model.state_dict()
        self.start = {k: weights[k].cpu().clone() for k in line_names(self.model, config)}
        if not self.start:
            raise UserError(
                f"--wise interpolates between pretrained and trained weights, and '{run.folder}' trained only weights "
                "that started at random: leave out --wise"
            )
        check_start(digest(self.start.values()), state, config)
        self.end = end_of_line(state)
        self.model.load_saved(self.end)

    def visit(self, shares: Sequence[float]) -> Iterator[float]:
        """Yield each share in turn, after giving the model (1 - share) * start + share * end."""
        for share in shares:
            self.model.load_state_dict(mixed(self.start, self.end, share), strict=False)
            yield share
