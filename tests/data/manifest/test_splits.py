"""Held-out validation splits and folds."""

from __future__ import annotations

from pathlib import Path

import pytest

from amclr.config.checks import problems
from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.utils.errors import UserError
from tests.conftest import make_folder
from tests.data.manifest.test_loading import append


def test_held_out_images_stay_when_others_come(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images=60, lists=False)
    config = Config(data=str(root), source=SourceConfig(val_fraction=0.2))
    before = manifests.load(config, tmp_path)
    held = {s.name for s in before.split("val")}
    assert 4 <= len(held) <= 24 and not held & {s.name for s in before.split("train")}
    (root / "Images" / "new.png").write_bytes((root / "Images" / "001.png").read_bytes())
    append(root, b"new.png,a new patch")
    after = manifests.load(config, tmp_path)
    assert held == {s.name for s in after.split("val")} - {"new.png"}


def test_folds_are_parts_of_the_training_images(tmp_path: Path) -> None:
    """Each training image is validated on in one fold, in another order of the rows too; the usual ones in none."""
    root = make_folder(tmp_path / "a", images=52)
    whole = manifests.load(Config(data=str(root)), tmp_path)
    train, val = ({s.name for s in whole.split(split)} for split in ("train", "val"))
    assert len(train) == 42 and len(val) == 10

    def parts(fold: str) -> tuple[set[str], set[str]]:
        found = manifests.load(Config(data=str(root), source=SourceConfig(fold=fold)), tmp_path)
        assert any("10 images of val are not used" in note for note in found.notes)
        return {s.name for s in found.split("train")}, {s.name for s in found.split("val")}

    folds = [parts(f"{k}/4") for k in range(1, 5)]
    assert [len(held) for _, held in folds] == [10, 11, 10, 11]
    assert set.union(*(held for _, held in folds)) == train and all(t | h == train and not t & h for t, h in folds)
    assert folds[0][1] != set(sorted(train)[:10]), "parts are drawn"
    lines = (root / "captions.txt").read_text().splitlines()
    (root / "captions.txt").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert parts("2/4") == folds[1]
    # What is measured on is read without the training images, but for a fold, which is of them.
    config = Config(data=str(root), source=SourceConfig(fold="2/4"))
    measured = manifests.prepare(config, tmp_path, only="val")
    assert {s.name for s in measured.samples} == folds[1][1]
    assert [*dict.fromkeys(line.split(",")[0] for line in reversed(lines[1:]))] == [*measured.order]
    with pytest.raises(UserError, match="has 42 training images: they cannot be cut into 43 parts"):
        parts("1/43")
    for slip in ("0/4", "5/4", "1/1", "1", "a/b", "1/4/2"):
        assert "--source.fold is K/N, such as 1/6" in problems(Config(source=SourceConfig(fold=slip)))[0]
        with pytest.raises(UserError, match="--source.fold is K/N"):
            parts(slip)
    # What is wrong with rows counts as a share of all of them, whichever part is read.
    (root / "Images" / "020.png").unlink()
    config = Config(data=str(root), source=SourceConfig(fold="2/4", max_bad=0.05))
    assert len(manifests.prepare(config, tmp_path, only="val").samples) in (10, 11)
    (tmp_path / "mix.yaml").write_text("- data: a\n  source: {fold: 1/4}\n")
    with pytest.raises(UserError, match="fold applies to the whole mix"):
        manifests.load(Config(data=str(tmp_path / "mix.yaml")), tmp_path)
