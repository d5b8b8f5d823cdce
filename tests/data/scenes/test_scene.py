"""Scenes are a function of the seed, splits share none, and a long tail follows Zipf's law."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from amclr.data.scenes.render import render
from amclr.data.scenes.scene import GROUNDS, KINDS, ranked_kinds, sample_scenes
from tests.data.scenes.test_captions import some


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


def chi_square(counts: np.ndarray, tail: float) -> float:
    """How far counts by rank are from Zipf's law: 39 degrees of freedom, above 80 once in ten thousand times."""
    expected = np.array([k**-tail for k in range(1, 41)])
    expected *= counts.sum() / expected.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("tail", [0.6, 1.25])
def test_a_tail_follows_zipfs_law(tail: float) -> None:
    made = list(itertools.islice(sample_scenes(0, "train", tail=tail), 500))
    assert all(len(s.kinds) == len(s.things) for s in made)
    assert not {s.signature for s in made} & {s.signature for split in ("val", "test") for s in some(split, 50)}
    shown = Counter(kind for s in made for kind in s.kinds)
    counts = np.array([shown[kind] for kind in ranked_kinds(0)])
    assert counts.sum() == sum(len(s.things) for s in made) > 800
    assert chi_square(counts, tail) < 80 < min(chi_square(counts, tail + off) for off in (-0.3, 0.3))
    for name in ("ground", "number"):  # the rest is as without a tail
        of = [s.ground if name == "ground" else len(s.things) for s in made]
        shares = {"ground": dict.fromkeys(GROUNDS, 0.2), "number": {1: 0.45, 2: 0.4, 3: 0.15}}[name]
        assert all(abs(of.count(v) / len(of) - share) < 0.1 for v, share in shares.items())  # type: ignore[arg-type]


def test_the_law_holds_however_many_things_a_scene_has() -> None:
    """Of three things one is of the commonest kind nearly always: drawn one by one, in three of four scenes."""
    first = ranked_kinds(3)[0]
    made = list(itertools.islice(sample_scenes(3, "train", objects=3, tail=1.25), 120))
    assert sum(first in s.kinds for s in made) >= 116
    places = [next(t.column for t in s.things if (t.colour, t.shape) == first) for s in made if first in s.kinds]
    assert min(places.count(column) for column in range(3)) > 20, "it stands anywhere"


def test_which_kinds_are_rare_is_a_matter_of_the_seed() -> None:
    assert ranked_kinds(0) == ranked_kinds(0) != ranked_kinds(1)
    assert sorted(ranked_kinds(0)) == sorted(ranked_kinds(1)) == sorted(KINDS)
    taken = [list(itertools.islice(sample_scenes(0, "train", tail=1.0), n)) for n in (10, 20)]
    assert taken[0] == taken[1][:10] != some(count=10)
