"""scenes: the built-in generated data set. Rendered objects on a ground, and captions that are true of them.

A scene is symbolic first: one to three objects, each with shape, colour, size, material and a place,
on a ground. `render` draws it by casting rays at exact shapes; `describe` words it. All of it is a
function of the seed, and the splits share no symbolic scene. What training images show may have a long
tail, and some of their captions may be wrong, both in known measure; the other splits stay as they are.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from amclr.config.schema import ScenesConfig
from amclr.utils.errors import UserError

FORMAT = 2
Array = np.ndarray

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
"""Kinds of things: the classes of the zero-shot images, and what a long tail ranks."""
COLUMNS, ROWS = 3, 2
SPLITS = {"train": 8, "val": 9, "test": 10}
"""A scene whose hash modulo 10 lies below the bound (and not below the one before) belongs to the split."""


@dataclass(frozen=True)
class Thing:
    """An object of a scene. column 0 is left, 2 right; row 0 is in front, 1 behind."""

    shape: str
    colour: str
    size: str
    material: str
    column: int
    row: int


@dataclass(frozen=True)
class Scene:
    """What an image shows, things from left to right; `seed` moves only what captions leave open."""

    ground: str
    things: tuple[Thing, ...]
    seed: int

    @property
    def signature(self) -> str:
        """The scene without its seed: what the splits must not share."""
        return "|".join([self.ground, *("-".join(map(str, vars(t).values())) for t in self.things)])

    @property
    def kinds(self) -> set[tuple[str, str]]:
        """Colour and shape of each thing: no two are alike in both."""
        return {(t.colour, t.shape) for t in self.things}


def _hash(*parts: object) -> int:
    return int.from_bytes(blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


def _split_of(signature: str) -> str:
    bucket = _hash("split", signature) % 10
    return next(name for name, bound in SPLITS.items() if bucket < bound)


def sample_scenes(seed: int, split: str, objects: int | None = None, tail: float = 0.0) -> Iterator[Scene]:
    """Endless different scenes of a split (`train`, `val` or `test`); the first n are the same for every n.

    objects: how many each has; None draws 1 to 3. tail: above 0, things are of the kind of rank k (`ranked_kinds`)
    with a probability in proportion to k ** -tail. Of the commonest kinds there are then fewer different scenes
    than it takes, and they come again with other seeds.
    """
    if tail:
        yield from _tailed(seed, split, objects, tail)
    seen: set[str] = set()
    attempt = 0
    while True:
        draw = np.random.default_rng(_hash(seed, split, objects, attempt))
        attempt += 1
        scene = _draw_scene(draw, objects or _how_many(draw))
        if scene.signature not in seen and _split_of(scene.signature) == split:
            seen.add(scene.signature)
            yield scene


def ranked_kinds(seed: int) -> list[tuple[str, str]]:
    """The kinds of things from the commonest to the rarest, where there is a tail."""
    return [KINDS[i] for i in np.random.default_rng(_hash(seed, "tail")).permutation(len(KINDS))]


def _tailed(seed: int, split: str, objects: int | None, tail: float) -> Iterator[Scene]:
    """Scenes whose things follow Zipf's law over `ranked_kinds`, however many things a scene has.

    Were kinds drawn one after the other, each other than those before, the commonest would come less often than
    the law says. Systematic sampling (Madow 1949) puts each kind in a scene with exactly the probability that it
    should: points one apart on a line, of which each kind, in random order, has its probability as length.
    """
    ranked, share = ranked_kinds(seed), np.arange(1.0, len(KINDS) + 1) ** -tail
    share /= share.sum()
    if COLUMNS * share[0] > 1:
        raise UserError(f"--scenes.tail {tail:g} has the commonest kind stand in a scene twice: give at most 1.25")
    for number in itertools.count():
        draw = np.random.default_rng(_hash(seed, split, objects, "tail", number))
        count = objects or _how_many(draw)
        order = draw.permutation(len(KINDS))
        points = np.searchsorted(np.cumsum(count * share[order]), draw.random() + np.arange(count), side="right")
        kinds = [ranked[order[min(p, len(KINDS) - 1)]] for p in draw.permutation(points)]
        while True:  # the kinds stay, or those with fewer scenes in this split would come less often
            scene = _draw_scene(draw, count, kinds)
            if _split_of(scene.signature) == split:
                yield scene
                break


def _how_many(draw: np.random.Generator) -> int:
    return int(draw.choice(3, p=(0.45, 0.4, 0.15))) + 1


def _draw_scene(draw: np.random.Generator, count: int, kinds: Sequence[tuple[str, str]] = ()) -> Scene:
    """A scene of so many things; kinds: theirs, from left to right, where they are not to be drawn too."""
    columns = sorted(int(c) for c in draw.choice(COLUMNS, count, replace=False))
    things: list[Thing] = []
    looks: set[tuple[str, str]] = set()
    while len(things) < count:
        shape, colour, size, material = (str(draw.choice(list(a))) for a in (SHAPES, COLOURS, SIZES, MATERIALS))
        if kinds:
            colour, shape = kinds[len(things)]
        if (shape, colour) in looks:  # "a red ball left of a red ball" would name nothing
            continue
        looks.add((shape, colour))
        things.append(Thing(shape, colour, size, material, columns[len(things)], int(draw.integers(ROWS))))
    return Scene(str(draw.choice(GROUNDS)), tuple(things), int(draw.integers(2**40)))


# -- captions -------------------------------------------------------------------------------------

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
    """`count` different true captions of a scene, from 1 up; the same ones first for every count."""
    draw = np.random.default_rng(_hash("captions", scene.seed))
    captions: dict[str, None] = {}
    for _ in range(200 * count):
        captions.setdefault(_sentence(scene, draw))
        if len(captions) == count:
            break
    else:
        raise UserError(f"a scene has fewer than {count} captions: lower --scenes.captions")
    return list(captions)


def _sentence(scene: Scene, draw: np.random.Generator) -> str:
    def pick(among: tuple[str, ...]) -> str:
        return among[int(draw.integers(len(among)))]

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


# -- rendering ------------------------------------------------------------------------------------

SUN_SIZE = 0.10
SUPERSAMPLING = 2


@dataclass(frozen=True)
class _Solid:
    """A thing in the world: where it stands, how large, how turned. Lengths in world units."""

    thing: Thing
    x: float
    z: float
    radius: float
    angle: float

    @property
    def height(self) -> float:
        return {"ball": 2.0, "cube": 1.48, "cylinder": 1.75, "cone": 2.1, "pyramid": 1.75}[
            self.thing.shape
        ] * self.radius


def render(scene: Scene, size: int) -> Array:
    """Draw a scene: (size, size, 3) uint8."""
    draw = np.random.default_rng(_hash("render", scene.seed))
    solids = [
        _Solid(
            t,
            x=(t.column - 1) * (1.65 + 0.30 * t.row) + draw.uniform(-0.05, 0.05),
            z=(-0.6, 1.5)[t.row] + draw.uniform(-0.15, 0.15),
            radius=SIZES[t.size] * draw.uniform(0.96, 1.04),
            angle=draw.uniform(0, np.pi / 2),
        )
        for t in scene.things
    ]
    azimuth = draw.uniform(-2.2, -0.9) if draw.random() < 0.5 else draw.uniform(0.9, 2.2)
    sun = _unit(np.array([np.sin(azimuth), 1.35, -abs(np.cos(azimuth)) - 0.25], dtype=np.float32))
    eye = np.array([draw.uniform(-0.25, 0.25), draw.uniform(2.5, 2.9), -6.2], dtype=np.float32)
    n = size * SUPERSAMPLING
    rays = _camera_rays(eye, np.array([0.0, 0.42, 0.25], dtype=np.float32), n)

    colour = _backdrop(scene.ground, eye, rays, solids, sun, draw)
    depth = np.full(n * n, np.inf, dtype=np.float32)
    for solid in solids:
        inside = _screen_box(solid, eye, rays)
        t, normal = _intersect(solid, np.broadcast_to(eye, (len(inside), 3)), rays[inside])
        hit = np.isfinite(t) & (t < depth[inside])
        index, t, normal = inside[hit], t[hit], normal[hit]
        if len(index):
            depth[index] = t
            points = eye + t[:, None] * rays[index]
            colour[index] = _shade(solid, points, normal, rays[index], sun, scene.ground)
    pixels = colour.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean(axis=(1, 3))
    # Linear light to sRGB, roughly.
    return (255 * np.clip(pixels, 0, 1) ** (1 / 1.8) + 0.5).astype(np.uint8)


def _unit(v: Array) -> Array:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _camera_rays(eye: Array, target: Array, n: int) -> Array:
    """Unit directions through the n x n pixels, row by row from the top left: (n * n, 3)."""
    forward = _unit(target - eye)
    right = _unit(np.cross(np.array([0.0, 1.0, 0.0], dtype=np.float32), forward))
    up = np.cross(forward, right)
    span = (np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1
    x, y = np.meshgrid(span, -span)
    reach = 0.475
    return _unit(forward + reach * (x.reshape(-1, 1) * right + y.reshape(-1, 1) * up)).astype(np.float32)


def _screen_box(solid: _Solid, eye: Array, rays: Array) -> Array:
    """Indices of the rays that pass the solid's bounding sphere."""
    middle = np.array([solid.x, solid.height / 2, solid.z], dtype=np.float32)
    reach = np.hypot(1.25 * solid.radius, solid.height / 2)
    offset = middle - eye
    along = rays @ offset
    return np.flatnonzero(offset @ offset - along**2 < reach**2)


def _local(solid: _Solid, points: Array, turn_only: bool = False) -> Array:
    """World points (or directions) in the solid's own frame: it stands at the origin, not turned."""
    c, s = np.float32(np.cos(solid.angle)), np.float32(np.sin(solid.angle))
    p = points if turn_only else points - np.array([solid.x, 0, solid.z], dtype=np.float32)
    return np.stack([c * p[:, 0] - s * p[:, 2], p[:, 1], s * p[:, 0] + c * p[:, 2]], axis=1)


def _world(solid: _Solid, directions: Array) -> Array:
    c, s = np.float32(np.cos(solid.angle)), np.float32(np.sin(solid.angle))
    x, y, z = directions.T
    return np.stack([c * x + s * z, y, -s * x + c * z], axis=1)


def _intersect(solid: _Solid, origins: Array, directions: Array) -> tuple[Array, Array]:
    """First hits of rays: distances (M,), infinite where there is none, and world normals (M, 3)."""
    o, d = _local(solid, origins), _local(solid, directions, turn_only=True)
    r, h = solid.radius, solid.height
    with np.errstate(all="ignore"):
        if solid.thing.shape == "ball":
            t, normal = _hit_ball(o, d, r)
        elif solid.thing.shape in ("cube", "pyramid"):
            t, normal = _hit_planes(o, d, *_planes(solid.thing.shape, r, h))
        else:
            cone = solid.thing.shape == "cone"
            t, normal = _hit_round(o, d, 0.95 * r if cone else 0.82 * r, h, cone)
        return np.where(t > 1e-3, t, np.inf), _world(solid, normal)


def _hit_ball(o: Array, d: Array, r: float) -> tuple[Array, Array]:
    p = o - np.array([0, r, 0], dtype=np.float32)
    b = (p * d).sum(1)
    root = np.sqrt(b**2 - (p * p).sum(1) + r * r)
    t = np.where(np.isfinite(root), -b - root, np.inf)
    return t, (p + t[:, None] * d) / r


def _planes(shape: str, r: float, h: float) -> tuple[Array, Array]:
    """Half-spaces n . p <= k of a cube or a pyramid standing on y = 0."""
    across = 0.76 * r if shape == "cube" else 0.80 * r
    rise = 0.0 if shape == "cube" else across / h
    sides = [(1, rise, 0), (-1, rise, 0), (0, rise, 1), (0, rise, -1), (0, 1, 0), (0, -1, 0)]
    lengths = np.array([np.hypot(1, rise)] * 4 + [1, 1], dtype=np.float32)
    normals = np.array(sides, dtype=np.float32) / lengths[:, None]
    return normals, np.array([across] * 4 + [h, 0], dtype=np.float32) / lengths


def _hit_planes(o: Array, d: Array, normals: Array, bounds: Array) -> tuple[Array, Array]:
    speed = d @ normals.T
    t = (bounds - o @ normals.T) / speed
    enter = np.where(speed < 0, t, -np.inf)
    face = enter.argmax(1)
    first = enter.max(1)
    last = np.where(speed > 0, t, np.inf).min(1)
    return np.where(first < last, first, np.inf), normals[face]


def _hit_round(o: Array, d: Array, r: float, h: float, cone: bool) -> tuple[Array, Array]:
    """A standing cylinder, or a cone with its tip at height h."""
    k = r / h if cone else 0.0
    reach, slope = (r - k * o[:, 1] if cone else r), -k * d[:, 1]
    a = d[:, 0] ** 2 + d[:, 2] ** 2 - slope**2
    b = o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2] - reach * slope
    root = np.sqrt(b**2 - a * (o[:, 0] ** 2 + o[:, 2] ** 2 - reach**2))
    best, normal = np.full(len(o), np.inf, dtype=np.float32), np.zeros_like(o)
    for t in ((-b - root) / a, (-b + root) / a):
        y = o[:, 1] + t * d[:, 1]
        good = np.isfinite(t) & (t > 1e-3) & (y >= 0) & (y <= h) & (t < best)
        p = o + t[:, None] * d
        side = _unit(np.stack([p[:, 0], k * r * (1 - y / h) if cone else np.zeros_like(y), p[:, 2]], axis=1) + 1e-9)
        best, normal = np.where(good, t, best), np.where(good[:, None], side, normal)
    if not cone:
        t = (h - o[:, 1]) / d[:, 1]
        p = o + t[:, None] * d
        good = (p[:, 0] ** 2 + p[:, 2] ** 2 <= r * r) & (t > 1e-3) & (t < best)
        best, normal = np.where(good, t, best), np.where(good[:, None], np.array([0, 1, 0], dtype=np.float32), normal)
    return best, normal


def _shade(solid: _Solid, points: Array, normal: Array, rays: Array, sun: Array, ground: str) -> Array:
    """Light that comes back from a solid's surface, (M, 3) linear."""
    albedo: Array = np.array(COLOURS[solid.thing.colour], dtype=np.float32)[None]
    light = np.clip(normal @ sun, 0, 1)[:, None]
    sky = (0.5 + 0.5 * normal[:, 1:2]) * np.array([0.62, 0.70, 0.82], dtype=np.float32)
    bounce = (0.5 - 0.5 * normal[:, 1:2]) * 0.35 * GROUND_COLOURS[ground]
    contact = np.clip(0.45 + points[:, 1:2] / (1.1 * solid.radius), 0.45, 1)
    mirrored = rays - 2 * (rays * normal).sum(1, keepdims=True) * normal
    shine = np.clip(mirrored @ sun, 0, 1)[:, None]
    if solid.thing.material == "wooden":
        p = _local(solid, points) / solid.radius
        wander = 0.35 * np.sin(2.1 * p[:, 1] + 3.0 * p[:, 2]) + 0.15 * np.sin(6.3 * p[:, 1] - 2.0 * p[:, 0])
        rings = 0.5 + 0.5 * np.sin(9.0 * (np.hypot(p[:, 0] + 0.4, p[:, 2] - 0.3) + wander))
        grain = (0.45 + 0.55 * rings)[:, None]
        albedo = albedo * grain * 0.95 + np.array([0.16, 0.09, 0.035], dtype=np.float32) * (1.15 - grain)
        return albedo * contact * (0.85 * light + 0.50 * (sky + bounce)) + 0.05 * shine**12
    if solid.thing.material == "metal":
        upward = np.clip(mirrored[:, 1:2] * 3 + 0.35, 0, 1)
        around = upward * np.array([0.95, 1.0, 1.08], dtype=np.float32) + (1 - upward) * 0.55 * GROUND_COLOURS[ground]
        edge = (1 - np.clip(-(rays * normal).sum(1, keepdims=True), 0, 1)) ** 4
        tinted = 0.82 * albedo + 0.10
        body = albedo * contact * (0.35 * light + 0.18 * sky) + 0.75 * around * tinted * (0.35 + 0.65 * contact)
        return body + 0.25 * edge * around + 1.5 * shine**70 + 0.25 * shine**14
    return albedo * contact * (0.95 * light + 0.55 * (sky + bounce)) + 0.06 * shine**6


GROUND_COLOURS: dict[str, Array] = {
    "grass": np.array([0.20, 0.36, 0.10], dtype=np.float32),
    "sand": np.array([0.72, 0.58, 0.36], dtype=np.float32),
    "snow": np.array([0.66, 0.70, 0.77], dtype=np.float32),
    "boards": np.array([0.36, 0.20, 0.10], dtype=np.float32),
    "tiles": np.array([0.52, 0.54, 0.56], dtype=np.float32),
}


def _backdrop(
    ground: str, eye: Array, rays: Array, solids: list[_Solid], sun: Array, draw: np.random.Generator
) -> Array:
    """Sky and ground with the solids' shadows, (M, 3) linear."""
    height = np.clip(rays[:, 1:2] * 2.2 + 0.45, 0, 1)
    warm, cold = np.array([0.85, 0.84, 0.80], dtype=np.float32), np.array([0.32, 0.52, 0.82], dtype=np.float32)
    colour: Array = ((1 - height) * warm + height * cold).astype(np.float32)
    below = np.flatnonzero(rays[:, 1] < -1e-3)
    t = -eye[1] / rays[below, 1]
    points = eye + t[:, None] * rays[below]
    surface = _ground(ground, points, int(draw.integers(2**31)))
    light = np.ones(len(below), dtype=np.float32)
    for solid in solids:
        light = np.minimum(light, _shadow(solid, points, sun, draw))
    lit = surface * (0.42 + 0.78 * light)[:, None]
    haze = np.clip((t - 9) / 16, 0, 1)[:, None]
    colour[below] = (1 - haze) * lit + haze * warm
    return colour


def _shadow(solid: _Solid, points: Array, sun: Array, draw: np.random.Generator) -> Array:
    """Share of sunlight that reaches ground points past a solid, (M,): a few rays into a sun of some size."""
    light = np.ones(len(points), dtype=np.float32)
    away = points - np.array([solid.x, 0, solid.z], dtype=np.float32)
    length = solid.height * np.hypot(sun[0], sun[2]) / sun[1]
    flat = np.array([-sun[0], -sun[2]]) / max(1e-6, np.hypot(sun[0], sun[2]))
    along = away[:, [0, 2]] @ flat
    across = np.abs(away[:, 0] * flat[1] - away[:, 2] * flat[0])
    reach = 1.45 * solid.radius
    near = np.flatnonzero((along > -reach) & (along < length + reach) & (across < reach))
    if not len(near):
        return light
    blocked = np.zeros(len(near), dtype=np.float32)
    offsets = draw.normal(0, SUN_SIZE, (4, 3)).astype(np.float32)
    for offset in offsets:
        toward = np.broadcast_to(_unit(sun + offset).astype(np.float32), (len(near), 3))
        blocked += np.isfinite(_intersect(solid, points[near], toward)[0])
    distance = np.hypot(away[near, 0], away[near, 2])
    contact = 0.55 * np.exp(-((np.clip(distance - 0.8 * solid.radius, 0, None) / (0.30 * solid.radius)) ** 2))
    light[near] = np.clip(1 - 0.92 * blocked / len(offsets), 0, 1) * (1 - contact)
    return light


def _ground(kind: str, points: Array, seed: int) -> Array:
    """Colour of the ground at points, (M, 3)."""
    x, z = points[:, 0], points[:, 2]
    base = GROUND_COLOURS[kind][None]
    tone: Array
    if kind == "boards":
        plank = np.floor(x / 0.55)
        tone = 0.75 + 0.45 * _noise(plank * 7.3, np.zeros_like(plank), seed)
        grain = 0.85 + 0.3 * _noise(x * 14, z * 0.9, seed)
        gap = np.where(np.abs(x / 0.55 - plank - 0.5) > 0.46, 0.5, 1.0)
        return base * (tone * grain * gap)[:, None]
    if kind == "tiles":
        dark = (np.floor(x / 0.8) + np.floor(z / 0.8)) % 2
        return base * (0.75 + 0.5 * dark + 0.08 * _noise(3 * x, 3 * z, seed))[:, None]
    coarse, fine = _noise(0.9 * x, 0.9 * z, seed), _noise(7 * x, 5 * z, seed + 1)
    depth = {"grass": (0.45, 0.75), "sand": (0.18, 0.16), "snow": (0.22, 0.10)}[kind]
    tone = 1 + depth[0] * (coarse - 0.5) + depth[1] * (fine - 0.5)
    if kind == "sand":
        tone += 0.05 * np.sin(5.0 * z + 3.0 * coarse)
    return base * tone[:, None]


def _noise(x: Array, z: Array, seed: int) -> Array:
    """Smooth value noise in [0, 1] on the unit lattice."""
    x0, z0 = np.floor(x), np.floor(z)
    u, v = x - x0, z - z0
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    table: Array = np.random.default_rng(seed).random(4096).astype(np.float32)

    def at(i: Array, j: Array) -> Array:
        return table[(i.astype(np.int64) * 73 + j.astype(np.int64) * 179) & 4095]

    top = at(x0, z0) * (1 - u) + at(x0 + 1, z0) * u
    bottom = at(x0, z0 + 1) * (1 - u) + at(x0 + 1, z0 + 1) * u
    return top * (1 - v) + bottom * v


# -- the data set on disk -------------------------------------------------------------------------


def write_scenes(folder: Path, settings: ScenesConfig, *, workers: int | None = None, progress: bool = True) -> Path:
    """Write the set in the Kaggle Flickr8k layout, with split lists and a zero-shot folder; return `folder`.

    Images/NAME.png, captions.txt (image,caption), train.txt, val.txt, test.txt, and
    zeroshot/COLOUR_SHAPE/N.png with zeroshot/classnames.txt, templates.txt and shown.tsv: how many training
    images show a kind. With noise, noise.csv lists what is wrong. A folder that holds the set already is
    left as it is. The folder appears only when it is complete.

    Raises UserError if the folder holds something else, or the settings ask for what cannot be.
    """
    record = {"format": FORMAT, **asdict(settings)}
    if folder.exists():
        try:
            if json.loads((folder / "settings.json").read_text()) == record:
                return folder
        except (OSError, ValueError):
            pass
        raise UserError(f"'{folder}' holds something else than these scenes: remove it or choose another folder")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    jobs: list[tuple[Scene, Path]] = []
    try:
        (part / "Images").mkdir(parents=True)
        with (part / "captions.txt").open("w", newline="", encoding="utf-8") as handle:
            table = csv.writer(handle)
            table.writerow(["image", "caption"])
            for split in SPLITS:
                tail, noise = (settings.tail, settings.noise) if split == "train" else (0.0, 0.0)
                made = list(itertools.islice(sample_scenes(settings.seed, split, tail=tail), getattr(settings, split)))
                names = [f"{split}-{i:06d}.png" for i in range(len(made))]
                texts = [describe(scene, settings.captions) for scene in made]
                wrong = exchanged(made, noise, settings.seed)
                for i, name in enumerate(names):
                    table.writerows([name, text] for text in texts[wrong.get(i, i)])
                if wrong:
                    _write_wrong(part / "noise.csv", names, texts, wrong)
                if split == "train":
                    shown = Counter(kind for scene in made for kind in scene.kinds)
                jobs += [(scene, part / "Images" / name) for scene, name in zip(made, names, strict=True)]
                (part / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        jobs += _zeroshot_jobs(settings, part / "zeroshot")
        lines = [f"{colour}_{shape}\t{shown[colour, shape]}\n" for colour, shape in KINDS]
        (part / "zeroshot" / "shown.tsv").write_text("".join(lines))
        _render_all(jobs, settings.size, workers or os.cpu_count() or 1, progress)
        (part / "settings.json").write_text(json.dumps(record, indent=2) + "\n")
        try:
            part.rename(folder)
        except OSError:  # another run made the same set meanwhile
            if not (folder / "settings.json").is_file():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def exchanged(scenes: Sequence[Scene], noise: float, seed: int) -> dict[int, int]:
    """Scenes that are to have another's captions, and whose: exactly a share of `noise`, rounded to whole scenes.

    They come in an order of the seed, so that more noise adds to less. Each takes those of the next in this order
    that has a thing of a kind which it has not: captions name all things, so every one of them is false.

    Raises UserError where there is none.
    """
    order = np.random.default_rng(_hash(seed, "noise")).permutation(len(scenes)).tolist()
    wrong: dict[int, int] = {}
    for k, own in enumerate(order[: round(noise * len(scenes))]):
        others = (order[(k + step) % len(order)] for step in range(1, len(order)))
        other = next((o for o in others if not scenes[o].kinds <= scenes[own].kinds), None)
        if other is None:
            raise UserError("--scenes.noise needs training images of different things: raise --scenes.train")
        wrong[own] = other
    return wrong


def _write_wrong(file: Path, names: Sequence[str], texts: Sequence[list[str]], wrong: Mapping[int, int]) -> None:
    """List the images with captions of another: which, whose, the first caption, and the one that is true."""
    with file.open("w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle)
        table.writerow(["image", "captions_of", "caption", "true_caption"])
        table.writerows([names[i], names[wrong[i]], texts[wrong[i]][0], texts[i][0]] for i in sorted(wrong))


def notes(folder: Path, settings: ScenesConfig) -> tuple[str, ...]:
    """What to know of a set that `write_scenes` has written, a sentence each: its tail, its noise."""
    found = []
    if settings.tail:
        shown = folder / "zeroshot" / "shown.tsv"
        counts = sorted(int(line.split("\t")[1]) for line in shown.read_text().splitlines())
        found.append(
            f"of {settings.train} training images {counts[-1]} show the commonest of {len(counts)} kinds, "
            f"{counts[0]} the rarest: {shown}"
        )
    if wrong := round(settings.noise * settings.train):
        found.append(f"{wrong} of {settings.train} training images have another's captions: {folder / 'noise.csv'}")
    return tuple(found)


TEMPLATES = ("a {}", "there is a {}", "a picture of a {}", "a {} on grass", "a {} on sand", "a {} on tiles")
"""Prompts in the words of the captions."""


def _zeroshot_jobs(settings: ScenesConfig, root: Path) -> list[tuple[Scene, Path]]:
    """Single things of the test split, as equally many per class as the number allows."""
    root.mkdir()
    (root / "templates.txt").write_text("".join(f"{t}\n" for t in TEMPLATES))
    (root / "classnames.txt").write_text("".join(f"{c}_{s}\t{c} {s}\n" for c, s in KINDS))
    share, rest = divmod(settings.zeroshot, len(KINDS))
    wanted = {pair: share + (k < rest) for k, pair in enumerate(KINDS)}
    jobs: list[tuple[Scene, Path]] = []
    if not settings.zeroshot:
        return jobs
    made = dict.fromkeys(KINDS, 0)
    # The set of symbolic scenes is finite: past it, the same ones are drawn with other seeds.
    for round_ in range(10_000):
        for scene in _all_singles(settings.seed, round_):
            pair = (scene.things[0].colour, scene.things[0].shape)
            if made[pair] < wanted[pair]:
                file = root / f"{pair[0]}_{pair[1]}" / f"{made[pair]:04d}.png"
                file.parent.mkdir(exist_ok=True)
                jobs.append((scene, file))
                made[pair] += 1
        if len(jobs) == settings.zeroshot:
            break
    return jobs


def _all_singles(seed: int, round_: int) -> list[Scene]:
    """Every scene of one thing in the test split, in a drawn order, with seeds of this round."""
    scenes = [
        Scene(g, (Thing(s, c, z, m, column, row),), _hash("single", seed, round_, g, s, c, z, m, column, row) >> 24)
        for g in GROUNDS for s in SHAPES for c in COLOURS for z in SIZES for m in MATERIALS
        for column in range(COLUMNS) for row in range(ROWS)
    ]  # fmt: skip
    kept = [s for s in scenes if _split_of(s.signature) == "test"]
    return [kept[i] for i in np.random.default_rng(_hash(seed, "singles", round_)).permutation(len(kept))]


def _render_all(jobs: list[tuple[Scene, Path]], size: int, workers: int, progress: bool) -> None:
    save = partial(_render_one, size=size)
    bar = partial(tqdm, total=len(jobs), desc="Rendering scenes", unit="image", disable=not progress, leave=False)
    if workers == 1 or len(jobs) < 64:
        for _ in bar(map(save, jobs)):
            pass
        return
    pool = ProcessPoolExecutor(workers)
    try:
        for _ in bar(pool.map(save, jobs, chunksize=16)):
            pass
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _render_one(job: tuple[Scene, Path], size: int) -> None:
    scene, file = job
    Image.fromarray(render(scene, size)).save(file)
