"""Training through the Python API: every objective, run folders, micro-batches, logs."""

from __future__ import annotations

import csv
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import amclr
import amclr.training.step
from amclr.config.schema import (
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ViewsConfig,
)
from amclr.data import manifest as manifests
from amclr.data.batches import ImageBatches
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.objectives import METHODS
from amclr.runs.folder import Run
from amclr.training import timing as clock
from amclr.training.loop import train
from amclr.utils.errors import UserError
from tests.conftest import make_folder
from tests.training.configs import assert_same_run, config_for, frozen, weights

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize("objective", METHODS)
def test_every_objective_trains(objective: str, folder: Path) -> None:
    run = train(frozen(folder, objective=objective), progress=False)
    rows = run.metrics()
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert len(losses) == 2 and all(np.isfinite(losses))
    state = run.load_last()
    assert state is not None
    tables = [v for k, v in state["objective"].items() if k.startswith("log_u_")]
    if METHODS[objective].contrast == "global":
        assert tables and all(bool(torch.isfinite(t).any(dim=1).sum() >= 30) for t in tables)
    start = DualEncoder(run.config.model, build_tokenizer(run.config.model, [], run.folder / "tokenizer"))
    assert not torch.equal(start.image_head.linear.weight, state["model"]["image_head.linear.weight"])  # type: ignore[union-attr]


@pytest.mark.parametrize("objective", ["clip", pytest.param("amclr", marks=pytest.mark.slow)])
def test_a_small_encoder_learns_colours(objective: str, tmp_path: Path) -> None:
    """End to end, towers and all: captions find images of their colour."""
    folder = make_folder(tmp_path / "patches", images=80)
    changes: dict[str, Any] = {"epochs": 25, "batch_size": 16, "objective": objective, "optim": OptimConfig(lr=3e-3)}
    changes["model"] = ModelConfig(image_size=32, dim=16, text_lr=0.1)
    run = train(config_for(folder, **changes), progress=False)
    model = amclr.load(run.folder)
    names = ["red", "green", "blue", "yellow"]
    paths = sorted((folder / "Images").iterdir())[:16]
    captions = [f"a {n} patch number 1" for n in names]
    result = amclr.evaluate.zeroshot(model, paths, [k % 4 for k in range(16)], captions, ["{}"])
    assert result["zeroshot_top1"] > 70


@pytest.mark.draws
def test_run_folder(folder: Path) -> None:
    with (folder / "captions.txt").open("a") as handle:
        handle.write("001.png,\n")
    config = config_for(folder, source=replace(Config().source, max_bad=0.1, paraphrases="none"))
    run = train(config, progress=False)
    results = json.loads((run.folder / "results.json").read_text())
    assert results["split"] == "val" and results["images"] == 8 and 0 <= results["r_mean"] <= 100
    evals = [r for r in run.metrics() if r["kind"] == "eval"]
    assert [r["epoch"] for r in evals] == [1.0, 2.0]
    assert results["r_mean"] == pytest.approx(max(r["r_mean"] for r in evals))
    assert Run.open(run.folder).config == config
    environment = json.loads((run.folder / "environment.json").read_text())
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert json.loads((run.folder / "rejects.jsonl").read_text())["reason"] == "empty caption"
    for figure in ("curves.png", "gallery.png"):
        with Image.open(run.folder / figure) as image:
            assert min(image.size) > 200
    with (run.folder / "metrics.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == len(run.metrics())
    board = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("eval/r_mean")] == [4, 8] and board.Scalars("train/loss")
    names = sorted(p.name for p in run.checkpoints.folder.iterdir())
    assert names == ["best.pt", "last.pt", "step-00000004.pt", "step-00000008.pt"]


def test_loaded_model_is_the_best_one(folder: Path) -> None:
    run = train(config_for(folder), progress=False)
    model = amclr.load(str(run.folder))
    images = [s.image for s in manifests.load(run.config, folder.parent).split("val")]
    captions = [c for s in manifests.load(run.config, folder.parent).split("val") for c in s.captions]
    owner = np.repeat(np.arange(len(images)), 2)
    result = amclr.evaluate.retrieval(model.encode_image(images), model.encode_text(captions), owner)
    assert result["r_mean"] == pytest.approx(json.loads((run.folder / "results.json").read_text())["r_mean"], abs=1e-4)


def test_the_same_seed_gives_the_same_run(folder: Path) -> None:
    first = train(config_for(folder, "a"), progress=False)
    torch.manual_seed(12345)  # whatever was drawn before
    second = train(config_for(folder, "b", workers=2), progress=False)
    assert_same_run(first, second)
    other = train(config_for(folder, "c", seed=1), progress=False)
    assert not torch.equal(weights(first)["image_head.weight"], weights(other)["image_head.weight"])


@pytest.mark.parametrize("objective", ["xamclr", "clip"])
def test_micro_batches_train_the_same(objective: str, folder: Path) -> None:
    """Embedded three at a time or all at once: the same weights, but for rounding. Without dropout, whose draws differ."""
    changes: dict[str, Any] = {"objective": objective, "optim": OptimConfig(name="sgd", lr=0.1)}
    config = frozen(folder, "whole", **changes)
    config = replace(config, model=replace(config.model, dropout=0.0))
    whole = train(config, progress=False)
    parts = train(replace(config, out=str(folder.parent / "parts"), micro_batch=3), progress=False)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    losses = [[r["loss"] for r in run.metrics() if r["kind"] == "train"] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_micro_batches_of_trained_towers(folder: Path) -> None:
    """With towers, dropout and batch norm: it runs, and resumes bit by bit."""
    config = config_for(folder, "a", micro_batch=3, loss=LossConfig(temperature=0.1, storage="disk"))
    first = train(config, progress=False)
    second = train(replace(config, out=str(folder.parent / "b")), progress=False)
    assert_same_run(first, second)


def test_what_is_logged_says_how_the_estimators_do(folder: Path) -> None:
    run = train(frozen(folder, objective="ixamclr"), progress=False)
    row = next(r for r in run.metrics() if r["kind"] == "train")
    for kind in ("cross", "image", "text"):
        assert 1 <= row[f"effective_negatives_{kind}"] <= 7 and 0 <= row[f"dead_{kind}"] <= 1
        assert row[f"tau_p05_{kind}"] <= row[f"tau_p95_{kind}"]


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_mixed_precision(precision: Any, folder: Path) -> None:
    run = train(config_for(folder, precision=precision), progress=False)
    assert weights(run)["image_head.weight"].dtype == torch.float32
    exact = train(config_for(folder, "exact"), progress=False)
    first, second = (next(r["loss"] for r in x.metrics() if r["kind"] == "train") for x in (run, exact))
    assert first == pytest.approx(second, rel=0.05) and first != second


def test_a_run_says_what_its_steps_waited_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "WAITED_LONG", 0.2)
    real = ImageBatches.__getitem__
    monkeypatch.setattr(ImageBatches, "__getitem__", lambda self, step: time.sleep(0.2) or real(self, step))
    run = train(config_for(folder, epochs=1, decoded="none"), progress=True)
    said = capsys.readouterr().err
    assert re.search(r"[\d.]+ s a step: .*loader \d+%", said)
    assert re.search(
        r"\d+% of the time went into waiting for batches: try .*--decoded auto with a larger --ram_cache", said
    )
    rows = [r for r in run.metrics() if r["kind"] == "train"]
    assert all(r["seconds_per_step"] > 0.2 and 0.15 < r["wait_share"] < 1 for r in rows)


def test_gradients_are_clipped(folder: Path) -> None:
    optim = OptimConfig(lr=1.0, name="sgd", warmup=0, weight_decay=0)
    start, moved = (
        weights(train(frozen(folder, out, optim=replace(optim, clip=clip, lr=lr), epochs=1), progress=False))
        for out, clip, lr in (("start", 1.0, 1e-12), ("moved", 1e-3, 1.0))
    )
    distance = sum(float((v - moved[k]).square().sum()) for k, v in start.items() if "head" in k) ** 0.5
    # Four steps with Nesterov momentum 0.9 go at most 1.9 + 2.71 + 3.44 + 4.1 times the largest norm.
    assert 1e-4 < distance < 12.2e-3


def test_word_noise_where_an_image_has_one_caption(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "single", captions=1)
    run = train(frozen(folder, objective="amclr", views=ViewsConfig(word_noise=0.5)), progress=False)
    assert (run.folder / "results.json").is_file()


def test_an_infinite_loss_stops_and_says_so(folder: Path) -> None:
    with pytest.raises(UserError, match="the loss is nan at step .*--on_nan skip or rollback"):
        train(config_for(folder, optim=OptimConfig(lr=900.0, name="sgd", clip=0, warmup=0), epochs=9), progress=False)
