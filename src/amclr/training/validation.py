"""Evaluations while a run trains, and the results that it leaves at its end."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from amclr.data import manifest as manifests
from amclr.data.sources.rows import append_rejects
from amclr.distributed.signals import Interrupted, Signals
from amclr.evaluation.classes import read_classes
from amclr.evaluation.gallery import draw_gallery
from amclr.evaluation.monitor import Monitor
from amclr.evaluation.zeroshot import measure_classes
from amclr.models.averaging import result_weights
from amclr.runs.loggers import Loggers
from amclr.training.state import Training
from amclr.utils import figures
from amclr.utils.files import write_arrays, write_text


def evaluate(t: Training, logs: Loggers, signals: Signals, bar: Any) -> bool:
    """Evaluate and log; returns whether the weights are the best so far.

    A signal interrupts it; `t.measured` then stays false, and it is repeated when the run is resumed.
    """
    try:
        # Several processes finish it together, and then stop. The weights are swapped outside of what a signal may
        # interrupt: interrupted halfway, the model would be a mixture of both.
        with t.averaging.result_in_model(), signals.interrupting(t.team.size == 1):
            recalls = t.evaluator() | (t.monitor() if t.monitor else {})
    except Interrupted:
        return False
    t.measured = True
    if not t.team.first_rank:
        return False
    # Without image-text terms in the objective recall is chance, and the last weights are as good as any.
    is_best = recalls["r_mean"] > t.best or not t.objective.pairs
    t.best = max(t.best, recalls["r_mean"])
    epoch = t.step / t.plan.steps_per_epoch
    logs.write("eval", t.step, epoch, recalls)
    if not bar.disable:
        bar.write(_recall_line(math.ceil(epoch), t.config.epochs, recalls), file=sys.stderr)
    return is_best


def _recall_line(epoch: int, epochs: int, recalls: dict[str, float]) -> str:
    return (
        f"epoch {epoch}/{epochs}: text retrieval {recalls['txt_r_mean']:.1f}, "
        f"image retrieval {recalls['img_r_mean']:.1f}, mean {recalls['r_mean']:.1f}{Monitor.summary(recalls)}"
    )


def finish(t: Training, progress: bool) -> None:
    """Load the best weights and write results.json, queries.npz, curves.png and gallery.png."""
    t.team.watchdog.at("evaluating the best weights", math.inf)
    t.team.barrier()  # until the first process has written its checkpoint
    best = t.run.load_best()
    t.load_weights(result_weights(best))
    t.model.eval()
    images, texts = t.evaluator.embeddings()
    if not t.team.first_rank:
        return
    best_step = round(best["step"] * t.step_scale(best))
    results = {"split": "val", "best_step": best_step, **t.evaluator.measure(images, texts)}
    if t.manifest.zeroshot:
        # A sharded model cannot be used by one process alone.
        model = t.run.load_model().to(t.fabric.device) if t.config.strategy == "fsdp" else t.model
        hits = t.run.folder / "queries-zeroshot.npz"
        results |= measure_classes(model, read_classes(t.manifest.zeroshot), t.config, progress, hits)
    write_arrays(t.run.folder / "queries.npz", t.evaluator.hits(images, texts))
    write_text(t.run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    title = f"{t.config.objective} on {manifests.label(t.config.data)}"
    figures.curves(t.run.metrics(), t.run.folder / "curves.png", title, t.evaluator.chance())
    draw_gallery(t.model, t.evaluator, images, texts, t.run.folder / "gallery.png", title)
    append_rejects(t.evaluator.rejects, t.run.folder / "rejects.jsonl")
