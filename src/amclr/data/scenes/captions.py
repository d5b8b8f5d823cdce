"""Captions of a scene: sentences that are true of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from amclr.data.scenes.scene import Scene, Thing, stable_hash
from amclr.utils.errors import UserError

SHAPE_WORDS = {
    "ball": ("ball", "sphere"), "cube": ("cube", "block", "box"), "cylinder": ("cylinder",), "cone": ("cone",),
    "pyramid": ("pyramid",),
}  # fmt: skip
SIZE_WORDS = {"small": ("small", "little", "tiny"), "medium": (), "large": ("large", "big", "huge")}
MATERIAL_WORDS = {"rubber": ("rubber", "matte"), "metal": ("metal", "shiny"), "wooden": ("wooden", "wood")}
GROUND_WORDS = {
    "grass": ("on grass", "on the grass", "on a lawn"),
    "sand": ("on sand", "on the sand", "on a sandy ground"),
    "snow": ("on snow", "in the snow", "on a snowy ground"),
    "boards": ("on a wooden floor", "on wooden boards", "on floorboards"),
    "tiles": ("on a tiled floor", "on tiles", "on checkered tiles"),
}
PLACE_WORDS = {
    0: ("on the left", "at the left"),
    1: ("in the middle", "in the centre"),
    2: ("on the right", "at the right"),
}


def describe(scene: Scene, count: int) -> list[str]:
    """`count` different true captions of a scene; a larger count extends the same list."""
    draw = np.random.default_rng(stable_hash("captions", scene.seed))
    captions: dict[str, None] = {}
    for _ in range(200 * count):
        captions.setdefault(_sentence(scene, draw))
        if len(captions) == count:
            break
    else:
        raise UserError(f"a scene has fewer than {count} captions: lower --scenes.captions")
    return list(captions)


def _sentence(scene: Scene, draw: np.random.Generator) -> str:
    def pick(options: tuple[str, ...]) -> str:
        return options[int(draw.integers(len(options)))]

    def name(thing: Thing) -> str:
        words = [pick(SHAPE_WORDS[thing.shape])]
        if draw.random() < 0.6:
            words.insert(0, pick(MATERIAL_WORDS[thing.material]))
        words.insert(0, thing.colour)
        if SIZE_WORDS[thing.size] and draw.random() < 0.7:
            words.insert(0, pick(SIZE_WORDS[thing.size]))
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"

    ground = pick(GROUND_WORDS[scene.ground]) if draw.random() < 0.6 else ""
    names = [name(t) for t in scene.things]
    if len(names) == 1:
        (thing,) = scene.things
        place = pick(PLACE_WORDS[thing.column]) if draw.random() < 0.5 else ""
        body = pick(("{0} {1} {2}", "there is {0} {1} {2}", "{0} {2} {1}", "a picture of {0} {1} {2}"))
        text = body.format(names[0], place, ground)
    elif len(names) == 2:
        text = f"{_pair(scene, names, draw, pick)} {ground}"
    else:
        a, b, c = names
        bodies = [
            f"{a}, {b} and {c} {ground}",
            f"from left to right, {a}, {b} and {c} {ground}",
            f"{b} between {a} and {c} {ground}",
            f"{c}, {b} and {a}, from right to left, {ground}",
            f"{a} on the left, {b} in the middle and {c} on the right {ground}",
            f"there are three things {ground}: {a}, {b} and {c}",
        ]
        text = bodies[int(draw.integers(len(bodies)))]
    if ground and text.endswith(ground) and draw.random() < 0.15:
        text = f"{ground}, {text[: -len(ground)].rstrip(' ,')}"
    return " ".join(text.split()).replace(" ,", ",").replace(" :", ":").rstrip(",")


def _pair(scene: Scene, names: list[str], draw: np.random.Generator, pick: Callable[[tuple[str, ...]], str]) -> str:
    a, b = names
    left, right = scene.things
    bodies = [
        f"{a} {pick(('left of', 'to the left of'))} {b}",
        f"{b} {pick(('right of', 'to the right of'))} {a}",
        f"there is {a} and, to the right of it, {b}",
        f"{a} and {b}",
        f"{b} beside {a}",
        f"a picture of {a} and {b}",
    ]
    if left.row != right.row:
        front, back = (a, b) if left.row < right.row else (b, a)
        bodies += [f"{front} in front of {back}", f"{back} behind {front}"] * 2
    return bodies[int(draw.integers(len(bodies)))]
