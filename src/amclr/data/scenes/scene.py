"""The symbolic scene, and the endless sequence of different scenes of a seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from amclr.utils.errors import UserError

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.80, 0.09, 0.08),
    "green": (0.08, 0.52, 0.14),
    "blue": (0.10, 0.22, 0.80),
    "yellow": (0.95, 0.80, 0.08),
    "purple": (0.46, 0.13, 0.62),
    "orange": (0.97, 0.42, 0.04),
    "white": (0.92, 0.92, 0.90),
    "black": (0.05, 0.05, 0.06),
}
SHAPES = ("ball", "cube", "cylinder", "cone", "pyramid")
MATERIALS = ("rubber", "metal", "wooden")
SIZES = {"small": 0.38, "medium": 0.53, "large": 0.70}
GROUNDS = ("grass", "sand", "snow", "boards", "tiles")
KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
"""Kinds of things: the zero-shot classes, and the ranks of a long tail."""
COLUMNS, ROWS = 3, 2
SPLITS = {"train": 8, "val": 9, "test": 10}
"""Upper bounds: a scene belongs to the first split whose bound exceeds its hash modulo 10."""


@dataclass(frozen=True)
class Thing:
    """An object of a scene. Column 0 is left, 2 right; row 0 is in front, 1 behind."""

    shape: str
    colour: str
    size: str
    material: str
    column: int
    row: int


@dataclass(frozen=True)
class Scene:
    """The content of an image, things from left to right; `seed` varies only what captions leave open."""

    ground: str
    things: tuple[Thing, ...]
    seed: int

    @property
    def signature(self) -> str:
        """The scene without its seed. No two splits share a signature."""
        return "|".join([self.ground, *("-".join(map(str, vars(t).values())) for t in self.things)])

    @property
    def kinds(self) -> set[tuple[str, str]]:
        """Colour and shape of each thing; no two things of a scene share both."""
        return {(t.colour, t.shape) for t in self.things}


def stable_hash(*parts: object) -> int:
    """A 64-bit number from the parts, from which random generators are seeded."""
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def split_of(signature: str) -> str:
    """The split that a scene belongs to."""
    bucket = stable_hash("split", signature) % 10
    return next(name for name, bound in SPLITS.items() if bucket < bound)


def sample_scenes(seed: int, split: str, objects: int | None = None, tail: float = 0.0) -> Iterator[Scene]:
    """An endless sequence of different scenes of a split (`train`, `val` or `test`).

    objects: things per scene; None draws 1 to 3. tail: if above 0, the kind of rank k (`ranked_kinds`) occurs with
    a probability proportional to k ** -tail. Scenes of the most common kinds then repeat, with other seeds, as
    there are not enough different ones.
    """
    if tail:
        yield from _tailed(seed, split, objects, tail)
    seen: set[str] = set()
    attempt = 0
    while True:
        draw = np.random.default_rng(stable_hash(seed, split, objects, attempt))
        attempt += 1
        scene = _draw_scene(draw, objects or _how_many(draw))
        if scene.signature not in seen and split_of(scene.signature) == split:
            seen.add(scene.signature)
            yield scene


def ranked_kinds(seed: int) -> list[tuple[str, str]]:
    """The kinds of things from the most common to the rarest, if there is a tail."""
    return [KINDS[i] for i in np.random.default_rng(stable_hash(seed, "tail")).permutation(len(KINDS))]


def _tailed(seed: int, split: str, objects: int | None, tail: float) -> Iterator[Scene]:
    """Scenes whose things follow Zipf's law over `ranked_kinds`, however many things a scene has.

    Drawing different kinds one after the other would make the most common ones too rare. Systematic sampling
    (Madow 1949) includes each kind in a scene with exactly the right probability: the kinds, in random order, cover
    a line with segments as long as their expected counts, and points at distance one select them.
    """
    ranked, share = ranked_kinds(seed), np.arange(1.0, len(KINDS) + 1) ** -tail
    share /= share.sum()
    if COLUMNS * share[0] > 1:
        raise UserError(f"--scenes.tail {tail:g} puts the most common kind into a scene twice: give at most 1.25")
    for number in itertools.count():
        draw = np.random.default_rng(stable_hash(seed, split, objects, "tail", number))
        count = objects or _how_many(draw)
        order = draw.permutation(len(KINDS))
        points = np.searchsorted(np.cumsum(count * share[order]), draw.random() + np.arange(count), side="right")
        kinds = [ranked[order[min(p, len(KINDS) - 1)]] for p in draw.permutation(points)]
        while True:  # keep the kinds, or those with fewer scenes in this split would become rarer
            scene = _draw_scene(draw, count, kinds)
            if split_of(scene.signature) == split:
                yield scene
                break


def _how_many(draw: np.random.Generator) -> int:
    return int(draw.choice(3, p=(0.45, 0.4, 0.15))) + 1


def _draw_scene(draw: np.random.Generator, count: int, kinds: Sequence[tuple[str, str]] = ()) -> Scene:
    """Draw a scene of `count` things. kinds: their kinds from left to right; if empty, drawn too."""
    columns = sorted(int(c) for c in draw.choice(COLUMNS, count, replace=False))
    things: list[Thing] = []
    used_kinds: set[tuple[str, str]] = set()
    while len(things) < count:
        shape, colour, size, material = (str(draw.choice(list(a))) for a in (SHAPES, COLOURS, SIZES, MATERIALS))
        if kinds:
            colour, shape = kinds[len(things)]
        if (shape, colour) in used_kinds:  # "a red ball left of a red ball" would be ambiguous
            continue
        used_kinds.add((shape, colour))
        things.append(Thing(shape, colour, size, material, columns[len(things)], int(draw.integers(ROWS))))
    return Scene(str(draw.choice(GROUNDS)), tuple(things), int(draw.integers(2**40)))
