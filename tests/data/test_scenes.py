"""The generated set: a function of the seed, captions that are true, splits that share nothing, files as promised."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclr.config.checks import problems
from amclr.config.schema import Config, ScenesConfig
from amclr.data import manifest, scenes
from amclr.data.scenes import KINDS, Scene, Thing, describe, ranked_kinds, render, sample_scenes, write_scenes
from amclr.utils.errors import UserError

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
    with Image.open(out / "Images" / "train-000000.png") as image:
        assert image.size == (32, 32)
        assert np.array_equal(np.asarray(image), render(some(count=1)[0], 32))
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


def test_zeroshot_images_are_single_things_of_the_test_split(tmp_path: Path) -> None:
    jobs = scenes._zeroshot_jobs(replace(TINY, zeroshot=400), tmp_path / "zeroshot")
    assert len(jobs) == 400 and len({s.seed for s, _ in jobs}) == 400
    trained = {s.signature for s in some()}
    for scene, file in jobs:
        (thing,) = scene.things
        assert file.parent.name == f"{thing.colour}_{thing.shape}" and scene.signature not in trained


def test_too_many_captions_is_said() -> None:
    with pytest.raises(UserError, match="lower --scenes.captions"):
        describe(Scene("sand", (Thing("cone", "red", "medium", "metal", 0, 0),), 1), 500)


# -- long tails and captions of other images ---------------------------------------------------------


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
        shares = {"ground": dict.fromkeys(scenes.GROUNDS, 0.2), "number": {1: 0.45, 2: 0.4, 3: 0.15}}[name]
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


def lines_of(file: Path) -> dict[str, list[str]]:
    """Captions by image."""
    found: dict[str, list[str]] = {}
    with file.open(newline="") as handle:
        for row in csv.DictReader(handle):
            found.setdefault(row["image"], []).append(row["caption"])
    return found


def is_true(scene: Scene, caption: str) -> bool:
    try:
        check(scene, caption)
    except AssertionError:
        return False
    return True


def test_tail_and_noise_change_training_images_alone(tmp_path: Path) -> None:
    settings = replace(TINY, train=32, val=4, test=4, size=16, seed=5)
    plain = write_scenes(tmp_path / "plain", settings, workers=1, progress=False)
    tailed = write_scenes(tmp_path / "tailed", replace(settings, tail=1.25, noise=0.25), workers=1, progress=False)
    noisy = write_scenes(tmp_path / "noisy", replace(settings, noise=0.5), workers=1, progress=False)
    of = {folder: lines_of(folder / "captions.txt") for folder in (plain, tailed, noisy)}
    held = [n for n in of[plain] if not n.startswith("train")]
    assert len(held) == 8 and all(of[plain][n] == of[tailed][n] == of[noisy][n] for n in held)
    images = [f"Images/{n}" for n in held] + [
        str(p.relative_to(plain)) for p in sorted((plain / "zeroshot").glob("*/*.png"))
    ]
    assert len(images) == 8 + 44
    for file in images:
        assert (plain / file).read_bytes() == (tailed / file).read_bytes() == (noisy / file).read_bytes()
    for name in (plain / "train.txt").read_text().split():  # captions are wrong, images are not
        assert (plain / "Images" / name).read_bytes() == (noisy / "Images" / name).read_bytes()
    assert not (plain / "noise.csv").exists()
    made = {plain: list(itertools.islice(sample_scenes(5, "train"), 32))}
    made |= {noisy: made[plain], tailed: list(itertools.islice(sample_scenes(5, "train", tail=1.25), 32))}
    for folder, count in ((plain, 0), (tailed, 8), (noisy, 16)):
        truth = {f"train-{i:06d}.png": scene for i, scene in enumerate(made[folder])}
        false = {n for n, scene in truth.items() if not any(is_true(scene, c) for c in of[folder][n])}
        assert len(false) == count and all(is_true(truth[n], c) for n in truth.keys() - false for c in of[folder][n])
        if count:
            with (folder / "noise.csv").open(newline="") as handle:
                rows = list(csv.DictReader(handle))
            assert {r["image"] for r in rows} == false
            for row in rows:
                assert of[folder][row["image"]][0] == row["caption"] and is_true(
                    truth[row["captions_of"]], row["caption"]
                )
                assert is_true(truth[row["image"]], row["true_caption"])
        shown = dict(line.split("\t") for line in (folder / "zeroshot" / "shown.tsv").read_text().splitlines())
        counted = Counter(f"{t.colour}_{t.shape}" for scene in truth.values() for t in scene.things)
        assert {k: int(v) for k, v in shown.items()} == {f"{c}_{s}": counted[f"{c}_{s}"] for c, s in KINDS}


def test_more_noise_adds_to_less() -> None:
    made = some(count=80)
    wrong = {share: scenes.exchanged(made, share, 0) for share in (0.0, 0.1, 0.25, 1.0)}
    assert [len(w) for w in wrong.values()] == [0, 8, 20, 80]
    assert wrong[0.1].items() <= wrong[0.25].items() <= wrong[1.0].items()
    assert scenes.exchanged(made, 0.1, 1).keys() != wrong[0.1].keys()
    assert all(own != other for own, other in wrong[1.0].items())


def test_what_a_set_cannot_be_is_said(tmp_path: Path) -> None:
    wrong = problems(Config(scenes=ScenesConfig(tail=2.0, noise=-0.1)))
    assert wrong == [
        "--scenes.tail must lie between 0 and 1.25, got 2",
        "--scenes.noise must lie between 0 and 1, got -0.1",
    ]
    with pytest.raises(UserError, match=r"--scenes.tail 2 .* give at most 1.25"):
        next(sample_scenes(0, "train", tail=2.0))
    with pytest.raises(UserError, match="raise --scenes.train"):
        write_scenes(tmp_path / "set", replace(TINY, train=1, noise=1.0), workers=1, progress=False)
    assert not (tmp_path / "set").exists()


def test_tail_and_noise_are_told(tmp_path: Path) -> None:
    settings = replace(TINY, train=20, zeroshot=0, tail=1.0, noise=0.3)
    told = manifest.load(Config(scenes=settings), tmp_path, progress=False).notes
    shown, wrong = told
    assert re.match(r"of 20 training images 1?\d show the commonest of 40 kinds, 0 the rarest: .*shown.tsv", shown)
    assert re.match(r"6 of 20 training images have another's captions: .*noise.csv", wrong)
    assert Path(wrong.split(": ")[1]).is_file() and Path(shown.split(": ")[1]).is_file()
    assert not manifest.load(Config(scenes=replace(TINY, zeroshot=0)), tmp_path, progress=False).notes
