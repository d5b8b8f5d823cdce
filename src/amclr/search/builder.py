"""Building an index of images, and bringing it up to date: only new and changed images are embedded."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.images.decode import BadImage, read_image
from amclr.data.images.duplicates import image_hash
from amclr.data.manifest import Sample
from amclr.distributed.world import Processes
from amclr.models.averaging import weights_digest
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.loading import load
from amclr.search.index import Index
from amclr.search.inverted_lists import InvertedLists
from amclr.search.parts import (
    FORMAT,
    PART_ROWS,
    IndexedImage,
    Part,
    append_rejects,
    arrow,
    complete_parts,
    merge_parts,
    read_metadata,
    read_rejects,
    read_table,
    write_metadata,
    write_part,
)
from amclr.utils.errors import UserError
from amclr.utils.files import write_text

CHUNK = 256
"""Images that are embedded and written at a time."""
APPROXIMATE_FROM = 200_000
"""Rows from which on search is approximate, unless told otherwise."""
LOCK = ".lock"


@dataclass(frozen=True)
class BuildResult:
    """What `build` did."""

    folder: Path
    rows: int
    """Images in the index."""
    embedded: int
    """Images embedded by this build; the others were in the index before."""
    removed: int
    """Images that were in the index and no longer exist."""
    rejected: int
    """Images that cannot be used; rejects.jsonl lists the reasons."""
    lists: InvertedLists | None
    """Present if search is approximate."""


@dataclass(frozen=True)
class PreparedImage:
    """A decoded image: model input, thumbnail and perceptual hash; or the reason why it cannot be used."""

    sample: Sample
    stamp: str
    pixels: Tensor | None = None
    thumbnail: bytes = b""
    perceptual_hash: bytes = b""
    fault: str = ""


def build(
    run: str | Path, data: str, out: str | Path = "", source: SourceConfig | None = None, thumbnails: int = 256,
    approximate: bool | None = None, cache: str = "", progress: bool = True,
) -> BuildResult | None:  # fmt: skip
    """Index the images of a folder, archive or data set, or bring their index up to date.

    run: what `amclr.load` takes. out: the index's folder; empty makes indexes/NAME after the data. thumbnails: longer
    side in pixels, 0 for none. approximate: search with inverted lists; None: from `APPROXIMATE_FROM` rows on.
    Processes started by torchrun share the images; the first returns the result, the others None. Raises UserError,
    saying what to type.
    """
    arrow()
    out = Path(out or f"indexes/{manifests.label(data)}")
    if thumbnails and not 16 <= thumbnails <= 2048:
        raise UserError(f"--thumbnails must be 0, or 16 to 2048 pixels, got {thumbnails}")
    processes = Processes.start()
    first = processes.rank == 0
    is_index = (out / "index.json").is_file()
    if out.is_file() or (not is_index and any(_foreign_files(out))):
        raise UserError(f"'{out}' is in use and not an index: give another --out")
    progress = progress and first
    samples = read_samples(data, source, cache, progress)
    model = load(run)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK, timeout=0) if first else nullcontext():
            if first:
                _initialise(model, out, data)
            processes.wait()
            update = _Update(out, model, samples, progress)
            processes.wait()  # no process may list the parts after another has written new ones
            update.embed(processes, thumbnails)
            processes.wait()
            return update.finish(approximate) if first else None
    except Timeout:
        raise UserError(f"another amclr index is writing to '{out}': wait for it, or give another --out") from None


def report(result: BuildResult) -> str:
    """Describe what `build` did, in a few lines."""
    lines = [f"{result.folder}: {result.rows:,} images, {result.embedded:,} newly embedded, "
             f"{result.rows - result.embedded:,} already there"
             + (f", {result.removed:,} removed" if result.removed else "")]  # fmt: skip
    if result.rejected:
        lines.append(f"{result.rejected:,} images cannot be used: see {result.folder / 'rejects.jsonl'}")
    if lists := result.lists:
        lines.append(f"approximate search: {lists.probes} of {len(lists.centroids):,} lists per query find "
                     f"{100 * lists.recall:.1f}% of the exact top ten")  # fmt: skip
    return "\n".join([*lines, "", f'search it:  amclr search {result.folder} "a dog on the beach"'])


def read_samples(data: str, source: SourceConfig | None, cache: str, progress: bool) -> tuple[Sample, ...]:
    """The images of a folder, archive or data set, with or without captions. Raises UserError if there are none."""
    config = replace(Config(), data=data, source=source or SourceConfig(), cache=cache)
    samples = manifests.load(config, manifests.cache_folder(config), progress, only="all", bare=True).samples
    if not samples:
        raise UserError(f"there is no image in '{data}'")
    return samples


def _foreign_files(folder: Path) -> Iterator[Path]:
    """The files in a folder that an interrupted first build does not leave behind."""
    return (p for p in (folder.iterdir() if folder.is_dir() else ()) if p.name not in (LOCK, "model.part", "model"))


def _initialise(model: DualEncoder, out: Path, data: str) -> None:
    """Write an index without rows, if there is none. Raises UserError if there is one of another model."""
    model_digest = weights_digest(model.state_dict().values())
    if (out / "index.json").is_file():
        metadata = read_metadata(out)
        if metadata["model"] != model_digest:
            raise UserError(f"'{out}' was built with another model, whose embeddings cannot be compared with this "
                            "one's: give another --out, or remove it")  # fmt: skip
        write_metadata(out, {**metadata, "data": data})
        return
    for name in ("model.part", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    model.save_pretrained(out / "model.part")
    os.replace(out / "model.part", out / "model")
    (out / "parts").mkdir(exist_ok=True)
    write_metadata(
        out, {"amclr index": FORMAT, "data": data, "dim": model.config.dim, "model": model_digest, "parts": []}
    )


class _Update:
    """Brings an index up to date with its images: which are missing, their embedding, and the final layout."""

    def __init__(self, out: Path, model: DualEncoder, samples: Sequence[Sample], progress: bool) -> None:
        self.out, self.model, self.samples, self.progress = out, model, samples, progress
        self.metadata = read_metadata(out)
        self.stamps = {s.name: s.image.stamp for s in samples}
        parts, listed = complete_parts(out, self.metadata["model"]), len(self.metadata["parts"])
        indexed = self._locate(parts[:listed])
        self.indexed_before = indexed.keys()
        embedded = indexed | self._locate(parts[listed:])  # of an interrupted build
        current = {name for name, (stamp, _, _) in embedded.items() if stamp == self.stamps.get(name)}
        rejects = self._current_rejects()
        self.missing = [s for s in samples if s.name not in current and s.name not in rejects]

    def _locate(self, parts: Sequence[Part]) -> dict[str, tuple[str, Part, int]]:
        """The stamp, part and position in that part of each image in some parts, by name."""
        locations = {}
        for part in parts:
            table = read_table(self.out, part, ["name", "stamp"])
            for position, (name, stamp) in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
                locations[name] = (stamp, part, position)
        return locations

    def _current_rejects(self) -> dict[str, dict[str, str]]:
        """Images known to be unusable that have not changed since, by name."""
        return {n: r for n, r in read_rejects(self.out).items() if r["stamp"] == self.stamps.get(n)}

    def embed(self, processes: Processes, thumbnails: int) -> None:
        """Embed this process's share of the missing images, and write them in parts of `CHUNK`."""
        chunks = [self.missing[k : k + CHUNK] for k in range(0, len(self.missing), CHUNK)]
        initial = len(self.samples) - len(self.missing)
        with tqdm(
            total=len(self.samples), initial=initial, desc="Embedding images", unit="image", disable=not self.progress
        ) as bar:
            for images in self._prepared(chunks[processes.rank :: processes.count], thumbnails):
                if usable := [image for image in images if not image.fault]:
                    vectors = self.model.encode_image([image.pixels for image in usable]).numpy()  # type: ignore[misc]
                    rows = [_stored(image) for image in usable]
                    write_part(self.out, vectors, rows, [i.thumbnail for i in usable], self.metadata["model"])
                append_rejects(self.out, [
                    {"name": i.sample.name, "file": str(i.sample.image), "stamp": i.stamp, "reason": i.fault}
                    for i in images if i.fault
                ])  # fmt: skip
                bar.update(min(len(images) * processes.count, len(self.samples) - bar.n))

    def _prepared(self, chunks: Sequence[Sequence[Sample]], thumbnails: int) -> Iterator[list[PreparedImage]]:
        """Decode each chunk in threads while the chunk before it is embedded."""
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            ahead: list[Future[PreparedImage]] = []
            try:
                for chunk in (*chunks, ()):
                    due, ahead = ahead, [pool.submit(self._prepare, sample, thumbnails) for sample in chunk]
                    if due:
                        yield [future.result() for future in due]
            finally:
                for future in ahead:
                    future.cancel()

    def _prepare(self, sample: Sample, thumbnails: int) -> PreparedImage:
        stamp, size = self.stamps[sample.name], self.model.config.image_size
        try:
            image = read_image(sample.image, size)
            larger = image if 2 * size >= thumbnails else read_image(sample.image, thumbnails)
        except BadImage as error:
            return PreparedImage(sample, stamp, fault=str(error))
        jpeg = make_thumbnail(larger, thumbnails) if thumbnails else b""
        return PreparedImage(sample, stamp, self.model.prepare(image), jpeg, image_hash(image))

    def finish(self, approximate: bool | None) -> BuildResult:
        """Merge small parts, drop rows of images that no longer exist, and make or remove the inverted lists."""
        parts = complete_parts(self.out, self.metadata["model"])
        current = {n: location for n, location in self._locate(parts).items() if location[0] == self.stamps.get(n)}
        rows: dict[Part, list[int]] = {}
        for _, part, position in current.values():
            rows.setdefault(part, []).append(position)
        parts = self._compacted(parts, rows)
        metadata = {**self.metadata, "parts": [asdict(p) for p in parts]}
        if metadata["parts"] != self.metadata["parts"]:
            metadata.pop("lists", None)  # they belong to the old rows
            write_metadata(self.out, metadata)
        count = sum(p.rows for p in parts)
        lists = None
        if approximate or (approximate is None and count >= APPROXIMATE_FROM):
            with suppress(UserError):  # damaged lists are rebuilt
                lists = InvertedLists.read(self.out / "lists", metadata.get("lists"), count)
            if lists is None:
                lists = self._train_lists()
                metadata["lists"] = lists.write(self.out / "lists")
        else:
            metadata.pop("lists", None)
            shutil.rmtree(self.out / "lists", ignore_errors=True)
        write_metadata(self.out, metadata)
        listed = {p.name for p in parts}
        for file in (self.out / "parts").iterdir():
            if file.name.partition(".")[0] not in listed:
                file.unlink(missing_ok=True)
        rejects = self._current_rejects().values()
        write_text(self.out / "rejects.jsonl", "".join(json.dumps(reject) + "\n" for reject in rejects))
        embedded = sum(s.name in current for s in self.missing)
        removed = len(self.indexed_before - current.keys())
        return BuildResult(self.out, count, embedded, removed, len(rejects), lists)

    def _compacted(self, parts: list[Part], rows: dict[Part, list[int]]) -> list[Part]:
        """Keep large parts of which every row is current, and rewrite the current rows of all others together."""
        compact = [p for p in parts if len(rows.get(p, ())) == p.rows and p.rows >= PART_ROWS // 2]
        loose = [(p, position) for p in parts if p not in compact for position in sorted(rows.get(p, ()))]
        if len(compact) == len(parts) or (len(parts) == 1 and len(loose) == parts[0].rows):
            return parts
        with tqdm(
            total=len(loose), desc="Merging parts", unit="row", disable=not self.progress, leave=False
        ) as bar:  # fmt: skip
            for start in range(0, len(loose), PART_ROWS):
                batch = loose[start : start + PART_ROWS]
                compact.append(merge_parts(self.out, batch, self.metadata["model"]))
                bar.update(len(batch))
        return compact

    def _train_lists(self) -> InvertedLists:
        index = Index(self.out)
        vectors = np.concatenate(list(index.vectors()))
        # Users search with texts, whose embeddings lie elsewhere than those of images: captions stand in for them.
        step = max(1, len(index) // 1000)
        texts = [captions[0] for captions in index.table["captions"][::step].to_pylist() if captions][:1000]
        queries = self.model.encode_text(texts).numpy() if texts else vectors[::step][:1000]
        return InvertedLists.train(vectors, queries, progress=self.progress)


def _stored(image: PreparedImage) -> IndexedImage:
    location = image.sample.image
    return IndexedImage(
        image.sample.name, location.file, location.offset, location.size, image.stamp, image.sample.captions,
        image.perceptual_hash,
    )  # fmt: skip


def make_thumbnail(image: Tensor, side: int) -> bytes:
    """Encode an image, uint8 (3, H, W), as a JPEG whose longer side is at most `side` pixels."""
    small = Image.fromarray(image.permute(1, 2, 0).numpy())
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=82)
    return content.getvalue()
