"""Images by class, for zero-shot classification: what the classes are called, and the prompts that name them.

Names and prompts of known sets are those of the libraries that publish them, not copies: ImageNet's names and prompt
ensembles are open_clip's, prompts of other sets CLIP_benchmark's (both in the extra `zeroshot`), and which of
ImageNet's classes a folder is, timm knows.
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
"""Sets whose folders are called by their classes, to know them by (Krizhevsky 2009)."""
NAMES = ("folders", "imagenet", *FOLDERS)
"""What `--classnames` takes besides a file: the folders' own names, or those of a set that they must be of."""
PROMPTS = ("amclr", "simple", "openai", "imagenet", *FOLDERS)
"""What `--templates` takes besides a file and the other sets that CLIP_benchmark has prompts for."""


@dataclass(frozen=True)
class ClassSet:
    """A folder of images by class, with names and prompts for its classes."""

    root: Path
    paths: list[Path]
    labels: list[int]
    """Of each image, the row of its class in `names`."""
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
        """Which names and prompts these are, and how many."""
        return f"{len(self.names)} names ({self.names_of}), {len(self.prompts)} prompts ({self.prompts_of})"

    @property
    def digest(self) -> str:
        """A number of what is asked of a model, from the folder, the names and the prompts."""
        asked = json.dumps([str(self.root), self.names, self.prompts])
        return hashlib.sha256(asked.encode()).hexdigest()


def read_classes(root: Path, classnames: str = "", templates: str = "", known: bool = True) -> ClassSet:
    """Read a folder of images by class.

    Args:
        root: holds a folder of images per class.
        classnames: a file of FOLDER<tab>NAME lines, or one of `NAMES`. Empty takes classnames.txt in the folder or
            beside it, else the names of the known set that the folder is, else the names of its folders.
        templates: a file with a prompt per line, one of `PROMPTS`, or another set of CLIP_benchmark's. Empty takes
            templates.txt in the folder, else the prompts of the known set that it is, else amclr's own seven.
        known: whether to look if it is a known set: ImageNet, or some classes of it, in folders called by their
            wnids, CIFAR-10, or CIFAR-100. Where the extra is missing it is told in `advice`, and not used.

    Raises:
        UserError: for a folder without images by class, for files and names that are not there, and for names whose
            library is missing, and for a prompt without {}.
    """
    file = Path(classnames) if classnames and classnames not in NAMES else None
    if file and not file.is_file():
        raise UserError(
            f"no class names file '{file}', nor names called so: give a file of FOLDER<tab>NAME lines, or one of "
            f"{', '.join(NAMES)}"
        )
    paths, labels, names = class_folders(root, file)
    folder_of = {label: path.relative_to(root).parts[0] for label, path in zip(labels, paths, strict=True)}
    folders = [folder_of[label] for label in range(len(names))]
    own_names, own_prompts = file or names_file(root), root / "templates.txt"
    asks_names = not (classnames or own_names)
    asks_prompts = not (templates or own_prompts.is_file())
    found = known_set(folders) if known and (asks_names or asks_prompts) else ""
    usable, advice = bool(found), ""
    if found and (lacking := _missing()):
        usable, advice = False, f"these are classes of {found}; for its names and prompts ({lacking}): {EXTRA}"
    if classnames in NAMES or (asks_names and usable):
        names, names_of = _named(classnames or found, folders)
    else:
        names_of = str(own_names.name) if own_names else "as its folders are called"
    if not asks_prompts and not templates:
        prompts, prompts_of = tuple(read_lines(own_prompts)), own_prompts.name
    else:
        prompts, prompts_of = read_prompts(templates or (found if usable else "amclr"))
    if not prompts or (bad := next((p for p in prompts if "{}" not in p), "")):
        told = f"the prompt '{bad}' has no {{}} for the class name" if prompts else "there is no prompt"
        raise UserError(f"'{templates or own_prompts}': {told}: write a prompt per line, as 'a photo of a {{}}.'")
    return ClassSet(root, paths, labels, names, prompts, names_of, prompts_of, advice)


def short_names(roots: Sequence[Path]) -> dict[str, Path]:
    """Folders by short names, all different: a folder's own, or its parent's if it is called train, val or test."""
    found: dict[str, Path] = {}
    for root in roots:
        parts = root.resolve().parts
        name = parts[-2] if parts[-1] in ("train", "val", "test") and len(parts) > 2 else parts[-1]
        found[name if name not in found else f"{name}-{len(found)}"] = root
    return found


def known_set(folders: Sequence[str]) -> str:
    """The set whose classes folders of these names are: imagenet (any of its wnids), cifar10, cifar100; or nothing."""
    plain = {_plain(name) for name in folders}
    for name in FOLDERS:
        if plain == _own(name):
            return name
    wnids = all(re.fullmatch(r"n\d{8}", folder) for folder in folders)
    return "imagenet" if wnids and set(folders) <= set(_wnids()) else ""


def _own(name: str) -> set[str]:
    """The classes of one of `FOLDERS`."""
    return {_plain(folder) for folder in FOLDERS[name].split()}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


@cache
def _wnids() -> dict[str, int]:
    """ImageNet's wnids, and the place of each in its order of 1,000 classes."""
    from timm.data import ImageNetInfo

    return {wnid: place for place, wnid in enumerate(ImageNetInfo().label_names())}


def _named(name: str, folders: Sequence[str]) -> tuple[list[str], str]:
    """The names that one of `NAMES` has for the classes of folders, and what to call them."""
    if name == "folders":
        return [folder.replace("_", " ") for folder in folders], "as its folders are called"
    known = set(_wnids()) if name == "imagenet" else _own(name)
    if strange := next((f for f in folders if (f if name == "imagenet" else _plain(f)) not in known), None):
        called = "wnids, as n01440764" if name == "imagenet" else "its classes"
        raise UserError(
            f"--classnames {name} needs folders called by {called}, and one is called '{strange}': give --classnames "
            "FILE, with FOLDER<tab>NAME lines"
        )
    if name in FOLDERS:
        return [_plain(folder) for folder in folders], f"{name}, as its folders are called"
    _need(name)
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return [IMAGENET_CLASSNAMES[_wnids()[folder]] for folder in folders], "imagenet, by open_clip"


def read_prompts(name: str) -> tuple[tuple[str, ...], str]:
    """The prompts of a name or in a file, with {} for the class, and what to call them.

    Raises UserError, naming those that there are, where there are none.
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
    others = ", ".join(n for n in sorted(listed) if n not in PROMPTS)
    raise UserError(
        f"no templates file '{name}', nor prompts called so: give a file with one prompt per line, {{}} for the class "
        f"name, or one of {', '.join(PROMPTS)}{f', {others}' if others else f'; for more: {EXTRA}'}"
    )


@cache
def _benchmark_prompts() -> dict[str, tuple[str, ...]]:
    """CLIP_benchmark's English prompts by set. They are read from its file: its modules import far more."""
    file = files("clip_benchmark") / "datasets" / "en_zeroshot_classification_templates.json"
    listed: dict[str, list[str]] = json.loads(file.read_text(encoding="utf-8"))
    return {name: tuple(prompt.replace("{c}", "{}") for prompt in prompts) for name, prompts in listed.items()}


def _missing() -> str:
    """The libraries that have names and prompts and are not there; empty where all are."""
    return ", ".join(name for name in ("open_clip", "clip_benchmark") if not find_spec(name))


def _need(name: str) -> None:
    """Raise UserError where the library that has the names or prompts of a set is missing."""
    if lacking := _missing():
        raise UserError(f"what '{name}' names is in {lacking}: {EXTRA}")
