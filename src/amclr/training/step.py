"""One training step: forward and backward pass, optimiser, and what happens if its numbers are not finite."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amclr.data.batches import Batch
from amclr.distributed.world import average_statistics
from amclr.objectives import backward_in_chunks
from amclr.training.faults import out_of_memory, save_fault, short_message
from amclr.training.optim import learning_rate, set_lr
from amclr.training.state import Training
from amclr.utils.errors import UserError
from amclr.utils.randomness import derive

LOG_EVERY = 10
"""Steps between two logged ones."""


@dataclass(frozen=True)
class StepResult:
    """What became of a step, with its metrics and learning rate."""

    outcome: Literal["done", "skipped", "rolled back"]
    metrics: dict[str, Tensor]
    rate: float


def advance(t: Training, batch: Batch) -> StepResult:
    """Make a step, or skip it where its numbers are not finite."""
    config = t.config
    rate = learning_rate(config.optim, t.step, t.steps)
    if t.step in t.skipped:
        return StepResult("skipped", {}, rate)
    t.objective.start_epoch(t.step // t.plan.steps_per_epoch, config.epochs)
    set_lr(t.optimizer, rate)
    t.wrapped.train()
    t.objective.diagnose = t.step % LOG_EVERY == 0
    loss, metrics = compute_gradient(t, batch)
    norm = None
    if config.optim.clip or config.on_nan != "stop":
        norm = t.fabric.clip_gradients(
            t.wrapped, t.optimizer, max_norm=config.optim.clip or math.inf, error_if_nonfinite=False
        )
    # Reading a number synchronises with the GPU: with "stop" it is not done at every step.
    checks = config.on_nan != "stop" or t.fabric.device.type == "cpu" or t.step % LOG_EVERY == 0
    if checks and not is_finite(t, loss, norm):
        return StepResult(handle_nonfinite(t, batch, loss, norm), metrics, rate)
    t.optimizer.step()
    t.optimizer.zero_grad()
    average_statistics(t.model)
    t.averaging.update()
    t.lap("optimiser", "logs and checkpoints", math.inf)
    return StepResult("done", metrics, rate)


def is_finite(t: Training, loss: Tensor, norm: Tensor | None) -> bool:
    """Whether the numbers of a step are finite. With loss scaling, the scaler takes care of the gradient."""
    if not math.isfinite(loss.item()):
        return False
    return norm is None or t.fabric.strategy.precision.precision == "16-mixed" or math.isfinite(float(norm))


def handle_nonfinite(t: Training, batch: Batch, loss: Tensor, norm: Tensor | None) -> Literal["skipped", "rolled back"]:
    """Skip a step, roll back or stop, as `on_nan` says, and save the batch for inspection."""
    names = [t.pinned.train[i] for i in batch.ids.tolist()]
    folder = t.run.folder / "faults"
    fault = save_fault(folder, t.step, t.team.rank, batch.to(t.fabric.device), names, loss, norm, t.model)
    t.undo.restore()
    t.optimizer.zero_grad()
    if (scaler := getattr(t.fabric.strategy.precision, "scaler", None)) is not None:
        scaler.update(scaler.get_scale())  # discards the gradients it has recorded; the scale stays
    what, saved = f"{fault} at step {t.step}", f"samples and batch are in {folder}"
    hint = "lower --optim.lr or raise --loss.temperature"
    if t.config.on_nan == "stop":
        raise UserError(
            f"{what}: {hint}, or skip such steps with --on_nan skip or rollback; {saved}, and earlier checkpoints in "
            f"{t.run.checkpoints.folder}"
        )
    row = {"kind": "fault", "step": t.step, "what": fault, "done": t.config.on_nan, "samples": names}
    if len(t.skipped) >= t.config.nan_limit:
        raise UserError(f"{what}, after {len(t.skipped)} others, which is the limit (--nan_limit): {hint}; {saved}")
    t.skipped.add(t.step)
    if t.team.first_rank:
        print(f"{what}: {t.config.on_nan}; {saved}", file=sys.stderr)
    if t.config.on_nan == "skip":
        if t.team.first_rank:
            t.run.log(row)
        return "skipped"
    t.run.checkpoints.wait(raises=False)
    t.team.barrier()  # until the first process has written its checkpoint
    state = t.run.load_last()
    if state is None:
        raise UserError(f"{what}, and there is no checkpoint to roll back to: {hint}; {saved}")
    t.load_state(state)
    if t.team.first_rank:
        t.run.drop_metrics_after(t.step, skipped=t.skipped)
        t.run.log(row)
    return "rolled back"


def compute_gradient(t: Training, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, metrics and gradient of a batch. When memory runs out, micro-batches are halved from here on."""
    rank = (t.team.rank,) if t.team.rank else ()
    while True:
        torch.manual_seed(derive(t.config.seed, "dropout", t.step, *rank))
        t.undo.mark()
        try:
            return backward(t, batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = short_message(error)
        # Outside the except block: the traceback keeps tensors alive.
        halve_micro_batch(t, len(batch.ids), reason)


def halve_micro_batch(t: Training, share: int, reason: str) -> None:
    """Embed half as many images at a time from here on.

    Raises UserError where that would be none, or with several processes, which wait in a collective already.
    """
    size = t.micro_batch if 0 < t.micro_batch < share else share
    half = (size + 1) // 2
    if t.team.size > 1 or size == 1:
        hint = f"--micro_batch {half}" if size > 1 else "a smaller --model.image_size or --batch_size"
        raise UserError(f"out of memory at step {t.step} with {size} images at a time ({reason}): resume with: "
                        f"amclr train --resume {t.run.folder} {hint}")  # fmt: skip
    t.undo.restore()
    t.optimizer.zero_grad()
    if t.fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    t.micro_batch = half
    print(f"out of memory with {size} images at a time: {half} from here on (--micro_batch {half} sets it from the "
          "start); the gradient is still that of the whole batch", file=sys.stderr)  # fmt: skip
    t.run.log({"kind": "fault", "step": t.step, "what": f"out of memory: {reason}", "micro_batch": half})


def backward(t: Training, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, metrics and gradient of a batch, embedded at once or in micro-batches."""
    record_function = torch.profiler.record_function
    device, size = t.fabric.device, t.micro_batch
    smallest, largest = t.plan.batch_size // t.team.size, -(-t.plan.batch_size // t.team.size)
    if 0 < size < largest:
        # Equally many on each process, since all wait for each other in the passes through a sharded model.
        parts = batch.chunks(size, 0 if t.team.size == 1 else min(smallest, -(-largest // size)))
        with record_function("amclr: forward and backward"):
            result = backward_in_chunks(
                lambda part: embed(t.wrapped, part.to(device)), parts, t.objective, batch.ids.to(device),
                groups=batch.groups, model=t.model, backward=t.fabric.backward,
                no_sync=lambda: t.fabric.no_backward_sync(t.wrapped),
            )  # fmt: skip
        t.lap("forward and backward", "optimiser")
        return result
    with record_function("amclr: forward"):
        batch = batch.to(device)
        views = embed(t.wrapped, batch)
    t.lap("forward", "objective")
    with record_function("amclr: objective"):
        loss, metrics = t.objective(views, batch.ids, batch.groups)
    t.lap("objective", "backward")
    with record_function("amclr: backward"):
        t.fabric.backward(loss)
    t.lap("backward", "optimiser")
    return loss, metrics


def embed(model: Any, batch: Batch) -> dict[str, Tensor]:
    """One pass per modality, its views stacked; a dict view -> (B, D) unit rows."""
    image, text = model(batch.images, batch.tokens)
    parts = ((batch.image_views, image), (batch.text_views, text))
    return {v: e for views, rows in parts if views for v, e in zip(views, rows.chunk(len(views)), strict=True)}
