"""Export to ONNX: the example, precisions, and towers that cannot be traced or run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import amclr
from amclr.export import onnx
from amclr.models.tokenizer import train_tokenizer
from amclr.utils.errors import UserError
from tests.export.conftest import ALONE, CAPTIONS, EMBEDS, alone, check_alone, command


def test_own_towers_as_onnx(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "onnx"
    check_alone(small, "onnx", out, tmp_path, capsys)
    images = sorted((small.parent / "patches" / "Images").iterdir())[:5]
    (tmp_path / "sitecustomize.py").write_text(ALONE.format(absent=sorted(EMBEDS["onnx"][1])))
    done = subprocess.run(
        [sys.executable, out / "example.py", *images, "--captions", *CAPTIONS[:2]],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=alone(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == CAPTIONS[:2] and len(lines) == 12
    model = amclr.load(small).cpu()
    scores = model.encode_text(CAPTIONS[:1]) @ model.encode_image(images).T
    printed = {Path(p).name: float(score) for score, p in (line.split() for line in lines[1:6])}
    assert list(printed.values()) == sorted(printed.values(), reverse=True)
    for image, score in zip(images, scores[0].tolist(), strict=True):
        assert abs(printed[image.name] - score) < 0.02
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", "import torch"], env=alone(tmp_path), check=True, capture_output=True)


@pytest.mark.slow
def test_smaller_onnx(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        out = tmp_path / precision
        assert command("export", small, "--to", "onnx", "--out", out, "--precision", precision) == 0
        sizes[precision] = [(out / f"{kind}.onnx").stat().st_size for kind in ("image", "text")]
        parity = json.loads((out / "parity.json").read_text())["parity"]
        assert parity["difference"] <= onnx.FORMAT.limits[precision] and parity["overlap"] > 0.8
        assert f"{parity['overlap']:.1%} overlap" in capsys.readouterr().out
    assert all(half < 0.6 * full for half, full in zip(sizes["fp16"], sizes["fp32"], strict=True))
    assert sizes["int8"][1] < 0.8 * sizes["fp16"][1]


@pytest.mark.slow
def test_a_tower_that_cannot_be_traced(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from amclr.models.towers import TextTower

    forward = TextTower.forward

    def stubborn(self: TextTower, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        out = forward(self, input_ids, attention_mask)
        return out * 2 if float(out.sum()) > 0 else out

    monkeypatch.setattr(TextTower, "forward", stubborn)
    assert command("export", small, "--to", "onnx", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("amclr: the text tower cannot be written as ONNX (") and error.endswith(
        "give --to hf instead"
    )
    assert not list(tmp_path.iterdir())


def test_files_that_onnxruntime_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text('{"image_size": 32}')
    train_tokenizer(CAPTIONS).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "image.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"^onnxruntime cannot run these towers \(.*\): give --to hf instead$"):
        onnx.load(tmp_path)


@pytest.mark.slow
def test_weights_too_large_for_one_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx, "MAX_FILE_BYTES", 1_000_000)
    assert command("export", small, "--to", "onnx", "--out", tmp_path / "out", "--precision", "fp16") == 1
    assert "the image tower is too large for --precision fp16 (2 GB): leave it out" in capsys.readouterr().err
    assert command("export", small, "--to", "onnx", "--out", tmp_path / "out") == 0
    assert (
        (tmp_path / "out" / "image.onnx.data").stat().st_size
        > 1_000_000
        > (tmp_path / "out" / "image.onnx").stat().st_size
    )
    (tmp_path / "out").rename(tmp_path / "moved")
    from amclr.export.onnx_example import Model

    assert np.allclose(
        Model(tmp_path / "moved").embed_texts(CAPTIONS), amclr.load(small).cpu().encode_text(CAPTIONS), atol=1e-4
    )
