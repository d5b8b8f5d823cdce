"""The arguments of a step: checked, and gathered from all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from amclr.distributed.world import World, processes
from amclr.objectives.methods import VIEWS, modality
from amclr.objectives.positives import Labels

UNIT_TOLERANCE = 2e-2
COMPARED = ("dimensions", "type", "training", "gradient", "diagnostics", "groups", "queued samples")
"""What processes compare before a step, so that none waits for a collective that another does not call."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = DTYPES[:2]


class Checks:
    """Checks of an objective's arguments. Each raises ValueError and names the view or argument that is wrong.

    name: the objective's. required: the views that it needs. num_samples: by modality. validate: whether to look at
    values; None: only on the CPU, where that needs no synchronisation.
    """

    def __init__(
        self, name: str, required: Sequence[str], num_samples: Mapping[str, int], validate: bool | None
    ) -> None:
        self.name, self.required, self.num_samples, self.validate = name, tuple(required), num_samples, validate

    def __call__(
        self, views: Mapping[str, Tensor], ids: Tensor | Mapping[str, Tensor], groups: Mapping[str, Tensor] | None
    ) -> Labels:
        """The labels of this process's rows: ids by modality, and groups of the views that are used."""
        self.views(views)
        batch = len(views[self.required[0]])
        labels = self.ids(ids, batch)
        labels = Labels(labels.ids, self.groups(groups, batch), labels.shared)
        if self.looks_at(views[self.required[0]]):
            self.lengths(views)
            self.range(labels)
        return labels

    def looks_at(self, like: Tensor) -> bool:
        """Whether values are checked."""
        return like.device.type == "cpu" if self.validate is None else self.validate

    def views(self, views: Mapping[str, Tensor]) -> None:
        """All views are there, and floating-point matrices (B, D) of one shape."""
        missing = [v for v in self.required if v not in views]
        if missing:
            raise ValueError(
                f"objective '{self.name}' needs the view{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                f"got {', '.join(views) or 'none'}"
            )
        for name in self.required:
            view, first = views[name], views[self.required[0]]
            if not isinstance(view, Tensor) or view.dim() != 2 or not view.is_floating_point():
                raise ValueError(f"view '{name}' must be a floating-point (B, D) matrix, got {_describe(view)}")
            if view.shape != first.shape:
                raise ValueError(
                    f"view '{name}' has shape {tuple(view.shape)}, view '{self.required[0]}' has {tuple(first.shape)}: "
                    "all views of a batch must agree"
                )
        if len(first) < 1:
            raise ValueError("the batch is empty: pass at least 2 samples")

    def ids(self, ids: Tensor | Mapping[str, Tensor], batch: int) -> Labels:
        """Ids of all modalities that are used, without groups."""
        used = sorted({modality(v) for v in self.required})
        if isinstance(ids, Tensor):
            by_modality, names = dict.fromkeys(used, ids), dict.fromkeys(used, "ids")
        elif not isinstance(ids, Mapping):
            raise ValueError(f"ids must be an int64 tensor, or a dict of them by modality, got {_describe(ids)}")
        elif any(of not in ids for of in used):
            raise ValueError(f"ids must hold {' and '.join(map(repr, used))}, got {sorted(ids)}")
        else:
            by_modality, names = {of: ids[of] for of in used}, {of: f"ids[{of!r}]" for of in used}
        for of, tensor in by_modality.items():
            _require_labels(names[of], tensor, batch)
        first = by_modality[used[0]]
        shared = all(tensor is first for tensor in by_modality.values())
        return Labels(by_modality, {}, shared).map(Tensor.contiguous)

    def groups(self, groups: Mapping[str, Tensor] | None, batch: int) -> dict[str, Tensor]:
        """Groups of the views that are used."""
        if groups is None:
            return {}
        if not isinstance(groups, Mapping) or not set(groups) <= set(VIEWS):
            got = sorted(map(str, groups)) if isinstance(groups, Mapping) else _describe(groups)
            raise ValueError(f"groups must be a dict of int64 tensors by view ({', '.join(VIEWS)}), got {got}")
        for name, tensor in groups.items():
            _require_labels(f"groups[{name!r}]", tensor, batch)
        return {v: groups[v].contiguous() for v in VIEWS if v in self.required and v in groups}

    def lengths(self, views: Mapping[str, Tensor]) -> None:
        """Rows are finite and have unit length."""
        # One look at all views tells whether a closer one is needed: comparisons with NaN are false.
        norms = [torch.linalg.vector_norm(views[v].detach(), dim=1).float() for v in VIEWS if v in self.required]
        low, high = (float(x) for x in torch.cat(norms).aminmax())
        if low >= 1 - UNIT_TOLERANCE and high <= 1 + UNIT_TOLERANCE:
            return
        for name in self.required:
            norm = views[name].detach().float().norm(dim=1)
            if not bool(torch.isfinite(norm).all()):
                raise ValueError(f"view '{name}' holds NaN or infinite values")
            deviation = float((norm - 1).abs().max())
            if deviation > UNIT_TOLERANCE:
                raise ValueError(
                    f"rows of view '{name}' are not unit length (off by up to {deviation:.3g}): "
                    "pass torch.nn.functional.normalize(embeddings, dim=-1)"
                )

    def range(self, labels: Labels) -> None:
        """Ids lie in [0, num_samples) of their modality."""
        least = min(self.num_samples[of] for of in labels.ids)
        for of, ids in zip(labels.ids, labels.distinct_ids, strict=False):
            low, high = (int(x) for x in ids.aminmax())
            rows = least if labels.shared else self.num_samples[of]
            if low < 0 or high >= rows:
                raise ValueError(f"{of} ids must lie in [0, {rows}), got values from {low} to {high}")

    def some_negative(self, has_negatives: Tensor) -> None:
        """Some anchor has a negative. has_negatives: bool, of any shape; looked at only if values are checked."""
        if self.looks_at(has_negatives) and not bool(has_negatives.any()):
            raise ValueError(
                "no row of the batch has a negative: all share an id or a group, so there is nothing to contrast"
            )


def agree(
    rows: int, device: torch.device, together: bool, width: int, dtype: torch.dtype, training: bool, gradient: bool,
    diagnose: bool, labels: Labels, queued: int,
) -> World:  # fmt: skip
    """The processes of a batch of which this one holds `rows`. Raises ValueError on all if they disagree."""
    groups = sum(1 << VIEWS.index(v) for v in labels.groups)
    values = (width, DTYPES.index(dtype), training, gradient, diagnose, groups, queued)
    return World.of(rows, device, together, dict(zip(COMPARED, values, strict=True)) if together else {})


def refuse(device: torch.device) -> None:
    """Let the other processes raise too, rather than wait for a part of the batch that will not come."""
    if processes() > 1:
        with suppress(ValueError):
            World.of(-1, device, True, dict.fromkeys(COMPARED, 0))


class Scaled(torch.autograd.Function):
    """The identity, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """X itself."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The scaled gradient."""
        return gradient * ctx.factor, None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Where autocast is on, a context without it; entering one costs as much as several small operations."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def _require_labels(name: str, labels: object, batch: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or tuple(labels.shape) != (batch,):
        raise ValueError(f"{name} must be an int64 tensor of shape ({batch},), got {_describe(labels)}")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__
