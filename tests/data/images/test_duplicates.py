"""What looks the same is found whatever was done to the file, and nothing else; captions that say the same."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from amclr.config.schema import Config, ModelConfig
from amclr.data.images import duplicates
from amclr.data.images.decode import read_image
from amclr.data.images.duplicates import HASH_BYTES, SIGNS, Duplicates
from amclr.inspection.dataset import inspect
from amclr.objectives import Objective
from amclr.training.loop import train
from tests.conftest import make_folder


def landscape(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Random colours in patches of several sizes, as smooth and as varied as photographs."""
    draw = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for cells, weight in ((3, 60), (6, 40), (12, 25), (30, 12)):
        patches = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += weight * (np.asarray(patches.resize(size, Image.Resampling.BICUBIC), dtype=float) / 127.5 - 1)
    return Image.fromarray((total + 120).clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


CHANGES = {
    "none": lambda p: p,
    "saved anew": lambda p: saved(p, 40),
    "smaller": lambda p: p.resize((80, 60), Image.Resampling.BICUBIC),
    "larger": lambda p: p.resize((400, 300), Image.Resampling.BILINEAR),
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.15),
    "less contrast": lambda p: ImageEnhance.Contrast(p).enhance(0.7),
    "cropped": lambda p: p.crop((1, 1, 158, 119)),
}


def hashes_of(images: list[Image.Image]) -> np.ndarray:
    return duplicates.as_rows(duplicates.image_hash(read_image(p, 64)) for p in images)


@pytest.mark.parametrize("change", CHANGES)
def test_copies_are_found_and_nothing_else(change: str) -> None:
    originals = [landscape(k) for k in range(60)]
    copies = [CHANGES[change](p) for p in originals[:30]]
    groups = duplicates.near_duplicates(hashes_of([*originals, *copies]))
    assert groups.dtype == np.int64
    assert groups[:30].tolist() == list(range(30)) == groups[60:].tolist(), "the first of each group is its number"
    assert (groups[30:60] == -1).all()


def test_small_things_on_one_background_are_told_apart() -> None:
    background = landscape(0)
    images = []
    for colour in ("red", "blue", "white", "black"):
        images.append(background.copy())
        images[-1].paste(colour, (60, 50, 85, 75))
    assert (duplicates.near_duplicates(hashes_of([background, *images])) == -1).all()


def test_any_image_has_a_hash() -> None:
    sizes = [(1, 1), (3, 700), (32, 32), (31, 33)]
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in sizes]
    blank = [torch.full((3, 40, 50), grey, dtype=torch.uint8) for grey in (0, 127, 255)]
    found = [duplicates.image_hash(p) for p in (*images, *blank)]
    assert all(len(h) == HASH_BYTES for h in found)
    assert len(set(found[-3:])) == 1, "what is blank has no waves and no patches"
    assert duplicates.near_duplicates(duplicates.as_rows([])).tolist() == []
    assert duplicates.near_duplicates(duplicates.as_rows(found[:1])).tolist() == [-1]


def linked(hashes: np.ndarray) -> np.ndarray:
    """Groups by loops over all pairs and union."""
    parent = list(range(len(hashes)))
    fives = np.unpackbits(hashes[:, SIGNS:], axis=1).reshape(len(hashes), -1, 5)
    levels = [[int("".join(map(str, five)), 2) for five in row] for row in fives]

    def root(i: int) -> int:
        return i if parent[i] == i else root(parent[i])

    for i in range(len(hashes)):
        for j in range(i):
            signs = np.unpackbits(hashes[i, :SIGNS] ^ hashes[j, :SIGNS]).sum()
            if signs <= 24 and max(abs(a - b) for a, b in zip(levels[i], levels[j], strict=True)) <= 3:
                parent[max(root(i), root(j))] = min(root(i), root(j))
    roots = [root(i) for i in range(len(hashes))]
    return np.array([r if roots.count(r) > 1 else -1 for r in roots])


@given(st.integers(0, 2**30), st.integers(1, 4), st.sampled_from([0.0, 0.02, 0.06, 0.15]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_groups_are_those_of_all_pairs(seed: int, kinds: int, changed: float) -> None:
    """Signs and patches changed at random, more and less than near-duplicates may be, and chains of such changes."""
    draw = np.random.default_rng(seed)
    middle = np.packbits(np.tile([0, 1, 1, 1, 1], 192))  # patches that may move by some levels without a carry
    rows = [np.concatenate([draw.integers(0, 256, SIGNS), middle]).astype(np.uint8) for _ in range(kinds)]
    for _ in range(14):
        row = rows[draw.integers(len(rows))].copy()
        flips = draw.random(192) < changed
        # Within the indexed bytes few enough that no pair is missed.
        indexed = [8 * b + k for b in duplicates.INDEXED for k in range(8)]
        flips[draw.permutation(indexed)[:-3]] = False
        row[:SIGNS] ^= np.packbits(flips)
        five = np.unpackbits(row[SIGNS:]).reshape(-1, 5)
        five[draw.integers(192), 3 if draw.random() < 0.8 else 1] ^= 1  # by 2 levels, or by 8
        row[SIGNS:] = np.packbits(five)
        rows.append(row)
    hashes = np.stack(rows)
    found = duplicates.near_duplicates(hashes)
    assert found.tolist() == linked(hashes).tolist()
    order = draw.permutation(len(hashes))
    again = duplicates.near_duplicates(hashes[order])
    assert np.array_equal(np.equal.outer(found, found)[np.ix_(order, order)], np.equal.outer(again, again))


def test_a_crowd_is_one_group() -> None:
    """More images that share every key than each is compared with."""
    draw = np.random.default_rng(0)
    crowd = np.repeat(draw.integers(0, 256, (1, HASH_BYTES)).astype(np.uint8), 2000, axis=0)
    crowd[:, 8:10] = draw.integers(0, 256, (2000, 2))  # signs that are not indexed, so that no two rows are equal
    others = draw.integers(0, 256, (300, HASH_BYTES)).astype(np.uint8)
    groups = duplicates.near_duplicates(np.concatenate([others, crowd]))
    assert (groups[300:] == 300).all() and (groups[:300] == -1).all()


def test_captions_that_say_the_same() -> None:
    captions = ["A dog runs .", "a cat", "A  DOG runs", "a dog runs!", "A dog, runs", "...", "!", "Ａ cat。"]
    assert duplicates.caption_groups(captions).tolist() == [0, 1, 0, 0, -1, -1, -1, 1]


def test_groups_of_a_batch_are_by_view() -> None:
    texts = [["A dog.", "One dog", "one dog"], ["a dog", "a cat"], ["A cat!", "two cats"], ["a horse", "a horse."]]
    rows = np.zeros((4, HASH_BYTES), dtype=np.uint8)
    rows[:2, :4] = 255
    rows[2:, SIGNS] = [0, 255]
    found = Duplicates.find(texts, [r.tobytes() for r in rows])
    assert set(found.captions) == {"A dog.", "a dog", "a cat", "A cat!"}, "what stands under one sample alone is none"
    drawn = {"text": ["A dog.", "a cat"], "text_aug": ["One dog", "a dog"]}
    groups = found.groups([0, 1], drawn)
    assert groups["image"].tolist() == [0, 0]
    assert groups["text"][0] == groups["text_aug"][1] >= 0 and groups["text_aug"][0] == -1
    assert groups["text"][1] not in (-1, groups["text"][0])
    some = Duplicates.find(texts, [None, rows[2].tobytes(), rows[0].tobytes(), rows[1].tobytes()]).images
    assert some is not None and some.tolist() == [-1, -1, 2, 2], "of an image without a hash nothing is known"
    assert set(Duplicates.find(texts, None).groups([0], drawn)) == {"text", "text_aug"}
    assert Duplicates().groups([0, 1], drawn) == {}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder of 24 images, of which 3 look like others, one of them in the other split, and 2 captions twice."""
    root = make_folder(tmp_path / "images", 24)
    for i in range(24):
        landscape(i).save(root / "Images" / f"{i:03d}.png")
    for copy, original in ((7, 1), (9, 8), (10, 8)):
        saved(landscape(original), 60).save(root / "Images" / f"{copy:03d}.png")
    lines = (root / "captions.txt").read_text().replace("one red patch number 12", "A green patch number 13.")
    (root / "captions.txt").write_text(lines)
    (root / "val.txt").write_text("".join(f"{i:03d}.png\n" for i in range(4)))
    (root / "train.txt").write_text("".join(f"{i:03d}.png\n" for i in range(4, 24)))
    return root


def test_inspect_reports_and_draws_them(copied: Path, tmp_path: Path) -> None:
    config = Config(data=str(copied), model=ModelConfig(image_size=48))
    said = inspect(config, tmp_path / "sheet.png", progress=False)
    assert "look-alikes  5 images in 2 groups look the same; the largest is of 3: 008.png, 009.png, 010.png" in said
    assert "leakage      1 images of val look like one of train, such as 001.png and 007.png" in said
    assert "repeated     2 captions, 1 different ones, occur with several images, such as 'a green patch" in said
    with Image.open(tmp_path / "sheet-duplicates.png") as drawn:
        assert min(drawn.size) > 200


@pytest.mark.parametrize(
    ("what", "names", "changes"),
    [
        ("positives", {"image", "text", "text_aug"}, {"micro_batch": 4}),
        ("positives", {"image", "text", "text_aug"}, {"model": {"image_lr": 0.0, "text_lr": 0.0}}),
        ("captions", {"text", "text_aug"}, {}),
        ("negatives", set(), {}),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_training_takes_them_as_positives(
    what: Any, names: set[str], changes: dict[str, Any], copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedded at once, in parts, or from cached features: the objective is given the groups of the batch's rows."""
    seen: list[dict[str, Any]] = []
    forward = Objective.forward

    def noted(self: Objective, views: Any, ids: Any, groups: Any = None) -> Any:
        seen.append({"ids": ids, **(groups or {})})
        return forward(self, views, ids, groups)

    monkeypatch.setattr(Objective, "forward", noted)
    config = Config(
        data=str(copied), out=str(copied.parent / "run"), objective="amclr", epochs=2, batch_size=20, accelerator="cpu",
        eval_every=2, source=replace(Config().source, duplicates=what), micro_batch=changes.get("micro_batch", 0),
        model=ModelConfig(image_size=32, dim=16, **changes.get("model", {})),
    )  # fmt: skip
    train(config, progress=False)
    assert len(seen) == 2 and all(set(s) == {"ids", *names} for s in seen)
    for step in seen:
        rows = [int(i) for i in step["ids"]]
        if "image" in names:
            places = dict(zip(rows, step["image"].tolist(), strict=True))
            assert places[4] == places[5] == places[6] >= 0, "rows 4 to 6 of the training split are 008 to 010"
            assert {g for i, g in places.items() if i not in (4, 5, 6)} == {-1}, (
                "a copy in the other split is no matter"
            )
        for view in names - {"image"}:
            assert {i for i, g in zip(rows, step[view].tolist(), strict=True) if g >= 0} <= {8, 9}
    if "text" in names:
        drawn = {g for s in seen for view in ("text", "text_aug") for g in s[view].tolist() if g >= 0}
        assert len(drawn) == 1, "the caption that stands under rows 8 and 9 is drawn, in one view or the other"
