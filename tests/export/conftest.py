"""Runs to export, and what an export computes where amclr cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, PretrainedConfig

import amclr
from amclr import cli
from amclr.config.schema import Config, ModelConfig, OptimConfig, ViewsConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer, train_tokenizer
from amclr.training.loop import train
from tests.conftest import COLOURS, make_folder

CAPTIONS = [f"{word} {colour} patch number {k}" for k, colour in enumerate(COLOURS) for word in ("a", "one", "this")]

ALONE = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)
sys.meta_path.insert(0, Absent())
sys.path[:] = [p for p in sys.path if not p.endswith("src")]
"""

OPEN_CLIP = """
import sys
import numpy as np, torch, open_clip
from PIL import Image
folder, inputs, outputs, *paths = sys.argv[1:]
inputs = np.load(inputs)
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
mean, std = (torch.tensor(model.visual.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
with torch.no_grad():
    images = model.eval().encode_image((torch.from_numpy(inputs["pixels"]) / 255 - mean) / std, normalize=True)
    files = model.encode_image(torch.stack([preprocess(Image.open(p)) for p in paths]), normalize=True)
    texts = model.encode_text(tokenizer(list(inputs["captions"])), normalize=True)
np.savez(outputs, images=images, files=files, texts=texts, scale=model.logit_scale.exp().detach())
"""

ONNX = """
import sys
from pathlib import Path
import numpy as np
folder, inputs, outputs, *paths = sys.argv[1:]
sys.path.insert(0, folder)
from example import Model
inputs, model = np.load(inputs), Model(Path(folder))
np.savez(outputs, images=model.run(model.image, images=inputs["pixels"]), files=model.embed_images(paths),
         texts=model.embed_texts(inputs["captions"].tolist()), scale=0)
"""

EMBEDS = {"open_clip": (OPEN_CLIP, {"amclr"}), "onnx": (ONNX, {"amclr", "torch", "transformers", "timm", "open_clip"})}

BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 32, "vocab_size": 500}
DISTILBERT = {"n_layers": 2, "n_heads": 2, "dim": 24, "hidden_dim": 32, "vocab_size": 500}


def run_of(root: Path, model: ModelConfig, **settings: Any) -> Path:
    """A run of a second on patches of colours."""
    data = root / "patches"
    if not data.is_dir():
        make_folder(data, images=32)
    values: dict[str, Any] = {
        "epochs": 1, "batch_size": 8, "accelerator": "cpu", "views": ViewsConfig(image="weak"), "workers": 0,
        "optim": OptimConfig(lr=1e-3), **settings,
    }  # fmt: skip
    config = Config(data=str(data), out=str(root / "run"), cache=str(root / "cache"), model=model, **values)
    return train(config, progress=False).folder


def text_folder(root: Path, config: PretrainedConfig) -> str:
    """A tiny text model as users have one: configuration, weights and tokenizer."""
    torch.manual_seed(3)
    AutoModel.from_config(config).save_pretrained(root)
    train_tokenizer(CAPTIONS).save_pretrained(root)
    return str(root)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's own towers."""
    return run_of(tmp_path_factory.mktemp("small"), ModelConfig(image_size=32, dim=16, max_tokens=40))


def command(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def encoder(config: ModelConfig) -> DualEncoder:
    torch.manual_seed(0)
    model = DualEncoder(config, build_tokenizer(config, CAPTIONS)).eval()
    with torch.no_grad():  # heads and norms as training leaves them, not as they begin
        for name, weight in model.named_parameters():
            if name.startswith("text_head") or "LayerNorm" in name:
                weight += 0.1 * torch.randn_like(weight)
    return model


def embedded_alone(to: str, folder: Path, model: DualEncoder, images: list[Path], work: Path) -> dict[str, Any]:
    """What the export gives in a process where neither amclr nor what it may do without can be imported."""
    script, absent = EMBEDS[to]
    pixels = torch.stack([model.prepare(p) for p in images]).numpy()
    np.savez(work / "inputs.npz", pixels=pixels, captions=np.array(CAPTIONS))
    code = ALONE.format(absent=sorted(absent)) + script
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(work / "inputs.npz"), str(work / "outputs.npz"), *map(str, images)],
        cwd=work, capture_output=True, text=True, timeout=300, env=alone(work),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(work / "outputs.npz"))


def alone(work: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(work)}


def check_alone(run: Path, to: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export by the command line, load without amclr, compare; the files too, which are read in another way."""
    assert command("export", run, "--to", to, "--out", out) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    limit = {"open_clip": 1e-5, "onnx": 1e-4}[to]
    record = json.loads((out / "parity.json").read_text())
    assert f"(limit {limit:g})" in output and f"folder: {out}" in output
    assert record["parity"]["difference"] <= limit and record["parity"]["same"] == record["parity"]["queries"] > 0
    assert f"largest difference {record['parity']['difference']:.1e}" in output
    assert not list(out.parent.glob("*.part"))
    check_tells_no_paths(out)
    model = amclr.load(run).cpu()
    images = sorted((run.parent / "patches" / "Images").iterdir())[:12]
    theirs = embedded_alone(to, out, model, images, tmp_path)
    ours = {"images": model.encode_image(images).numpy(), "texts": model.encode_text(CAPTIONS).numpy()}
    for side, rows in ours.items():
        assert rows.shape == theirs[side].shape and np.abs(rows - theirs[side]).max() <= limit
    assert np.ptp(ours["images"], axis=0).max() > 0.01, "images must not all look the same to it"
    assert (ours["images"] * theirs["files"]).sum(axis=1).min() > 0.99


def check_tells_no_paths(out: Path) -> None:
    """Nothing says where files lie at who exported, but the configuration that open_clip wants it of."""
    for file in out.rglob("*"):
        if file.is_file() and file.name != "open_clip_config.json":
            content = file.read_bytes()
            for place in (Path(amclr.__file__).parent, out.parent, Path(sys.prefix)):
                assert str(place).encode() not in content, file
