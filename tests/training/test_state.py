"""Runs that are resumed: with the same data and with other data, after signals, damage and full disks."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import amclr
import amclr.training.step
from amclr.data import manifest as manifests
from amclr.data.text.version import ParaphrasedCaption, Version
from amclr.evaluation.evaluator import Evaluator
from amclr.evaluation.run import evaluate_run
from amclr.models.dual_encoder import DualEncoder
from amclr.models.towers import ImageTower
from amclr.objectives import build
from amclr.runs.folder import Run
from amclr.training.assembly import assemble
from amclr.training.loop import Stopped, train
from amclr.utils.errors import UserError
from tests.conftest import make_folder
from tests.training.configs import assert_same_run, config_for, frozen, queued, weights

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.mark.parametrize(("make", "stop"), [(config_for, 3), (frozen, 6), (queued, 6)])
def test_stopped_and_resumed_equals_uninterrupted(
    make: Any, stop: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the middle of an epoch: nothing is lost, and the rest goes on bit by bit the same."""
    whole = train(make(folder, "whole", objective="iamclr", epochs=3), progress=False)
    original = amclr.training.step.embed
    count = iter(range(1000))

    def interrupt(model: Any, batch: Any) -> Any:
        if next(count) == stop:
            signal.raise_signal(signal.SIGTERM)
        return original(model, batch)

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
            result = measure(self)
            done = [r["epoch"] for r in run.metrics() if r["kind"] == "eval"]
            if len(done) == epochs - 1 and next(count) == 0:
                signal.raise_signal(signal.SIGUSR1)
            return result

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
    result, saved = training.objective.state_dict(), before["objective"]
    assert sum(k.endswith(".values") for k in saved) >= 2
    for key in (k for k in saved if k.endswith(".values")):
        for row, name in enumerate(now):
            if name == "000-new.png":
                fresh = build("iamclr", 1, temperature=0.1).state_dict()
                assert torch.equal(result[key][row], fresh[key][0])
            else:
                assert torch.equal(result[key][row], saved[key][sorted(names).index(name)])
    after = train(resume=run.folder, changed_data=True, progress=False)
    assert after.load_last()["step"] == 9  # type: ignore[index]


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


def test_resuming_with_changed_data_must_succeed_to_be_remembered(
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


def test_a_run_keeps_the_paraphrases_that_it_started_with(folder: Path) -> None:
    """A store that is made, or another that becomes the latest, while a run is stopped changes nothing in it."""
    train(frozen(folder, "without"), progress=False)
    assert Run.open(folder.parent / "without").config.source.paraphrases == "none"
    built = []
    for seed in (0, 1):
        version = Version(folder / "paraphrases", {"model": "rules", "k": 1, "seed": seed})
        version.append([ParaphrasedCaption("a red patch number 8", (f"patch {seed}",))])
        version.finish()
        built.append(version)
        train(frozen(folder, f"with{seed}"), progress=False)
    for seed in (0, 1):
        run = Run.open(folder.parent / f"with{seed}")
        result = manifests.load(run.config, folder.parent)
        assert result.paraphrases == (str(built[seed].folder),)
        assert [p for s in result.samples for k in s.paraphrases for p in k] == [f"patch {seed}"]
    (built[1].folder / "paraphrases.jsonl").unlink()
    with pytest.raises(UserError, match="are not complete"):
        train(frozen(folder, "incomplete"), progress=False)
    measured = evaluate_run(folder.parent / "with1", progress=False)
    assert measured["images"] == 8, "evaluation needs no second views"


def test_keeps_so_many_checkpoints(folder: Path) -> None:
    run = train(frozen(folder, epochs=5, keep=1), progress=False)
    assert sorted(p.name for p in run.checkpoints.folder.glob("step-*")) == ["step-00000020.pt"]
    assert (run.checkpoints.folder / "best.pt").is_file()
