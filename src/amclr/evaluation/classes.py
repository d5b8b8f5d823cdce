"""Images by class for zero-shot classification: names of the classes, and prompts.

Names and prompts of known sets come from the libraries that publish them: ImageNet's names and prompt ensembles from
open_clip, prompts of other sets from CLIP_benchmark (both in the extra `zeroshot`), ImageNet's wnids from timm.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from amclr.data.sources.folders import class_folders, names_file, read_lines
from amclr.evaluation.metrics import TEMPLATES
from amclr.utils.errors import UserError

EXTRA = "pip install 'amclr[zeroshot]'"
FOLDERS = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ),
}
"""Known sets whose folders have the names of their classes (Krizhevsky 2009)."""
NAMES = ("folders", "imagenet", *FOLDERS)
"""What `--classnames` accepts besides a file: the names of the folders, or those of a known set."""
PROMPTS = ("amclr", "simple", "openai", "imagenet", *FOLDERS)
"""What `--templates` accepts besides a file and the other sets that CLIP_benchmark has prompts for."""


@dataclass(frozen=True)
class ClassSet:
    """A folder of images by class, with names and prompts for its classes."""

    root: Path
    paths: list[Path]
    labels: list[int]
    """The class of each image, as an index into `names`."""
    names: list[str]
    prompts: tuple[str, ...]
    """With {} for the name."""
    names_of: str
    """Where the names come from, in a few words."""
    prompts_of: str
    """Where the prompts come from, in a few words."""
    advice: str = ""
    """What to install for the names and prompts of a known set."""

    @property
    def about(self) -> str:
        """Where the names and prompts come from, and how many there are."""
        return f"{len(self.names)} names ({self.names_of}), {len(self.prompts)} prompts ({self.prompts_of})"

    @property
    def digest(self) -> str:
        """SHA-256 of the folder, the names and the prompts: results can be compared only if it is the same."""
        return hashlib.sha256(json.dumps([str(self.root), self.names, self.prompts]).encode()).hexdigest()


def read_classes(root: Path, classnames: str = "", templates: str = "", known: bool = True) -> ClassSet:
    """Read a folder of images by class.

    Args:
        root: a folder with one folder of images per class.
        classnames: a file of FOLDER<tab>NAME lines, or one of `NAMES`. Default: classnames.txt in the folder or next
            to it, else the names of the known set, else the names of the folders.
        templates: a file with a prompt per line, one of `PROMPTS`, or another set of CLIP_benchmark's. Default:
            templates.txt in the folder, else the prompts of the known set, else amclr's seven.
        known: whether to recognise known sets: ImageNet, or some of its classes, by folders named by wnids; CIFAR-10;
            CIFAR-100. If the extra is missing, they are not used, and `advice` says what to install.

    Raises:
        UserError: for a folder without images by class, for files and names that do not exist, for names whose library
            is missing, and for a prompt without {}.
    """
    file = Path(classnames) if classnames and classnames not in NAMES else None
    if file and not file.is_file():
        raise UserError(
            f"there is no class names file '{file}': give a file of FOLDER<tab>NAME lines, or one of {', '.join(NAMES)}"
        )
    paths, labels, names = class_folders(root, file)
    folder_of = {label: path.relative_to(root).parts[0] for label, path in zip(labels, paths, strict=True)}
    folders = [folder_of[label] for label in range(len(names))]
    classes_file, prompts_file = file or names_file(root), root / "templates.txt"
    needs_names = not (classnames or classes_file)
    needs_prompts = not (templates or prompts_file.is_file())
    recognised = known_set(folders) if known and (needs_names or needs_prompts) else ""
    usable, advice = bool(recognised), ""
    if recognised and (missing := _missing()):
        usable, advice = False, f"these are classes of {recognised}; for its names and prompts ({missing}): {EXTRA}"
    if classnames in NAMES or (needs_names and usable):
        names, names_of = _known_names(classnames or recognised, folders)
    else:
        names_of = str(classes_file.name) if classes_file else "as its folders are called"
    if not needs_prompts and not templates:
        prompts, prompts_of = tuple(read_lines(prompts_file)), prompts_file.name
    else:
        prompts, prompts_of = read_prompts(templates or (recognised if usable else "amclr"))
    if not prompts or (bad := next((p for p in prompts if "{}" not in p), "")):
        problem = f"the prompt '{bad}' has no {{}} for the class name" if prompts else "there is no prompt"
        raise UserError(f"'{templates or prompts_file}': {problem}: write a prompt per line, as 'a photo of a {{}}.'")
    return ClassSet(root, paths, labels, names, prompts, names_of, prompts_of, advice)


def short_names(roots: Sequence[Path]) -> dict[str, Path]:
    """Folders by unique short names: a folder's name, or its parent's if it is called train, val or test."""
    named: dict[str, Path] = {}
    for root in roots:
        parts = root.resolve().parts
        name = parts[-2] if parts[-1] in ("train", "val", "test") and len(parts) > 2 else parts[-1]
        named[name if name not in named else f"{name}-{len(named)}"] = root
    return named


def known_set(folders: Sequence[str]) -> str:
    """The known set with folders of these names: imagenet (any of its wnids), cifar10 or cifar100; else empty."""
    plain = {_plain(name) for name in folders}
    for name in FOLDERS:
        if plain == _class_names(name):
            return name
    wnids = all(re.fullmatch(r"n\d{8}", folder) for folder in folders)
    return "imagenet" if wnids and set(folders) <= set(_wnids()) else ""


def _class_names(name: str) -> set[str]:
    """The classes of one of `FOLDERS`."""
    return {_plain(folder) for folder in FOLDERS[name].split()}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


@cache
def _wnids() -> dict[str, int]:
    """ImageNet's wnids, each with its index among the 1,000 classes."""
    from timm.data import ImageNetInfo

    return {wnid: index for index, wnid in enumerate(ImageNetInfo().label_names())}


def _known_names(name: str, folders: Sequence[str]) -> tuple[list[str], str]:
    """The class names of folders by one of `NAMES`, and where they come from."""
    if name == "folders":
        return [folder.replace("_", " ") for folder in folders], "as its folders are called"
    known = set(_wnids()) if name == "imagenet" else _class_names(name)
    if unknown := next((f for f in folders if (f if name == "imagenet" else _plain(f)) not in known), None):
        expected = "wnids, as n01440764" if name == "imagenet" else "its classes"
        raise UserError(
            f"--classnames {name} needs folders named by {expected}, and one is named '{unknown}': give --classnames "
            "FILE, with FOLDER<tab>NAME lines"
        )
    if name in FOLDERS:
        return [_plain(folder) for folder in folders], f"{name}, as its folders are called"
    _need(name)
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return [IMAGENET_CLASSNAMES[_wnids()[folder]] for folder in folders], "imagenet, by open_clip"


def read_prompts(name: str) -> tuple[tuple[str, ...], str]:
    """The prompts by a name or in a file, with {} for the class, and where they come from.

    Raises UserError that lists the known names if there are none.
    """
    if name == "amclr":
        return TEMPLATES, "amclr"
    if name in ("simple", "openai", "imagenet"):
        _need(name)
        from open_clip import zero_shot_metadata

        simple, openai = zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES, zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES
        return tuple(t("{}") for t in (simple if name == "simple" else openai)), f"{name}, by open_clip"
    if name in FOLDERS:
        _need(name)
    listed = {} if _missing() else _benchmark_prompts()
    if name in listed:
        return listed[name], f"{name}, by CLIP_benchmark"
    if Path(name).is_file():
        return tuple(read_lines(Path(name))), name
    more = ", ".join(n for n in sorted(listed) if n not in PROMPTS)
    raise UserError(
        f"there is no templates file or known set '{name}': give a file with one prompt per line, {{}} for the class "
        f"name, or one of {', '.join(PROMPTS)}{f', {more}' if more else f'; for more: {EXTRA}'}"
    )


@cache
def _benchmark_prompts() -> dict[str, tuple[str, ...]]:
    """CLIP_benchmark's English prompts by set, read from its file because its modules import far more."""
    file = files("clip_benchmark") / "datasets" / "en_zeroshot_classification_templates.json"
    listed: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return {name: tuple(prompt.replace("{c}", "{}") for prompt in prompts) for name, prompts in listed.items()}


def _missing() -> str:
    """The libraries with names and prompts that are not installed; empty if all are."""
    return ", ".join(name for name in ("open_clip", "clip_benchmark") if not find_spec(name))


def _need(name: str) -> None:
    """Raise UserError if the library with the names or prompts of a set is missing."""
    if missing := _missing():
        raise UserError(f"the names and prompts of '{name}' need {missing}: {EXTRA}")
