"""A model as a folder of its own, and under a name on the Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.hub_mixin
import pytest
import timm
import torch
from transformers import AutoModel, BertConfig, DistilBertConfig

import amclr
from amclr.config.schema import ModelConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer, train_tokenizer
from amclr.runs.folder import Run
from amclr.training.loop import train
from amclr.utils.errors import UserError
from tests.conftest import paint
from tests.training.configs import config_for

CAPTIONS = ["a red patch", "one blue patch", "ä green patch, number 7"]
IMAGES = [paint(colour, k) for k, colour in enumerate(("red", "blue", "green"))]
TINY = ModelConfig(image_size=32, dim=16, hidden=32)


@pytest.fixture
def run(folder: Path) -> Run:
    return train(config_for(folder), progress=False)


def published(folder: Path, text: str) -> ModelConfig:
    """Towers as published ones are: a folder of timm's and one of transformers', frozen in part."""
    tokenizer = train_tokenizer(CAPTIONS)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 40}
    if text == "bert":
        config: Any = BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, **sizes
        )
    else:
        config = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, **sizes)
    AutoModel.from_config(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return replace(TINY, text_tower=str(folder / "text"), text_lr=0, text_pooling="first")


def assert_same(a: DualEncoder, b: DualEncoder) -> None:
    assert a.config == b.config and b.training is False
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert torch.equal(a.encode_text(CAPTIONS), b.encode_text(CAPTIONS))
    assert torch.equal(a.encode_image(IMAGES), b.encode_image(IMAGES))


def test_a_run_as_a_folder(run: Run, tmp_path: Path) -> None:
    model = amclr.load(run.folder)
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(run.folder)
    loaded = amclr.load(tmp_path / "saved")
    assert_same(model, loaded)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| Objective | amclr |" in card and "text retrieval, R@5" in card and "None is stated" in card
    assert "| Data | patches |" in card and str(tmp_path) not in card, "where files lie is not told"
    loaded.save_pretrained(tmp_path / "again", model_card_kwargs={"license": "mit"})
    again = (tmp_path / "again" / "README.md").read_text()
    assert "license: mit" in again and "text retrieval, R@5" in again
    assert_same(model, amclr.load(tmp_path / "again"))


@pytest.mark.parametrize(
    ("image", "text"),
    [("resnet10t", "bert"), ("vit_tiny_patch16_224", "distilbert"), ("local-dir", "bert")],
)
def test_towers_of_others_need_nothing_but_the_folder(image: str, text: str, tmp_path: Path) -> None:
    config = replace(published(tmp_path, text), image_tower=image, image_pretrained=False, head="residual")
    if image == "local-dir":  # with a setting and a normalisation of its own, and frozen
        trunk = timm.create_model("resnet10t", channels=(8, 16, 16, 32), num_classes=0)
        trunk.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
        timm.models.save_for_hf(
            trunk, tmp_path / "image", model_args={"channels": (8, 16, 16, 32)}, safe_serialization=True
        )
        config = replace(config, image_tower=f"local-dir:{tmp_path / 'image'}", image_pretrained=True, image_lr=0)
    torch.manual_seed(0)
    model = DualEncoder(config, build_tokenizer(config, CAPTIONS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "saved")
    shutil.rmtree(tmp_path / "text")
    shutil.rmtree(tmp_path / "image", ignore_errors=True)
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    loaded = amclr.load(tmp_path / "elsewhere")
    assert_same(model, loaded)
    assert torch.equal(model.image_tower.mean, loaded.image_tower.mean)
    assert [t.width for t in loaded.frozen_towers] == [t.width for t in model.frozen_towers]


def test_adapters_are_merged_first(tmp_path: Path) -> None:
    config = replace(TINY, text_adapters=2)
    model = DualEncoder(config, build_tokenizer(config, CAPTIONS)).eval()
    with pytest.raises(ValueError, match=r"merge_adapters\(\)"):
        model.save_pretrained(tmp_path / "saved")
    before = model.encode_text(CAPTIONS)
    model.merge_adapters().save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(amclr.load(tmp_path / "saved").encode_text(CAPTIONS), before)


def test_pushed_to_the_hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent is what was saved. The Hub itself is not asked."""
    sent: dict[str, Any] = {}

    class Hub:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Made", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id: str, folder_path: Path, **_: Any) -> str:
            sent[repo_id] = sorted(str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file())
            return "there"

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Hub)
    assert amclr.load(run.folder).push_to_hub("someone/patches") == "there"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer/tokenizer.json"} <= set(sent["someone/patches"])


def test_had_from_the_hub(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, from the cache of what was fetched before."""
    model = amclr.load(run.folder)
    cache = tmp_path / "hub" / "models--someone--patches"
    model.save_pretrained(cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(
        model, DualEncoder.from_pretrained("someone/patches", cache_dir=tmp_path / "hub", local_files_only=True)
    )


@pytest.mark.parametrize(
    ("spoil", "output"),
    [
        (lambda f: (f / "config.json").write_text("{"), "cannot read the model in .*; export it again"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "another library's model"),
        (lambda f: (f / "config.json").write_text('{"amclr": 99, "model": {}}'), "has format 99, .* reads 1"),
        (lambda f: (f / "config.json").write_text('{"amclr": 1, "model": {"dims": 3}}'), "dims"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "cannot read the model in .*; export it again"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "cannot read the model in .*; export it again"),
    ],
)  # fmt: skip
def test_a_damaged_folder(spoil: Any, output: str, tmp_path: Path) -> None:
    DualEncoder(TINY, build_tokenizer(TINY, CAPTIONS)).save_pretrained(tmp_path / "saved")
    spoil(tmp_path / "saved")
    with pytest.raises(UserError, match=output):
        amclr.load(tmp_path / "saved")


def test_weights_of_another_model(tmp_path: Path) -> None:
    DualEncoder(TINY, build_tokenizer(TINY, CAPTIONS)).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    output = json.loads(file.read_text())
    output["model"]["dim"] = 24
    file.write_text(json.dumps(output))
    with pytest.raises(UserError, match="these weights belong to another model"):
        amclr.load(tmp_path / "saved")


@pytest.mark.slow
def test_what_is_no_model(tmp_path: Path) -> None:
    code = """
import amclr
for name in ("someone/absent", "runs/absent"):
    try:
        amclr.load(name)
    except amclr.utils.errors.UserError as error:
        print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    absent, no_run = done.stdout.splitlines()
    assert "no such model can be downloaded from the Hub" in absent and "is not a run folder" in no_run
