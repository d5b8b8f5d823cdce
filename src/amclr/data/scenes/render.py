"""Rendering of a scene: rays cast at exact shapes, with light, shadows and ground."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amclr.data.scenes.scene import COLOURS, SIZES, Scene, Thing, stable_hash

Array = np.ndarray

SUN_SIZE = 0.10
SUPERSAMPLING = 2


@dataclass(frozen=True)
class _Solid:
    """A thing in the world: its position, size and rotation. Lengths are in world units."""

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
    """Render a scene: (size, size, 3) uint8."""
    draw = np.random.default_rng(stable_hash("render", scene.seed))
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
    # Linear light to sRGB, approximately.
    return (255 * np.clip(pixels, 0, 1) ** (1 / 1.8) + 0.5).astype(np.uint8)


def _unit(v: Array) -> Array:
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def _camera_rays(eye: Array, target: Array, n: int) -> Array:
    """Unit directions (n * n, 3) through the n x n pixels, row by row from the top left."""
    forward = _unit(target - eye)
    right = _unit(np.cross(np.array([0.0, 1.0, 0.0], dtype=np.float32), forward))
    up = np.cross(forward, right)
    span = (np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1
    x, y = np.meshgrid(span, -span)
    reach = 0.475
    return _unit(forward + reach * (x.reshape(-1, 1) * right + y.reshape(-1, 1) * up)).astype(np.float32)


def _screen_box(solid: _Solid, eye: Array, rays: Array) -> Array:
    """Indices of the rays that hit the solid's bounding sphere."""
    middle = np.array([solid.x, solid.height / 2, solid.z], dtype=np.float32)
    reach = np.hypot(1.25 * solid.radius, solid.height / 2)
    offset = middle - eye
    along = rays @ offset
    return np.flatnonzero(offset @ offset - along**2 < reach**2)


def _local(solid: _Solid, points: Array, turn_only: bool = False) -> Array:
    """World points (or directions) in the solid's frame, with the solid at the origin and not rotated."""
    c, s = np.float32(np.cos(solid.angle)), np.float32(np.sin(solid.angle))
    p = points if turn_only else points - np.array([solid.x, 0, solid.z], dtype=np.float32)
    return np.stack([c * p[:, 0] - s * p[:, 2], p[:, 1], s * p[:, 0] + c * p[:, 2]], axis=1)


def _world(solid: _Solid, directions: Array) -> Array:
    c, s = np.float32(np.cos(solid.angle)), np.float32(np.sin(solid.angle))
    x, y, z = directions.T
    return np.stack([c * x + s * z, y, -s * x + c * z], axis=1)


def _intersect(solid: _Solid, origins: Array, directions: Array) -> tuple[Array, Array]:
    """First hits of rays: distances (M,), infinite without a hit, and world normals (M, 3)."""
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
    """Hits of an upright cylinder, or of a cone with its tip at height h."""
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
    """Linear light (M, 3) reflected by a solid's surface."""
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
    """Linear light (M, 3) of the sky, and of the ground with the solids' shadows."""
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
    """Share of sunlight (M,) that reaches ground points past a solid: a few rays into an extended sun."""
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
    """Colour (M, 3) of the ground at points."""
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
