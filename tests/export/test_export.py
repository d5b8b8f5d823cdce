"""`amclr export`: parity where nothing of ours is installed, what is refused, and that nothing half-made stays."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    PretrainedConfig,
    RobertaConfig,
)

import amclr
from amclr import cli, evaluate
from amclr.config.schema import Config, ModelConfig, OptimConfig, SourceConfig, ViewsConfig
from amclr.data import manifest as manifests
from amclr.export import formats as export
from amclr.models import packaged
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer, train_tokenizer
from amclr.training.loop import train
from amclr.utils.errors import UserError
from tests.conftest import COLOURS, REAL, make_folder, needs_real_data, paint

CAPTIONS = [f"{word} {colour} patch number {k}" for k, colour in enumerate(COLOURS) for word in ("a", "one", "this")]

needs_packages = pytest.mark.skipif(not packaged.available(), reason="pip install 'amclr[pretrained]'")

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
folder, given, found, *images = sys.argv[1:]
given = np.load(given)
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
mean, std = (torch.tensor(model.visual.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
with torch.no_grad():
    images = model.eval().encode_image((torch.from_numpy(given["pixels"]) / 255 - mean) / std, normalize=True)
    files = model.encode_image(torch.stack([preprocess(Image.open(p)) for p in images]), normalize=True)
    texts = model.encode_text(tokenizer(list(given["captions"])), normalize=True)
np.savez(found, images=images, files=files, texts=texts, scale=model.logit_scale.exp().detach())
"""

ONNX = """
import sys
from pathlib import Path
import numpy as np
folder, given, found, *images = sys.argv[1:]
sys.path.insert(0, folder)
from example import Model
given, model = np.load(given), Model(Path(folder))
np.savez(found, images=model.run(model.image, images=given["pixels"]), files=model.embed_images(images),
         texts=model.embed_texts(given["captions"].tolist()), scale=0)
"""

EMBEDS = {"open_clip": (OPEN_CLIP, {"amclr"}), "onnx": (ONNX, {"amclr", "torch", "transformers", "timm", "open_clip"})}


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


BERT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24, "intermediate_size": 32, "vocab_size": 500}
DISTILBERT = {"n_layers": 2, "n_heads": 2, "dim": 24, "hidden_dim": 32, "vocab_size": 500}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's own towers."""
    return run_of(tmp_path_factory.mktemp("small"), ModelConfig(image_size=32, dim=16, max_tokens=40))


def command(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def embedded_alone(to: str, folder: Path, model: DualEncoder, images: list[Path], work: Path) -> dict[str, Any]:
    """What the export gives in a process where neither amclr nor what it may do without can be imported."""
    script, absent = EMBEDS[to]
    pixels = torch.stack([model.prepare(p) for p in images]).numpy()
    np.savez(work / "given.npz", pixels=pixels, captions=np.array(CAPTIONS))
    code = ALONE.format(absent=sorted(absent)) + script
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(work / "given.npz"), str(work / "found.npz"), *map(str, images)],
        cwd=work, capture_output=True, text=True, timeout=300, env=alone(work),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(work / "found.npz"))


def alone(work: Path) -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(work)}


def check_alone(run: Path, to: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Export by the command line, load without amclr, compare; the files too, which are read in another way."""
    assert command("export", run, "--to", to, "--out", out) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    limit = {"open_clip": 1e-5, "onnx": 1e-4}[to]
    record = json.loads((out / "parity.json").read_text())
    assert f"(limit {limit:g})" in told and f"folder: {out}" in told
    assert record["parity"]["difference"] <= limit and record["parity"]["same"] == record["parity"]["queries"] > 0
    assert f"largest difference {record['parity']['difference']:.1e}" in told
    assert not list(out.parent.glob("*.part"))
    check_tells_no_paths(out)
    model = amclr.load(run).cpu()
    images = sorted((run.parent / "patches" / "Images").iterdir())[:12]
    found = embedded_alone(to, out, model, images, tmp_path)
    ours = {"images": model.encode_image(images).numpy(), "texts": model.encode_text(CAPTIONS).numpy()}
    for side, rows in ours.items():
        assert rows.shape == found[side].shape and np.abs(rows - found[side]).max() <= limit
    assert np.ptp(ours["images"], axis=0).max() > 0.01, "images must not all look the same to it"
    assert (ours["images"] * found["files"]).sum(axis=1).min() > 0.99


def check_tells_no_paths(out: Path) -> None:
    """Nothing says where files lie at who exported, but the configuration that open_clip wants it of."""
    for file in out.rglob("*"):
        if file.is_file() and file.name != "open_clip_config.json":
            content = file.read_bytes()
            for place in (Path(amclr.__file__).parent, out.parent, Path(sys.prefix)):
                assert str(place).encode() not in content, file


def test_own_towers_for_open_clip(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a folder" / "clip"
    check_alone(small, "open_clip", out, tmp_path, capsys)
    assert ".part" not in (out / "open_clip_config.json").read_text()
    found = np.load(tmp_path / "found.npz")
    assert math.isclose(float(found["scale"]), 1 / 0.01, rel_tol=1e-5), "amclr's own temperature"


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
    told = {Path(p).name: float(score) for score, p in (line.split() for line in lines[1:6])}
    assert list(told.values()) == sorted(told.values(), reverse=True)
    for image, score in zip(images, scores[0].tolist(), strict=True):
        assert abs(told[image.name] - score) < 0.02
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([sys.executable, "-c", "import torch"], env=alone(tmp_path), check=True, capture_output=True)


def test_hugging_face_folder(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("export", small, "--to", "hf") == 0
    out = small / "exports" / "hf"
    assert f"amclr.load('{out}')" in capsys.readouterr().out
    assert torch.equal(amclr.load(out).encode_text(CAPTIONS), amclr.load(small).encode_text(CAPTIONS))
    shutil.rmtree(small / "exports")


@pytest.mark.slow
def test_smaller_onnx(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        out = tmp_path / precision
        assert command("export", small, "--to", "onnx", "--out", out, "--precision", precision) == 0
        sizes[precision] = [(out / f"{kind}.onnx").stat().st_size for kind in ("image", "text")]
        parity = json.loads((out / "parity.json").read_text())["parity"]
        assert parity["difference"] <= export.FORMATS["onnx"].limits[precision] and parity["overlap"] > 0.8
        assert f"{parity['overlap']:.1%} overlap" in capsys.readouterr().out
    assert all(half < 0.6 * full for half, full in zip(sizes["fp16"], sizes["fp32"], strict=True))
    assert sizes["int8"][1] < 0.8 * sizes["fp16"][1]


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


# -- open_clip: towers by kind ----------------------------------------------------------------------------


def encoder(config: ModelConfig) -> DualEncoder:
    torch.manual_seed(0)
    model = DualEncoder(config, build_tokenizer(config, CAPTIONS)).eval()
    with torch.no_grad():  # heads and norms as training leaves them, not as they begin
        for name, weight in model.named_parameters():
            if name.startswith("text_head") or "LayerNorm" in name:
                weight += 0.1 * torch.randn_like(weight)
    return model


def differences(model: DualEncoder, folder: Path) -> tuple[float, float]:
    """How far open_clip's embeddings of images and of captions of unequal lengths are from ours."""
    export.write_open_clip(model, folder, 0.05, "fp32")
    check_tells_no_paths(folder)
    exported = export.load_open_clip(folder)
    size = model.config.image_size
    pixels = torch.randint(0, 256, (4, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    captions = [*CAPTIONS, "a red patch", "a red patch beside one that is of another colour, and one more of them"]
    tokens = model.tokenize(captions)
    with torch.inference_mode():
        ours, theirs = model(pixels, tokens), (exported.images(pixels), exported.texts(tokens))
        own = exported.own_texts(captions)
    assert (own - theirs[1]).abs().max() < 1e-6, "its tokenizer gives the same"
    found = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return found[0], found[1]


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


def test_a_layer_norm_takes_up_the_bias_of_a_map() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = torch.nn.LayerNorm(12).double()
    for width in (3, 12, 30):
        linear = torch.nn.Linear(12, width).double()
        x, gain, shift = (torch.randn(*size, 12, generator=generator).double() for size in ((7, 5), (), ()))
        with torch.no_grad():
            norm.weight.copy_(gain)
            norm.bias.copy_(shift)
            bias, weight = export.with_bias_in_norm(norm.weight, norm.bias, linear.weight, linear.bias)
            expected = linear(norm(x)), linear(norm(x).mean(dim=1))
            norm.bias.copy_(bias)
            for given, want in zip((norm(x), norm(x).mean(dim=1)), expected, strict=True):
                torch.testing.assert_close(given @ weight.T, want, rtol=0, atol=1e-9)
            assert linear.bias.abs().min() > 1e-3


def test_towers_that_open_clip_lacks(tmp_path: Path) -> None:
    electra = text_folder(tmp_path / "electra", ElectraConfig(**BERT, embedding_size=24))
    settings = ModelConfig(image_size=32, dim=16)
    for changed, message in (
        ({"text_tower": electra}, f"open_clip cannot build the text tower '{electra}' (it is a electra"),
        ({"head": "residual", "hidden": 8}, "open_clip has no head like the run's (--model.head residual)"),
    ):
        model = encoder(replace(settings, **changed))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=re.escape(message) + ".*give --to onnx or --to hf instead"):
            export.write_open_clip(model, tmp_path, 0.05, "fp32")


# -- parity -------------------------------------------------------------------------------------------------


def rows(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_parity_tells_what_differs() -> None:
    image, text = rows(40, 0), rows(40, 1)
    alike = export.parity((image, text), (image + 1e-8, text))
    assert alike.difference < 1e-7 and alike.same == alike.queries == 80 and alike.overlap == 1
    assert alike.cosine == pytest.approx(1, abs=1e-9)
    turned = text.clone()
    turned[3] = -text[3]
    found = export.parity((image, text), (image, turned))
    assert found.difference == pytest.approx(float(2 * text[3].abs().max())) and found.cosine == pytest.approx(-1)
    top = (image.double() @ text.double().T).topk(10).indices
    assert found.same < 80 - int((top == 3).any(dim=1).sum()) and found.overlap < 1
    wrong = text.clone()
    wrong[0, 0] = math.nan
    assert math.isnan(export.parity((image, text), (image, wrong)).difference)


def test_parity_leaves_ties_aside_and_nothing_else() -> None:
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.2, 1.0]]), dim=-1)
    moved = text.clone()
    moved[0] = F.normalize(text[0] + torch.tensor([1e-8, -1e-8]), dim=-1)
    assert export.parity((image, text[:2]), (image, moved[:2])).same == 4, "two captions that are one: any order"
    swapped = text[[2, 1, 0]]
    assert export.parity((image, text), (image, swapped)).same < 5


def test_an_export_that_differs_is_not_kept(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    form = export.FORMATS["open_clip"]

    def spoiled(change: Callable[[DualEncoder], None]) -> None:
        def write(model: DualEncoder, *rest: Any) -> None:
            kept = {k: v.clone() for k, v in model.state_dict().items()}
            with torch.no_grad():
                change(model)
            form.write(model, *rest)
            model.load_state_dict(kept)

        monkeypatch.setitem(export.FORMATS, "open_clip", replace(form, write=write))

    def nudge(model: DualEncoder) -> None:
        model.image_head.weight.add_(1e-3)  # type: ignore[operator, union-attr]

    def spoil(model: DualEncoder) -> None:
        model.text_head.weight[0, 0] = math.nan  # type: ignore[index]

    for change, told in ((nudge, r"by up to \d.\de-0[1-4]"), (spoil, "by up to nan")):
        spoiled(change)
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)  # an empty folder may be named
        assert command("export", small, "--to", "open_clip", "--out", out) == 1
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("amclr:")]
        assert len(lines) == 1 and re.search(
            f"the export differs from the model: {told} .limit 1e-05.*nothing was kept", lines[0]
        )
        assert not said.out and not any(out.iterdir()) and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_is_no_hindrance(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "model.safetensors").write_bytes(b"half")
    assert command("export", small, "--to", "open_clip", "--out", tmp_path / "out") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["RUN"], "--to must be one of open_clip, onnx, hf, got ''"),
        (["RUN", "--to", "tensorflow"], "--to must be one of open_clip, onnx, hf, got 'tensorflow'"),
        (["RUN", "--to", "open_clip", "--precision", "int8"], "--to open_clip has --precision fp32, got 'int8'"),
        (["RUN", "--to", "onnx", "--precision", "fp8"], "--to onnx has --precision fp32 or fp16 or int8, got 'fp8'"),
        (["nothing", "--to", "onnx"], "'nothing' is not a run folder (no config.yaml): give the --out of an"),
        (["RUN", "--to", "onnx", "--out", "USED"], "is in use: choose another --out, or remove it"),
        (["RUN", "--to", "onnx", "--out", "USED/file/deeper"], "cannot make the folder"),
        (["RUN", "--to", "onnx", "--data", "nowhere"], "nowhere"),
        (["RUN", "--too", "onnx"], "unknown option '--too': did you mean --to? (amclr export --help"),
    ],
)
def test_slips_are_one_line(
    arguments: list[str], told: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("mine")
    assert command("export", *(a.replace("RUN", str(small)).replace("USED", str(used)) for a in arguments)) == 1
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("amclr: ")]
    assert len(lines) == 1 and told in lines[0] and "Traceback" not in said.err
    assert (used / "file").read_text() == "mine" and not (small / "exports").exists()


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxruntime"), ("open_clip", "open_clip")])
def test_missing_packages(
    to: str, package: str, small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = export.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == package else find(name))
    assert command("export", small, "--to", to) == 1
    assert f"--to {to} needs {package}: pip install 'amclr[export]'" in capsys.readouterr().err


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
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("amclr: the text tower cannot be written as ONNX (") and said.endswith(
        "give --to hf instead"
    )
    assert not list(tmp_path.iterdir())


def test_files_that_onnxruntime_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "preprocess.json").write_text('{"image_size": 32}')
    train_tokenizer(CAPTIONS).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "image.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"^onnxruntime cannot run these towers \(.*\): give --to hf instead$"):
        export.load_onnx(tmp_path)


# -- others' measures ----------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_packages
@needs_real_data
def test_clip_benchmark_measures_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    retrieval = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    run = run_of(
        tmp_path,
        ModelConfig(image_tower="efficientnet-lite0", text_tower="minilm", image_lr=0, text_lr=0, image_size=96, dim=128),
    )  # fmt: skip
    assert command("export", run, "--to", "open_clip", "--out", tmp_path / "clip", "--data", REAL / "flickr8k") == 0
    ours = amclr.load(run).cpu()
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")
    mean, std = (torch.tensor(theirs.eval().visual.preprocess_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    config = Config(data=str(REAL / "flickr8k"), cache=str(tmp_path / "cache"), source=SourceConfig(paraphrases="none"))
    samples = manifests.prepare(config, tmp_path / "cache", progress=False, only="val").samples[:200]

    pixels = torch.stack([ours.prepare(s.image) for s in samples])
    seen = (pixels / 255 - mean) / std
    loader = [(seen[k : k + 50], [list(s.captions) for s in samples[k : k + 50]]) for k in range(0, 200, 50)]
    found = retrieval.evaluate(theirs, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    captions = [c for s in samples for c in s.captions]
    owner = np.repeat(np.arange(200), [len(s.captions) for s in samples])
    images = ours.encode_image([s.image for s in samples])
    own = evaluate.retrieval(images, ours.encode_text(captions), owner)
    for k in (1, 5, 10):
        assert own[f"txt_r{k}"] / 100 == pytest.approx(found[f"text_retrieval_recall@{k}"], abs=1e-3)
        assert own[f"img_r{k}"] / 100 == pytest.approx(found[f"image_retrieval_recall@{k}"], abs=1e-3)
    assert found["text_retrieval_recall@10"] > 0.02

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


def test_temperature_is_the_one_that_was_learned(small: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path, ModelConfig(image_size=32, dim=16), objective="clip", optim=OptimConfig(lr=0.05))
    opened = amclr.runs.folder.Run.open(run)
    learned = math.exp(float(opened.load_best()["objective"]["log_temperature"]))
    assert export.temperature_of(opened) == learned != pytest.approx(0.07, rel=1e-3)
    assert export.temperature_of(amclr.runs.folder.Run.open(small)) == 0.01


def test_images_of_the_check_are_the_validation_split(small: Path) -> None:
    config = amclr.runs.folder.Run.open(small).config
    model = amclr.load(small).cpu()
    images, captions = export.pairs_of(model, config, progress=False)
    names = (small.parent / "patches" / "val.txt").read_text().split()
    assert sorted(Path(p.file).name for p in images) == sorted(names) and len(captions) == len(names)


def test_images_that_cannot_be_decoded_are_left_out(small: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "other", images=12)
    first = (data / "val.txt").read_text().split()[0]
    (data / "Images" / first).write_bytes(b"no image")
    paint("red", 1).save(data / "Images" / "extra.png")
    assert command("export", small, "--to", "open_clip", "--out", tmp_path / "out", "--data", data) == 0
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["pairs"] == 1


@pytest.mark.slow
def test_weights_too_large_for_one_file(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "MESSAGE_BYTES", 1_000_000)
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
