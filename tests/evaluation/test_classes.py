"""Folders of images by class: what the classes are called, and by which prompts, from files, libraries or a name."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from PIL import Image

from amclr import evaluate
from amclr.evaluation import classes
from amclr.evaluation.classes import known_set, read_classes, short_names
from amclr.utils.errors import UserError

GOLDFISH, SHARK = "n01443537", "n01484850"


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return root


@pytest.fixture
def no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither library of the extra is there."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        classes, "find_spec", lambda name: None if name in ("open_clip", "clip_benchmark") else find(name)
    )
    for name in [m for m in sys.modules if m.split(".")[0] in ("open_clip", "clip_benchmark")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)


def test_imagenet_is_known_by_its_wnids(tmp_path: Path) -> None:
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    read = read_classes(made(tmp_path / "val", SHARK, GOLDFISH))
    # open_clip's names have the order of ImageNet's 1,000 classes: tench, goldfish, great white shark.
    assert read.names == list(IMAGENET_CLASSNAMES[1:3]) == ["goldfish", "great white shark"]
    assert read.labels == [0, 1] and [p.parent.name for p in read.paths] == [GOLDFISH, SHARK]
    assert [p.replace("{}", "crane") for p in read.prompts] == [t("crane") for t in OPENAI_IMAGENET_TEMPLATES]
    assert read.about == "2 names (imagenet, by open_clip), 80 prompts (imagenet, by open_clip)"
    # A wnid that is none of the 1,000 (entity), or another name among them: no known set.
    assert known_set([GOLDFISH, "n00001740"]) == known_set([GOLDFISH, "cat"]) == ""
    assert known_set(["cat", "dog"]) == ""


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_known_by_its_classes(name: str, tmp_path: Path) -> None:
    folders = classes.FOLDERS[name].split()
    assert len(set(folders)) == int(name[5:])
    read = read_classes(made(tmp_path / "test", *(f.replace("_", " ").title() for f in folders)))
    theirs = json.loads(
        (files("clip_benchmark") / "datasets/en_zeroshot_classification_templates.json").read_text(encoding="utf-8")
    )[name]
    assert [p.replace("{}", "crane") for p in read.prompts] == [t.format(c="crane") for t in theirs]
    assert len(theirs) == 18 and read.prompts_of == f"{name}, by CLIP_benchmark"
    assert read.names == sorted(f.replace("_", " ") for f in folders)
    (tmp_path / "test" / folders[0].title()).rename(tmp_path / "test" / "else")  # one other class, and it is none
    assert read_classes(tmp_path / "test").prompts == evaluate.TEMPLATES


def test_what_the_folder_says_comes_first(tmp_path: Path) -> None:
    root = made(tmp_path / "val", GOLDFISH, SHARK)
    (root / "templates.txt").write_text("my {}\n\nyour {}\n")
    read = read_classes(root)
    assert read.names == ["goldfish", "great white shark"] and read.prompts == ("my {}", "your {}")
    (tmp_path / "classnames.txt").write_text(f"{GOLDFISH}\tgold, fish\n{SHARK}\tjaws\n")
    read = read_classes(root)
    assert read.names == ["gold", "jaws"]
    assert read.about == "2 names (classnames.txt), 2 prompts (templates.txt)"
    # What is asked for comes before both.
    read = read_classes(root, "imagenet", "simple")
    assert read.names == ["goldfish", "great white shark"] and len(read.prompts) == 7
    assert read_classes(root, "folders", "amclr").names == [GOLDFISH, SHARK]
    (tmp_path / "mine.tsv").write_text(f"{SHARK}\tfish, big\n")
    (tmp_path / "mine.txt").write_text("{}!\n")
    read = read_classes(root, str(tmp_path / "mine.tsv"), str(tmp_path / "mine.txt"))
    assert read.names == [GOLDFISH, "fish"] and read.prompts == ("{}!",)
    assert len(read_classes(root, templates="openai").prompts) == 80
    assert read_classes(root, templates="pets").prompts == ("a photo of a {}, a type of pet.",)
    assert len({read_classes(root, templates=t).digest for t in ("", "amclr", "pets", "amclr")}) == 3


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, no_extra: None) -> None:
    root = made(tmp_path / "val", GOLDFISH, SHARK)
    read = read_classes(root)
    assert read.names == [GOLDFISH, SHARK] and read.prompts == evaluate.TEMPLATES
    assert read.advice == (
        "these are classes of imagenet; for its names and prompts (open_clip, clip_benchmark): "
        "pip install 'amclr[zeroshot]'"
    )
    for options in ({"templates": "openai"}, {"templates": "cifar100"}, {"classnames": "imagenet"}):
        with pytest.raises(UserError, match=r"need open_clip, clip_benchmark: pip install 'amclr\[zeroshot\]'$"):
            read_classes(root, **options)
    assert not read_classes(root, "folders", "amclr").advice
    assert not read_classes(made(tmp_path / "pets", "cat", "dog")).advice


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classnames": "nowhere.txt"}, r"there is no class names file 'nowhere.txt': give a file of FOLDER<tab>NAME lines, or one of folders, imagenet"),
        ({"classnames": "cifar10"}, "--classnames cifar10 needs folders named by its classes, and one is named 'cow': give --classnames FILE"),
        ({"classnames": "imagenet"}, "needs folders named by wnids, as n01440764, and one is named 'cat'"),
        ({"templates": "opnai"}, r"there is no templates file or known set 'opnai': .*amclr, simple, openai, imagenet, cifar10, cifar100, caltech101"),
        ({"templates": "bare.txt"}, "'bare.txt': the prompt 'a photo' has no {} for the class name"),
        ({"templates": "empty.txt"}, "'empty.txt': there is no prompt: write a prompt per line"),
        ({"templates": "latin.txt"}, "'latin.txt' is not UTF-8 text"),
    ],
)  # fmt: skip
def test_slips(options: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bare.txt").write_text("a photo\n")
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes("caf\xe9 {}\n".encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_classes(made(tmp_path / "pets", "cat", "cow"), **options)
    assert "\n" not in str(error.value)


def test_short_names(tmp_path: Path) -> None:
    roots = [tmp_path / "cifar10" / "test", tmp_path / "pets", tmp_path / "old" / "cifar10" / "val"]
    assert short_names(roots) == {"cifar10": roots[0], "pets": roots[1], "cifar10-2": roots[2]}
