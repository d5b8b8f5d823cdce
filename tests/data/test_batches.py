"""Views and batches are pure functions of their keys, and draw what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from amclr.config.schema import Config, ModelConfig, SourceConfig, ViewsConfig
from amclr.data import manifest as manifests
from amclr.data.batches import Batch, BatchPlan, ImageBatches
from amclr.data.images.store import ImageStore
from amclr.data.images.views import NamedPolicy, whole
from amclr.utils.errors import UserError

VIEWS = ("image", "image_aug", "text", "text_aug")


def test_a_plan_visits_each_sample_once_an_epoch() -> None:
    plan = BatchPlan(np.arange(50), 8, seed=3)
    assert plan.steps_per_epoch == 6
    for epoch in range(3):
        ids = np.concatenate([plan[epoch * 6 + k][1] for k in range(6)])
        assert len(set(ids)) == 48 and {plan[epoch * 6 + k][0] for k in range(6)} == {epoch}
    assert not np.array_equal(plan[0][1], plan[6][1])
    assert np.array_equal(BatchPlan(np.arange(50), 8, 3)[11][1], plan[11][1])
    assert not np.array_equal(BatchPlan(np.arange(50), 8, 4)[0][1], plan[0][1])
    # Without some samples, the others keep their order.
    kept = np.arange(50)[np.arange(50) % 7 != 0]
    whole = np.concatenate([BatchPlan(np.arange(50), 10, 3)[k][1] for k in range(5)])
    part = np.concatenate([BatchPlan(kept, 1, 3)[k][1] for k in range(len(kept))])
    assert [i for i in whole if i % 7] == list(kept[part])
    with pytest.raises(UserError, match="5 training images are fewer than one batch of 8: lower --batch_size"):
        BatchPlan(np.arange(5), 8, 0)


def letters(texts: list[str]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[ord(c) for c in f"{t:60}"[:60]] for t in texts])}


def batches(
    folder: Path, views: tuple[str, ...] = VIEWS, ram: float = 1.0, edited: bool = True, **views_config: object
) -> ImageBatches:
    config = Config(
        data=str(folder), batch_size=8, model=ModelConfig(image_size=24), views=replace(ViewsConfig(), **views_config),  # type: ignore[arg-type]
        source=SourceConfig(),
    )  # fmt: skip
    samples = manifests.load(config, folder.parent).split("train")
    store = ImageStore([s.image for s in samples], 24, "ram" if ram else "none", ram=ram, progress=False)
    plan = BatchPlan(np.array([s.id for s in samples]), 8, 0)
    return ImageBatches(samples, store, plan, views, letters, config, edited=edited)


def same(a: Batch, b: Batch) -> bool:
    assert isinstance(a.tokens, dict) and isinstance(b.tokens, dict) and a.images is not None and b.images is not None
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.tokens["input_ids"], b.tokens["input_ids"])
        and torch.equal(a.ids, b.ids)
    )


def test_batches_are_functions_of_the_step_whatever_the_workers(folder: Path) -> None:
    data = batches(folder)
    alone = [data[step] for step in range(6)]
    assert alone[0].images is not None and alone[0].images.shape == (16, 3, 24, 24)
    for workers, start in ((0, 0), (2, 0), (2, 3)):
        loader = DataLoader(data, batch_size=None, sampler=range(start, 6), num_workers=workers)
        assert all(same(a, b) for a, b in zip(alone[start:], loader, strict=True))
    assert same(batches(folder, ram=0.0)[4], alone[4])


def test_views_of_a_batch_stand_in_order(folder: Path) -> None:
    data = batches(folder, image="none", image_aug="none")
    batch = data[0]
    assert batch.image_views == ("image", "image_aug") and batch.text_views == ("text", "text_aug")
    assert batch.images is not None and torch.equal(batch.images[:8], batch.images[8:])
    assert isinstance(batch.tokens, dict)
    first, second = batch.tokens["input_ids"].chunk(2)
    for row, i in enumerate(batch.ids):
        texts = {"".join(map(chr, side[row])).strip() for side in (first, second)}
        assert texts == set(data.samples[int(i)].captions)
    assert torch.equal(batch.images[3], whole(data.store[int(batch.ids[3])], 24))


def test_the_visits_of_an_epoch_draw_different_views(folder: Path) -> None:
    """At weight 2 an epoch shows each image twice: the first time as it would at weight 1."""
    once, twice = batches(folder, image="weak", image_aug="weak"), batches(folder, image="weak", image_aug="weak")
    twice.texts = once.texts = replace(once.texts, words=1.0, noise=0.5)
    twice.plan = BatchPlan(once.plan.samples, 8, 0, np.full(32, 2.0))
    seen: dict[int, list[tuple[int, ...]]] = {}
    for data in (once, twice):
        for step in range(data.plan.steps_per_epoch):
            batch, (_, rows, copies) = data[step], data.plan.visits(step)
            assert isinstance(batch.tokens, dict) and batch.images is not None
            for k, (row, copy) in enumerate(zip(rows.tolist(), copies.tolist(), strict=True)):
                drawn = [*batch.images[k :: len(rows)], *batch.tokens["input_ids"][k :: len(rows)]]
                seen.setdefault(row, [(), (), ()])[copy + (data is twice)] = tuple(
                    hash(d.numpy().tobytes()) for d in drawn
                )
    assert all(one == first for one, first, _ in seen.values())
    for view in (0, 1):
        assert all(first[view] != second[view] for _, first, second in seen.values())
    # Of two short captions and their noise, some are drawn twice.
    assert sum(first[3] != second[3] for _, first, second in seen.values()) > 20


def test_edits_made_on_the_device_give_the_same_images(folder: Path) -> None:
    for names in ({"image": "paper", "image_aug": "single"}, {"image": "strong", "image_aug": "weak"}):
        here, there = batches(folder, **names)[3], batches(folder, edited=False, **names)[3]
        assert here.edits is None and there.edits is not None and here.images is not None
        assert there.images is not None and not torch.equal(there.images, here.images)
        cpu = torch.device("cpu")
        for _ in range(2):  # the second pass of a batch in parts asks again
            assert torch.equal(there.to(cpu).images, here.images) and there.to(cpu).edits is None
        for size in (3, 8):
            chunks = [c.to(cpu).images for c in there.chunks(size)]
            expected = [c.images for c in here.chunks(size)]
            assert all(torch.equal(a, b) for a, b in zip(chunks, expected, strict=True))
        with_workers = list(
            DataLoader(batches(folder, edited=False, **names), batch_size=None, sampler=[3], num_workers=1)
        )
        assert torch.equal(with_workers[0].to(cpu).images, here.images)


def test_unused_views_are_not_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = NamedPolicy.draw
    monkeypatch.setattr(
        NamedPolicy, "draw", lambda self, p, ids, *key: made.append(key[-1]) or real(self, p, ids, *key)
    )
    batch = batches(folder, ("image", "text"))[0]
    assert made == ["image"] and batch.images is not None and len(batch.images) == 8
    assert isinstance(batch.tokens, dict) and len(batch.tokens["input_ids"]) == 8
    assert batches(folder, ("image", "image_aug"))[0].tokens is None


def test_an_image_that_goes_bad_is_replaced_and_named(folder: Path) -> None:
    data = batches(folder, ram=0.0)
    victim = int(data[0].ids[2])
    Path(data.store.places[victim].file).write_bytes(b"")
    batch = data[0]
    assert int(batch.ids[2]) == (victim + 1) % len(data.samples)
    (name,) = batch.replaced
    assert name == data.samples[victim].name and "0 bytes" in batch.replaced[name]
    for place in data.store.places:
        Path(place.file).write_bytes(b"")
    with pytest.raises(UserError, match="no image can be read any more"):
        data[1]
