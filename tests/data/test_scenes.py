"""The generated set: a function of the seed, captions that are true, splits that share nothing, files as promised."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclr.config import ScenesConfig
from amclr.data import scenes
from amclr.data.scenes import Scene, Thing, describe, render, sample_scenes, write_scenes
from amclr.errors import UserError

TINY = ScenesConfig(train=12, val=6, test=6, zeroshot=44, size=32, captions=3)

# An independent reading of captions: word -> what it claims.
SHAPE = {"ball": "ball", "sphere": "ball", "cube": "cube", "block": "cube", "box": "cube"} | {
    s: s for s in ("cylinder", "cone", "pyramid")
}
SIZE = dict.fromkeys(("small", "little", "tiny"), "small") | dict.fromkeys(("large", "big", "huge"), "large")
MATERIAL = {
    "rubber": "rubber",
    "matte": "rubber",
    "metal": "metal",
    "shiny": "metal",
    "wooden": "wooden",
    "wood": "wooden",
}
GROUND = {"grass": "grass", "lawn": "grass", "sand": "sand", "sandy": "sand", "snow": "snow", "snowy": "snow",
          "boards": "boards", "floorboards": "boards", "tiled": "tiles", "tiles": "tiles"}  # fmt: skip
PLACE = {"left": 0, "middle": 1, "centre": 1, "right": 2}


def claims(caption: str) -> tuple[list[dict[str, str]], str]:
    """The things that a caption names, in its order, and the caption with each replaced by #."""
    named: list[dict[str, str]] = []

    def read(match: re.Match[str]) -> str:
        found = {"shape": SHAPE[match["shape"]], "colour": match["colour"]}
        for word in match["before"].split() + match["between"].split():
            found |= {"size": SIZE[word]} if word in SIZE else {"material": MATERIAL[word]}
        named.append(found)
        return "#"

    pattern = (
        rf"\ban? (?P<before>(?:(?:{'|'.join(SIZE)}) )?)(?P<colour>{'|'.join(scenes.COLOURS)}) "
        rf"(?P<between>(?:(?:{'|'.join(MATERIAL)}) )?)(?P<shape>{'|'.join(SHAPE)})\b"
    )
    return named, re.sub(pattern, read, caption)


def check(scene: Scene, caption: str) -> None:
    named, rest = claims(caption)
    assert named, caption

    def thing(claim: dict[str, str]) -> Thing:
        fitting = [t for t in scene.things if all(getattr(t, k) == v for k, v in claim.items())]
        assert len(fitting) == 1, (caption, claim)
        return fitting[0]

    things = [thing(n) for n in named]
    assert len(set(things)) == len(scene.things), f"{caption}: each thing once"
    for word, ground in GROUND.items():
        if re.search(rf"\b{word}\b", rest):
            assert scene.ground == ground, caption
    if "wooden floor" in rest:
        assert scene.ground == "boards"
    for pattern, holds in (
        ("# (?:to the )?left of #", things[0].column < things[-1].column),
        ("# (?:to the )?right of #", things[0].column > things[-1].column),
        ("to the right of it, #", things[0].column < things[-1].column),
        ("# in front of #", things[0].row < things[-1].row),
        ("# behind #", things[0].row > things[-1].row),
        ("from left to right", [t.column for t in things] == [0, 1, 2]),
        ("from right to left", [t.column for t in things] == [2, 1, 0]),
        ("# between #", things[0].column == 1),
        ("# on the left, # in the middle and # on the right", [t.column for t in things] == [0, 1, 2]),
        ("three things", len(things) == 3),
    ):
        if re.search(pattern, rest):
            assert holds, (caption, scene)
    if len(things) == 1 and (place := re.search(r"(?:on|at|in) the (left|right|middle|centre)", rest)):
        assert things[0].column == PLACE[place[1]], caption


def some(split: str = "train", count: int = 300) -> list[Scene]:
    return list(itertools.islice(sample_scenes(0, split), count))


def test_captions_are_true_and_different() -> None:
    said: set[str] = set()
    for scene in some():
        captions = describe(scene, 6)
        assert len(set(captions)) == 6 and captions[:3] == describe(scene, 3)
        for caption in captions:
            check(scene, caption)
            assert len(caption.split()) <= 32
            assert not re.search(r"  |\ba [aeiou]|\ban [^aeiou]|^[A-Z]|[.,]$| ,", caption), caption
            said |= set(re.findall(r"left of|right of|in front of|behind|between|from left|beside", caption))
    assert len(said) == 7, "every kind of relation is used"


def test_the_check_itself_finds_lies() -> None:
    scene = Scene(
        "sand", (Thing("ball", "red", "large", "metal", 0, 0), Thing("cube", "blue", "small", "rubber", 2, 1)), 1
    )
    check(scene, "a big red shiny sphere to the left of a tiny blue box on sand")
    for lie in (
        "a red ball right of a blue cube", "a small red ball and a blue cube", "a red ball and a green cube",
        "a red wooden ball and a blue cube", "a red ball behind a blue cube", "a red ball and a blue cube on grass",
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            check(scene, lie)


def test_a_function_of_the_seed() -> None:
    assert some(count=20) == some(count=40)[:20]
    assert some(count=20) != list(itertools.islice(sample_scenes(1, "train"), 20))
    scene = some(count=3)[2]
    assert np.array_equal(render(scene, 48), render(scene, 48))
    assert not np.array_equal(render(scene, 48), render(replace(scene, seed=scene.seed + 1), 48))


def test_splits_share_no_scene() -> None:
    signatures = {split: [s.signature for s in some(split)] for split in ("train", "val", "test")}
    for listed in signatures.values():
        assert len(set(listed)) == len(listed)
    for a, b in itertools.combinations(signatures, 2):
        assert not set(signatures[a]) & set(signatures[b])
    # A split is a matter of the scene alone, whatever the seed that found it.
    other = {s.signature for s in itertools.islice(sample_scenes(7, "val"), 300)}
    assert not other & set(signatures["train"])


def test_every_thing_is_visible_where_it_should_be() -> None:
    size = 64
    for scene in some(count=60):
        whole = render(scene, size).astype(int)
        centres = []
        for k in range(len(scene.things)):
            alone = _mask(scene, k, size)
            assert alone.sum() >= 16, f"{scene.things[k]} covers {alone.sum()} pixels"
            edge = alone[:, 0].any() or alone[:, -1].any() or alone[0].any() or alone[-1].any()
            assert not edge, f"{scene} leaves the frame"
            centres.append(np.argwhere(alone).mean(0)[1])
        assert centres == sorted(centres), "things stand from left to right"
        assert min(np.diff(centres), default=99) > 4
        assert whole.std() > 10


def _mask(scene: Scene, k: int, size: int) -> np.ndarray:
    """Pixels that change when thing k takes another colour: those that show it."""
    changed = list(scene.things)
    other = "white" if changed[k].colour != "white" else "black"
    changed[k] = replace(changed[k], colour=other)
    difference = render(scene, size).astype(int) - render(replace(scene, things=tuple(changed)), size)
    return np.abs(difference).max(-1) > 6


def test_files(tmp_path: Path) -> None:
    out = write_scenes(tmp_path / "set", TINY, workers=1, progress=False)
    assert sorted(p.name for p in out.iterdir()) == [
        "Images", "captions.txt", "settings.json", "test.txt", "train.txt", "val.txt", "zeroshot",
    ]  # fmt: skip
    assert len(list((out / "Images").iterdir())) == 24
    assert len((out / "captions.txt").read_text().splitlines()) == 1 + 24 * 3
    assert len((out / "train.txt").read_text().split()) == 12
    with Image.open(out / "Images" / "train-000000.png") as picture:
        assert picture.size == (32, 32)
        assert np.array_equal(np.asarray(picture), render(some(count=1)[0], 32))
    names = dict(line.split("\t") for line in (out / "zeroshot" / "classnames.txt").read_text().splitlines())
    assert len(names) == 40 and names["red_ball"] == "red ball"
    counts = [len(list((out / "zeroshot" / name).iterdir())) for name in names]
    assert sum(counts) == 44 and set(counts) == {1, 2}
    again = write_scenes(tmp_path / "two", TINY, workers=2, progress=False)
    for file in ("captions.txt", "Images/val-000003.png", "zeroshot/blue_cone/0000.png"):
        assert (out / file).read_bytes() == (again / file).read_bytes()


def test_a_finished_set_is_reused_and_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scenes(tmp_path / "set", TINY, workers=1, progress=False)
    monkeypatch.setattr(scenes, "_render_all", lambda *_: pytest.fail("rendered again"))
    write_scenes(tmp_path / "set", TINY)
    with pytest.raises(UserError, match="holds something else than these scenes"):
        write_scenes(tmp_path / "set", replace(TINY, seed=1))


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_set_leaves_nothing(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "_render_one", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "set", replace(TINY, train=80), workers=workers, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_zeroshot_pictures_are_single_things_of_the_test_split(tmp_path: Path) -> None:
    jobs = scenes._zeroshot_jobs(replace(TINY, zeroshot=400), tmp_path / "zeroshot")
    assert len(jobs) == 400 and len({s.seed for s, _ in jobs}) == 400
    trained = {s.signature for s in some()}
    for scene, file in jobs:
        (thing,) = scene.things
        assert file.parent.name == f"{thing.colour}_{thing.shape}" and scene.signature not in trained


def test_too_many_captions_is_said() -> None:
    with pytest.raises(UserError, match="lower --scenes.captions"):
        describe(Scene("sand", (Thing("cone", "red", "medium", "metal", 0, 0),), 1), 500)
