"""The weights that are evaluated and saved, where they differ from those being trained: averages and interpolations.

EMA: an exponential moving average over the steps. WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903): weight
interpolation, (1 - wise) * initial + wise * fine-tuned weights, which keeps more of what a pretrained model could do
on data other than the training data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from amclr.config.schema import Config
from amclr.distributed.world import is_sharded, local, shard_like
from amclr.models.dual_encoder import DualEncoder
from amclr.utils.errors import UserError

State = dict[str, Tensor]


class Averaging:
    """EMA and weight interpolation of a model in training. Create it while the model has its initial weights.

    It covers trained parameters and the running statistics of batch norms; nothing of the objective. Raises UserError
    where `wise` would interpolate with random initial weights.
    """

    def __init__(self, model: DualEncoder, config: Config) -> None:
        self.model, self.config = model, config
        weights = model.state_dict()
        self.names = [k for k in model.trained_names() if weights[k].is_floating_point()]
        # A sharded model replaces its tensors, so its state dict has to be asked for each time.
        self._live = None if any(map(is_sharded, weights.values())) else weights
        self.steps = 0
        """Steps averaged so far."""
        self.average = {k: weights[k].clone() for k in self.names} if config.ema else {}
        interpolated = interpolated_names(model, config)
        self.digest = weights_digest(weights[k] for k in interpolated)
        """Of the initial weights that WiSE-FT may need later; empty where there are none, or they are sharded."""
        self.initial = {k: weights[k].clone() for k in interpolated} if config.wise < 1 else {}
        if config.wise < 1 and not interpolated:
            raise UserError(
                f"--wise {config.wise:g} interpolates with the initial weights, which are random or frozen here: "
                "give --init_from RUN, or train a pretrained tower"
            )

    def trained(self) -> State:
        """The weights being trained, by name."""
        return self._live or self.model.state_dict()

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a step."""
        if self.average:
            decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
            weights = self.trained()
            torch._foreach_lerp_(_local(self.average.values()), _local(weights[k] for k in self.names), 1 - decay)
        self.steps += 1

    @torch.no_grad()
    def result(self) -> State:
        """The weights to evaluate and save, by name, as far as they differ from those being trained."""
        if not self.initial:
            return self.average
        final = self.average or self.trained()
        return {**self.average, **interpolate(self.initial, final, self.config.wise)}

    @contextmanager
    def result_in_model(self) -> Iterator[None]:
        """Swap the `result` into the model for a block; those being trained are put back at its end."""
        result = self.result()
        if not result:
            yield
            return
        weights = self.trained()
        backup = {k: weights[k].clone() for k in result}
        _copy(weights, result)
        try:
            yield
        finally:
            _copy(self.trained(), backup)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the weights being trained."""
        state: dict[str, Any] = {"start": self.digest} if self.digest else {}
        if self.average:
            state["average"] = {"weights": self.average, "steps": self.steps}
        if result := self.result():
            state["kept"] = result
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from a checkpoint. Raises UserError where its run had other initial weights."""
        if self.initial:
            check_initial_weights(self.digest, state, self.config)
        if self.average and "average" in state:
            self.steps = state["average"]["steps"]
            weights: State = state["average"]["weights"]
            _copy(self.average, {k: shard_like(weights[k], v) for k, v in self.average.items()})


def result_weights(state: Mapping[str, Any]) -> State:
    """The weights of a checkpoint to use: `Averaging.result`, and else those being trained."""
    return {**state["model"], **state.get("kept", {})}


def fine_tuned_weights(state: Mapping[str, Any]) -> State:
    """The weights of a checkpoint before interpolation: the average, where there is one, or those being trained."""
    return {**state["model"], **state.get("average", {}).get("weights", {})}


def interpolate(initial: Mapping[str, Tensor], final: Mapping[str, Tensor], share: float) -> State:
    """(1 - share) * initial + share * final, for the names in `initial`. Exact at both ends."""
    result = {k: torch.empty_like(v) for k, v in initial.items()}
    values = torch._foreach_lerp(
        _local(initial.values()), _local(final[k].to(v.device) for k, v in initial.items()), share
    )
    torch._foreach_copy_(_local(result.values()), values)
    return result


def interpolated_names(model: DualEncoder, config: Config) -> list[str]:
    """Names of the weights that WiSE-FT interpolates: those of pretrained towers, or with `init_from` all.

    Of adapters only the second factor: it starts at zero, so that the product, which is what the tower sees, is
    interpolated linearly.
    """
    c = config.model
    pretrained = ["image_tower."] * (c.image_tower != "small" and c.image_pretrained)
    pretrained += ["text_tower."] * (c.text_tower != "small" and c.text_pretrained)
    weights = model.state_dict()
    return [
        k for k in model.trained_names()
        if weights[k].is_floating_point() and ".lora_A." not in k
        and (config.init_from or k.startswith(tuple(pretrained)))
    ]  # fmt: skip


def weights_digest(tensors: Iterable[Tensor]) -> str:
    """A hash of tensors; empty for none, or where any is sharded over processes."""
    sha, count = hashlib.sha256(), 0
    for tensor in tensors:
        if is_sharded(tensor):
            return ""
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        count += 1
    return sha.hexdigest() if count else ""


def check_initial_weights(digest: str, state: Mapping[str, Any], config: Config) -> None:
    """Raise UserError where initial weights, by their digest, are not those that a checkpoint's run started with."""
    if digest and state.get("start", digest) != digest:
        source = f"'{config.init_from}'" if config.init_from else "the published files"
        raise UserError(
            f"the weights that this run started from are no longer those in {source}: restore them, or use the "
            "fine-tuned weights alone (--wise 1)"
        )


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [local(t) for t in tensors]


def _copy(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(_local(target[k] for k in source), _local(source.values()))
