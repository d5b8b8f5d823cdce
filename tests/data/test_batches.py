"""Views and batches are pure functions of their keys, and draw what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from amclr.config import Config, ModelConfig, SourceConfig, ViewsConfig
from amclr.data import manifest as manifests
from amclr.data.batches import Batch, BatchPlan, PictureBatches
from amclr.data.pictures import PictureStore
from amclr.data.views import image_view, policy
from amclr.errors import UserError

VIEWS = ("image", "image_aug", "text", "text_aug")
POLICIES = ("none", "weak", "paper", "single", "strong")


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 60, 48), dtype=np.uint8))


@pytest.mark.parametrize("name", POLICIES)
def test_views_are_functions_of_their_key(name: str, picture: torch.Tensor) -> None:
    transform = policy(name, 32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn = [image_view(transform, picture, 0, epoch, 7, "image") for epoch in range(12)]
    assert torch.equal(before, torch.get_rng_state()), "the global generator was moved"
    torch.manual_seed(2)
    again = [image_view(transform, picture, 0, epoch, 7, "image") for epoch in reversed(range(12))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert all(d.shape == (3, 32, 32) and d.dtype == torch.uint8 for d in drawn)
    different = len({d.numpy().tobytes() for d in drawn})
    assert different == 1 if name == "none" else different > 6


def test_single_draws_its_own_operation_per_sample(picture: torch.Tensor) -> None:
    plain = image_view(policy("none", 32), picture, 0)
    drawn = [image_view(policy("single", 32), picture, 0, 0, sample, "image_aug") for sample in range(60)]
    mirrored = sum(torch.equal(d, plain.flip(-1)) for d in drawn)
    brighter = sum(float(d.float().mean()) > float(plain.float().mean()) + 12 for d in drawn)
    blurred = sum(
        float(d.float().diff(dim=-1).abs().mean()) < 0.7 * float(plain.float().diff(dim=-1).abs().mean()) for d in drawn
    )
    assert min(mirrored, brighter, blurred) >= 2


def test_without_flips_left_stays_left() -> None:
    picture = torch.zeros(3, 40, 40, dtype=torch.uint8)
    picture[:, :, :12] = 255
    for name in POLICIES:
        if name == "paper":  # RandAugment may rotate and shift, and never mirrors
            continue
        for sample in range(40):
            view = image_view(policy(name, 32, False), picture, 0, 0, sample).float()
            assert view[:, :, :12].mean() >= view[:, :, -12:].mean()


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
    with pytest.raises(UserError, match="5 training pictures are fewer than one batch of 8: lower --batch_size"):
        BatchPlan(np.arange(5), 8, 0)


def letters(texts: list[str]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[ord(c) for c in f"{t:60}"[:60]] for t in texts])}


def batches(folder: Path, views: tuple[str, ...] = VIEWS, ram: float = 1.0, **views_config: object) -> PictureBatches:
    config = Config(
        data=str(folder), batch_size=8, model=ModelConfig(image_size=24), views=replace(ViewsConfig(), **views_config),  # type: ignore[arg-type]
        source=SourceConfig(),
    )  # fmt: skip
    samples = manifests.load(config, folder.parent).split("train")
    store = PictureStore([s.picture for s in samples], 24, ram, progress=False)
    return PictureBatches(samples, store, BatchPlan(np.array([s.id for s in samples]), 8, 0), views, letters, config)


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
    assert torch.equal(batch.images[3], image_view(policy("none", 24), data.store[int(batch.ids[3])]))


def test_unused_views_are_not_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        "amclr.data.batches.image_view", lambda t, p, *key: made.append(key[-1]) or torch.zeros(3, 2, 2)
    )
    batch = batches(folder, ("image", "text"))[0]
    assert set(made) == {"image"} and len(made) == 8
    assert isinstance(batch.tokens, dict) and len(batch.tokens["input_ids"]) == 8
    assert batches(folder, ("image", "image_aug"))[0].tokens is None


def test_a_picture_that_goes_bad_is_replaced_and_named(folder: Path) -> None:
    data = batches(folder, ram=0.0)
    victim = int(data[0].ids[2])
    Path(data.store.places[victim].file).write_bytes(b"")
    batch = data[0]
    assert int(batch.ids[2]) == (victim + 1) % len(data.samples)
    (name,) = batch.replaced
    assert name == data.samples[victim].name and "0 bytes" in batch.replaced[name]
    for place in data.store.places:
        Path(place.file).write_bytes(b"")
    with pytest.raises(UserError, match="no picture can be read any more"):
        data[1]
