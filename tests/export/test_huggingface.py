"""Export as a Hugging Face folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import amclr
from tests.export.conftest import CAPTIONS, command


def test_hugging_face_folder(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", small, "--to", "hf") == 0
    out = small / "exports" / "hf"
    assert f"amclr.load('{out}')" in capsys.readouterr().out
    assert torch.equal(amclr.load(out).encode_text(CAPTIONS), amclr.load(small).encode_text(CAPTIONS))
    shutil.rmtree(small / "exports")
