"""The set on disk: files as promised, whole or absent, with a tail and noise in known measure."""

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
from amclr.data import manifest
from amclr.data.scenes import dataset
from amclr.data.scenes.dataset import write_scenes
from amclr.data.scenes.render import render
from amclr.data.scenes.scene import KINDS, sample_scenes
from amclr.utils.errors import UserError
from tests.data.scenes.test_captions import is_true, some

TINY = ScenesConfig(train=12, val=6, test=6, zeroshot=44, size=32, captions=3)


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
    monkeypatch.setattr(dataset, "_render_all", lambda *_: pytest.fail("rendered again"))
    write_scenes(tmp_path / "set", TINY)
    with pytest.raises(UserError, match="contains something other than these scenes"):
        write_scenes(tmp_path / "set", replace(TINY, seed=1))


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_set_leaves_nothing(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_render_one", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "set", replace(TINY, train=80), workers=workers, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_zeroshot_images_are_single_things_of_the_test_split(tmp_path: Path) -> None:
    jobs = dataset._zeroshot_jobs(replace(TINY, zeroshot=400), tmp_path / "zeroshot")
    assert len(jobs) == 400 and len({s.seed for s, _ in jobs}) == 400
    trained = {s.signature for s in some()}
    for scene, file in jobs:
        (thing,) = scene.things
        assert file.parent.name == f"{thing.colour}_{thing.shape}" and scene.signature not in trained


def lines_of(file: Path) -> dict[str, list[str]]:
    """Captions by image."""
    found: dict[str, list[str]] = {}
    with file.open(newline="") as handle:
        for row in csv.DictReader(handle):
            found.setdefault(row["image"], []).append(row["caption"])
    return found


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
    wrong = {share: dataset.exchanged(made, share, 0) for share in (0.0, 0.1, 0.25, 1.0)}
    assert [len(w) for w in wrong.values()] == [0, 8, 20, 80]
    assert wrong[0.1].items() <= wrong[0.25].items() <= wrong[1.0].items()
    assert dataset.exchanged(made, 0.1, 1).keys() != wrong[0.1].keys()
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
    assert re.match(r"of 20 training images 1?\d show the most common of 40 kinds, 0 the rarest: .*shown.tsv", shown)
    assert re.match(r"6 of 20 training images have the captions of another image: .*noise.csv", wrong)
    assert Path(wrong.split(": ")[1]).is_file() and Path(shown.split(": ")[1]).is_file()
    assert not manifest.load(Config(scenes=replace(TINY, zeroshot=0)), tmp_path, progress=False).notes
