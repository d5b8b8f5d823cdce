"""`amclr export`: parity of all towers and formats, what it refuses, and that nothing half-written stays."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, DistilBertConfig

import amclr
from amclr.config.schema import ModelConfig, OptimConfig
from amclr.export import open_clip
from amclr.export.exporter import final_temperature, parity_pairs
from amclr.models import packaged
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.folder import Run
from amclr.utils import errors
from tests.conftest import make_folder, paint
from tests.export.conftest import BERT, DISTILBERT, check_alone, command, run_of, text_folder


@pytest.mark.slow
@pytest.mark.parametrize("to", ["open_clip", "onnx"])
@pytest.mark.parametrize("towers", ["packaged", "packaged, residual", "resnet50+distilbert", "vit+bert"])
def test_parity_of_towers(towers: str, to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch = {"image_pretrained": False, "text_pretrained": False, "image_size": 64, "dim": 32}
    if towers.startswith("packaged"):
        if not packaged.available():
            pytest.skip("pip install 'amclr[pretrained]'")
        model = ModelConfig(
            image_tower="efficientnet-lite0", text_tower="minilm", image_lr=0, text_lr=0, image_size=64, dim=512,
            head="residual" if "residual" in towers else "linear", hidden=64,
        )  # fmt: skip
    elif "distilbert" in towers:
        folder = text_folder(tmp_path / "text", DistilBertConfig(**DISTILBERT))
        model = ModelConfig(image_tower="resnet50", text_tower=folder, text_pooling="first", **scratch)
    else:
        folder = text_folder(tmp_path / "text", BertConfig(**BERT))
        model = ModelConfig(image_tower="vit_tiny_patch16_224", text_tower=folder, **scratch)
    run = run_of(tmp_path, model)
    if to == "open_clip" and model.head == "residual":
        assert command("export", run, "--to", to, "--out", tmp_path / "out") == 1
        assert (
            "open_clip has no head like the run's (--model.head residual): give --to onnx or" in capsys.readouterr().err
        )
        assert not list(tmp_path.glob("out*"))
    else:
        check_alone(run, to, tmp_path / "out", tmp_path, capsys)


def test_an_export_that_differs_is_not_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = open_clip.FORMAT

    def spoiled(change: Callable[[DualEncoder], None]) -> None:
        def write(model: DualEncoder, *rest: Any) -> None:
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            with torch.no_grad():
                change(model)
            real.write(model, *rest)
            model.load_state_dict(weights)

        monkeypatch.setattr(open_clip, "FORMAT", replace(real, write=write))

    def nudge(model: DualEncoder) -> None:
        model.image_head.weight.add_(1e-3)  # type: ignore[operator, union-attr]

    def spoil(model: DualEncoder) -> None:
        model.text_head.weight[0, 0] = math.nan  # type: ignore[index]

    for change, message in ((nudge, r"by up to \d.\de-0[1-4]"), (spoil, "by up to nan")):
        spoiled(change)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)  # an empty folder may be named
        assert command("export", small, "--to", "open_clip", "--out", out) == 1
        output = capsys.readouterr()
        lines = [line for line in output.err.splitlines() if line.startswith("amclr:")]
        assert len(lines) == 1 and re.search(
            f"the export differs from the model: {message} .limit 1e-05.*nothing was written", lines[0]
        )
        assert not output.out and not any(out.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_kill_are_replaced(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "model.safetensors").write_bytes(b"half")
    assert command("export", small, "--to", "open_clip", "--out", tmp_path / "out") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "--to must be one of open_clip, onnx, hf, got ''"),
        (["RUN", "--to", "tensorflow"], "--to must be one of open_clip, onnx, hf, got 'tensorflow'"),
        (["RUN", "--to", "open_clip", "--precision", "int8"], "--to open_clip supports --precision fp32, got 'int8'"),
        (
            ["RUN", "--to", "onnx", "--precision", "fp8"],
            "--to onnx supports --precision fp32 or fp16 or int8, got 'fp8'",
        ),
        (["nothing", "--to", "onnx"], "'nothing' is not a run folder (no config.yaml): give the --out of an"),
        (["RUN", "--to", "onnx", "--out", "USED"], "is in use: choose another --out, or remove it"),
        (["RUN", "--to", "onnx", "--out", "USED/file/deeper"], "cannot create the folder"),
        (["RUN", "--to", "onnx", "--data", "nowhere"], "nowhere"),
        (["RUN", "--too", "onnx"], "unknown option '--too': did you mean --to? (amclr export --help"),
    ],
)
def test_slips_are_one_line(
    arguments: list[str], message: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine")
    assert command("export", *(a.replace("RUN", str(small)).replace("USED", str(used)) for a in arguments)) == 1
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("amclr: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in output.err
    assert (used / "file").read_text() == "mine" and not (small / "exports").exists()


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxruntime"), ("open_clip", "open_clip")])
def test_missing_packages(
    to: str, package: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = errors.find_spec
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else find(name))
    assert command("export", small, "--to", to) == 1
    assert f"--to {to} needs {package.replace('_', '-')}: pip install 'amclr[export]'" in capsys.readouterr().err


def test_temperature_is_the_one_that_was_learned(small: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, ModelConfig(image_size=32, dim=16), objective="clip", optim=OptimConfig(lr=0.05))
    opened = Run.open(run)
    learned = math.exp(float(opened.load_best()["objective"]["log_temperature"]))
    assert final_temperature(opened) == learned != pytest.approx(0.07, rel=1e-3)
    assert final_temperature(Run.open(small)) == 0.01


def test_images_of_the_check_are_the_validation_split(small: Path) -> None:
    config = Run.open(small).config
    model = amclr.load(small).cpu()
    images, captions = parity_pairs(model, config, progress=False)
    names = (small.parent / "patches" / "val.txt").read_text().split()
    assert sorted(Path(p.file).name for p in images) == sorted(names) and len(captions) == len(names)


def test_images_that_cannot_be_decoded_are_left_out(small: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "other", images=12)
    first = (data / "val.txt").read_text().split()[0]
    (data / "Images" / first).write_bytes(b"no image")
    paint("red", 1).save(data / "Images" / "extra.png")
    assert command("export", small, "--to", "open_clip", "--out", tmp_path / "out", "--data", data) == 0
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["pairs"] == 1
