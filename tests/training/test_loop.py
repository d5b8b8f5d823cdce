"""Training through the Python API: every objective, run folders, resuming, frozen towers, replaced images."""

from __future__ import annotations

import csv
import errno
import json
import re
import shutil
import signal
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

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
    SourceConfig,
    ViewsConfig,
    from_dict,
    problems,
)
from amclr.data import manifest as manifests
from amclr.data.batches import BatchPlan, ImageBatches
from amclr.data.images.decode import ImageStore
from amclr.data.images.views import policy
from amclr.data.text.store import Entry, Version
from amclr.evaluation.evaluator import Evaluator, evaluate_run, inspect, report
from amclr.models import features
from amclr.models.dual_encoder import DualEncoder
from amclr.models.features import FeatureBatches
from amclr.models.tokenizer import build_tokenizer
from amclr.models.towers import ImageTower
from amclr.objectives import METHODS, build
from amclr.runs.folder import Run
from amclr.training import loop
from amclr.training import timing as clock
from amclr.training.assembly import assemble
from amclr.training.loop import Stopped, train
from amclr.training.state import Training
from amclr.utils.errors import UserError
from tests.conftest import make_folder

pytestmark = pytest.mark.usefixtures("undrawn")


def config_for(folder: Path, out: str = "run", **changes: Any) -> Config:
    base = Config(
        data=str(folder), out=str(folder.parent / out), epochs=2, batch_size=8, accelerator="cpu",
        model=ModelConfig(image_size=32, dim=16), optim=OptimConfig(lr=1e-3), views=ViewsConfig(image="weak"),
        loss=LossConfig(temperature=0.1),
    )  # fmt: skip
    return replace(base, **changes)


def frozen(folder: Path, out: str = "run", **changes: Any) -> Config:
    """Both towers frozen at random weights: the cached path in seconds."""
    model = ModelConfig(image_size=32, dim=16, image_lr=0, text_lr=0, head="residual", hidden=32)
    return config_for(folder, out, model=model, **changes)


def queued(folder: Path, out: str = "run", **changes: Any) -> Config:
    return frozen(folder, out, loss=LossConfig(temperature=0.1, queue=20), **changes)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.load_last()["model"]  # type: ignore[index]


def assert_same_run(a: Run, b: Run) -> None:
    first, second = a.load_last(), b.load_last()
    assert first is not None and second is not None
    assert first["step"] == second["step"] and first["best"] == second["best"]
    for part in ("model", "objective"):
        assert first[part].keys() == second[part].keys()
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), f"{part} {name}"
    assert untimed(a) == untimed(b)


def untimed(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in clock.TIMES} for row in run.metrics()]


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
    found = amclr.evaluate.zeroshot(model, paths, [k % 4 for k in range(16)], captions, ["{}"])
    assert found["zeroshot_top1"] > 70


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
    found = amclr.evaluate.retrieval(model.encode_image(images), model.encode_text(captions), owner)
    assert found["r_mean"] == pytest.approx(json.loads((run.folder / "results.json").read_text())["r_mean"], abs=1e-4)


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


@pytest.mark.parametrize(("make", "stop"), [(config_for, 3), (frozen, 6), (queued, 6)])
def test_stopped_and_resumed_equals_uninterrupted(
    make: Any, stop: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of an epoch: nothing is lost, and the rest goes on bit by bit the same."""
    whole = train(make(folder, "whole", objective="iamclr", epochs=3), progress=False)
    taken = amclr.training.step.embed
    count = iter(range(1000))

    def interrupt(model: Any, batch: Any) -> Any:
        if next(count) == stop:
            signal.raise_signal(signal.SIGTERM)
        return taken(model, batch)

    monkeypatch.setattr("amclr.training.step.embed", interrupt)
    config = make(folder, "parts", objective="iamclr", epochs=3)
    with pytest.raises(Stopped, match="amclr train --resume .*parts") as stopped:
        train(config, progress=False)
    assert stopped.value.code == 143
    run = Run.open(Path(config.out))
    state = run.load_last()
    assert state is not None and state["step"] == stop + 1
    # Metrics of steps that the checkpoint does not know, as a kill would leave them.
    run.log({"kind": "train", "step": 11, "epoch": 2.75, "loss": 1.0})
    resumed = train(resume=Path(config.out), progress=False)
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("again", [False, True])
def test_a_signal_during_evaluation_puts_it_off(again: bool, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation may take long, and is made again; also where it is stopped a second time, and at the last step."""
    whole = train(frozen(folder, "whole", epochs=3), progress=False)
    config = frozen(folder, "parts", epochs=3)
    run, measure = Run(Path(config.out), config), Evaluator.__call__
    rounds = [1, 3] if not again else [1, 1, 3, 3]
    for when, epochs in enumerate(rounds):
        count = iter(range(100))

        def interrupted(self: Evaluator, epochs: int = epochs, count: Any = count) -> dict[str, float]:
            found = measure(self)
            done = [r["epoch"] for r in run.metrics() if r["kind"] == "eval"]
            if len(done) == epochs - 1 and next(count) == 0:
                signal.raise_signal(signal.SIGUSR1)
            return found

        monkeypatch.setattr(Evaluator, "__call__", interrupted)
        with pytest.raises(Stopped) as stopped:
            train(None if when else config, resume=run.folder if when else None, progress=False)
        assert stopped.value.code == 128 + signal.SIGUSR1
        assert [r["epoch"] for r in run.metrics() if r["kind"] == "eval"] == [float(k) for k in range(1, epochs)]
        assert run.load_last()["step"] == 4 * epochs  # type: ignore[index]
    monkeypatch.setattr(Evaluator, "__call__", measure)
    assert_same_run(whole, train(resume=run.folder, progress=False))
    assert (run.folder / "results.json").read_text() == (whole.folder / "results.json").read_text()


def test_stopped_while_features_are_computed(folder: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    """Ctrl-C before the first step: the run can go on, and ends as if it had not been stopped."""
    whole = train(frozen(folder, "whole"), progress=False)
    shutil.rmtree(own_cache)
    forward = ImageTower.forward

    def interrupt(self: ImageTower, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:  # one image is asked for when the tower is built
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(ImageTower, "forward", interrupt)
    config = frozen(folder, "parts")
    with pytest.raises(Stopped, match="amclr train --resume .*parts"):
        train(config, progress=False)
    monkeypatch.setattr(ImageTower, "forward", forward)
    assert_same_run(whole, train(resume=Path(config.out), progress=False))


def test_a_run_that_lost_files_says_so(folder: Path) -> None:
    run = train(config_for(folder), progress=False)
    kept = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(kept.replace("epochs: 2", "epochs: two"))
    with pytest.raises(UserError, match="cannot read .*config.yaml': epochs must be int, got 'two'"):
        train(resume=run.folder, progress=False)
    (run.folder / "config.yaml").write_text(kept)
    shutil.rmtree(run.folder / "tokenizer")
    with pytest.raises(UserError, match="has lost its folder tokenizer/"):
        amclr.load(run.folder)
    shutil.rmtree(run.checkpoints.folder)
    with pytest.raises(UserError, match="has no checkpoint yet: resume it with"):
        amclr.load(run.folder)
    # As after a kill at the very start: there is nothing to go on with but the settings.
    before = json.loads((run.folder / "results.json").read_text())
    train(resume=run.folder, progress=False)
    assert json.loads((run.folder / "results.json").read_text()) == before
    assert amclr.load(run.folder).encode_text(["a red patch"]).shape == (1, 16)


@pytest.mark.parametrize("objective", ["sogclr", "clip"])
def test_resuming_on_other_images_is_refused(objective: str, folder: Path) -> None:
    """An image more or less would move every later sample to another row of the estimators."""
    run = train(frozen(folder, objective=objective), progress=False)
    listed = folder / "train.txt"
    names = listed.read_text()
    listed.write_text(names.replace("020.png\n", ""))
    with pytest.raises(
        UserError,
        match=r"have changed \(31 now, 32 before; removed: 020.png\): restore the data that '.*run' started with",
    ):
        train(resume=run.folder, progress=False)
    listed.write_text(names)
    train(resume=run.folder, progress=False)


def test_with_other_images_the_samples_that_stay_keep_their_estimates(folder: Path) -> None:
    run = train(frozen(folder, objective="iamclr"), progress=False)
    before = run.load_last()
    assert before is not None
    names = (folder / "train.txt").read_text().split()
    (folder / "Images" / "000-new.png").write_bytes((folder / "Images" / names[0]).read_bytes())
    with (folder / "captions.txt").open("a") as handle:
        handle.write("000-new.png,a new patch\n")
    now = sorted({*names, "000-new.png"} - {"020.png", "033.png"})
    (folder / "train.txt").write_text("\n".join(now))
    settings = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(settings.replace("epochs: 2", "epochs: 3"))
    with pytest.raises(
        UserError,
        match=r"31 now, 32 before; removed: 020.png, 033.png; added: 000-new.png\).*--resume .*run --changed_data",
    ):
        train(resume=run.folder, progress=False)
    former = Run.open(run.folder)
    training = assemble(former.config, run.folder, former, False, changed_data=True)
    training.restore(changed_data=True)
    assert training.step == 6 and training.plan.steps_per_epoch == 3  # two epochs, as before
    found, saved = training.objective.state_dict(), before["objective"]
    assert sum(k.endswith(".values") for k in saved) >= 2
    for key in (k for k in saved if k.endswith(".values")):
        for row, name in enumerate(now):
            if name == "000-new.png":
                fresh = build("iamclr", 1, temperature=0.1).state_dict()
                assert torch.equal(found[key][row], fresh[key][0])
            else:
                assert torch.equal(found[key][row], saved[key][sorted(names).index(name)])
    after = train(resume=run.folder, changed_data=True, progress=False)
    assert after.load_last()["step"] == 9  # type: ignore[index]


def test_images_that_go_bad_while_training_are_listed_up_to_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(folder, decoded="none", source=SourceConfig(max_bad=0.1))
    bad = [folder / "Images" / f"{k:03d}.png" for k in (12, 25, 31)]
    whole = [file.read_bytes() for file in bad]
    fit = loop.fit

    def spoiled(training: Training, progress: bool, profile: bool) -> None:
        for file in bad:
            file.write_bytes(b"")
        fit(training, progress, profile)

    monkeypatch.setattr(loop, "fit", spoiled)
    run = train(config, progress=False)
    rows = [json.loads(line) for line in (run.folder / "rejects.jsonl").read_text().splitlines()]
    assert sorted(r["key"] for r in rows) == ["012.png", "025.png", "031.png"]
    assert all("while training: " in r["reason"] and "0 bytes" in r["reason"] for r in rows)

    def mend() -> None:
        for file, content in zip(bad, whole, strict=True):
            file.write_bytes(content)

    mend()
    train(resume=run.folder, progress=False)
    mend()
    assert [json.loads(line)["key"] for line in (run.folder / "rejects.jsonl").read_text().splitlines()] == [
        r["key"] for r in rows
    ]
    with pytest.raises(UserError, match=r"2 of 32 training images can no longer be read, over the limit of 4.0%"):
        train(replace(config, out=f"{config.out}-2", source=SourceConfig(max_bad=0.04)), progress=False)


@pytest.mark.parametrize(
    ("make", "decoded"),
    [pytest.param(config_for, "none", marks=pytest.mark.draws), (config_for, "ram"), (frozen, "none")],
)
def test_bad_images_that_nothing_looked_for_are_passed_over(
    make: Any, decoded: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training another takes the place of each; evaluation, the gallery and the contact sheet leave them out."""
    (folder / "Images" / "020.png").write_bytes(b"junk")
    (folder / "Images" / "003.png").write_bytes(b"")
    source = SourceConfig(scan_up_to=10, max_bad=0.04, paraphrases="none")
    run = train(make(folder, source=source, decoded=decoded), progress=False)
    rows = [json.loads(line) for line in (run.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(r["key"], r["reason"][:15]) for r in rows] == [
        ("020.png", "while training:"),
        ("003.png", "while evaluatin"),
    ]
    assert "cannot be decoded" in rows[0]["reason"] and "0 bytes" in rows[1]["reason"]
    results = json.loads((run.folder / "results.json").read_text())
    assert (results["images"], results["captions"], results["rejects"]) == (7, 14, 1)
    assert all(np.isfinite(r["loss"]) for r in run.metrics() if r["kind"] == "train")
    assert "1 of 8 images to evaluate on cannot be decoded, and are left out; the first: " in capsys.readouterr().err
    measured = evaluate_run(run.folder, progress=False)
    assert measured["r_mean"] == pytest.approx(results["r_mean"], abs=1e-3) and measured["images"] == 7
    assert "val split: 7 images, 14 captions, 1 left out" in report(measured)
    assert "contact sheet" in inspect(run.config, folder.parent / "sheet.png", progress=False)
    with pytest.raises(UserError, match="1 of 32 training images can no longer be read, over the limit of 2.0%"):
        train(make(folder, "strict", source=replace(source, max_bad=0.02), decoded=decoded), progress=False)
    for file in (folder / "Images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no image to evaluate on can be decoded; the first: .*0 bytes"):
        evaluate_run(run.folder, progress=False)
    with pytest.raises(UserError, match="no (training )?image .*can be (read|decoded)"):
        train(make(folder, "none", source=source, decoded=decoded), progress=False)
    with pytest.raises(UserError, match="no image of .* can be decoded: amclr inspect --scan"):
        inspect(run.config, folder.parent / "sheet.png", progress=False)


def test_replaced_features_are_those_of_the_next_sample(towers: Any, own_cache: Path) -> None:
    config, model, samples, store = towers
    for k in (4, 31):
        Path(samples[k].image.file).write_bytes(b"")
    plan = BatchPlan(np.array([s.id for s in samples]), 8, 0)
    data = FeatureBatches(model, samples, store, plan, ("image", "text"), config, own_cache, progress=False)
    found: dict[str, str] = {}
    for step in range(4):
        batch, planned = data[step], plan[step][1]
        assert isinstance(batch.images, torch.Tensor) and not batch.images.isnan().any()
        assert batch.ids.tolist() == [{4: 5, 31: 0}.get(i, i) for i in planned.tolist()]
        found |= batch.replaced
    assert found.keys() == {samples[4].name, samples[31].name} and all("0 bytes" in r for r in found.values())


def test_bad_images_count_until_they_are_mended(folder: Path) -> None:
    """What went bad before a run is taken up counts again only if it is still bad, or else no mending would help."""
    run = train(frozen(folder, source=SourceConfig(max_bad=0.04)), progress=False)
    for name in ("012.png", "025.png", "gone.png"):
        run.log({"kind": "replaced", "step": 8, "sample": name, "reason": "image is empty"})
    former = Run.open(run.folder)
    training = assemble(former.config, run.folder, former, False)
    training.restore()
    training.reject("012.png", "bad again")
    with pytest.raises(UserError, match="2 of 32 training images can no longer be read"):
        training.reject("013.png", "bad as well")
    rows = [json.loads(line) for line in (run.folder / "rejects.jsonl").read_text().splitlines()]
    assert [r["key"] for r in rows] == ["012.png", "025.png", "013.png"], "what the run trains on, each once"


@pytest.mark.parametrize("val_too", [False, True])
def test_changed_data_keep_what_was_measured(val_too: bool, folder: Path) -> None:
    """Steps are counted anew, in metrics and names of checkpoints; a best recall on other images is none."""
    run = train(frozen(folder, keep=3), progress=False)
    before = run.load_last()
    assert before is not None and before["best"] > 0
    for listed, size in (("train", 24), ("val", 7 if val_too else 8)):
        names = (folder / f"{listed}.txt").read_text().split()
        (folder / f"{listed}.txt").write_text("\n".join(names[:size]))
    settings = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(settings.replace("epochs: 2", "epochs: 3"))
    for _ in range(2):  # stopped before it made a step, it is no different
        former = Run.open(run.folder)
        training = assemble(former.config, run.folder, former, False, changed_data=True)
        training.restore(changed_data=True)
        assert (training.step, training.plan.steps_per_epoch) == (6, 3)
        assert training.best == (-np.inf if val_too else before["best"])
        assert [(r["step"], r["epoch"]) for r in run.metrics() if r["kind"] == "eval"] == [(3, 1.0), (6, 2.0)]
        assert [p.name for p in run.checkpoints.folder.glob("step-*")] == ["step-00000006.pt"]
    train(resume=run.folder, changed_data=True, progress=False)
    assert [(r["step"], r["epoch"]) for r in run.metrics() if r["kind"] == "eval"] == [(3, 1.0), (6, 2.0), (9, 3.0)]
    assert run.load_last()["step"] == 9  # type: ignore[index]
    assert json.loads((run.folder / "results.json").read_text())["best_step"] in ((9,) if val_too else (3, 6, 9))
    train(resume=run.folder, progress=False)


def test_going_on_with_changed_data_must_succeed_to_be_remembered(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(frozen(folder), progress=False)
    names = (folder / "train.txt").read_text().split()
    (folder / "train.txt").write_text("\n".join(names[1:]))
    with monkeypatch.context() as patch:
        patch.setattr(DualEncoder, "load_saved", lambda self, state: (_ for _ in ()).throw(UserError("will not fit")))
        with pytest.raises(UserError, match="will not fit"):
            train(resume=run.folder, changed_data=True, progress=False)
    with pytest.raises(UserError, match=r"31 now, 32 before; removed: 008.png\)"):
        train(resume=run.folder, progress=False)
    (run.folder / "samples.json").unlink()
    with pytest.raises(UserError, match="newest checkpoint .* has other training images.* --changed_data"):
        train(resume=run.folder, progress=False)


def test_other_weights_and_validation_images_are_refused(folder: Path) -> None:
    make_folder(folder.parent / "more", images=20)
    mix = folder.parent / "mix.yaml"
    mix.write_text("- {data: patches, weight: 1}\n- {data: more, weight: 2}\n")
    run = train(frozen(mix), progress=False)
    assert run.load_last()["step"] == 16  # type: ignore[index]
    mix.write_text("- {data: patches, weight: 1}\n- {data: more, weight: 1}\n")
    with pytest.raises(UserError, match="the weights of the mix have changed: restore the data"):
        train(resume=run.folder, progress=False)
    train(resume=run.folder, changed_data=True, progress=False)
    assert run.load_last()["step"] == 12  # type: ignore[index]
    listed = folder / "val.txt"
    listed.write_text(listed.read_text().replace("003.png\n", ""))
    with pytest.raises(
        UserError, match=r"the validation images have changed \(11 now, 12 before; removed: patches/003.png\)"
    ):
        train(resume=run.folder, progress=False)


def test_captions_that_all_say_the_same_are_refused(folder: Path) -> None:
    listed = folder / "captions.txt"
    names = sorted({row.split(",")[0] for row in listed.read_text().splitlines()[1:]})
    listed.write_text("image,caption\n" + "".join(f"{n},a patch\n" for n in names))
    with pytest.raises(UserError, match="every training caption of .* is 'a patch': none tells images apart"):
        train(config_for(folder), progress=False)
    assert not (folder.parent / "run").exists()


def test_resuming_a_finished_run_changes_nothing(folder: Path) -> None:
    run = train(frozen(folder), progress=False)
    before, rows = weights(run), run.metrics()
    again = train(resume=run.folder, progress=False)
    after = weights(again)
    assert all(torch.equal(v, after[k]) for k, v in before.items()) and again.metrics() == rows


def test_a_disk_that_is_full_keeps_the_checkpoint_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(frozen(folder, "whole"), progress=False)
    save, saved = torch.save, []

    def fill(state: Any, handle: Any) -> None:
        saved.append(handle)
        if len(saved) == 2:
            handle.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, handle)

    monkeypatch.setattr(torch, "save", fill)
    config = frozen(folder, "parts")
    with pytest.raises(
        UserError, match=r"\(No space left on device\): free some space, then resume with: amclr train --resume"
    ):
        train(config, progress=False)
    run = Run.open(Path(config.out))
    assert sorted(p.name for p in run.checkpoints.folder.iterdir()) == ["best.pt", "last.pt", "step-00000004.pt"]
    assert_same_run(whole, train(resume=run.folder, progress=False))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(frozen(folder), progress=False)
    (run.checkpoints.folder / "step-00000008.pt").write_bytes(b"rubbish")  # last.pt is the same file
    state = run.load_last()
    assert state is not None and state["step"] == 4
    assert "last.pt is damaged" in capsys.readouterr().err
    for file in run.checkpoints.folder.iterdir():
        file.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
        run.load_last()
    with pytest.raises(UserError, match="is damaged"):
        amclr.load(run.folder)


def test_a_checkpoint_never_runs_code(folder: Path, tmp_path: Path) -> None:
    run = train(frozen(folder), progress=False)

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model": Payload()}, run.checkpoints.folder / "best.pt")
    with pytest.raises(UserError, match="damaged"):
        amclr.load(run.folder)
    assert not (tmp_path / "executed").exists()


def test_logs_to_wandb_where_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amclr.utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'amclr\[wandb\]'"):
        train(frozen(folder, "without", wandb=True), progress=False)
    assert not (folder.parent / "without").exists()
    monkeypatch.setattr("amclr.utils.errors.find_spec", lambda name: True)
    seen: list[Any] = []
    board = types.SimpleNamespace(
        log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kw: seen.append(kw) or board))
    train(frozen(folder, wandb=True), progress=False)
    assert seen[0]["config"]["batch_size"] == 8 and seen[0]["resume"] == "allow" and seen[-1] == "end"
    assert any("eval/r_mean" in values for _, values in seen[1:-1])


def test_keeps_so_many_checkpoints(folder: Path) -> None:
    run = train(frozen(folder, epochs=5, keep=1), progress=False)
    assert sorted(p.name for p in run.checkpoints.folder.glob("step-*")) == ["step-00000020.pt"]
    assert (run.checkpoints.folder / "best.pt").is_file()


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


# -- frozen towers --------------------------------------------------------------------------------


@pytest.fixture
def towers(folder: Path) -> tuple[Config, DualEncoder, list[manifests.Sample], ImageStore]:
    config = frozen(folder, views=ViewsConfig(image="weak", image_aug="weak", cached=3))
    torch.manual_seed(0)
    model = DualEncoder(config.model, build_tokenizer(config.model, ["a red green blue yellow patch number 1"]))
    samples = list(manifests.load(config, folder.parent).split("train"))
    return config, model, samples, ImageStore([s.image for s in samples], 32)


def test_cached_features_are_the_towers_own(towers: Any, own_cache: Path) -> None:
    config, model, samples, store = towers
    found = features.image_features(model, samples, "weak", 3, config, own_cache, store, progress=False)
    assert found.shape == (32, 3, 256)
    drawn = policy("weak", 32)
    table = found.read()
    for i, v in ((0, 0), (17, 2), (31, 1)):
        (view,) = drawn([store[i]], np.array([samples[i].id]), 0, "cached", v, "weak")
        with torch.inference_mode():
            expected = model.image_tower(view[None])[0]
        np.testing.assert_allclose(table[i, v], expected, atol=1e-4)
    captions = ["a red patch", "a much longer caption of a green patch number 7", "blue"]
    rows = features.caption_features(model, captions, own_cache, progress=False).read()
    for text, row in zip(captions, rows, strict=True):
        with torch.inference_mode():
            np.testing.assert_allclose(row, model.text_tower(**model.tokenize([text]))[0], atol=1e-4)


def test_cache_is_reused_until_something_that_matters_changes(
    towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, samples, store = towers
    computed = []
    real = model.image_tower.forward
    monkeypatch.setattr(model.image_tower, "forward", lambda x: computed.append(len(x)) or real(x))

    def get(name: str = "weak", views: int = 3, **changes: Any) -> int:
        computed.clear()
        changed = replace(config, **{k.removesuffix("_config"): v for k, v in changes.items()})
        features.image_features(model, samples, name, views, changed, own_cache, store, progress=False)
        return sum(computed)

    assert get() == 96 and get() == 0
    assert get(objective="clip", batch_size=4, epochs=9) == 0
    assert get(views=2) == 64 and get("none") == 32 and get(seed=1) == 0
    assert get(views_config=replace(config.views, cached_seed=1)) == 96
    Image.new("RGB", (40, 40)).save(samples[3].image.file)
    assert get() == 3 and get() == 0, "one image of 32 has changed"
    with torch.no_grad():
        next(model.image_tower.parameters()).mul_(1.5)
    assert get() == 96


def test_what_is_cached_serves_other_sets_of_the_same_images_and_captions(
    towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits, folds and data that grow share their features; the rows are those of a cache of their own."""
    config, model, samples, store = towers
    captions = [f"a patch number {k % 50}" for k in range(60)]
    seen: list[int] = []
    for tower in (model.image_tower, model.text_tower):
        real = tower.forward
        monkeypatch.setattr(tower, "forward", lambda *a, real=real, **k: seen.append(1) or real(*a, **k))
    monkeypatch.setattr("amclr.models.feature_cache.CHUNK", 1)

    def both(rows: np.ndarray, texts: list[str], cache: Path = own_cache) -> tuple[np.ndarray, np.ndarray, int]:
        seen.clear()
        some = [samples[i] for i in rows]
        decoded = ImageStore([s.image for s in some], 32)
        images = features.image_features(model, some, "weak", 2, config, cache, decoded, progress=False)
        return images.read(), features.caption_features(model, texts, cache, progress=False).read(), len(seen)

    images, texts, made = both(np.arange(20), captions)
    assert made == 20 + 50, "ten captions stand twice"
    assert both(np.arange(10, 20), captions[:7])[2] == 0
    rows = np.random.default_rng(0).permutation(32)
    mixed, others, made = both(rows, ["another", *captions[::-1]])
    assert made == 12 + 1
    alone, own, _ = both(np.arange(32), ["another", *captions[::-1]], own_cache / "alone")
    assert np.array_equal(mixed, alone[rows]) and np.array_equal(images, alone[:20])
    assert np.array_equal(others, own) and np.array_equal(texts, own[:0:-1])
    found = features.image_features(model, [samples[i] for i in rows], "weak", 2, config, own_cache, store, False)
    assert len(found.parts) == 2, "the files of both computations"
    pick = np.arange(32) % 2
    assert np.array_equal(found.read(rows, pick), mixed[rows, pick])
    assert np.array_equal(found.read(rows[:5]), mixed[rows[:5]]) and found.read(rows[:0]).shape == (0, *mixed.shape[1:])


def test_towers_of_the_same_weights_with_other_tokenizers_share_nothing(towers: Any, own_cache: Path) -> None:
    """Two small towers of one seed, whose tokenizers are as large and were trained on other captions."""
    config, *_ = towers
    found = []
    for captions in (["red dog", "dog red"], ["big cat", "cat big"]):
        torch.manual_seed(0)
        model = DualEncoder(config.model, build_tokenizer(config.model, captions))
        found.append(features.caption_features(model, ["red cat"], own_cache, False).read())
        with torch.inference_mode():
            np.testing.assert_allclose(found[-1], model.text_tower(**model.tokenize(["red cat"])), atol=1e-4)
    assert not np.allclose(*found, atol=1e-2)


def test_interrupted_caching_goes_on_where_it_was(
    towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, samples, store = towers
    monkeypatch.setattr("amclr.models.feature_cache.CHUNK", 8)
    whole = features.image_features(model, samples, "weak", 3, config, own_cache / "whole", store, progress=False)
    real, done = model.image_tower.forward, []

    def killed(x: torch.Tensor) -> torch.Tensor:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(x))
        return real(x)

    monkeypatch.setattr(model.image_tower, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        features.image_features(model, samples, "weak", 3, config, own_cache, store, progress=False)
    rest: list[int] = []
    monkeypatch.setattr(model.image_tower, "forward", lambda x: rest.append(len(x)) or real(x))
    parts = features.image_features(model, samples, "weak", 3, config, own_cache, store, progress=False)
    assert sum(rest) == 48 and np.array_equal(whole.read(), parts.read())


def test_feature_batches_hold_what_they_say(towers: Any, own_cache: Path) -> None:
    config, model, samples, store = towers
    views = ("image", "image_aug", "text", "text_aug")
    data = FeatureBatches(
        model,
        samples,
        store,
        BatchPlan(np.array([s.id for s in samples]), 8, 0),
        views,
        config,
        own_cache,
        progress=False,
    )
    table = data.features["image"]
    for step in range(8):
        batch = data[step]
        assert isinstance(batch.images, torch.Tensor) and isinstance(batch.tokens, torch.Tensor)
        first, second = batch.images.chunk(2)
        text, other = batch.tokens.chunk(2)
        for row, i in enumerate(batch.ids):
            of = [[np.array_equal(t, side[row]) for t in table.read(np.array([int(i)]))[0]] for side in (first, second)]
            assert sum(of[0]) == sum(of[1]) == 1 and of[0] != of[1], "two different views of the same image"
            own = data.text_features(samples[int(i)].captions)
            assert {tuple(text[row].tolist()), tuple(other[row].tolist())} == set(map(tuple, own.tolist()))


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, 1, 1), (0, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize("captions", ["all", "one"])
def test_feature_batches_know_every_text_that_can_be_drawn(
    towers: Any, own_cache: Path, weights: tuple[float, float, float], captions: Literal["all", "one"]
) -> None:
    """Samples with all kinds of texts; the second views are those that batches of images tokenise."""
    config, model, samples, store = towers
    texts = ("a red patch on grey", "some red patch by itself", "grey and red")
    kinds: list[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = [
        (texts[:1], ()), (texts[:2], ()), (texts[:1], (("one red patch",),)), (texts, (("red it is", "so red"), (), ("x",))),
    ]  # fmt: skip
    samples = [replace(s, captions=c, paraphrases=p) for s, (c, p) in zip(samples, kinds * 8, strict=True)]
    views = replace(config.views, word_noise=0.5, paraphrases=weights[0], other_captions=weights[1], words=weights[2])
    config = replace(config, views=views, source=SourceConfig(captions=captions))
    required = ("image", "image_aug", "text", "text_aug")
    plan = BatchPlan(np.array([s.id for s in samples]), 8, 0)
    data = FeatureBatches(model, samples, store, plan, required, config, own_cache, progress=False)
    drawn: list[list[str]] = []
    data.text_features = lambda texts: drawn.append(list(texts)) or FeatureBatches.text_features(data, texts)  # type: ignore[method-assign, func-returns-value]
    tokenized: list[str] = []
    images = ImageBatches(samples, store, plan, required, lambda t: tokenized.extend(t) or {}, config)  # type: ignore[func-returns-value]
    for step in range(40):
        first, second = data[step].tokens.chunk(2)
        tokenized.clear()
        images[step]
        ids = plan[step][1]
        said = drawn[-1]
        assert len(said) == len(tokenized) == 16 and tokenized[:8] == said[:8]
        for row, i in enumerate(ids):
            known = {*samples[i].texts}
            noise = tokenized[8 + row] not in known or said[8 + row] not in known
            assert noise or tokenized[8 + row] == said[8 + row]
        for side, of_side in ((first, said[:8]), (second, said[8:])):
            with torch.inference_mode():
                expected = model.text_tower(**model.tokenize(of_side))
            torch.testing.assert_close(side, expected, atol=1e-4, rtol=0)


def test_another_store_computes_its_own_texts_alone(
    towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, samples, store = towers
    real, asked = model.tokenize, []
    monkeypatch.setattr(model, "tokenize", lambda t: asked.extend(t) or real(t))

    def texts(paraphrases: tuple[str, ...], views: tuple[str, ...]) -> list[str]:
        asked.clear()
        with_them = [replace(s, paraphrases=(paraphrases,) * len(s.captions)) for s in samples]
        FeatureBatches(model, with_them, store, plan, views, drawing, own_cache, progress=False)
        return list(asked)

    plan = BatchPlan(np.array([s.id for s in samples]), 8, 0)
    both = ("text", "text_aug")
    drawing = replace(config, views=replace(config.views, paraphrases=1.0, other_captions=1.0))
    assert sorted(texts((), both)) == sorted({c for s in samples for c in s.captions})
    assert sorted(texts(("so it is", "so be it"), both)) == ["so be it", "so it is"]
    assert texts(("so it is", "so be it"), both) == [] and texts(("never seen",), ("text",)) == []


def test_a_run_keeps_the_paraphrases_that_it_began_with(folder: Path) -> None:
    """A store that is made, or another that becomes the latest, while a run is stopped changes nothing in it."""
    train(frozen(folder, "without"), progress=False)
    assert Run.open(folder.parent / "without").config.source.paraphrases == "none"
    made = []
    for seed in (0, 1):
        version = Version(folder / "paraphrases", {"model": "rules", "k": 1, "seed": seed})
        version.append([Entry("a red patch number 8", (f"patch {seed}",))])
        version.finish()
        made.append(version)
        train(frozen(folder, f"with{seed}"), progress=False)
    for seed in (0, 1):
        run = Run.open(folder.parent / f"with{seed}")
        found = manifests.load(run.config, folder.parent)
        assert found.paraphrases == (str(made[seed].folder),)
        assert [p for s in found.samples for k in s.paraphrases for p in k] == [f"patch {seed}"]
    (made[1].folder / "paraphrases.jsonl").unlink()
    with pytest.raises(UserError, match="are not complete"):
        train(frozen(folder, "incomplete"), progress=False)
    measured = evaluate_run(folder.parent / "with1", progress=False)
    assert measured["images"] == 8, "evaluation needs no second views"


def test_second_views_are_made_only_for_methods_that_use_them(folder: Path, own_cache: Path) -> None:
    """A baseline computes one policy's features; `pairs` gives it the views of AmCLR, and so both."""
    views = ViewsConfig(image="weak", image_aug="single")

    def trained(out: str, **changes: Any) -> tuple[Run, int]:
        run = train(frozen(folder, out, views=views, **changes), progress=False)
        return run, len(list(own_cache.glob("images-*")))

    _, one = trained("plain", objective="sogclr")
    assert one == 2, "weak views to train on, and plain images to evaluate on"
    same, two = trained("pairs", objective="sogclr", loss=LossConfig(temperature=0.1, pairs="all"))
    assert two == 3
    published, three = trained("amclr", objective="amclr")
    assert three == 3
    expected = weights(published)
    assert all(torch.equal(v, expected[k]) for k, v in weights(same).items())


def test_gradients_are_clipped(folder: Path) -> None:
    optim = OptimConfig(lr=1.0, name="sgd", warmup=0, weight_decay=0)
    start, moved = (
        weights(train(frozen(folder, out, optim=replace(optim, clip=clip, lr=lr), epochs=1), progress=False))
        for out, clip, lr in (("start", 1.0, 1e-12), ("moved", 1e-3, 1.0))
    )
    distance = sum(float((v - moved[k]).square().sum()) for k, v in start.items() if "head" in k) ** 0.5
    # Four steps with Nesterov momentum 0.9 go at most 1.9 + 2.71 + 3.44 + 4.1 times the largest norm.
    assert 1e-4 < distance < 12.2e-3


def test_word_noise_where_a_image_has_one_caption(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "single", captions=1)
    run = train(frozen(folder, objective="amclr", views=ViewsConfig(word_noise=0.5)), progress=False)
    assert (run.folder / "results.json").is_file()


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "amlcr"}, "unknown objective 'amlcr': did you mean 'amclr'"),
        ({"epochs": 0}, "--epochs must lie between 1 and"),
        ({"batch_size": 1, "epochs": -1}, "--epochs .*; --batch_size must lie between 2"),
        ({"batch_size": 64}, "32 training images are fewer than one batch of 64"),
        ({"optim": OptimConfig(name="adamx")}, "unknown optimiser '--optim.name adamx'"),
        ({"loss": LossConfig(gamma=0.0)}, r"gamma must lie in \(0, 1\]"),
        ({"loss": LossConfig(estimator="reference"), "objective": "clip"}, "'reference' needs a global objective"),
        ({"model": ModelConfig(image_tower="resnet5000")}, "cannot load image tower"),
    ],
)
def test_settings_that_will_not_do(changes: dict[str, Any], message: str, folder: Path) -> None:
    config = config_for(folder, **changes)
    with pytest.raises(UserError, match=message):
        train(config, progress=False)
    assert not Path(config.out).exists(), "a refused run leaves no folder"


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    run = train(frozen(folder), progress=False)
    with pytest.raises(UserError, match=f"is in use: resume it with: amclr train --resume {run.folder}"):
        train(frozen(folder), progress=False)
    (folder.parent / "file").write_text("x")
    with pytest.raises(UserError, match="is in use: choose another --out"):
        train(frozen(folder, "file"), progress=False)
    with pytest.raises(UserError, match="cannot make the run folder '.*file/run': Not a directory"):
        train(frozen(folder, "file/run"), progress=False)
    with pytest.raises(UserError, match="no run folder"):
        train(resume=folder, progress=False)


def test_an_infinite_loss_stops_and_says_so(folder: Path) -> None:
    with pytest.raises(UserError, match="the loss is nan at step .*--on_nan skip or rollback"):
        train(config_for(folder, optim=OptimConfig(lr=900.0, name="sgd", clip=0, warmup=0), epochs=9), progress=False)


def test_config_round_trip() -> None:
    from dataclasses import asdict

    config = config_for(Path("x"), loss=LossConfig(temperature=None, pairs="all"))
    assert from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="LossConfig has no setting gama"):
        from_dict({"loss": {"gama": 1}})
    assert problems(Config()) == []
    for recipe in amclr.config.recipes.RECIPES.values():
        assert problems(recipe()) == []
