"""Weights that are kept: EMA, WiSE-FT, a start from another run, low-rank adapters."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.layers import convert_sync_batchnorm
from transformers import AutoModel, BertConfig

import amclr
import amclr.training.step
from amclr.config.checks import problems
from amclr.config.schema import Config, ModelConfig, OptimConfig
from amclr.evaluation.run import evaluate_run
from amclr.evaluation.tables import format_results
from amclr.models import averaging, packaged
from amclr.models.averaging import Averaging
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer, train_tokenizer
from amclr.runs.loading import initial_model
from amclr.training.assembly import assemble
from amclr.training.loop import Stopped, train
from amclr.utils.errors import UserError
from tests.conftest import Command
from tests.models.test_dual_encoder import CAPTIONS, TINY, encoder, sample_images
from tests.training.configs import assert_same_run, config_for, frozen

pytestmark = pytest.mark.usefixtures("undrawn")

needs_packages = pytest.mark.skipif(not packaged.available(), reason="needs pip install 'amclr[pretrained]'")


@pytest.fixture
def published(tmp_path: Path) -> ModelConfig:
    """Settings of tiny towers with weights from files, as a hub would give them."""
    image, text = tmp_path / "image-tower", tmp_path / "text-tower"
    torch.manual_seed(1)
    # As trained weights are: in a fresh one the blocks' last norms are zero, and hide what is before them.
    tower = timm.create_model("resnet10t", num_classes=4, zero_init_last=False)
    timm.models.save_for_hf(tower, image, model_args={"num_classes": 4})
    tokenizer = train_tokenizer(CAPTIONS)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    AutoModel.from_config(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return replace(TINY, image_tower=f"local-dir:{image}", text_tower=str(text), text_lr=0.5)


def shift(model: DualEncoder, step: int) -> None:
    """What a step of training may do to the weights and to norms' statistics."""
    torch.manual_seed(step)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor).abs_() * 0.01)
            elif name.endswith("num_batches_tracked"):
                tensor.add_(1)


@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_the_average_is_that_of_a_loop(decay: float) -> None:
    model = encoder()
    averaging = Averaging(model, Config(ema=decay))
    expected = {k: v.double() for k, v in model.state_dict().items() if v.is_floating_point()}
    for step in range(30):
        shift(model, step)
        averaging.update()
        share = min(decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            if name in expected:
                expected[name] = share * expected[name] + (1 - share) * tensor.double()
    kept = averaging.result()
    assert kept.keys() == expected.keys() and any(k.endswith("running_var") for k in kept)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(tensor, model.state_dict()[name]), name


def test_frozen_towers_are_not_averaged() -> None:
    kept = Averaging(encoder(replace(TINY, image_lr=0.0)), Config(ema=0.9)).result()
    assert kept and not any(k.startswith("image_tower") for k in kept)
    assert not Averaging(encoder(), Config()).state_dict(), "nothing to keep, and no start to go back to"


def test_the_result_is_swapped_in_and_out() -> None:
    model = encoder()
    averaging = Averaging(model, Config(ema=0.9))
    shift(model, 0)
    averaging.update()
    shift(model, 1)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), averaging.result_in_model():
        for name, tensor in averaging.result().items():
            assert torch.equal(model.state_dict()[name], tensor) and not torch.equal(trained[name], tensor)
        raise KeyboardInterrupt
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())


def test_a_signal_while_weights_are_exchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an evaluation: those being trained are back before anything else happens."""
    whole = train(frozen(folder, "whole", ema=0.9), progress=False)
    put, count = averaging._copy, iter(range(100))

    def copy(to: Any, source: Any) -> None:
        if next(count) == 1:
            signal.raise_signal(signal.SIGTERM)
        put(to, source)

    monkeypatch.setattr(averaging, "_copy", copy)
    with pytest.raises(Stopped):
        train(frozen(folder, ema=0.9), progress=False)
    monkeypatch.setattr(averaging, "_copy", put)
    assert_same_run(whole, train(resume=folder.parent / "run", progress=False))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8])
def test_wise_interpolates_from_the_initial_weights(share: float, published: ModelConfig) -> None:
    """Towers go back, heads that began at random do not."""
    model = encoder(published)
    start = {k: v.double() for k, v in model.state_dict().items()}
    averaging = Averaging(model, Config(model=published, wise=share))
    shift(model, 0)
    averaging.update()
    kept = averaging.result()
    assert {k.partition(".")[0] for k in kept} == {"image_tower", "text_tower"}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name in kept:
            line = (1 - share) * start[name] + share * tensor.double()
            torch.testing.assert_close(kept[name].double(), line, rtol=1e-6, atol=1e-6)
    if share == 0:
        assert all(torch.equal(v.double(), start[k]) for k, v in kept.items())


def test_wise_of_an_average(published: ModelConfig) -> None:
    model = encoder(published)
    averaging = Averaging(model, Config(model=published, ema=0.5, wise=0.5))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    shift(model, 0)
    averaging.update()
    average = averaging.state_dict()["average"]["weights"]
    for name, tensor in averaging.result().items():
        on_line = name.startswith(("image_tower", "text_tower"))
        expected = (start[name] + average[name]) / 2 if on_line else average[name]
        torch.testing.assert_close(tensor, expected)


def test_a_random_start_is_nothing_to_go_back_to(folder: Path) -> None:
    with pytest.raises(UserError, match="--wise 0.5 interpolates with .* random or frozen here: give --init_from RUN"):
        train(config_for(folder, wise=0.5), progress=False)
    assert problems(Config(wise=1.5, ema=1.0)) == [
        "--ema must be at least 0 and less than 1, got 1", "--wise must lie between 0 and 1, got 1.5",
    ]  # fmt: skip


def tuned(folder: Path, published: ModelConfig, out: str = "run", **changes: Any) -> Config:
    return config_for(folder, out, model=published, **{"ema": 0.8, "wise": 0.6, "objective": "sogclr", **changes})


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    original, count = amclr.training.step.embed, iter(range(1000))

    def interrupt(model: Any, batch: Any) -> Any:
        if next(count) == step:
            signal.raise_signal(signal.SIGTERM)
        return original(model, batch)

    monkeypatch.setattr("amclr.training.step.embed", interrupt)


def test_resumed_equals_uninterrupted(folder: Path, published: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tuned(folder, published, "whole", monitor=str(classes(folder))), progress=False)
    config = tuned(folder, published, "parts", monitor=str(classes(folder)))
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(2, patched)
        train(config, progress=False)
    resumed = train(resume=Path(config.out), progress=False)
    assert_same_run(whole, resumed)
    first, second = whole.load_last(), resumed.load_last()
    assert first is not None and second is not None and first["average"]["steps"] == first["step"] == 8
    for state in ("kept", "average"):
        a, b = (s[state].get("weights", s[state]) for s in (first, second))
        assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
    assert not any("log_u" in k or "tau" in k or "objective" in k for k in first["kept"])


@pytest.mark.slow
def test_what_is_loaded_is_what_was_measured(folder: Path, published: ModelConfig) -> None:
    run = train(tuned(folder, published), progress=False)
    results = json.loads((run.folder / "results.json").read_text())
    again = evaluate_run(run.folder, progress=False)
    assert again["r_mean"] == pytest.approx(results["r_mean"], abs=1e-4)
    state = run.load_best()
    loaded = amclr.load(run.folder).state_dict()
    name = "image_tower.trunk.layer1.0.conv1.weight"
    assert torch.equal(loaded[name].cpu(), state["kept"][name])
    assert not torch.equal(loaded[name].cpu(), state["model"][name])
    plain = train(tuned(folder, published, "plain", ema=0.0, wise=1.0), progress=False)
    assert not {"kept", "average"} & plain.load_best().keys()
    assert torch.equal(plain.load_last()["model"][name], run.load_last()["model"][name])  # type: ignore[index]


@pytest.mark.slow
def test_the_line_after_the_fact(folder: Path, published: ModelConfig, main: Command) -> None:
    """At 0 the towers are the published ones, at 1 the trained ones, in between what a run with --wise keeps."""
    plain = train(tuned(folder, published, "plain", wise=1.0, ema=0.0, objective="clip"), progress=False)
    done = main("evaluate", plain.folder, "--wise", "0,0.6,1", "--zeroshot", classes(folder))
    assert done.returncode == 0, done.stderr
    assert "wise (0 start, 1 trained)" in done.stdout and "plain-wise" not in done.stderr
    file = plain.folder / "evaluations" / "patches-val-wise.json"
    rows = json.loads(file.read_text())["wise"]
    assert [row["wise"] for row in rows] == [0.0, 0.6, 1.0]
    with Image.open(file.with_suffix(".png")) as drawn:
        assert min(drawn.size) > 300
    ended = evaluate_run(plain.folder, zeroshot=str(classes(folder)), progress=False)
    for key in ("r_mean", "txt_r1", "zeroshot_top1"):
        assert rows[2][key] == pytest.approx(ended[key], abs=1e-3)
    # The run itself with --wise 0.6 trains the same weights, so that its last evaluation is this line's middle.
    state = plain.load_best()
    kept = train(tuned(folder, published, "kept", wise=0.6, ema=0.0, objective="clip"), progress=False)
    row = next(r for r in kept.metrics() if r["kind"] == "eval" and r["step"] == state["step"])
    assert rows[1]["r_mean"] == pytest.approx(row["r_mean"], abs=1e-3)
    assert "image retr." in format_results({"wise": rows, "curves": "x.png"})
    wrong = main("evaluate", plain.folder, "--wise", "0,2")
    assert wrong.returncode == 1 and "--wise must be numbers between 0 and 1" in wrong.stderr


@pytest.mark.slow
def test_the_line_needs_the_weights_it_began_with(folder: Path, published: ModelConfig) -> None:
    run = train(tuned(folder, published, ema=0.0, wise=1.0), progress=False)
    place = Path(published.image_tower.removeprefix("local-dir:"))
    torch.manual_seed(2)
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=4), place, model_args={"num_classes": 4})
    with pytest.raises(UserError, match="no longer those in the published files"):
        evaluate_run(run.folder, wise=[0.5], progress=False)
    assert amclr.load(run.folder).encode_text(["a patch"]).shape == (1, 16), "trained weights are there all the same"
    scratch = train(config_for(folder, "scratch"), progress=False)
    with pytest.raises(UserError, match="trained only weights that started at random"):
        evaluate_run(scratch.folder, wise=[0.5], progress=False)


def test_a_run_begins_with_another(folder: Path) -> None:
    first = train(config_for(folder, "first"), progress=False)
    config = config_for(folder, "second", init_from=str(first.folder), wise=0.5, seed=3)
    model = initial_model(config, ["words that the tokenizer never saw"], Path(config.out))
    before = amclr.load(first.folder)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.cpu().state_dict().items())
    assert model.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    second = train(config, progress=False)
    state = second.load_last()
    assert state is not None and (second.folder / "tokenizer").is_dir()
    for name in ("image_head.weight", "text_tower.trunk.embeddings.word_embeddings.weight"):
        middle = (before.state_dict()[name] + state["model"][name]) / 2
        torch.testing.assert_close(state["kept"][name], middle)
    unlike = replace(
        config, out=str(folder.parent / "third"), model=ModelConfig(image_size=32, dim=24, head="residual")
    )
    with pytest.raises(UserError, match="has another shape than this run's: give --model.head linear .*--model.dim 16"):
        train(unlike, progress=False)
    shutil.rmtree(first.folder)
    assert amclr.load(second.folder).encode_text(["a patch"]).shape == (1, 16), "stands on its own"
    for attempt in (lambda: evaluate_run(second.folder, wise=[0.0], progress=False),
                    lambda: train(resume=second.folder, progress=False)):  # fmt: skip
        with pytest.raises(UserError, match="run folder '.*first' does not exist .*put it back"):
            attempt()


@pytest.mark.slow
def test_a_frozen_tower_from_another_run_is_stored(folder: Path, published: ModelConfig) -> None:
    """A published file does not give it again."""
    first = train(config_for(folder, "first", model=published), progress=False)
    still = replace(published, image_lr=0.0, text_lr=0.0)
    second = train(config_for(folder, "second", model=still, init_from=str(first.folder)), progress=False)
    a, b = amclr.load(first.folder).state_dict(), amclr.load(second.folder).state_dict()
    assert all(torch.equal(v, b[k]) for k, v in a.items() if k.startswith(("image_tower", "text_tower")))
    third = train(config_for(folder, "third", model=still, objective="clip"), progress=False)
    assert not any(k.startswith(("image_tower", "text_tower")) for k in third.load_best()["model"])


def adapted(published: ModelConfig, rank: int = 4) -> ModelConfig:
    return replace(published, image_adapters=rank, text_adapters=rank)


def test_adapters_train_alone(folder: Path, published: ModelConfig) -> None:
    config = config_for(folder, model=adapted(published), ema=0.5, optim=OptimConfig(lr=0.05))
    base = {k: v.clone() for k, v in encoder(published).state_dict().items()}
    run = train(config, progress=False)
    state = run.load_last()
    assert state is not None
    towers = [k for k in state["model"] if k.startswith(("image_tower", "text_tower"))]
    assert towers and all(".lora_" in k for k in towers), "published weights need not be stored"
    assert {k for k in state["kept"] if "tower" in k} == set(towers)
    training = assemble(run.config, run.folder, run, False)
    training.restore()
    parts = training.model.state_dict()
    for name, tensor in base.items():
        if name.startswith(("image_tower", "text_tower")):  # norms' statistics among them
            module, _, leaf = name.rpartition(".")
            now = parts.get(name, parts.get(f"{module}.base_layer.{leaf}"))
            assert now is not None and torch.equal(now, tensor), name
    moved = [k for k in towers if ".lora_B." in k]
    still = [k for k in moved if not bool(state["model"][k].any())]
    assert moved and not still, "every adapter has learned"
    tower = [p for n, p in training.model.named_parameters() if "tower" in n]
    assert sum(p.numel() for p in tower if p.requires_grad) < 0.15 * sum(p.numel() for p in tower)


def test_merged_adapters_are_the_same_model(published: ModelConfig) -> None:
    model = encoder(adapted(published))
    for name, tensor in model.state_dict().items():
        if ".lora_B." in name:
            tensor.normal_(std=0.05)
    before = model.encode_image(sample_images()), model.encode_text(CAPTIONS)
    plain = encoder(published)
    assert (before[0] - plain.encode_image(sample_images())).abs().max() > 1e-3, "adapters must matter here"
    model.merge_adapters()
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model.encode_image(sample_images()), before[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(CAPTIONS), before[1], atol=1e-5, rtol=0)
    assert model.state_to_save().keys() == model.state_dict().keys(), "no longer what was published"


@pytest.mark.slow
def test_adapted_runs_load_merged_and_go_on(folder: Path, published: ModelConfig) -> None:
    config = config_for(folder, "first", model=adapted(published), optim=OptimConfig(lr=0.05), objective="clip")
    run = train(config, progress=False)
    model = amclr.load(run.folder)
    assert not any("lora" in k or "base_layer" in k for k in model.state_dict())
    found = evaluate_run(run.folder, progress=False)["r_mean"]
    assert found == pytest.approx(json.loads((run.folder / "results.json").read_text())["r_mean"], abs=1e-3)
    # Anew from there, with other adapters: it begins with what was loaded, which must be stored then.
    second = replace(config, out=str(folder.parent / "second"), init_from=str(run.folder), wise=0.5)
    started = initial_model(second, [], Path(second.out))
    torch.testing.assert_close(
        started.encode_image(sample_images()), model.encode_image(sample_images()), atol=1e-5, rtol=0
    )
    later = train(second, progress=False)
    row = [r for r in later.metrics() if r["kind"] == "eval"][-1]
    measured = evaluate_run(later.folder, wise=[0.0, 0.5, 1.0], progress=False)["wise"]
    assert measured[0]["r_mean"] == pytest.approx(found, abs=1e-3)
    if later.load_best()["step"] == row["step"]:
        assert measured[1]["r_mean"] == pytest.approx(row["r_mean"], abs=1e-3)
    shutil.rmtree(run.folder)
    assert amclr.load(later.folder).encode_image(sample_images()).shape == (3, 16)


@pytest.mark.parametrize(
    ("tower", "adapted_layers", "left_alone"),
    [
        ("vit_tiny_patch16_224", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), "patch_embed.proj"),
        ("mobilenetv3_small_050", ("conv_pw", "conv_pwl"), "conv_dw"),
        ("convnext_atto", ("mlp.fc1", "mlp.fc2"), "conv_dw"),
    ],
)
def test_what_is_adapted(tower: str, adapted_layers: tuple[str, ...], left_alone: str) -> None:
    model = encoder(replace(TINY, image_tower=tower, image_pretrained=False, image_adapters=2))
    names = [k.removesuffix(".lora_A.default.weight") for k in model.state_dict() if ".lora_A." in k]
    assert all(any(n.endswith(part) for n in names) for part in adapted_layers)
    assert not any(n.endswith(left_alone) for n in names)
    # A random base is in no file: it is stored.
    assert any(".base_layer." in k for k in model.state_to_save())


def test_adapters_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "give --model.text_lr 1" in problems(Config(model=replace(TINY, text_adapters=8, text_lr=0.0)))[0]
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError, match=r"--model.text_adapters needs the package peft: pip install 'amclr\[adapters\]'"
    ):
        encoder(replace(TINY, text_adapters=8))


@pytest.mark.slow
def test_adapters_resume(folder: Path, published: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config_for(folder, "whole", model=adapted(published)), progress=False)
    config = config_for(folder, "parts", model=adapted(published))
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(2, patched)
        train(config, progress=False)
    assert_same_run(whole, train(resume=Path(config.out), progress=False))


@needs_packages
def test_adapters_of_the_packaged_encoders(tmp_path: Path) -> None:
    config = ModelConfig(
        image_tower="efficientnet-lite0", text_tower="minilm", image_size=64, dim=64, image_adapters=8, text_adapters=8
    )
    torch.manual_seed(0)
    model = DualEncoder(config, build_tokenizer(config, []))
    for name, tensor in model.state_dict().items():
        if ".lora_B." in name:
            tensor.normal_(std=0.02)
    torch.save(model.state_to_save(), tmp_path / "adapters.pt")
    assert (tmp_path / "adapters.pt").stat().st_size < 8e6, "the two encoders take 100 MB"
    rows = model.encode_image(sample_images()), model.encode_text(CAPTIONS)
    again = DualEncoder(config, model.tokenizer, from_checkpoint=True)
    again.load_saved(torch.load(tmp_path / "adapters.pt"))
    again.merge_adapters()
    torch.testing.assert_close(again.encode_image(sample_images()), rows[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(again.encode_text(CAPTIONS), rows[1], atol=1e-5, rtol=0)


# -- norms that keep their statistics -------------------------------------------------------------------


def statistics(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in state.items() if k.startswith("image_tower") and ("running_" in k or "batches" in k)}


def test_frozen_norms_normalise_by_what_they_came_with(published: ModelConfig) -> None:
    """In training as in evaluation: what an image gives depends on no other in its batch."""
    batch = torch.stack([encoder(published).prepare(p) for p in sample_images(4)])
    for frozen_norms in (True, False):
        model = encoder(replace(published, freeze_norms=frozen_norms))
        expected = model.eval().image_tower(batch)
        found, alone = model.train().image_tower(batch), model.image_tower(batch[:2])
        assert torch.allclose(found, expected, atol=1e-5) == torch.allclose(found[:2], alone, atol=1e-5) == frozen_norms
        assert model.text_tower.training and model.image_tower.training and model.image_tower.trunk.training


@pytest.mark.slow
def test_the_rest_is_trained_where_norms_are_frozen(folder: Path, published: ModelConfig) -> None:
    """In parts, and recomputed, too."""
    before = encoder(published).state_dict()
    for frozen_norms in (True, False):
        model = replace(published, freeze_norms=frozen_norms, activation_checkpointing=True)
        config = config_for(
            folder, f"run-{frozen_norms}", model=model, objective="clip", ema=0.5, epochs=1, micro_batch=3
        )
        state = train(config, progress=False).load_last()
        assert state is not None
        kept = statistics(state["model"])
        assert len(kept) > 20 and all(torch.equal(v, before[k]) for k, v in kept.items()) == frozen_norms
        averaged = statistics(state["kept"])
        assert averaged and all(torch.equal(v, before[k]) for k, v in averaged.items()) == frozen_norms
        moved = [k for k, v in state["model"].items() if k.startswith("image_tower") and not torch.equal(v, before[k])]
        assert {k.rpartition(".")[0] for k in moved} >= {
            "image_tower.trunk.layer1.0.conv1",
            "image_tower.trunk.layer1.0.bn1",
        }


@pytest.mark.slow
def test_runs_with_frozen_norms_resume(folder: Path, published: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(published, freeze_norms=True)
    whole = train(config_for(folder, "whole", model=model), progress=False)
    config = config_for(folder, "parts", model=model)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        stop_at(3, patched)
        train(config, progress=False)
    resumed = train(resume=Path(config.out), progress=False)
    assert_same_run(whole, resumed)
    with pytest.raises(UserError, match="--model.freeze_norms is True in this run, not False"):
        train(replace(config, model=published, epochs=3), resume=resumed.folder, progress=False)


def test_frozen_norms_over_several_processes(published: ModelConfig) -> None:
    """--sync_batchnorm makes other norms of them, which keep their statistics too."""
    model = encoder(replace(published, freeze_norms=True))
    batch = torch.stack([model.prepare(p) for p in sample_images(4)])
    expected = model.train().image_tower(batch)
    convert_sync_batchnorm(model)
    norms = [m for m in model.train().modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(norms) > 10 and not any(m.training for m in norms)
    torch.testing.assert_close(model.image_tower(batch), expected)


def test_frozen_norms_want_a_pretrained_tower(tmp_path: Path) -> None:
    (wrong,) = problems(Config(model=replace(TINY, freeze_norms=True)))
    assert "this image tower starts from random weights: give --model.freeze_norms false" in wrong
    assert problems(Config(model=ModelConfig(image_tower="resnet10t", image_pretrained=False, freeze_norms=True)))
    assert not problems(Config(model=ModelConfig(image_tower="resnet10t", freeze_norms=True)))
    assert not problems(Config(model=replace(TINY, freeze_norms=True), init_from=str(tmp_path)))


@needs_packages
def test_the_packaged_tower_keeps_its_statistics(tmp_path: Path) -> None:
    config = ModelConfig(image_tower="efficientnet-lite0", image_size=64, dim=16, freeze_norms=True)
    model = encoder(config)
    before = {k: v.clone() for k, v in statistics(model.state_dict()).items()}
    model.train().image_tower(torch.stack([model.prepare(p) for p in sample_images(4)])).sum().backward()
    assert len(before) > 100 and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(p.grad is not None for p in model.image_tower.parameters())


# -- the zero-shot monitor --------------------------------------------------------------------------


def classes(folder: Path) -> Path:
    """A folder of images by class, with one that cannot be decoded, beside a captioned folder."""
    root = folder.parent / "classes"
    if not root.is_dir():
        for k, file in enumerate(sorted((folder / "Images").iterdir())):
            place = root / ("red", "green", "blue", "yellow")[k % 4]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place / file.name)
        (root / "red" / "000.png").write_bytes(b"no image")
        (root / "classnames.txt").write_text("red\ta red thing\n")
        (root / "templates.txt").write_text("one {} patch\n")
    return root


@pytest.mark.draws
def test_monitor(folder: Path, published: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    root = classes(folder)
    first = train(config_for(folder, "first", objective="clip", optim=OptimConfig(lr=3e-3)), progress=False)
    start = evaluate_run(first.folder, zeroshot=str(root), retrieval=False, progress=False)
    config = config_for(folder, init_from=str(first.folder), monitor=str(root), objective="clip", ema=0.5)
    run = train(config, progress=True)
    output = capsys.readouterr().err
    assert "zero-shot monitor: 39 of 40 images in 4 classes, 1 left out" in output
    rows = [r for r in run.metrics() if r["kind"] == "eval"]
    assert {r["zeroshot_top1_start"] for r in rows} == {start["zeroshot_top1"]}
    assert f"zero-shot {rows[0]['zeroshot_top1']:.1f} (start {start['zeroshot_top1']:.1f})" in output
    best = run.load_best()["step"]
    ended = evaluate_run(run.folder, zeroshot=str(root), retrieval=False, progress=False)
    assert next(r for r in rows if r["step"] == best)["zeroshot_top1"] == pytest.approx(ended["zeroshot_top1"])
    with Image.open(run.folder / "curves.png") as drawn, Image.open(first.folder / "curves.png") as plain:
        assert drawn.size[0] > 1.3 * plain.size[0], "a third panel"


@pytest.mark.slow
@pytest.mark.parametrize("image_lr", [0.0, 1.0])
def test_the_monitor_decodes_once(image_lr: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = classes(folder)
    opened: list[str] = []
    prepare = DualEncoder.prepare

    def counted(self: DualEncoder, image: Any) -> torch.Tensor:
        opened.extend([str(image)] if str(root) in str(image) else [])
        return prepare(self, image)

    monkeypatch.setattr(DualEncoder, "prepare", counted)
    model = ModelConfig(image_size=32, dim=16, image_lr=image_lr)
    run = train(config_for(folder, model=model, monitor=str(root)), progress=False)
    assert len(opened) == len(set(opened)) == 40
    rows = [r for r in run.metrics() if r["kind"] == "eval"]
    assert len(rows) == 2 and all(0 <= r["zeroshot_top1"] <= 100 for r in rows)
    before = rows[0]["zeroshot_top1_start"]
    (start,) = [r for r in run.metrics() if r["kind"] == "start"]
    assert start["zeroshot_top1"] == before and start["step"] == 0
    # Gone on with, the start is not measured anew: its figure is the one that was noted.
    file = run.folder / "metrics.jsonl"
    file.write_text(file.read_text().replace(f'"zeroshot_top1": {json.dumps(before)}}}', '"zeroshot_top1": 12.5}'))
    later = train(replace(run.config, epochs=3), resume=run.folder, progress=False)
    assert [r for r in later.metrics() if r["kind"] == "eval"][-1]["zeroshot_top1_start"] == 12.5
