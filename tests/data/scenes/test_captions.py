"""Captions are true of their scenes, by an independent reading of them."""

from __future__ import annotations

import itertools
import re

import pytest

from amclr.data.scenes.captions import describe
from amclr.data.scenes.scene import COLOURS, Scene, Thing, sample_scenes
from amclr.utils.errors import UserError

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
        rf"\ban? (?P<before>(?:(?:{'|'.join(SIZE)}) )?)(?P<colour>{'|'.join(COLOURS)}) "
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


def is_true(scene: Scene, caption: str) -> bool:
    try:
        check(scene, caption)
    except AssertionError:
        return False
    return True


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


def test_too_many_captions_is_said() -> None:
    with pytest.raises(UserError, match="lower --scenes.captions"):
        describe(Scene("sand", (Thing("cone", "red", "medium", "metal", 0, 0),), 1), 500)
