"""An index of images: their embeddings, what is known of them, thumbnails, and the model that made them.

index.json             which parts there are, with checksums, and what made them
model/                 the model, as `save_pretrained` writes it: an index needs nothing outside its folder
parts/NAME.npy         embeddings, unit rows, (n, D) float32
parts/NAME.thumbs      JPEG thumbnails, one after the other
parts/NAME.parquet     name, place, captions of every row; written last, so that a part is whole where it is
lists/                 of a large index: centroids and which of them each row is nearest to (see `Lists`)
rejects.jsonl          images that cannot be used, and why

A part is written at once and never changed. So what is killed loses the part that it was at, and nothing is embedded
twice; where images came, changed or went, the rows of the others stay.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

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
from amclr.utils.errors import UserError, require
from amclr.utils.files import write_text, written

FORMAT = 1
CHUNK = 256
"""Images that are embedded, and written, at a time."""
PART = 1 << 16
"""Most rows of a part, once an index is finished."""
APPROXIMATE_FROM = 200_000
"""Rows from which on a search looks at a part of them alone, unless told otherwise."""
RECALL = 0.95
"""Share of the true ten best that such a search is to find, on average."""


@dataclass(frozen=True)
class Part:
    """Some rows of an index, in files of its own."""

    name: str
    rows: int
    sha256: str
    """Of the embeddings' file."""


@dataclass(frozen=True)
class Row:
    """An image of an index."""

    name: str
    file: str
    offset: int
    size: int
    """Bytes from the offset on; -1 is the whole file."""
    stamp: str
    """What changes with the image: `Location.stamp`."""
    captions: tuple[str, ...]
    looks: bytes
    """Its perceptual hash: `image_hash`."""


class Index:
    """An index that has been made. `search` finds rows for queries; `row` and `thumbnail` say what they are.

    Raises UserError, saying what to type, where the folder has none, or is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = _read_about(folder)
        self.parts = [Part(**p) for p in self.about["parts"]]
        self.starts = np.cumsum([0, *(p.rows for p in self.parts)])
        self.dim = int(self.about["dim"])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"<amclr index '{self.folder}': {len(self):,} images, {self.dim} dimensions>"

    @cached_property
    def model(self) -> DualEncoder:
        """The model that made it."""
        return load(self.folder / "model")

    @cached_property
    def table(self) -> Any:
        """What is known of the rows: a pyarrow Table with the fields of `Row`."""
        pa, _ = _arrow()
        return pa.concat_tables([_schema().empty_table(), *(_read_table(self.folder, p) for p in self.parts)])

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        found = []
        for part in self.parts:
            try:
                array = np.load(self._file(part, "npy"), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise _damaged(self.folder, error) from None
            if array.shape != (part.rows, self.dim) or array.dtype != np.float32:
                raise _damaged(self.folder, f"part {part.name} holds {array.shape} of {array.dtype}")
            found.append(array)
        return found

    def vectors(self) -> Iterator[np.ndarray]:
        """Embeddings, (n, D) float32, part by part, each checked against its checksum."""
        for part, array in zip(self.parts, self._arrays, strict=True):
            with self._file(part, "npy").open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != part.sha256:
                    raise _damaged(self.folder, f"the embeddings of part {part.name} are not those that were written")
            yield array

    def vector(self, row: int) -> np.ndarray:
        """The embedding of a row, (D,) float32."""
        part, place = self._place(row)
        return np.array(self._arrays[part][place])

    def row(self, row: int) -> Row:
        """What is known of a row."""
        self._place(row)
        found = self.table.slice(row, 1).select(list(Row.__dataclass_fields__)).to_pylist()[0]
        return Row(**{**found, "captions": tuple(found["captions"])})

    def thumbnail(self, row: int) -> bytes:
        """The thumbnail of a row, a JPEG; empty where the index has none."""
        part, _ = self._place(row)
        at, size = (int(self.table[name][row].as_py()) for name in ("thumb_at", "thumb_size"))
        with self._file(self.parts[part], "thumbs").open("rb") as handle:
            return os.pread(handle.fileno(), size, at)

    def search(
        self, queries: np.ndarray | Tensor, k: int = 10, among: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best k rows of each query, best first: cosines (Q, k) float32, rows (Q, k) int64.

        queries: unit rows (Q, D). among (N,) bool: rows that may be found. Where there are fewer than k, places at
        the end hold row -1.
        """
        import faiss

        wanted = np.ascontiguousarray(np.asarray(queries, dtype=np.float32).reshape(-1, self.dim))
        k = min(k, len(self))
        if not k or not len(wanted):
            return np.zeros((len(wanted), 0), np.float32), np.zeros((len(wanted), 0), np.int64)
        selector = None
        if among is not None:
            bits = np.packbits(np.asarray(among, dtype=bool), bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
        found, probes = self._searcher
        if probes:
            # Of few that are asked for, the lists looked at may hold none: then all are.
            rare = among is not None and np.count_nonzero(among) < len(self) // 10
            how = faiss.SearchParametersIVF(sel=selector, nprobe=found.nlist if rare else probes)
        else:
            how = faiss.SearchParameters(sel=selector)
        scores, rows = found.search(wanted, k, params=how)
        return scores, rows

    @cached_property
    def _searcher(self) -> tuple[Any, int]:
        """FAISS's index, made of our own files, since its files are read by code that trusts them; lists to look at."""
        lists = Lists.read(self.folder / "lists", self.about.get("lists"), len(self))
        return searcher(self.vectors(), self.dim, lists), lists.probes if lists else 0

    def _place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} images")
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, row - int(self.starts[part])

    def _file(self, part: Part, kind: str) -> Path:
        return self.folder / "parts" / f"{part.name}.{kind}"


# -- search in a part of the rows -----------------------------------------------------------------


@dataclass(frozen=True)
class Lists:
    """Rows by the nearest of some centroids: a search looks at the rows of the nearest few alone (FAISS's IVF-Flat).

    centroids (C, D) float32; nearest (N,) int32, the list of each row; probes: lists that a search looks at; recall:
    share of the true ten best that it then found.
    """

    centroids: np.ndarray
    nearest: np.ndarray
    probes: int
    recall: float

    @classmethod
    def make(
        cls, vectors: np.ndarray, queries: np.ndarray, recall: float = RECALL, seed: int = 0, progress: bool = False
    ) -> Lists:
        """Lists for embeddings (N, D), with as few probes as find that share of the ten best of the queries (Q, D)."""
        import faiss

        rows, dim = vectors.shape
        count = int(min(4 * math.sqrt(rows), rows / 39)) or 1  # FAISS wants 39 rows a list to learn from
        steps = tqdm(total=4, desc="Approximate search", unit="step", disable=not progress, leave=False)
        with steps:
            means = faiss.Kmeans(dim, count, niter=10, spherical=True, seed=1234 + seed, max_points_per_centroid=64)
            means.train(np.ascontiguousarray(vectors))
            steps.update()
            flat = faiss.IndexFlatIP(dim)
            flat.add(means.centroids)
            nearest = np.concatenate([
                flat.search(np.ascontiguousarray(vectors[k : k + PART]), 1)[1][:, 0] for k in range(0, rows, PART)
            ]).astype(np.int32)  # fmt: skip
            steps.update()
            exact = faiss.IndexFlatIP(dim)
            exact.add(np.ascontiguousarray(vectors))
            true = exact.search(queries, 10)[1]
            del exact
            steps.update()
            made = cls(means.centroids, nearest, 1, 0.0)
            index = searcher([vectors], dim, made)
            for probes in sorted({min(count, 2**k) for k in range(count.bit_length() + 1)}):
                found = index.search(queries, 10, params=faiss.SearchParametersIVF(nprobe=probes))[1]
                share = (found[:, :, None] == true[:, None, :]).any(2).mean()
                made = replace(made, probes=probes, recall=float(share))
                if share >= recall:
                    break
            steps.update()
        return made

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the arrays, and return what index.json is to say of them."""
        folder.mkdir(exist_ok=True)
        told: dict[str, Any] = {"probes": self.probes, "recall": self.recall, "rows": len(self.nearest)}
        for name in ("centroids", "nearest"):
            with written(folder / f"{name}.npy") as handle:
                np.save(handle, getattr(self, name), allow_pickle=False)
            told[name] = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
        return told

    @classmethod
    def read(cls, folder: Path, told: Mapping[str, Any] | None, rows: int) -> Lists | None:
        """What `write` wrote; None where there is none. Raises UserError where it is damaged."""
        if not told:
            return None
        arrays = []
        for name in ("centroids", "nearest"):
            try:
                content = (folder / f"{name}.npy").read_bytes()
            except OSError:
                content = b""
            if hashlib.sha256(content).hexdigest() != told[name]:
                raise UserError(
                    f"'{folder / name}.npy' is damaged: make the lists anew by the same `amclr index` command"
                )
            arrays.append(np.load(io.BytesIO(content), allow_pickle=False))
        if len(arrays[1]) != rows:
            raise UserError(f"'{folder}' is of another state of the index: give the same `amclr index` command again")
        return cls(arrays[0], arrays[1], int(told["probes"]), float(told["recall"]))


def searcher(vectors: Any, dim: int, lists: Lists | None) -> Any:
    """FAISS's index of embeddings, given in parts: exact, or by lists."""
    import faiss

    if lists is None:
        flat = faiss.IndexFlatIP(dim)
        for part in vectors:
            flat.add(np.ascontiguousarray(part))
        return flat
    from faiss.contrib.ivf_tools import add_preassigned

    coarse = faiss.IndexFlatIP(dim)
    coarse.add(lists.centroids)
    index = faiss.IndexIVFFlat(coarse, dim, len(lists.centroids), faiss.METRIC_INNER_PRODUCT)
    index.referenced_objects = [coarse]  # FAISS does not own it
    index.is_trained = True
    start = 0
    for part in vectors:
        ids = np.arange(start, start + len(part), dtype=np.int64)
        nearest = lists.nearest[start : start + len(part)].astype(np.int64)
        add_preassigned(index, np.ascontiguousarray(part), nearest, ids)
        start += len(part)
    return index


# -- making one -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """What became of `build`."""

    folder: Path
    rows: int
    """Images in the index."""
    embedded: int
    """Of these, how many were embedded this time; the others were there."""
    gone: int
    """Images that were in it and are no more."""
    bad: int
    """Images that cannot be used: rejects.jsonl says why."""
    lists: Lists | None
    """Where a search looks at a part of the rows alone."""


@dataclass(frozen=True)
class Entry:
    """An image that was looked at: what the tower sees, its thumbnail and hash; or why it cannot be used."""

    sample: Sample
    stamp: str
    pixels: Tensor | None = None
    thumbnail: bytes = b""
    looks: bytes = b""
    fault: str = ""


def build(
    run: str | Path, data: str, out: str | Path = "", source: SourceConfig | None = None, thumbnails: int = 256,
    approximate: bool | None = None, cache: str = "", progress: bool = True,
) -> Built | None:  # fmt: skip
    """Index the images of a folder, archive or data set, or bring their index up to date.

    run: what `amclr.load` takes. out: its folder; empty makes indexes/NAME after the data. thumbnails: longer side in
    pixels, 0 for none. approximate: whether a search looks at a part of the rows alone; None: from `APPROXIMATE_FROM`
    rows on. Processes that torchrun started share the images; the first of them returns what became of it, the
    others None. Raises UserError, saying what to type.
    """
    _arrow()
    out = Path(out or f"indexes/{manifests.label(data)}")
    if thumbnails and not 16 <= thumbnails <= 2048:
        raise UserError(f"--thumbnails must be 0, or 16 to 2048 pixels, got {thumbnails}")
    processes = Processes.start()
    first = processes.rank == 0
    is_index = (out / "index.json").is_file()
    if out.is_file() or (not is_index and any(_others(out))):
        raise UserError(f"'{out}' is in use, and no index: give another --out")
    progress = progress and first
    samples = read_samples(data, source, cache, progress)
    model = load(run)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / LOCK, timeout=0) if first else nullcontext():
            if first:
                _begin(model, out, data)
            processes.wait()
            work = _Work(out, model, samples, progress)
            processes.wait()  # what others write from now on was not there before
            work.embed(processes, thumbnails)
            processes.wait()
            return work.finish(approximate) if first else None
    except Timeout:
        raise UserError(f"another amclr index is at work in '{out}': wait for it, or give another --out") from None


def read_samples(data: str, source: SourceConfig | None, cache: str, progress: bool) -> tuple[Sample, ...]:
    """The images of a folder, archive or data set, with captions or without. Raises UserError for none."""
    config = replace(Config(), data=data, source=source or SourceConfig(), cache=cache)
    samples = manifests.load(config, manifests.cache_folder(config), progress, only="all", bare=True).samples
    if not samples:
        raise UserError(f"there is no image in '{data}'")
    return samples


LOCK = ".lock"


def _others(folder: Path) -> Iterator[Path]:
    """What lies in a folder, but for what an index that was hardly begun leaves."""
    return (p for p in (folder.iterdir() if folder.is_dir() else ()) if p.name not in (LOCK, "model.part", "model"))


def _begin(model: DualEncoder, out: Path, data: str) -> None:
    """Make an index without rows, where there is none. Raises UserError where there is one of another model."""
    made_by = weights_digest(model.state_dict().values())
    if (out / "index.json").is_file():
        about = _read_about(out)
        if about["model"] != made_by:
            raise UserError(f"'{out}' was made by another model, and its embeddings cannot be compared with "
                            "this one's: give another --out, or remove it")  # fmt: skip
        _write_about(out, {**about, "data": data})
        return
    for name in ("model.part", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    model.save_pretrained(out / "model.part")
    os.replace(out / "model.part", out / "model")
    (out / "parts").mkdir(exist_ok=True)
    _write_about(out, {"amclr index": FORMAT, "data": data, "dim": model.config.dim, "model": made_by, "parts": []})


class _Work:
    """Bringing an index up to date: what is there, what is to be embedded, and what is left at the end."""

    def __init__(self, out: Path, model: DualEncoder, samples: Sequence[Sample], progress: bool) -> None:
        self.out, self.model, self.samples, self.progress = out, model, samples, progress
        self.about = _read_about(out)
        self.stamps = {s.name: s.image.stamp for s in samples}
        parts, listed = _whole_parts(out, self.about["model"]), len(self.about["parts"])
        before = self._places(parts[:listed])
        self.before = before.keys()
        there = before | self._places(parts[listed:])  # of a build that was stopped
        faults = {n: f for n, f in _read_faults(out).items() if f["stamp"] == self.stamps.get(n)}
        known = {n for n, (stamp, _, _) in there.items() if stamp == self.stamps.get(n)}
        self.todo = [s for s in samples if s.name not in known and s.name not in faults]

    def _places(self, parts: Sequence[Part]) -> dict[str, tuple[str, Part, int]]:
        """Of each image in some parts: its stamp, its part, its row there."""
        found = {}
        for part in parts:
            table = _read_table(self.out, part, ["name", "stamp"])
            for place, (name, stamp) in enumerate(zip(*(c.to_pylist() for c in table.columns), strict=True)):
                found[name] = (stamp, part, place)
        return found

    def embed(self, processes: Processes, thumbnails: int) -> None:
        """Embed this process's share of what is missing, a part at a time."""
        chunks = [self.todo[k : k + CHUNK] for k in range(0, len(self.todo), CHUNK)]
        had = len(self.samples) - len(self.todo)
        bar = tqdm(total=len(self.samples), initial=had, desc="Embedding images", unit="image",
                   disable=not self.progress)  # fmt: skip
        with bar:
            for entries in self._looked_at(chunks[processes.rank :: processes.count], thumbnails):
                if good := [e for e in entries if not e.fault]:
                    vectors = self.model.encode_image([e.pixels for e in good]).numpy()  # type: ignore[misc]
                    rows = [Row(e.sample.name, e.sample.image.file, e.sample.image.offset, e.sample.image.size,
                                e.stamp, e.sample.captions, e.looks) for e in good]  # fmt: skip
                    write_part(self.out, vectors, rows, [e.thumbnail for e in good], self.about["model"])
                _note_faults(self.out, [e for e in entries if e.fault])
                bar.update(min(len(entries) * processes.count, len(self.samples) - bar.n))

    def _looked_at(self, chunks: Sequence[Sequence[Sample]], thumbnails: int) -> Iterator[list[Entry]]:
        """The images of each chunk, decoded by threads while the chunk before is embedded."""
        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            ahead: list[Future[Entry]] = []
            try:
                for chunk in (*chunks, ()):
                    now, ahead = ahead, [pool.submit(self._look, s, thumbnails) for s in chunk]
                    if now:
                        yield [f.result() for f in now]
            finally:
                for future in ahead:
                    future.cancel()

    def _look(self, sample: Sample, thumbnails: int) -> Entry:
        stamp, size = self.stamps[sample.name], self.model.config.image_size
        try:
            image = read_image(sample.image, size)
            larger = image if 2 * size >= thumbnails else read_image(sample.image, thumbnails)
        except BadImage as error:
            return Entry(sample, stamp, fault=str(error))
        shown = thumbnail(larger, thumbnails) if thumbnails else b""
        return Entry(sample, stamp, self.model.prepare(image), shown, image_hash(image))

    def finish(self, approximate: bool | None) -> Built:
        """Put small parts together, leave out what has gone, and make what is searched by."""
        parts = _whole_parts(self.out, self.about["model"])
        there = self._places(parts)
        wanted = {n: place for n, place in there.items() if place[0] == self.stamps.get(n)}
        rows: dict[Part, list[int]] = {}
        for _, part, place in wanted.values():
            rows.setdefault(part, []).append(place)
        # What is whole and large stays; the rest is written anew, together.
        stays = [p for p in parts if len(rows.get(p, ())) == p.rows and p.rows >= PART // 2]
        loose = [(p, place) for p in parts if p not in stays for place in sorted(rows.get(p, ()))]
        if len(stays) < len(parts) and not (len(parts) == 1 and len(loose) == parts[0].rows):
            bar = tqdm(total=len(loose), desc="Putting parts together", unit="row", disable=not self.progress,
                       leave=False)  # fmt: skip
            with bar:
                for some in (loose[k : k + PART] for k in range(0, len(loose), PART)):
                    stays.append(_merged(self.out, some, self.about["model"]))
                    bar.update(len(some))
            parts = stays
        changed = [asdict(p) for p in parts] != self.about["parts"]
        about = {**self.about, "parts": [asdict(p) for p in parts]}
        if changed:
            about.pop("lists", None)  # of other rows
            _write_about(self.out, about)
        count = sum(p.rows for p in parts)
        lists = None
        if approximate or (approximate is None and count >= APPROXIMATE_FROM):
            with suppress(UserError):  # damaged: made anew
                lists = Lists.read(self.out / "lists", about.get("lists"), count)
            if lists is None:
                lists = self._lists()
                about["lists"] = lists.write(self.out / "lists")
        else:
            about.pop("lists", None)
            shutil.rmtree(self.out / "lists", ignore_errors=True)
        _write_about(self.out, about)
        kept = {p.name for p in parts}
        for file in (self.out / "parts").iterdir():
            if file.name.partition(".")[0] not in kept:
                file.unlink(missing_ok=True)
        faults = [f for n, f in _read_faults(self.out).items() if f["stamp"] == self.stamps.get(n)]
        write_text(self.out / "rejects.jsonl", "".join(json.dumps(f) + "\n" for f in faults))
        new = sum(s.name in wanted for s in self.todo)
        return Built(self.out, count, new, len(self.before - wanted.keys()), len(faults), lists)

    def _lists(self) -> Lists:
        index = Index(self.out)
        vectors = np.concatenate(list(index.vectors()))
        # Captions are what people will ask for, and lie elsewhere than images do.
        step = max(1, len(index) // 1000)
        asked = [captions[0] for captions in index.table["captions"][::step].to_pylist() if captions][:1000]
        queries = self.model.encode_text(asked).numpy() if asked else vectors[::step][:1000]
        return Lists.make(vectors, queries, progress=self.progress)


def report(built: Built) -> str:
    """What became of an index, in a few lines."""
    there = built.rows - built.embedded
    lines = [f"{built.folder}: {built.rows:,} images, {built.embedded:,} embedded now, {there:,} there before"
             + (f", {built.gone:,} gone" if built.gone else "")]  # fmt: skip
    if built.bad:
        lines.append(f"{built.bad:,} images cannot be used: {built.folder / 'rejects.jsonl'} says why")
    if found := built.lists:
        lines.append(f"approximate search: {found.probes} of {len(found.centroids):,} lists a query, which finds "
                     f"{100 * found.recall:.1f}% of the true ten best")  # fmt: skip
    return "\n".join([*lines, "", f'search it:  amclr search {built.folder} "a dog on the beach"'])


def thumbnail(image: Tensor, side: int) -> bytes:
    """A JPEG of an image, uint8 (3, H, W), its longer side at most `side` pixels."""
    small = Image.fromarray(image.permute(1, 2, 0).numpy())
    small.thumbnail((side, side))
    made = io.BytesIO()
    small.save(made, "JPEG", quality=82)
    return made.getvalue()


# -- files ----------------------------------------------------------------------------------------


def write_part(out: Path, vectors: np.ndarray, rows: Sequence[Row], thumbnails: Sequence[bytes], made_by: str) -> Part:
    """Write some rows as a part of the index in `out`: embeddings (n, D), what is known of them, their thumbnails.

    made_by: what index.json calls the model.
    """
    pa, _ = _arrow()
    columns: dict[str, list[Any]] = {n: [getattr(r, n) for r in rows] for n in Row.__dataclass_fields__}
    sizes = [len(t) for t in thumbnails]
    columns |= {"thumb_at": list(accumulate(sizes, initial=0))[:-1], "thumb_size": sizes}
    return _write(out, [vectors], pa.table(columns, schema=_schema()), thumbnails, made_by)


def _write(out: Path, vectors: Sequence[np.ndarray], table: Any, thumbnails: Iterable[bytes], made_by: str) -> Part:
    _, parquet = _arrow()
    named = hashlib.sha256()
    for column in ("name", "stamp"):
        for text in table[column].to_pylist():
            named.update(f"{text}\n".encode("utf-8", "surrogatepass"))
    name = named.hexdigest()[:16]
    file = out / "parts" / name
    with written(file.with_suffix(".npy")) as handle:
        np.save(handle, np.concatenate(vectors).astype(np.float32, copy=False), allow_pickle=False)
    with file.with_suffix(".npy").open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    with written(file.with_suffix(".thumbs")) as handle:
        for content in thumbnails:
            handle.write(content)
    told = {"amclr": json.dumps({"model": made_by, "sha256": sha256, "rows": table.num_rows})}
    with written(file.with_suffix(".parquet")) as handle:
        parquet.write_table(table.replace_schema_metadata(told), handle, compression="zstd")
    return Part(name, table.num_rows, sha256)


def _merged(out: Path, rows: Sequence[tuple[Part, int]], made_by: str) -> Part:
    """A part of the rows of others, in their order."""
    pa, _ = _arrow()
    vectors, tables = [], []
    for part, some in groupby(rows, key=lambda row: row[0]):
        places = [place for _, place in some]
        vectors.append(np.load(out / "parts" / f"{part.name}.npy", mmap_mode="r", allow_pickle=False)[places])
        tables.append(_read_table(out, part).take(places))

    def thumbnails() -> Iterator[bytes]:
        for (part, _), table in zip(groupby(rows, key=lambda row: row[0]), tables, strict=True):
            with (out / "parts" / f"{part.name}.thumbs").open("rb") as handle:
                for at, size in zip(table["thumb_at"].to_pylist(), table["thumb_size"].to_pylist(), strict=True):
                    yield os.pread(handle.fileno(), size, at)

    table = pa.concat_tables(tables)
    starts = np.cumsum([0, *table["thumb_size"].to_pylist()])[:-1]
    table = table.set_column(table.schema.get_field_index("thumb_at"), "thumb_at", pa.array(starts, pa.int64()))
    return _write(out, vectors, table, thumbnails(), made_by)


def _whole_parts(out: Path, made_by: str) -> list[Part]:
    """The parts in an index's folder that are whole, listed yet or not; those that are listed first."""
    _, parquet = _arrow()
    listed = [Part(**p) for p in _read_about(out)["parts"]]
    found = []
    for file in sorted((out / "parts").glob("*.parquet")):
        if file.stem in {p.name for p in listed}:
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or of something else
            told = json.loads(parquet.read_schema(file).metadata[b"amclr"])
            if told.pop("model") == made_by:
                found.append(Part(name=file.stem, **told))
    return listed + found


def _read_table(out: Path, part: Part, columns: list[str] | None = None) -> Any:
    pa, parquet = _arrow()
    try:
        table = parquet.read_table(out / "parts" / f"{part.name}.parquet", columns=columns).replace_schema_metadata()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(out, error) from None
    if table.num_rows != part.rows:
        raise _damaged(out, f"part {part.name} has {table.num_rows} rows instead of {part.rows}")
    return table


def _read_faults(out: Path) -> dict[str, dict[str, str]]:
    """Images that could not be used, by name: name, file, stamp, reason. A line cut off by a kill is left out."""
    found = {}
    with suppress(OSError):
        for line in (out / "rejects.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                fault = json.loads(line)
                found[fault["name"]] = fault
    return found


def _note_faults(out: Path, entries: Sequence[Entry]) -> None:
    if entries:
        lines = [{"name": e.sample.name, "file": str(e.sample.image), "stamp": e.stamp, "reason": e.fault}
                 for e in entries]  # fmt: skip
        with (out / "rejects.jsonl").open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(line) + "\n" for line in lines))


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if about["amclr index"] != FORMAT:
            raise UserError(f"'{folder}' is of format {about['amclr index']}, and this version of amclr reads "
                            f"{FORMAT}: make it anew by amclr index")  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"'{folder}' is no index (it has no index.json): make one by amclr index RUN IMAGES "
                        f"--out {folder}") from None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"index.json: {error!r}") from None
    return about


def _write_about(folder: Path, about: Mapping[str, Any]) -> None:
    write_text(folder / "index.json", json.dumps(about, indent=1) + "\n")


def _damaged(folder: Path, what: object) -> UserError:
    reason = (str(what).strip().splitlines() or [type(what).__name__])[0]
    return UserError(f"the index '{folder}' is damaged ({reason}): remove it, and make it anew by amclr index")


def _arrow() -> tuple[Any, Any]:
    """Apache Arrow and its Parquet reader. Raises UserError where they, or FAISS, are not installed."""
    require("an index", "search", "faiss", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    return pyarrow, parquet


def _schema() -> Any:
    pa, _ = _arrow()
    return pa.schema([
        ("name", pa.string()), ("file", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
        ("stamp", pa.string()), ("captions", pa.list_(pa.string())), ("looks", pa.binary()),
        ("thumb_at", pa.int64()), ("thumb_size", pa.int32()),
    ])  # fmt: skip
