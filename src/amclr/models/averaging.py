"""The weights that are evaluated and kept, where they are not simply those being trained: averages of them.

EMA: an exponential moving average over the steps. WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): the
point at `wise` on the line from the weights that fine-tuning started with to those it ended with, which
keeps more of what a pretrained model could do beside the data that it is tuned on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from amclr.config.schema import Config
from amclr.distributed.world import is_spread, local, spread
from amclr.models.dual_encoder import DualEncoder
from amclr.utils.errors import UserError

State = dict[str, Tensor]


class Averaging:
    """What is kept of a model that is being trained. Made while the model has the weights that it starts with.

    It covers trained parameters and the running statistics of norms, as float buffers; nothing of the
    objective. Raises UserError where `wise` asks for a mixture with a start that was random.
    """

    def __init__(self, model: DualEncoder, config: Config) -> None:
        self.model, self.config = model, config
        own = model.state_dict()
        self.names = [k for k in model.trained_names() if own[k].is_floating_point()]
        # A model that is spread over processes moves its weights about, and has to be asked anew each time.
        self._live = None if any(map(is_spread, own.values())) else own
        self.steps = 0
        """Steps averaged so far."""
        self.average = {k: own[k].clone() for k in self.names} if config.ema else {}
        line = line_names(model, config)
        self.digest = digest(own[k] for k in line)
        """Of the weights at the start, that WiSE-FT may ask for later; empty where there are none, or they are spread
        over several processes."""
        self.start = {k: own[k].clone() for k in line} if config.wise < 1 else {}
        if config.wise < 1 and not line:
            raise UserError(
                f"--wise {config.wise:g} mixes with the weights that training starts from, and here those are random, "
                "or frozen: give --init_from RUN, or train a pretrained tower"
            )

    def own(self) -> State:
        """The model's tensors as they are, by name."""
        return self._live or self.model.state_dict()

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after a step into the average."""
        if self.average:
            decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
            own = self.own()
            torch._foreach_lerp_(_local(self.average.values()), _local(own[k] for k in self.names), 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def kept(self) -> State:
        """Weights to evaluate and keep, by name, where they are not the model's own."""
        if not self.start:
            return self.average
        end = self.average or self.own()
        return {**self.average, **mixed(self.start, end, self.config.wise)}

    @contextmanager
    def kept_in_model(self) -> Iterator[None]:
        """Put the kept weights into the model; at the end, those being trained again."""
        kept = self.kept()
        if not kept:
            yield
            return
        own = self.own()
        before = {k: own[k].clone() for k in kept}
        _copy(own, kept)
        try:
            yield
        finally:
            _copy(self.own(), before)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the weights being trained: the average, and what is kept."""
        state: dict[str, Any] = {"start": self.digest} if self.digest else {}
        if self.average:
            state["average"] = {"weights": self.average, "steps": self.steps}
        if kept := self.kept():
            state["kept"] = kept
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, from a checkpoint. Raises UserError where it is of another start."""
        if self.start:
            check_start(self.digest, state, self.config)
        if self.average and "average" in state:
            self.steps = state["average"]["steps"]
            weights: State = state["average"]["weights"]
            _copy(self.average, {k: spread(weights[k], v) for k, v in self.average.items()})


def kept_weights(state: Mapping[str, Any]) -> State:
    """The weights of a checkpoint that are to be used: those kept, and else those being trained."""
    return {**state["model"], **state.get("kept", {})}


def end_of_line(state: Mapping[str, Any]) -> State:
    """The weights of a checkpoint that training led to: their average, where there is one."""
    return {**state["model"], **state.get("average", {}).get("weights", {})}


def mixed(start: Mapping[str, Tensor], end: Mapping[str, Tensor], share: float) -> State:
    """(1 - share) * start + share * end, for the names in `start`. Exact at both ends."""
    made = {k: torch.empty_like(v) for k, v in start.items()}
    found = torch._foreach_lerp(_local(start.values()), _local(end[k].to(v.device) for k, v in start.items()), share)
    torch._foreach_copy_(_local(made.values()), found)
    return made


def line_names(model: DualEncoder, config: Config) -> list[str]:
    """Names of the weights on the line from a start that is worth going back to: of pretrained towers, or all.

    Of adapters only the second factor: it starts at zero, so that the line of the product, which is
    what the tower sees, is straight.
    """
    c = config.model
    pretrained = ["image_tower."] * (c.image_tower != "small" and c.image_pretrained)
    pretrained += ["text_tower."] * (c.text_tower != "small" and c.text_pretrained)
    own = model.state_dict()
    return [
        k for k in model.trained_names()
        if own[k].is_floating_point() and ".lora_A." not in k and (config.init_from or k.startswith(tuple(pretrained)))
    ]  # fmt: skip


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors; empty of none, or of some that are spread over processes."""
    made, count = hashlib.sha256(), 0
    for tensor in tensors:
        if is_spread(tensor):
            return ""
        made.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        count += 1
    return made.hexdigest() if count else ""


def check_start(found: str, state: Mapping[str, Any], config: Config) -> None:
    """Raise UserError where the weights at the start are not those that a checkpoint's run began with."""
    if found and state.get("start", found) != found:
        source = f"'{config.init_from}'" if config.init_from else "the published files"
        raise UserError(
            f"the weights that this run began with are no longer those in {source}: put them back, or take the "
            "trained ones alone (--wise 1)"
        )


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(t) for t in tensors]


def _copy(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(_local(to[k] for k in source), _local(source.values()))
