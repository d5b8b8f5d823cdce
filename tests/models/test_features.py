"""Features of frozen towers: cached, shared and drawn from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from amclr.config.schema import (
    Config,
    SourceConfig,
    ViewsConfig,
)
from amclr.data import manifest as manifests
from amclr.data.batches import BatchPlan, ImageBatches
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policy
from amclr.models import features
from amclr.models.dual_encoder import DualEncoder
from amclr.models.features import FeatureBatches
from amclr.models.tokenizer import build_tokenizer
from tests.training.configs import frozen

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def towers(folder: Path) -> tuple[Config, DualEncoder, list[manifests.Sample], ImageStore]:
    config = frozen(folder, views=ViewsConfig(image="weak", image_aug="weak", cached=3))
    torch.manual_seed(0)
    model = DualEncoder(config.model, build_tokenizer(config.model, ["a red green blue yellow patch number 1"]))
    samples = list(manifests.load(config, folder.parent).split("train"))
    return config, model, samples, ImageStore([s.image for s in samples], 32)


def test_cached_features_are_the_towers_own(towers: Any, own_cache: Path) -> None:
    config, model, samples, store = towers
    result = features.image_features(model, samples, "weak", 3, config, own_cache, store, progress=False)
    assert result.shape == (32, 3, 256)
    drawn = policy("weak", 32)
    table = result.read()
    for i, v in ((0, 0), (17, 2), (31, 1)):
        (view,) = drawn([store[i]], np.array([samples[i].id]), 0, "cached", v, "weak")
        with torch.inference_mode():
            expected = model.image_tower(view[None])[0]
        np.testing.assert_allclose(table[i, v], expected, atol=1e-4)
    captions = ["a red patch", "a much longer caption of a green patch number 7", "blue"]
    rows = features.caption_features(model, captions, own_cache, progress=False).read()
    for text, row in zip(captions, rows, strict=True):
        with torch.inference_mode():
            np.testing.assert_allclose(row, model.text_tower(**model.tokenize([text]))[0], atol=1e-4)


def test_cache_is_reused_until_something_that_matters_changes(
    towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, samples, store = towers
    computed = []
    real = model.image_tower.forward
    monkeypatch.setattr(model.image_tower, "forward", lambda x: computed.append(len(x)) or real(x))

    def get(name: str = "weak", views: int = 3, **changes: Any) -> int:
        computed.clear()
        changed = replace(config, **{k.removesuffix("_config"): v for k, v in changes.items()})
        features.image_features(model, samples, name, views, changed, own_cache, store, progress=False)
        return sum(computed)

    assert get() == 96 and get() == 0
    assert get(objective="clip", batch_size=4, epochs=9) == 0
    assert get(views=2) == 64 and get("none") == 32 and get(seed=1) == 0
    assert get(views_config=replace(config.views, cached_seed=1)) == 96
    Image.new("RGB", (40, 40)).save(samples[3].image.file)
    assert get() == 3 and get() == 0, "one image of 32 has changed"
    with torch.no_grad():
        next(model.image_tower.parameters()).mul_(1.5)
    assert get() == 96


def test_cached_features_serve_other_sets_of_the_same_images_and_captions(
    towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Splits, folds and data that grow share their features; the rows are those of a cache of their own."""
    config, model, samples, store = towers
    captions = [f"a patch number {k % 50}" for k in range(60)]
    seen: list[int] = []
    for tower in (model.image_tower, model.text_tower):
        real = tower.forward
        monkeypatch.setattr(tower, "forward", lambda *a, real=real, **k: seen.append(1) or real(*a, **k))
    monkeypatch.setattr("amclr.models.feature_cache.CHUNK", 1)

    def both(rows: np.ndarray, texts: list[str], cache: Path = own_cache) -> tuple[np.ndarray, np.ndarray, int]:
        seen.clear()
        some = [samples[i] for i in rows]
        decoded = ImageStore([s.image for s in some], 32)
        images = features.image_features(model, some, "weak", 2, config, cache, decoded, progress=False)
        return images.read(), features.caption_features(model, texts, cache, progress=False).read(), len(seen)

    images, texts, built = both(np.arange(20), captions)
    assert built == 20 + 50, "ten captions stand twice"
    assert both(np.arange(10, 20), captions[:7])[2] == 0
    rows = np.random.default_rng(0).permutation(32)
    mixed, others, built = both(rows, ["another", *captions[::-1]])
    assert built == 12 + 1
    alone, own, _ = both(np.arange(32), ["another", *captions[::-1]], own_cache / "alone")
    assert np.array_equal(mixed, alone[rows]) and np.array_equal(images, alone[:20])
    assert np.array_equal(others, own) and np.array_equal(texts, own[:0:-1])
    result = features.image_features(model, [samples[i] for i in rows], "weak", 2, config, own_cache, store, False)
    assert len(result.parts) == 2, "the files of both computations"
    pick = np.arange(32) % 2
    assert np.array_equal(result.read(rows, pick), mixed[rows, pick])
    assert np.array_equal(result.read(rows[:5]), mixed[rows[:5]]) and result.read(rows[:0]).shape == (
        0,
        *mixed.shape[1:],
    )


def test_towers_of_the_same_weights_with_other_tokenizers_share_nothing(towers: Any, own_cache: Path) -> None:
    """Two small towers of one seed, whose tokenizers are as large and were trained on other captions."""
    config, *_ = towers
    result = []
    for captions in (["red dog", "dog red"], ["big cat", "cat big"]):
        torch.manual_seed(0)
        model = DualEncoder(config.model, build_tokenizer(config.model, captions))
        result.append(features.caption_features(model, ["red cat"], own_cache, False).read())
        with torch.inference_mode():
            np.testing.assert_allclose(result[-1], model.text_tower(**model.tokenize(["red cat"])), atol=1e-4)
    assert not np.allclose(*result, atol=1e-2)


def test_interrupted_caching_is_resumed(towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model, samples, store = towers
    monkeypatch.setattr("amclr.models.feature_cache.CHUNK", 8)
    whole = features.image_features(model, samples, "weak", 3, config, own_cache / "whole", store, progress=False)
    real, done = model.image_tower.forward, []

    def killed(x: torch.Tensor) -> torch.Tensor:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(x))
        return real(x)

    monkeypatch.setattr(model.image_tower, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        features.image_features(model, samples, "weak", 3, config, own_cache, store, progress=False)
    rest: list[int] = []
    monkeypatch.setattr(model.image_tower, "forward", lambda x: rest.append(len(x)) or real(x))
    parts = features.image_features(model, samples, "weak", 3, config, own_cache, store, progress=False)
    assert sum(rest) == 48 and np.array_equal(whole.read(), parts.read())


def test_feature_batches_hold_what_they_say(towers: Any, own_cache: Path) -> None:
    config, model, samples, store = towers
    views = ("image", "image_aug", "text", "text_aug")
    data = FeatureBatches(
        model,
        samples,
        store,
        BatchPlan(np.array([s.id for s in samples]), 8, 0),
        views,
        config,
        own_cache,
        progress=False,
    )
    table = data.features["image"]
    for step in range(8):
        batch = data[step]
        assert isinstance(batch.images, torch.Tensor) and isinstance(batch.tokens, torch.Tensor)
        first, second = batch.images.chunk(2)
        text, other = batch.tokens.chunk(2)
        for row, i in enumerate(batch.ids):
            of = [[np.array_equal(t, side[row]) for t in table.read(np.array([int(i)]))[0]] for side in (first, second)]
            assert sum(of[0]) == sum(of[1]) == 1 and of[0] != of[1], "two different views of the same image"
            own = data.text_features(samples[int(i)].captions)
            assert {tuple(text[row].tolist()), tuple(other[row].tolist())} == set(map(tuple, own.tolist()))


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, 1, 1), (0, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize("captions", ["all", "one"])
def test_feature_batches_know_every_text_that_can_be_drawn(
    towers: Any, own_cache: Path, weights: tuple[float, float, float], captions: Literal["all", "one"]
) -> None:
    """Samples with all kinds of texts; the second views are those that batches of images tokenise."""
    config, model, samples, store = towers
    texts = ("a red patch on grey", "some red patch by itself", "grey and red")
    kinds: list[tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]] = [
        (texts[:1], ()), (texts[:2], ()), (texts[:1], (("one red patch",),)), (texts, (("red it is", "so red"), (), ("x",))),
    ]  # fmt: skip
    samples = [replace(s, captions=c, paraphrases=p) for s, (c, p) in zip(samples, kinds * 8, strict=True)]
    views = replace(config.views, word_noise=0.5, paraphrases=weights[0], other_captions=weights[1], words=weights[2])
    config = replace(config, views=views, source=SourceConfig(captions=captions))
    required = ("image", "image_aug", "text", "text_aug")
    plan = BatchPlan(np.array([s.id for s in samples]), 8, 0)
    data = FeatureBatches(model, samples, store, plan, required, config, own_cache, progress=False)
    drawn: list[list[str]] = []
    data.text_features = lambda texts: drawn.append(list(texts)) or FeatureBatches.text_features(data, texts)  # type: ignore[method-assign, func-returns-value]
    tokenized: list[str] = []
    images = ImageBatches(samples, store, plan, required, lambda t: tokenized.extend(t) or {}, config)  # type: ignore[func-returns-value]
    for step in range(40):
        first, second = data[step].tokens.chunk(2)
        tokenized.clear()
        images[step]
        ids = plan[step][1]
        said = drawn[-1]
        assert len(said) == len(tokenized) == 16 and tokenized[:8] == said[:8]
        for row, i in enumerate(ids):
            known = {*samples[i].texts}
            noise = tokenized[8 + row] not in known or said[8 + row] not in known
            assert noise or tokenized[8 + row] == said[8 + row]
        for side, of_side in ((first, said[:8]), (second, said[8:])):
            with torch.inference_mode():
                expected = model.text_tower(**model.tokenize(of_side))
            torch.testing.assert_close(side, expected, atol=1e-4, rtol=0)


def test_another_store_computes_its_own_texts_alone(
    towers: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model, samples, store = towers
    real, requested = model.tokenize, []
    monkeypatch.setattr(model, "tokenize", lambda t: requested.extend(t) or real(t))

    def texts(paraphrases: tuple[str, ...], views: tuple[str, ...]) -> list[str]:
        requested.clear()
        with_them = [replace(s, paraphrases=(paraphrases,) * len(s.captions)) for s in samples]
        FeatureBatches(model, with_them, store, plan, views, drawing, own_cache, progress=False)
        return list(requested)

    plan = BatchPlan(np.array([s.id for s in samples]), 8, 0)
    both = ("text", "text_aug")
    drawing = replace(config, views=replace(config.views, paraphrases=1.0, other_captions=1.0))
    assert sorted(texts((), both)) == sorted({c for s in samples for c in s.captions})
    assert sorted(texts(("so it is", "so be it"), both)) == ["so be it", "so it is"]
    assert texts(("so it is", "so be it"), both) == [] and texts(("never seen",), ("text",)) == []


def test_replaced_features_are_those_of_the_next_sample(towers: Any, own_cache: Path) -> None:
    config, model, samples, store = towers
    for k in (4, 31):
        Path(samples[k].image.file).write_bytes(b"")
    plan = BatchPlan(np.array([s.id for s in samples]), 8, 0)
    data = FeatureBatches(model, samples, store, plan, ("image", "text"), config, own_cache, progress=False)
    result: dict[str, str] = {}
    for step in range(4):
        batch, planned = data[step], plan[step][1]
        assert isinstance(batch.images, torch.Tensor) and not batch.images.isnan().any()
        assert batch.ids.tolist() == [{4: 5, 31: 0}.get(i, i) for i in planned.tolist()]
        result |= batch.replaced
    assert result.keys() == {samples[4].name, samples[31].name} and all("0 bytes" in r for r in result.values())
