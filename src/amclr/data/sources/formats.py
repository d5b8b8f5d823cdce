"""The formats of data sets, and how to tell which one a folder or file has."""

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
from amclr.data.sources.rows import IMAGE_SUFFIXES, Reading, SourceRow
from amclr.utils.errors import UserError

IMAGE_FOLDERS = ("Images", "images", "Flicker8k_Dataset", "flickr30k_images", "flickr30k-images")
CAPTION_FILES = (
    "captions.txt", "captions.csv", "captions.tsv", "captions.jsonl", "captions.json", "captions.parquet",
    "metadata.csv", "metadata.jsonl", "metadata.parquet", "dataset.json", "dataset_*.json", "captions_*.json",
    "annotations/captions_*.json", "results.csv", "Flickr8k.token.txt",
    "*/metadata.csv", "*/metadata.jsonl", "*/metadata.parquet", "*/captions.csv", "*/captions.jsonl",
)  # fmt: skip
"""Patterns of captions files in a folder; all matches of the first pattern that matches are read."""
NO_CAPTIONS = ("dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class Format:
    """A file format: its name in messages, the suffixes of its files, and its reader."""

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Reading], Iterator[SourceRow]]


FORMATS = (
    Format("CSV", (".csv", ".tsv", ".txt", ".token"), tables.read_tables),
    Format("JSON lines", (".jsonl", ".ndjson"), json_files.read_json_lines),
    Format("JSON", (".json",), json_files.read_json_files),
    Format("Parquet", (".parquet",), columnar.read_parquet),
    Format("WebDataset tars", (".tar",), tars.read_tars),
)
"""The known file formats. Add a format here."""
SAVED = Format("saved Hugging Face dataset", (), columnar.read_saved_dataset)
CLASSES = Format("images by class", (), folders.read_class_folders)
SIDECARS = Format("images with captions beside them", (), folders.read_sidecars)
IMAGES = Format("images", (), folders.read_images)


def find(path: Path, source: SourceConfig, bare: bool = False) -> tuple[Path, list[Path], Format]:
    """The root folder of a data set, the files to read, and their format; `path` is a folder, a file or a pattern.

    bare: include images without captions.
    Raises UserError, saying what is expected, if there is nothing to read.
    """
    if path.is_dir():
        return path, *_inspect(path, source, bare)
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
    missing = [p for p in patterns if not glob.has_magic(p) and not os.path.exists(p)]
    if missing:
        raise UserError(f"{len(missing)} of the {len(patterns)} files of '{path}' do not exist, such as '{missing[0]}'")
    kinds = {format_of(f) for f in files}
    if len(kinds) > 1:
        raise UserError(f"'{path}' matches files of several formats: {', '.join(sorted(k.name for k in kinds))}")
    return Path(os.path.commonpath([f.parent for f in files])), files, kinds.pop()


def _inspect(root: Path, source: SourceConfig, bare: bool) -> tuple[list[Path], Format]:
    """The files and format of a folder: captions file, saved data set, tars, Parquet, images with texts or by class."""
    if source.captions_file:
        file = root / source.captions_file
        if not file.is_file():
            raise UserError(f"no captions file '{file}'")
        return [file], format_of(file)
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return [], SAVED
    for pattern in CAPTION_FILES:
        if files := _inside(root, [f for f in root.glob(pattern) if f.name not in NO_CAPTIONS]):
            return files, format_of(files[0])
    # img2dataset writes a Parquet table beside each tar; the images are in the tars.
    shards = _inside(root, [*root.glob("*.tar"), *root.glob("*/*.tar")])
    parquets = _inside(root, [*root.glob("*.parquet"), *root.glob("*/*.parquet")])
    if shards and ({f.stem for f in parquets} & {f.stem for f in shards} or not parquets):
        return shards, format_of(shards[0])
    if parquets:
        return parquets, format_of(parquets[0])
    if any(root.glob("*.tar.*")) or any(root.glob("*.tgz")):
        raise UserError(f"the tars in '{root}' are compressed, so single images cannot be read from them: "
                        "unpack them to plain .tar files")  # fmt: skip
    if bare:
        return [], IMAGES
    images = [f for d in (root, *folders.subfolders(root)) for f in sorted(d.iterdir())[:100]
                if f.suffix.lower() in IMAGE_SUFFIXES]  # fmt: skip
    if any(folders.sidecar(f) for f in images):
        return [], SIDECARS
    if loose := sorted(f for f in root.iterdir() if f.suffix in (".csv", ".tsv", ".jsonl", ".json") and f.is_file()):
        names = ", ".join(f.name for f in loose[:5])
        raise UserError(f"'{root}' has no captions file with a known name, but {names}: name one of them with "
                        "--source.captions_file")  # fmt: skip
    usual = any((root / f).is_dir() for f in IMAGE_FOLDERS)
    if not usual and any(folders.images_in(d) for d in folders.subfolders(root)):
        return [], CLASSES
    raise UserError(
        f"'{root}' has {'images but ' if usual else ''}no captions file: expected {', '.join(CAPTION_FILES[:4])} ... "
        "with image and caption, tars, Parquet files, or a folder of images per class; or name one with "
        "--source.captions_file"
    )


def _inside(root: Path, files: list[Path]) -> list[Path]:
    """The files, sorted. Raises UserError for a link that leaves the folder, as the user did not name its target."""
    for file in files:
        if file.is_symlink() and not file.resolve().is_relative_to(root.resolve()):
            raise UserError(f"'{file}' is a link out of the data set: to read it, name it: --data '{file}'")
    return sorted(f for f in files if f.is_file())


def format_of(file: Path) -> Format:
    """The format of a file by its suffix. Raises UserError, listing the known suffixes, if it has none of them."""
    for kind in FORMATS:
        if file.suffix.lower() in kind.suffixes:
            return kind
    known = ", ".join(s for kind in FORMATS for s in kind.suffixes)
    raise UserError(f"'{file}' has no known format: its name must end with {known}")


def label(data: str) -> str:
    """A short name of a data set, fit for a folder or a title."""
    stem = re.split(r"[/:]", (data.partition("?")[0] if "://" in data else data).rstrip("/"))[-1]
    if "://" not in data and not data.startswith("hf:") and data != "scenes":
        stem = Path(data).expanduser().resolve().name
    for suffix in (".yaml", ".yml", *(s for f in FORMATS for s in f.suffixes)):
        stem = stem.removesuffix(suffix)
    return re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "data"
