"""The same images in every format are the same samples, the same batches and the same training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from amclr.config.schema import Config, LossConfig, ModelConfig, OptimConfig, ViewsConfig
from amclr.data import manifest as manifests
from amclr.data.batches import BatchPlan, ImageBatches
from amclr.data.images.store import ImageStore
from amclr.data.manifest import Manifest
from amclr.training.loop import train
from tests.conftest import REAL, make_folder, needs_real_data
from tests.data.formats import WRITERS, Item, items_of, write_csv, write_jsonl, write_tars
from tests.data.test_batches import letters, same

VIEWS = ("image", "image_aug", "text", "text_aug")


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    return items_of(make_folder(tmp_path / "patches"))


def load(data: Path | str, cache: Path) -> Manifest:
    return manifests.load(Config(data=str(data)), cache, progress=False)


def content(manifest: Manifest, split: str = "all") -> list[tuple[object, ...]]:
    return [(s.name, s.id, s.captions, s.image.read()) for s in manifest.split(split)]


def batches(manifest: Manifest) -> ImageBatches:
    config = Config(batch_size=8, model=ModelConfig(image_size=24))
    samples = manifest.split("train")
    store = ImageStore([s.image for s in samples], 24, progress=False)
    return ImageBatches(samples, store, BatchPlan(np.array([s.id for s in samples]), 8, 0), VIEWS, letters, config)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_samples_and_batches(
    name: str, items: list[Item], tmp_path: Path, own_cache: Path
) -> None:
    known = load(tmp_path / "patches", own_cache)
    data = WRITERS[name](tmp_path / "other" / "set", items)
    for _ in range(2):  # read, then taken from the cache where the format has one
        found = load(data, own_cache)
        assert not found.rejects and found.rows == 80
        assert content(found) == content(known)
        assert {s: found.splits[s] for s in ("train", "val")} == known.splits
    a, b = batches(known), batches(found)
    assert all(same(a[step], b[step]) for step in (0, 3, 5, 9))


def test_order_of_shards_and_rows_changes_nothing(items: list[Item], tmp_path: Path, own_cache: Path) -> None:
    known = load(write_tars(tmp_path / "a", items), own_cache)
    other = load(write_tars(tmp_path / "b", items[::-1], per_shard=5), own_cache)
    assert content(known) == content(other)


def test_ids_stay_when_samples_come_and_go(items: list[Item], tmp_path: Path, own_cache: Path) -> None:
    before = load(write_jsonl(tmp_path / "a", items), own_cache)
    after = load(write_jsonl(tmp_path / "b", [*items[::2], replace(items[1], name="new.png")]), own_cache)
    ids = {s.name: s.id for s in before.samples}
    assert all(ids[s.name] == s.id for s in after.samples if s.name != "new.png") and len(after.samples) == 21
    assert len({*ids.values(), *(s.id for s in after.samples)}) == 41


def test_a_url_is_copied_once_and_then_followed(items: list[Item], own_cache: Path) -> None:
    import fsspec

    there = fsspec.filesystem("memory")
    there.rm("/bucket", recursive=True) if there.exists("/bucket") else None
    for item in items:
        there.pipe(f"/bucket/set/Images/{item.name}", item.content)
    rows = [f"{i.name},{c}" for i in items for c in i.captions]
    there.pipe("/bucket/set/captions.csv", "\n".join(["image,caption", *rows]).encode())
    first = load("memory://bucket/set", own_cache)
    assert len(first.samples) == 40 and first.samples[3].image.read() == items[3].content
    copied = Path(first.samples[3].image.file)
    before = copied.stat().st_mtime_ns
    there.pipe("/bucket/set/captions.csv", "\n".join(["image,caption", *rows[2:]]).encode())
    there.rm(f"/bucket/set/Images/{items[0].name}")
    again = load("memory://bucket/set", own_cache)
    assert len(again.samples) == 39 and copied.stat().st_mtime_ns == before
    assert not Path(first.samples[0].image.file).exists()


def test_a_folder_by_class_is_captioned_by_its_classes(items: list[Item], tmp_path: Path, own_cache: Path) -> None:
    for k, item in enumerate(items):
        folder = tmp_path / "pets" / ("n01_cat" if k % 2 else "n02_dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / item.name).write_bytes(item.content)
    (tmp_path / "classnames.txt").write_text("n01_cat\ttabby cat\nn02_dog\tdog\n")
    found = load(tmp_path / "pets", own_cache)
    assert found.format == "images by class" and len(found.samples) == 40
    assert {s.captions for s in found.samples} == {("a photo of a tabby cat",), ("a photo of a dog",)}


def test_a_mix_visits_each_source_by_its_weight(items: list[Item], tmp_path: Path, own_cache: Path) -> None:
    write_csv(tmp_path / "photos", items[4:24])
    write_jsonl(tmp_path / "web", [*items[:4], *items[24:]])
    (tmp_path / "mix.yaml").write_text("- {data: photos, weight: 2}\n- {data: web, name: crawl, weight: 0.5}\n")
    found = load(tmp_path / "mix.yaml", own_cache)
    assert found.parts == {"photos": 2.0, "crawl": 0.5} and len(found.samples) == 40
    assert found.samples[0].name.startswith("crawl/") and found.samples[-1].name.startswith("photos/")
    train = found.split("train")
    plan = BatchPlan(np.array([s.id for s in train]), 5, 0, np.array([s.weight for s in train]))
    visits = np.zeros(len(train), dtype=int)
    epochs = 8
    for step in range(epochs * plan.steps_per_epoch):
        epoch, rows = plan[step]
        assert epoch == step // plan.steps_per_epoch
        visits += np.bincount(rows, minlength=len(train))
    for part, weight in found.parts.items():
        own = visits[[k for k, s in enumerate(train) if s.name.startswith(part)]]
        # What does not fill a batch sits out an epoch: at most 4 of all visits of an epoch.
        assert abs(own.mean() - weight * epochs) < 4 * epochs / len(own)
    assert plan.steps_per_epoch == int(sum(s.weight for s in train)) // 5


@pytest.mark.slow
@needs_real_data
def test_real_images_train_alike_bit_for_bit_in_every_format(tmp_path: Path, own_cache: Path) -> None:
    everything = items_of(REAL / "flickr8k")
    chosen = [i for i in everything if i.split == "train"][:1700] + [i for i in everything if i.split == "val"][:300]
    states: dict[str, dict[str, torch.Tensor]] = {}
    losses: dict[str, list[float]] = {}
    for name, write in WRITERS.items():
        data = write(tmp_path / name / "set", chosen)
        config = Config(
            data=str(data), out=str(tmp_path / name / "run"), objective="xamclr", epochs=1, batch_size=64, accelerator="cpu",
            views=ViewsConfig(image="paper", image_aug="single"), model=ModelConfig(image_size=32, dim=32),
            loss=LossConfig(temperature=0.05), optim=OptimConfig(lr=1e-3),
        )  # fmt: skip
        run = train(config, progress=False)
        state = run.load_last()
        assert state is not None and state["step"] == 26
        states[name] = {**state["model"], **{k: v for k, v in state["objective"].items() if torch.is_tensor(v)}}
        losses[name] = [row["loss"] for row in run.metrics() if row["kind"] == "train"]
    first = next(iter(WRITERS))
    for name in WRITERS:
        assert losses[name] == losses[first] and len(losses[name]) >= 3
        assert all(torch.equal(states[name][k], v) for k, v in states[first].items()), name
