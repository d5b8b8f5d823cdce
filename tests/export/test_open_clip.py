"""Export for open_clip: towers and heads by kind, and its own measures."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig

import amclr
from amclr import evaluate
from amclr.config.schema import Config, ModelConfig, SourceConfig
from amclr.data import manifest as manifests
from amclr.export import open_clip
from amclr.models import packaged
from amclr.models.dual_encoder import DualEncoder
from amclr.utils.errors import UserError
from tests.conftest import REAL, needs_real_data
from tests.export.conftest import (
    BERT,
    CAPTIONS,
    DISTILBERT,
    check_alone,
    check_tells_no_paths,
    command,
    encoder,
    run_of,
    text_folder,
)

needs_packages = pytest.mark.skipif(not packaged.available(), reason="pip install 'amclr[pretrained]'")


def test_own_towers_for_open_clip(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a folder" / "clip"
    check_alone(small, "open_clip", out, tmp_path, capsys)
    assert ".part" not in (out / "open_clip_config.json").read_text()
    outputs = np.load(tmp_path / "outputs.npz")
    assert math.isclose(float(outputs["scale"]), 1 / 0.01, rel_tol=1e-5), "the temperature of objective amclr"


def differences(model: DualEncoder, folder: Path) -> tuple[float, float]:
    """Largest differences of image and text embeddings between open_clip and us; captions of unequal lengths."""
    open_clip.write(model, folder, 0.05, "fp32")
    check_tells_no_paths(folder)
    exported = open_clip.load(folder)
    size = model.config.image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    captions = [*CAPTIONS, "a red patch", "a red patch beside one that is of another colour, and one more of them"]
    tokens = model.tokenize(captions)
    with torch.inference_mode():
        ours, theirs = model(pixels, tokens), (exported.images(pixels), exported.texts(tokens))
        own = exported.own_texts(captions)
    assert (own - theirs[1]).abs().max() < 1e-6, "its tokenizer agrees with ours"
    image, text = (float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return image, text


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_image_towers_for_open_clip(name: str, tmp_path: Path) -> None:
    model = encoder(ModelConfig(image_tower=name, image_pretrained=False, image_size=64, dim=24, max_tokens=12))
    assert max(differences(model, tmp_path)) < 1e-6


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize("dim", [16, 24, 40])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_text_towers_for_open_clip(kind: str, dim: int, pooling: Any, tmp_path: Path) -> None:
    config = {
        "bert": BertConfig(**BERT), "distilbert": DistilBertConfig(**DISTILBERT),
        # Its padding and the tokenizer's must be one number: positions are counted from it.
        "roberta": RobertaConfig(**BERT, pad_token_id=0),
    }[kind]  # fmt: skip
    folder = text_folder(tmp_path / "text", config)
    (tmp_path / "out").mkdir()
    settings = ModelConfig(image_size=32, text_tower=folder, text_pooling=pooling, dim=dim, max_tokens=12)
    assert max(differences(encoder(settings), tmp_path / "out")) < 1e-6


def test_a_layer_norm_absorbs_the_bias_of_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.LayerNorm(12).double()
    for width in (3, 12, 30):
        linear = torch.nn.Linear(12, width).double()
        x, gain, shift = (torch.randn(*size, 12, generator=generator).double() for size in ((7, 5), (), ()))
        with torch.no_grad():
            norm.weight.copy_(gain)
            norm.bias.copy_(shift)
            bias, weight = open_clip.absorb_bias(norm.weight, norm.bias, linear.weight, linear.bias)
            expected = linear(norm(x)), linear(norm(x).mean(dim=1))
            norm.bias.copy_(bias)
            for inputs, want in zip((norm(x), norm(x).mean(dim=1)), expected, strict=True):
                torch.testing.assert_close(inputs @ weight.T, want, rtol=0, atol=1e-9)
            assert linear.bias.abs().min() > 1e-3


def test_towers_that_open_clip_lacks(tmp_path: Path) -> None:
    electra = text_folder(tmp_path / "electra", ElectraConfig(**BERT, embedding_size=24))
    settings = ModelConfig(image_size=32, dim=16)
    for changed, message in (
        ({"text_tower": electra}, f"open_clip cannot build the text tower '{electra}' (its type is electra"),
        ({"head": "residual", "hidden": 8}, "open_clip has no head like the run's (--model.head residual)"),
    ):
        model = encoder(replace(settings, **changed))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=re.escape(message) + ".*give --to onnx or --to hf instead"):
            open_clip.write(model, tmp_path, 0.05, "fp32")


@pytest.mark.slow
@needs_packages
@needs_real_data
def test_clip_benchmark_measures_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip as library

    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    run = run_of(
        tmp_path,
        ModelConfig(image_tower="efficientnet-lite0", text_tower="minilm", image_lr=0, text_lr=0, image_size=96, dim=128),
    )  # fmt: skip
    assert command("export", run, "--to", "open_clip", "--out", tmp_path / "clip", "--data", REAL / "flickr8k") == 0
    ours = amclr.load(run).cpu()
    theirs, _, _ = library.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    tokenizer = library.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")
    mean, std = (torch.tensor(theirs.eval().visual.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    config = Config(data=str(REAL / "flickr8k"), cache=str(tmp_path / "cache"), source=SourceConfig(paraphrases="none"))
    samples = manifests.prepare(config, tmp_path / "cache", progress=False, only="val").samples[:200]

    pixels = torch.stack([ours.prepare(s.image) for s in samples])
    seen = (pixels / 255 - mean) / std
    loader = [(seen[k : k + 50], [list(s.captions) for s in samples[k : k + 50]]) for k in range(0, 200, 50)]
    their_recalls = retrieval.evaluate(theirs, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    captions = [c for s in samples for c in s.captions]
    owner = np.repeat(np.arange(200), [len(s.captions) for s in samples])
    images = ours.encode_image([s.image for s in samples])
    our_recalls = evaluate.retrieval(images, ours.encode_text(captions), owner)
    for k in (1, 5, 10):
        assert our_recalls[f"txt_r{k}"] / 100 == pytest.approx(their_recalls[f"text_retrieval_recall@{k}"], abs=1e-3)
        assert our_recalls[f"img_r{k}"] / 100 == pytest.approx(their_recalls[f"image_retrieval_recall@{k}"], abs=1e-3)
    assert their_recalls["text_retrieval_recall@10"] > 0.02

    # Its accuracy() calls float() on an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(classification, "float", lambda x: np.ravel(x)[0], raising=False)
    names, templates = ["dog", "child", "man", "woman", "bike", "water"], ["a photo of a {}.", "an image with a {}"]
    labels = torch.tensor([next((i for i, n in enumerate(names) if n in s.captions[0]), 5) for s in samples])

    class Batches(list):  # type: ignore[type-arg]
        dataset = SimpleNamespace(classes=names)

    batches = Batches([(seen[k : k + 50], labels[k : k + 50]) for k in range(0, 200, 50)])
    braced = [t.replace("{}", "{c}") for t in templates]
    other = classification.evaluate(theirs, batches, tokenizer, names, braced, "cpu", amp=False)
    mine = evaluate.zeroshot(ours, [s.image for s in samples], labels, names, templates)
    for k in (1, 5):
        assert mine[f"zeroshot_top{k}"] / 100 == pytest.approx(other[f"acc{k}"], abs=1e-3)
