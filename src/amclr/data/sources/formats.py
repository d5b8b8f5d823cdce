"""What a data set is: the formats of files, and which of them lie in a folder."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from amclr.config.schema import SourceConfig
from amclr.data.sources import columnar, folders, json_files, tables, tars
from amclr.data.sources.remote import braces
from amclr.data.sources.rows import IMAGE_SUFFIXES, Reading, Row
from amclr.utils.errors import UserError

IMAGE_FOLDERS = ("Images", "images", "Flicker8k_Dataset", "flickr30k_images", "flickr30k-images")
CAPTION_FILES = (
    "captions.txt", "captions.csv", "captions.tsv", "captions.jsonl", "captions.json", "captions.parquet",
    "metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json", "dataset_*.json", "captions_*.json",
    "annotations/captions_*.json", "results.csv", "Flickr8k.token.txt",
    "*/metadata.csv", "*/metadata.jsonl", "*/metadata.parquet", "*/captions.csv", "*/captions.jsonl",
)  # fmt: skip
"""Where captions are looked for in a folder: of the first pattern that matches, all matches are read."""
NO_CAPTIONS = ("dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class Format:
    """A format of files: what messages call it, the names that its files end with, and its reader."""

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Reading], Iterator[Row]]


FORMATS = (
    Format("CSV", (".csv", ".tsv", ".txt", ".token"), tables.read_tables),
    Format("JSON lines", (".jsonl", ".ndjson"), json_files.read_json_lines),
    Format("JSON", (".json",), json_files.read_json_files),
    Format("Parquet", (".parquet",), columnar.read_parquet),
    Format("WebDataset tars", (".tar",), tars.read_tars),
)
"""What a file can be. Add a format here."""
SAVED = Format("saved Hugging Face dataset", (), columnar.read_saved_dataset)
CLASSES = Format("images by class", (), folders.read_class_folders)
SIDECARS = Format("images with captions beside them", (), folders.read_sidecars)
IMAGES = Format("images", (), folders.read_images)


def find(path: Path, source: SourceConfig, bare: bool = False) -> tuple[Path, list[Path], Format]:
    """The folder of a data set, the files to read in it, and what they are; `path` is a folder, file or pattern.

    bare: images are wanted with captions or without.

    Raises UserError, saying what is looked for, where there is nothing to read.
    """
    if path.is_dir():
        return path, *_look_into(path, source, bare)
    if path.is_file():
        if source.captions_file:
            raise UserError(f"'{path}' is a file: leave out --source.captions_file, or give the folder")
        return path.parent, [path], format_of(path)
    patterns = braces(str(path))
    files = sorted({Path(f) for pattern in patterns for f in glob.glob(pattern)})
    if not files:
        raise UserError(
            f"no data set at '{path}': give a folder with images and a captions file, a captions file, tars, "
            "Parquet files, hf:NAME, or --data scenes"
        )
    absent = [p for p in patterns if not glob.has_magic(p) and not os.path.exists(p)]
    if absent:
        raise UserError(f"{len(absent)} of the {len(patterns)} files of '{path}' are not there, such as '{absent[0]}'")
    kinds = {format_of(f) for f in files}
    if len(kinds) > 1:
        raise UserError(f"'{path}' matches files of several kinds: {', '.join(sorted(k.name for k in kinds))}")
    return Path(os.path.commonpath([f.parent for f in files])), files, kinds.pop()


def _look_into(root: Path, source: SourceConfig, bare: bool) -> tuple[list[Path], Format]:
    """What lies in a folder: a captions file, a saved data set, Parquet or tars, images with texts, or by class."""
    if source.captions_file:
        file = root / source.captions_file
        if not file.is_file():
            raise UserError(f"no captions file '{file}'")
        return [file], format_of(file)
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return [], SAVED
    for pattern in CAPTION_FILES:
        if files := _own(root, [f for f in root.glob(pattern) if f.name not in NO_CAPTIONS]):
            return files, format_of(files[0])
    # Of tars with a table of the same name beside each, as img2dataset leaves them, the tars have the images.
    shards = _own(root, [*root.glob("*.tar"), *root.glob("*/*.tar")])
    listed = _own(root, [*root.glob("*.parquet"), *root.glob("*/*.parquet")])
    if shards and ({f.stem for f in listed} & {f.stem for f in shards} or not listed):
        return shards, format_of(shards[0])
    if listed:
        return listed, format_of(listed[0])
    if any(root.glob("*.tar.*")) or any(root.glob("*.tgz")):
        raise UserError(f"the tars in '{root}' are compressed, so that images cannot be read at their places: "
                        "unpack them to plain .tar files")  # fmt: skip
    if bare:
        return [], IMAGES
    images = [f for d in (root, *folders.subfolders(root)) for f in sorted(d.iterdir())[:100]
                if f.suffix.lower() in IMAGE_SUFFIXES]  # fmt: skip
    if any(folders.sidecar(f) for f in images):
        return [], SIDECARS
    if loose := sorted(f for f in root.iterdir() if f.suffix in (".csv", ".tsv", ".jsonl", ".json") and f.is_file()):
        names = ", ".join(f.name for f in loose[:5])
        raise UserError(f"'{root}' has no captions file of a known name, but {names}: name one of them with "
                        "--source.captions_file")  # fmt: skip
    usual = any((root / f).is_dir() for f in IMAGE_FOLDERS)
    if not usual and any(folders.images_in(d) for d in folders.subfolders(root)):
        return [], CLASSES
    raise UserError(
        f"'{root}' has {'images but ' if usual else ''}no captions file: expected {', '.join(CAPTION_FILES[:4])} ... "
        "with image and caption, tars, Parquet files, or a folder of images per class; or name one with "
        "--source.captions_file"
    )


def _own(root: Path, files: list[Path]) -> list[Path]:
    """Files found in a folder, sorted. Raises UserError for a link that leaves it: nobody has named that file."""
    for file in files:
        if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            raise UserError(f"'{file}' is a link out of the data set: if that is meant, name it: --data '{file}'")
    return sorted(f for f in files if f.is_file())


def format_of(file: Path) -> Format:
    """The format of a file by its name. Raises UserError, naming those that there are, if it is of none."""
    for kind in FORMATS:
        if file.suffix.lower() in kind.suffixes:
            return kind
    known = ", ".join(s for kind in FORMATS for s in kind.suffixes)
    raise UserError(f"'{file}' is of no known format: its name must end with {known}")


def label(data: str) -> str:
    """A short name for a data set, good for a folder or a title."""
    stem = re.split(r"[/:]", (data.partition("?")[0] if "://" in data else data).rstrip("/"))[-1]
    if "://" not in data and not data.startswith("hf:") and data != "scenes":
        stem = Path(data).expanduser().resolve().name
    for suffix in (".yaml", ".yml", *(s for f in FORMATS for s in f.suffixes)):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "data"
