"""Every thing of a scene is visible where the scene says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from amclr.data.scenes.render import render
from amclr.data.scenes.scene import Scene
from tests.data.scenes.test_captions import some


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
