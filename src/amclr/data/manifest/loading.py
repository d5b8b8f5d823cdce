"""Reading a data set that settings name: from a source to a manifest that is ready to train on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from amclr.config.checks import fold_of
from amclr.config.schema import Config, SourceConfig
from amclr.data.images.scan import scan
from amclr.data.manifest.collect import collect
from amclr.data.manifest.mix import merged, read_mix
from amclr.data.manifest.samples import Manifest
from amclr.data.manifest.splits import with_fold, with_splits
from amclr.data.scenes import dataset as scenes
from amclr.data.sources import columnar, remote
from amclr.data.sources.formats import find
from amclr.data.sources.rows import Reading, printable
from amclr.data.text.store import attach, find_store
from amclr.utils.errors import UserError
from amclr.utils.randomness import derive


def cache_folder(config: Config) -> Path:
    """The folder of generated data, copies, scan verdicts and cached features."""
    return Path(config.cache or os.environ.get("AMCLR_CACHE") or "~/.cache/amclr").expanduser()


def prepare(config: Config, cache: Path, progress: bool = True, scan_all: bool = False, only: str = "") -> Manifest:
    """Load the data set, decode every image once, and drop unusable samples, up to the limit `source.max_bad`.

    If the set has more than `source.scan_up_to` images, they are decoded only with `scan_all`; otherwise images
    that an earlier scan found bad are dropped, and training skips the rest.
    only: as in `load`; the manifest then holds the samples of that split alone. No image is decoded here, because
    evaluation decodes them all anyway, and drops and counts bad ones.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder '{cache}' ({error.strerror}): give another --cache, or set AMCLR_CACHE"
        ) from None
    manifest = load(config, cache, progress, only)
    if only in folded_splits(config.source):  # all rows were read, and the limit is a share of them
        manifest.enforce_limit(config.source.max_bad)
        return replace(manifest, samples=manifest.split(only))
    if only:
        manifest = replace(manifest, samples=manifest.split(only))
        if not (manifest.samples or manifest.rejects):
            raise UserError(f"split '{only}' of {config.data} is empty")
    manifest.enforce_limit(config.source.max_bad)
    if only:
        return manifest
    verdicts = scan(
        [s.image for s in manifest.samples],
        config.model.image_size,
        cache / f"scan-{derive(str(manifest.root.resolve())):016x}.jsonl",
        progress,
        decode=scan_all or len(manifest.samples) <= config.source.scan_up_to,
        hashes=config.source.duplicates == "positives",
    )
    manifest = manifest.with_verdicts(verdicts)
    manifest.enforce_limit(config.source.max_bad)
    return manifest


def load(config: Config, cache: Path, progress: bool = True, only: str = "", bare: bool = False) -> Manifest:
    """Read the data set that `config.data` names (see its help), without decoding its images.

    only: read one split; rows of other splits are skipped, valid or not, and there need be no training images.
    bare: include images without a usable caption; a folder without a captions file is then read as its images at
    any depth.
    Raises UserError if there is no data set, or nothing in it can be read.
    """
    data = config.data
    try:
        fold = fold_of(config.source.fold)
    except ValueError as error:
        raise UserError(str(error)) from None
    if only in folded_splits(config.source):
        only = ""
    if data.endswith((".yaml", ".yml")) and "://" not in data and not data.startswith(("hf:", "pipe:")):
        file = Path(data).expanduser()
        parts = [(entry, load(part, cache, progress, only, bare)) for entry, part in read_mix(file, config)]
        return merged(file, parts)
    manifest = _read(config, cache, progress, only, bare)
    if only == "val" and "val" not in manifest.splits and "train" in manifest.splits:
        return load(config, cache, progress)  # val is held out of the training images, which were skipped
    manifest = _with_paraphrases(manifest, config.source.paraphrases)
    manifest = with_splits(manifest, config.source.val_fraction, only)
    return with_fold(manifest, *fold) if fold and not only else manifest


def folded_splits(source: SourceConfig) -> tuple[str, ...]:
    """The splits that a fold makes out of the training images, for which all rows must be read."""
    return ("train", "val") if source.fold else ()


def _read(config: Config, cache: Path, progress: bool, only: str, bare: bool) -> Manifest:
    """Read a single data set: the built-in one, one of the Hugging Face Hub, one behind a URL, or a path."""
    data = config.data
    if data == "scenes":
        folder = cache / f"scenes-{derive(scenes.FORMAT, repr(config.scenes)):016x}"
        scenes.write_scenes(folder, config.scenes, progress=progress)
        manifest = _read_path(folder, config, cache, progress, only, bare)
        notes = scenes.notes(folder, config.scenes)
        return replace(manifest, zeroshot=folder / "zeroshot", format="scenes", notes=notes)
    if data.startswith("pipe:"):
        raise UserError(f"'{printable(data)}' would run a command: save its output as a file and give that")
    if data.startswith("hf:"):
        name = data.removeprefix("hf:")
        reading = Reading(Path(name), [], config.source, cache, progress, bare)
        return collect(reading, columnar.read_hub_dataset(reading, name), "Hugging Face dataset", only)
    path = remote.fetch(data, cache, progress) if "://" in data else Path(data).expanduser()
    return _read_path(path, config, cache, progress, only, bare)


def _read_path(path: Path, config: Config, cache: Path, progress: bool, only: str, bare: bool) -> Manifest:
    root, files, kind = find(path, config.source, bare)
    reading = Reading(root, files, config.source, cache, progress, bare)
    return collect(reading, kind.read(reading), kind.name, only)


def _with_paraphrases(manifest: Manifest, setting: str) -> Manifest:
    """The manifest with the paraphrases that `setting` names; their unusable rows become rejects too."""
    store = find_store(manifest.root, setting)
    if store is None:
        return manifest
    return replace(
        manifest,
        samples=attach(manifest.samples, store),
        rejects=manifest.rejects + store.rejects,
        rows=manifest.rows + (0 if store.version else store.rows),
        paraphrases=(str(store.path),),
    )
