"""Contrastive objectives for image-text dual encoders: needs torch and NumPy alone.

objective = amclr.objectives.build("amclr", num_samples=len(dataset))
loss, metrics = objective({"image": i, "image_aug": i2, "text": t, "text_aug": t2}, ids)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from amclr.objectives.methods import METHODS, PAIRS, VIEWS, Method, Pairs, Temperature, Term, modality
from amclr.objectives.microbatch import backward_in_chunks
from amclr.objectives.objective import Objective
from amclr.objectives.tables import STORAGES, choose_storage
from amclr.utils.errors import did_you_mean

__all__ = ["METHODS", "PAIRS", "VIEWS", "Method", "Objective", "Term", "backward_in_chunks", "build", "modality"]

ESTIMATORS = ("per-term", "reference")
GAMMA_SCHEDULES = ("constant", "cosine", "adaptive")
PRODUCTS = ("auto", "float32", "tf32", "float16", "bfloat16")
BACKENDS = ("auto", "eager", "triton")


def build(
    name: str,
    num_samples: int | Mapping[str, int],
    *,
    temperature: float | None = None,
    gamma: float = 0.8,
    gamma_schedule: str = "constant",
    temperature_mode: Temperature | None = None,
    temperature_range: tuple[float, float] = (0.005, 1.0),
    temperature_lr: float = 1e-3,
    temperature_momentum: float = 0.9,
    rho: float = 2.5,
    pairs: Pairs | None = None,
    weights: Mapping[str, float] | None = None,
    cyclic_weight: float | None = None,
    queue: int = 0,
    estimator: str = "per-term",
    validate: bool | None = None,
    distributed: bool = True,
    averaged: bool = False,
    storage: str = "auto",
    folder: str | Path | None = None,
    matmul_dtype: str = "auto",
    backend: str = "auto",
) -> Objective:
    """Make an objective by name.

    Args:
        name: one of `amclr.objectives.METHODS`.
        num_samples: how many samples the training set has (the estimators have a row each), or
            {"image": n, "text": m} where images and captions have ids of their own.
        temperature: tau; the start of a learnable or individual one. Default: the method's own.
        gamma: weight of this batch in the running estimate, in (0, 1]; 1 keeps no memory.
        gamma_schedule: "constant"; "cosine" from 1 down to `gamma` (call `start_epoch`); or "adaptive", between
            `gamma` and 1, by how noisy batches are and how stale the estimates (see `adaptive.py`).
        temperature_mode: "fixed", "learnable" (one, a parameter) or "individual" (one per sample
            and term, global objectives only). Default: the method's own.
        temperature_range: bounds of a learnable or individual temperature.
        temperature_lr: step size of individual temperatures.
        temperature_momentum: momentum of individual temperatures (beta), in [0, 1).
        rho: holds a learned temperature of a global objective: tau * rho is added to its loss, so that
            a temperature settles where the weights' divergence from uniform is rho. The default is
            half of log 127, the largest that a batch of 128 can show.
        pairs: which image-text pairs are aligned: "first" (x, t), "aligned" (x, t) and (x', t'), or
            "all" four. Gives a baseline the same views as AmCLR. Default: the method's own.
        weights: factors on the terms by kind: "cross", "image" (image-image), "text" (text-text).
        cyclic_weight: weight of each of CyCLIP's two penalties, for any method with image-text pairs. Default: the
            method's own, 0.25 for cyclip and else 0.
        queue: samples of the last batches whose embeddings stay as further, constant negatives (see `queue.py`):
            cross-batch memory, for small batches where embeddings move slowly (frozen or fine-tuned towers, not
            ones from scratch). Takes 4 x queue x views x D bytes, and is saved with the rest.
        estimator: "per-term" keeps one running estimate per sample and term; "reference" one per
            sample, overwritten by the terms in turn, as the public AmCLR code does (call `start_epoch`: it
            remembers nothing before the second).
        validate: check unit length, NaN and the range of ids at every call. Default: on the CPU
            only, since on an accelerator it costs a synchronisation.
        distributed: where torch.distributed is initialised, take the batches of all processes as one.
        averaged: the gradients are averaged over the processes afterwards, as DDP and FSDP do: hand
            them out times the number of processes, so that the average is the gradient of the whole.
        storage: where the tables are: "device", "host" (memory, pinned where there is a GPU), "disk"
            (memory-mapped), or "auto": the first of these that they fit.
        folder: where "disk" puts its files, which have no name and go with the process; None is the
            system's temporary folder. `Objective.save_tables` is what keeps them.
        matmul_dtype: type of the features in the matrix products: "auto" (the views' own, exact), "float32",
            "tf32" (Triton only), "float16" or "bfloat16"; sums are in float32 all the same.
        backend: "eager", "triton", or "auto": Triton on a GPU where it is installed.

    Raises:
        ValueError: for an unknown name or a setting out of range; the message names the argument.
    """
    if name not in METHODS:
        raise ValueError(f"unknown objective '{name}': {did_you_mean(name, METHODS)}")
    method = METHODS[name]
    mode = temperature_mode or method.temperature
    samples = _samples(num_samples)
    low, high = temperature_range
    tau = float(method.default_temperature if temperature is None else temperature)
    _require(0 < low <= high < math.inf, "temperature_range must be 0 < low <= high", temperature_range)
    _require(tau > 0 and math.isfinite(tau), "temperature must be positive", temperature)
    _require(mode == "fixed" or low <= tau <= high, f"temperature must lie in temperature_range {low, high}", tau)
    _require(0 < gamma <= 1, "gamma must lie in (0, 1]", gamma)
    _choose("gamma_schedule", gamma_schedule, GAMMA_SCHEDULES)
    _choose("temperature_mode", mode, ("fixed", "learnable", "individual"))
    _choose("estimator", estimator, ESTIMATORS)
    _require(0 <= temperature_momentum < 1, "temperature_momentum must lie in [0, 1)", temperature_momentum)
    _require(temperature_lr > 0, "temperature_lr must be positive", temperature_lr)
    cyclic = method.cyclic if cyclic_weight is None else cyclic_weight
    _require(0 <= cyclic < math.inf, "cyclic_weight must not be negative or infinite", cyclic_weight)
    if cyclic and method.pairs == "none":
        raise ValueError(f"'{name}' aligns no image-text pairs: leave out cyclic_weight={cyclic_weight!r}")
    if pairs is not None:
        _choose("pairs", pairs, tuple(p for p in PAIRS if p != "none"))
        if method.pairs == "none":
            raise ValueError(f"'{name}' aligns no image-text pairs: leave out pairs={pairs!r}")
    for kind, weight in (weights or {}).items():
        _choose("weights", kind, ("cross", "image", "text"))
        _require(0 <= weight < math.inf, f"weights[{kind!r}] must not be negative or infinite", weight)
    if mode == "individual" and method.contrast != "global":
        raise ValueError(f"temperature_mode 'individual' needs a global objective, and '{name}' is a mini-batch one")
    if estimator == "reference" and method.contrast != "global":
        raise ValueError(f"estimator 'reference' needs a global objective, and '{name}' is a mini-batch one")
    if estimator == "reference" and gamma_schedule == "adaptive":
        raise ValueError("gamma_schedule 'adaptive' needs estimator 'per-term', which tells the terms apart")
    _require(isinstance(queue, int) and queue >= 0, "queue must be a whole number, 0 for none", queue)
    if queue and (method.contrast == "sigmoid" or method.pool_negatives):
        raise ValueError(f"'{name}' has no anchors to contrast with a queue: leave out queue={queue!r}")
    if queue and estimator == "reference":
        raise ValueError("a queue needs estimator 'per-term': the public AmCLR code has none")
    if not method.terms(pairs, weights):
        raise ValueError(f"weights {dict(weights or {})} leave '{name}' without a term")
    _require(math.isfinite(rho) and rho >= 0, "rho must not be negative", rho)
    _choose("storage", storage, STORAGES)
    _choose("matmul_dtype", matmul_dtype, PRODUCTS)
    _choose("backend", backend, BACKENDS)
    if storage == "auto":
        terms = len(method.terms(pairs, weights)) // 2
        columns = (1 if estimator == "reference" else terms) + (2 * terms if mode == "individual" else 0)
        size = 4 * columns * sum(samples.values())
        storage = choose_storage(size) if method.contrast == "global" else "device"
    return Objective(
        name,
        replace(method, temperature=mode),
        samples,
        temperature=tau,
        gamma=gamma,
        gamma_schedule=gamma_schedule,
        temperature_mode=mode,
        temperature_range=temperature_range,
        temperature_lr=temperature_lr,
        temperature_momentum=temperature_momentum,
        rho=rho,
        pairs=pairs,
        weights=weights,
        cyclic_weight=cyclic,
        queue=queue,
        estimator=estimator,
        validate=validate,
        distributed=distributed,
        averaged=averaged,
        storage=storage,
        folder=Path(folder) if folder else None,
        matmul_dtype=matmul_dtype,
        backend=backend,
    )


def _samples(given: int | Mapping[str, int]) -> dict[str, int]:
    try:
        if isinstance(given, Mapping):
            found = {of: operator.index(n) for of, n in given.items()}
        else:
            found = dict.fromkeys(("image", "text"), operator.index(given))
    except TypeError:
        found = {}
    if set(found) != {"image", "text"} or min(found.values()) < 1:
        raise ValueError(f"num_samples must be a positive int or a dict of them for 'image' and 'text', got {given!r}")
    return found


def _require(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}, got {got!r}")


def _choose(what: str, got: object, among: tuple[str, ...]) -> None:
    if got not in among:
        raise ValueError(f"{what} must be one of {', '.join(among)}, got {got!r}")
