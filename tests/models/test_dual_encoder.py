"""The dual encoder: towers by every kind of name, frozen ones, saving, and errors that say what would do."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoModel, BertConfig, BertModel, DistilBertConfig

import amclr
from amclr.config.checks import problems
from amclr.config.schema import Config, LossConfig, ModelConfig, OptimConfig
from amclr.models import packaged
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer, train_tokenizer
from amclr.objectives import build
from amclr.training.loop import train
from amclr.training.optim import OPTIMIZERS, build_optimizer, learning_rate, set_lr
from amclr.utils.errors import UserError

CAPTIONS = ["a red patch", "a blue patch on grass", "two green patches"]
TINY = ModelConfig(image_size=32, dim=16)

needs_packages = pytest.mark.skipif(not packaged.available(), reason="needs pip install 'amclr[pretrained]'")


def encoder(config: ModelConfig = TINY) -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(config, build_tokenizer(config, CAPTIONS))


def sample_images(count: int = 3) -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(count)]


def check_encodes(model: DualEncoder) -> None:
    for rows in (model.encode_image(sample_images()), model.encode_text(CAPTIONS)):
        assert rows.dtype == torch.float32 and rows.shape == (3, model.config.dim) and not rows.requires_grad
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as users have one: a folder with configuration, weights and tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = train_tokenizer(CAPTIONS)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModel.from_config(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_embeds_unit_rows_whatever_the_batching(tmp_path: Path) -> None:
    model = encoder()
    check_encodes(model)
    whole = model.encode_text(CAPTIONS)
    torch.testing.assert_close(model.encode_text(CAPTIONS, batch_size=1), whole)
    assert model.training, "encoding must leave the mode as it was"
    assert model.images_at_once < 40, "the default must cut these into several passes"
    many = sample_images(3) * 20
    torch.testing.assert_close(model.encode_image(many), model.encode_image(many, batch_size=60))
    image = sample_images(1)[0]
    image.save(tmp_path / "p.png")
    kinds = [image, tmp_path / "p.png", str(tmp_path / "p.png"), (tmp_path / "p.png").read_bytes()]
    rows = model.encode_image(kinds)
    torch.testing.assert_close(rows, rows[:1].expand(4, -1))
    assert model.encode_text([]).shape == (0, 16)
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        model.encode_text("a red patch")


def test_pads_do_not_count(bert_folder: Path) -> None:
    for pooling in ("mean", "first"):
        model = encoder(replace(TINY, text_tower=str(bert_folder), text_pooling=pooling)).eval()  # type: ignore[arg-type]
        alone, neighbour = model.encode_text(CAPTIONS[:1]), model.encode_text(CAPTIONS)
        torch.testing.assert_close(alone[0], neighbour[0], atol=1e-5, rtol=0)


def test_transformers_folder_and_from_scratch(bert_folder: Path, tmp_path: Path) -> None:
    named = replace(TINY, text_tower=str(bert_folder))
    check_encodes(encoder(named))
    saved = AutoModel.from_pretrained(bert_folder, dtype=torch.float32).state_dict()
    loaded = encoder(named).text_tower.trunk.state_dict()
    key = "encoder.layer.0.output.dense.weight"
    assert torch.equal(saved[key], loaded[key])
    assert not torch.equal(
        saved[key], encoder(replace(named, text_pretrained=False)).text_tower.trunk.state_dict()[key]
    )
    sizes = {"dim": 24, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "vocab_size": 400}
    AutoModel.from_config(DistilBertConfig(**sizes)).save_pretrained(tmp_path)
    train_tokenizer(CAPTIONS).save_pretrained(tmp_path)
    check_encodes(encoder(replace(TINY, text_tower=str(tmp_path), text_pooling="first")))


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm_towers_from_scratch(name: str) -> None:
    check_encodes(encoder(replace(TINY, image_tower=name, image_pretrained=False)))


def test_timm_local_folder(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = timm.create_model("resnet10t", num_classes=4)
    timm.models.save_for_hf(model, tmp_path, model_args={"num_classes": 4})
    loaded = encoder(replace(TINY, image_tower=f"local-dir:{tmp_path}"))
    assert torch.equal(loaded.image_tower.trunk.conv1[0].weight, model.conv1[0].weight)  # type: ignore[index, union-attr]
    check_encodes(loaded)


def test_trained_towers_come_from_the_checkpoint_alone(bert_folder: Path, tmp_path: Path) -> None:
    """The files that training started from may have gone; those of frozen towers are still needed."""
    image, text = tmp_path / "image", tmp_path / "text"
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=4), image, model_args={"num_classes": 4})
    shutil.copytree(bert_folder, text)
    config = replace(TINY, image_tower=f"local-dir:{image}", text_tower=str(text))
    tokenizer = build_tokenizer(config, [])
    trained = DualEncoder(config, tokenizer)
    frozen = [replace(config, image_lr=0.0), replace(config, text_lr=0.0)]
    for file in (*image.iterdir(), *text.iterdir()):
        if file.suffix in (".safetensors", ".bin"):
            file.unlink()
    again = DualEncoder(config, tokenizer, from_checkpoint=True)
    again.load_saved(trained.state_to_save())
    assert torch.equal(again.image_tower.mean, trained.image_tower.mean)
    assert torch.equal(again.encode_image(sample_images()), trained.encode_image(sample_images()))
    assert torch.equal(again.encode_text(CAPTIONS), trained.encode_text(CAPTIONS))
    for needs_file in frozen:
        with pytest.raises(UserError, match="cannot load"):
            DualEncoder(needs_file, tokenizer, from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_tower": "resnet5000"}, "cannot load image tower 'resnet5000'"),
        ({"image_tower": "local-dir:/nowhere"}, "cannot load image tower"),
        ({"text_tower": "/nowhere"}, "give a folder with config.json, weights and tokenizer"),
        ({"text_tower": "bert-base-uncased"}, "cannot load text tower 'bert-base-uncased'"),
        (
            {"image_tower": "resnet50"},
            r"local-dir:FOLDER, efficientnet-lite0 \(pip install 'amclr\[pretrained\]'\), or small",
        ),
    ],
)
def test_towers_that_cannot_be_had_say_what_would_do(
    change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True, raising=False)
    with pytest.raises(UserError, match=message) as error:
        encoder(replace(TINY, **change))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_frozen_towers_stay_as_they_are() -> None:
    model = encoder(replace(TINY, image_lr=0.0, text_lr=0.5, head="residual"))
    before = {k: v.clone() for k, v in model.image_tower.state_dict().items()}
    assert not model.train().image_tower.training and model.text_tower.training and model.image_head.training
    optimizer = build_optimizer(OptimConfig(lr=1e-2), model, build("clip", 8))
    tokens = model.tokenize(CAPTIONS)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    image, text = model(images, tokens)
    assert image is not None and text is not None
    (image * text).sum().backward()
    set_lr(optimizer, 1e-2)
    optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.image_tower.state_dict().items()), "norm statistics moved"
    assert sorted({g["lr"] for g in optimizer.param_groups}) == [5e-3, 1e-2]


def test_what_decays() -> None:
    model = encoder()
    objective = build("siglip", 8)
    optimizer = build_optimizer(OptimConfig(weight_decay=0.1), model, objective)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in [*model.named_parameters(), *objective.named_parameters()]:
        assert decay[id(p)] == (0.1 if p.dim() > 1 else 0), name
    assert len(decay) == len(list(model.parameters())) + 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_learns(name: str) -> None:
    model = encoder().eval()  # without dropout and batch statistics every step should help
    optimizer = build_optimizer(OptimConfig(name=name, lr=1e-3), model, build("clip", 8))
    images, tokens = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), model.tokenize(CAPTIONS)
    losses = []
    for _ in range(10):
        image, text = model(images, tokens)
        assert image is not None and text is not None
        loss = torch.nn.functional.cross_entropy(image @ text.T / 0.1, torch.arange(3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_learning_rate_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup=0.25, warmup_lr=0.1, min_lr=0.01)
    rates = [learning_rate(config, step, 40) for step in range(40)]
    assert rates[0] == 0.1 and rates[10] == 1.0 and rates[-1] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.55)
    assert all(a < b for a, b in zip(rates[:10], rates[1:11], strict=True))
    assert all(a > b for a, b in zip(rates[10:-1], rates[11:], strict=True))


def test_saved_weights_come_back_and_strangers_are_refused() -> None:
    model, other = encoder(), encoder(replace(TINY, dim=16))
    with torch.no_grad():
        other.image_head.weight.add_(1)  # type: ignore[union-attr, operator]
    other.load_saved(model.state_to_save())
    assert torch.equal(model.encode_image(sample_images()), other.encode_image(sample_images()))
    state = model.state_to_save()
    state.pop("text_head.weight")
    with pytest.raises(UserError, match="text_head.weight do not fit"):
        other.load_saved(state)
    with pytest.raises(UserError, match="image_head.weight.* have another shape"):
        encoder(replace(TINY, dim=8)).load_saved(model.state_to_save())


def test_tokenizers_trained_twice_agree(tmp_path: Path) -> None:
    texts = [f"a {c} {s} on {g}" for c in ("red", "blue") for s in ("cube", "ball") for g in ("grass", "sand")] * 5
    first, second = train_tokenizer(texts), train_tokenizer(texts)
    assert first.get_vocab() == second.get_vocab()
    first.save_pretrained(tmp_path)
    again = build_tokenizer(TINY, [], tmp_path)
    assert again("A red CUBE")["input_ids"] == first("a red cube")["input_ids"]
    assert again.decode(again("a red cube")["input_ids"], skip_special_tokens=True).strip() == "a red cube"


@needs_packages
def test_packaged_encoders() -> None:
    config = ModelConfig(
        image_tower="efficientnet-lite0", text_tower="minilm", image_lr=0, text_lr=0, image_size=64, head="residual"
    )
    model = encoder(config)
    assert (model.image_tower.width, model.text_tower.width) == (1280, 384)
    check_encodes(model)
    assert not any(k.startswith(("image_tower", "text_tower")) for k in model.state_to_save())
    # Sentences that mean the same are close for the pretrained text tower itself.
    tokens = model.tokenize(["a dog runs on the beach", "a puppy is running along the sea", "an office with computers"])
    with torch.inference_mode():
        a, b, c = torch.nn.functional.normalize(model.text_tower(**tokens))
    assert float(a @ b) > 0.6 > 0.3 > float(a @ c)


def test_packages_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "packaged_tower"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "weights.bin").write_bytes(b"tampered")
    monkeypatch.syspath_prepend(tmp_path)
    good = hashlib.sha256(b"tampered").hexdigest()
    assert packaged._checked("packaged_tower", {"weights.bin": good}) == folder
    with pytest.raises(UserError, match="not the published file"):
        packaged._checked("packaged_tower", {"weights.bin": "0" * 64})
    with pytest.raises(UserError, match="is missing: pip install --force-reinstall"):
        packaged._checked("packaged_tower", {"absent.bin": good})
    with pytest.raises(UserError, match=r"not installed: pip install 'amclr\[pretrained\]'"):
        packaged._checked("no_such_package", {})


# -- what changes the speed, and not the result ------------------------------------------------------


def gradients(model: DualEncoder, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of a training step, dropout and batch statistics included."""
    images, tokens = some_batch()
    torch.manual_seed(seed)
    model.zero_grad()
    image, text = model.train()(images, tokens)
    assert image is not None and text is not None
    (image @ text.T).diagonal().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def some_batch(count: int = 6, size: int = 32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=draw)
    tokens = torch.randint(5, 200, (count, 12), generator=draw)
    return images, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def kept_bytes(model: DualEncoder, images: torch.Tensor | None, tokens: dict[str, torch.Tensor] | None) -> int:
    """Bytes that a forward pass keeps for the backward pass, the weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        built = model.train()(images, tokens)
    del built
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


@pytest.mark.parametrize(
    ("image", "adapters"), [("small", 0), ("mobilenetv3_small_050", 0), ("vit_tiny_patch16_224", 0), ("resnet10t", 4)]
)
def test_recomputed_activations_give_the_same(image: str, adapters: int) -> None:
    """Gradients with dropout, and norms' statistics, which see each batch once."""
    config = replace(TINY, image_tower=image, image_pretrained=False, image_adapters=adapters)
    plain, frugal = encoder(config), encoder(replace(config, activation_checkpointing=True))
    assert plain.text_tower.trunk.config.hidden_dropout_prob > 0  # type: ignore[union-attr]
    for seed in (0, 1):
        expected, result = gradients(plain, seed), gradients(frugal, seed)
        assert expected.keys() == result.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(result[name], gradient, msg=name)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, frugal.state_dict()[name]), name
    other = gradients(plain, 2)["text_tower.trunk.encoder.layer.0.output.dense.weight"]
    assert not torch.equal(other, expected["text_tower.trunk.encoder.layer.0.output.dense.weight"]), "dropout is drawn"
    batch = some_batch()
    assert kept_bytes(frugal, *batch) < 0.7 * kept_bytes(plain, *batch)


def test_towers_without_activation_checkpointing_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"--model.activation_checkpointing: the image tower \(SelecSls\) does not support it"
    ):
        encoder(replace(TINY, image_tower="selecsls42", image_pretrained=False, activation_checkpointing=True))
    monkeypatch.setattr(BertModel, "supports_gradient_checkpointing", False)
    with pytest.raises(
        UserError, match=r"--model.activation_checkpointing: the text tower \(BertModel\) does not support it"
    ):
        encoder(replace(TINY, activation_checkpointing=True))
    # A frozen tower has nothing to compute again.
    assert not gradients(encoder(replace(TINY, text_lr=0.0, activation_checkpointing=True))).keys() & {"text_tower"}
    assert (
        "leave out --model.activation_checkpointing"
        in problems(Config(model=replace(TINY, compile=True, activation_checkpointing=True)))[0]
    )


@pytest.mark.parametrize("still", ["image", "text"])
def test_frozen_towers_keep_no_activations(still: str) -> None:
    model = encoder(replace(TINY, **{f"{still}_lr": 0.0}))  # type: ignore[arg-type]
    images, tokens = some_batch()
    both = kept_bytes(model, images, tokens)
    frozen = kept_bytes(model, images if still == "image" else None, tokens if still == "text" else None)
    rows = 6 * model.config.dim * 4
    width = getattr(model, f"{still}_tower").width
    assert frozen <= 4 * 6 * width + 4 * rows, "the head's input and output, and no more"
    assert both > 20 * frozen, "the other tower keeps its own"
    whole = encoder()
    assert kept_bytes(whole, images if still == "image" else None, tokens if still == "text" else None) > 20 * frozen


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("small", torch.channels_last),
        ("resnet10t", torch.channels_last),
        ("mobilenetv3_small_050", torch.channels_last),
    ],
)
def test_convolutions_have_their_own_layout(name: str, layout: torch.memory_format) -> None:
    model = encoder(replace(TINY, image_tower=name, image_pretrained=False))
    kernels = [
        m.weight for m in model.image_tower.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size > (1, 1)
    ]
    assert kernels and all(k.is_contiguous(memory_format=layout) for k in kernels)
    seen: list[bool] = []
    first = next(m for m in model.image_tower.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda m, args: seen.append(args[0].is_contiguous(memory_format=layout)))
    rows = model.encode_image(sample_images())
    assert seen == [True]
    # The layout stays when weights are loaded, and changes nothing but rounding.
    model.load_saved({k: v.contiguous() for k, v in model.state_to_save().items()})
    assert all(k.is_contiguous(memory_format=layout) for k in kernels)
    model.image_tower.to(memory_format=torch.contiguous_format)
    model.image_tower.layout = torch.contiguous_format
    torch.testing.assert_close(model.encode_image(sample_images()), rows, atol=1e-5, rtol=0)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"--model.compile needs a C\+\+ compiler"):
        encoder(replace(TINY, compile=True))


@pytest.mark.slow
def test_compiled_towers() -> None:
    """The same gradients under the same names; captions of any length without compiling anew. A minute or two."""
    plain, compiled = encoder(), encoder(replace(TINY, compile=True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    captions = [" ".join(["a red patch"] * k) for k in (1, 2, 4, 7, 3)]
    for model in (plain, compiled):
        model.eval()  # dropout is drawn in another order where it is compiled
    graphs = []
    for number, caption in enumerate(captions):
        images, _ = some_batch(count=3 + number)
        tokens = {k: v.repeat(3 + number, 1) for k, v in plain.tokenize([caption]).items()}
        result = []
        for model in (plain, compiled):
            model.zero_grad()
            image, text = model(images, tokens)
            assert image is not None and text is not None
            (image * text).sum().backward()
            result.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        largest = max(float(g.abs().max()) for g in result[0].values())
        for name, gradient in result[0].items():
            torch.testing.assert_close(result[1][name], gradient, rtol=1e-2, atol=1e-4 * largest)
    assert graphs[0] >= 2 and len(set(graphs[1:])) == 1, "no graph more for other lengths"
    assert graphs[1] - graphs[0] <= 1, "the image tower's, for other numbers of images"
    torch.testing.assert_close(compiled.encode_image(sample_images()), plain.encode_image(sample_images()))
    torch.testing.assert_close(compiled.encode_text(CAPTIONS), plain.encode_text(CAPTIONS))


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [0, 3])
def test_runs_that_recompute_learn_the_same(micro_batch: int, folder: Path) -> None:
    model = ModelConfig(image_size=32, dim=16)
    base = Config(
        data=str(folder), epochs=1, batch_size=8, accelerator="cpu", objective="sogclr", model=model,
        micro_batch=micro_batch, loss=LossConfig(temperature=0.1),
    )  # fmt: skip
    plain = train(replace(base, out=str(folder.parent / "plain")), progress=False).load_last()
    frugal = replace(base, out=str(folder.parent / "frugal"), model=replace(model, activation_checkpointing=True))
    result = train(frugal, progress=False).load_last()
    assert plain is not None and result is not None and plain["model"].keys() == result["model"].keys()
    for name, tensor in plain["model"].items():
        torch.testing.assert_close(result["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_compiled_run(folder: Path) -> None:
    """Training compiles the towers, whatever is stacked, evaluated or cut off; loading compiles nothing. Two minutes."""
    config = Config(
        data=str(folder), out=str(folder.parent / "run"), epochs=2, batch_size=8, accelerator="cpu", objective="sogclr",
        model=ModelConfig(image_size=32, dim=16, compile=True), loss=LossConfig(temperature=0.1), ema=0.5,
    )  # fmt: skip
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = train(config, progress=False)
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6, "towers, in training and evaluation"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert amclr.load(run.folder).encode_text(CAPTIONS).shape == (3, 16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
