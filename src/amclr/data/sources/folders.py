"""Readers of folders of images: one folder per class, a text file beside each image, or images alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from amclr.data.sources.rows import (
    IMAGE_SUFFIXES,
    MAX_LINE,
    SPLIT_NAMES,
    Reading,
    SourceRow,
)
from amclr.utils.errors import UserError


def read_class_folders(reading: Reading) -> Iterator[SourceRow]:
    """A folder of images per class, or such folders per split; the caption names the class."""
    folders = subfolders(reading.root)
    by_split = [f for f in folders if f.name.lower() in SPLIT_NAMES]
    if by_split and len(by_split) < len(folders):
        raise UserError(f"'{reading.root}' mixes splits and classes, {by_split[0].name} and "
                        f"{next(f.name for f in folders if f not in by_split)}: give one of them")  # fmt: skip
    for root in by_split or [reading.root]:
        paths, labels, names = class_folders(root)
        if all(re.fullmatch(r"\d+", name) for name in names):
            raise UserError(f"the folders of '{root}' are numbers, not names: name the classes "
                            f"in '{root / 'classnames.txt'}' (FOLDER<tab>NAME), or add a captions file")  # fmt: skip
        split = SPLIT_NAMES[root.name.lower()] if by_split else ""
        for path, label in zip(paths, labels, strict=True):
            name = path.relative_to(reading.root).as_posix()
            yield SourceRow(name, [reading.source.class_caption.replace("{}", names[label])], split=split, file=name)


def read_sidecars(reading: Reading) -> Iterator[SourceRow]:
    """Images, each with a text file of the same name beside it, as img2dataset and captioning tools write them."""
    for path in images_in(reading.root):
        name = path.relative_to(reading.root).as_posix()
        text = sidecar(path)
        if text is None:
            reading.reject(path, f"no caption file {path.stem}.txt beside it", key=name)
            continue
        try:
            caption = text.read_text(encoding="utf-8-sig") if text.stat().st_size <= MAX_LINE else "x" * MAX_LINE
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            reading.reject(text, f"caption cannot be read ({reason})", key=name)
            continue
        yield SourceRow(name, [caption], file=reading.name(text))


def read_images(reading: Reading) -> Iterator[SourceRow]:
    """Images at any depth in a folder, with or without a text file beside them."""
    for path in images_in(reading.root):
        text = sidecar(path)
        captions: list[str] = []
        with suppress(OSError, UnicodeDecodeError):
            if text and text.stat().st_size <= MAX_LINE:
                captions = [text.read_text(encoding="utf-8-sig")]
        yield SourceRow(path.relative_to(reading.root).as_posix(), captions, file=reading.name(path))


def sidecar(image: Path) -> Path | None:
    """The text file with an image's caption, if there is one."""
    return next((f for s in (".txt", ".caption") if (f := image.with_suffix(s)).is_file()), None)


def subfolders(root: Path) -> list[Path]:
    """The subfolders of a folder, except hidden ones and those of archivers (__MACOSX)."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))


def images_in(root: Path) -> list[Path]:
    """The images at any depth in a folder, except hidden ones."""
    return sorted(
        p for p in root.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and "__MACOSX" not in p.parts
    )  # fmt: skip


def class_folders(root: Path, classnames: Path | None = None) -> tuple[list[Path], list[int], list[str]]:
    """Image paths, labels and class names of a folder with one subfolder per class, for zero-shot classification.

    Class names come from the file `classnames` (lines of folder name, tab, name; synonyms after a comma are
    dropped), or else from classnames.txt in the folder or beside it, or else from the names of the subfolders.
    Raises UserError if there is no such folder or no image in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder '{root}': zero-shot classification needs a folder with one folder per class")
    if classnames and not classnames.is_file():
        raise UserError(f"no class names file '{classnames}'")
    file = classnames or names_file(root)
    pairs = [text.partition("\t") for text in read_lines(file)] if file else []
    name_of = {key: name.split(",")[0].strip() for key, _, name in pairs}
    paths: list[Path] = []
    labels: list[int] = []
    names: list[str] = []
    for folder in subfolders(root):
        images = images_in(folder)
        if not images:
            continue
        labels += [len(names)] * len(images)
        paths += images
        names.append(name_of.get(folder.name) or folder.name.replace("_", " "))
    if not names:
        raise UserError(f"'{root}' holds no folder with images: expected {root}/CLASS/IMAGE.jpg")
    return paths, labels, names


def names_file(root: Path) -> Path | None:
    """The file classnames.txt in a folder of classes or beside it, if there is one."""
    return next((f for f in (root / "classnames.txt", root.parent / "classnames.txt") if f.is_file()), None)


def read_lines(file: Path) -> list[str]:
    """The non-blank lines of a text file, stripped. Raises UserError if it is not UTF-8."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{file}' is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_split_lists(folder: Path) -> dict[str, frozenset[str]]:
    """Names by split from train.txt, val.txt and test.txt in a folder; links that leave it are ignored."""
    files = {split: folder / f"{split}.txt" for split in ("train", "val", "test")}
    return {
        split: frozenset(read_lines(file))
        for split, file in files.items()
        if file.is_file() and file.resolve().is_relative_to(folder.resolve())
    }
