"""Our index against FAISS used directly, on many vectors: build time, memory, recall@10, queries per second.

    python -m benchmarks.search                    # a million vectors; about ten minutes on two cores
    python -m benchmarks.search --rows 100000

The vectors are synthetic: unit rows around 20,000 centres, which are clustered themselves, like images of many kinds.
Queries lie near some of them. FAISS directly is IndexFlatIP for exact search, and index_factory's IVF-Flat with as many
lists and probes as ours chose for approximate search. Each row is measured in a process of its own; memory excludes the
libraries, and includes the vectors passed to FAISS.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

DIM, BATCH, QUERIES = 256, 32, 1000


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def blocks(rows: int) -> Iterator[np.ndarray]:
    """Yield the vectors, a part at a time."""
    draw = np.random.default_rng(0)
    kinds = unit(draw.normal(size=(500, DIM)))
    centres = unit(kinds[draw.integers(0, 500, 20_000)] + 0.06 * draw.normal(size=(20_000, DIM)))
    for start in range(0, rows, 1 << 16):
        size = min(1 << 16, rows - start)
        yield unit(
            centres[draw.integers(0, len(centres), size)] + 0.04 * draw.normal(size=(size, DIM)).astype(np.float32)
        )


def queries(rows: int) -> np.ndarray:
    draw = np.random.default_rng(1)
    first = next(blocks(rows))
    some = first[draw.integers(0, len(first), QUERIES)]
    return unit(some + 0.04 * draw.normal(size=(QUERIES, DIM)))


def memory(what: str) -> float:
    """Memory of this process in MB: `VmRSS` is current, `VmHWM` the peak."""
    match = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) / 1024 if match else float("nan")


def timed(search: Any, batch: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Search, and return the rows, and the queries per second one by one and in batches."""
    search(batch[:1])
    began = time.perf_counter()
    for k in range(100):
        search(batch[k : k + 1])
    one = 100 / (time.perf_counter() - began)
    began = time.perf_counter()
    found = np.concatenate([search(batch[k : k + BATCH]) for k in range(0, len(batch), BATCH)])
    return found, one, len(batch) / (time.perf_counter() - began)


def make_index(folder: Path, rows: int, lists: bool, out: Any) -> None:
    """Build ours, from vectors to files."""
    from amclr.search.inverted_lists import InvertedLists
    from amclr.search.parts import FORMAT, IndexedImage, write_part

    base = memory("VmRSS")
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    began, at, parts = time.perf_counter(), 0, []
    for block in blocks(rows):
        images = [IndexedImage(f"{at + k:08d}.jpg", "", 0, -1, "", (), b"") for k in range(len(block))]
        parts.append(vars(write_part(folder, block, images, [b""] * len(block), "digest")))
        at += len(block)
    metadata: dict[str, Any] = {"amclr index": FORMAT, "data": "", "dim": DIM, "model": "digest", "parts": parts}
    if lists:
        vectors = np.concatenate(list(blocks(rows)))
        metadata["lists"] = InvertedLists.train(vectors, queries(rows)[::2], progress=True).write(folder / "lists")
    (folder / "index.json").write_text(json.dumps(metadata))
    out.put(
        {
            "seconds": time.perf_counter() - began,
            "MB": memory("VmHWM") - base,
            "probes": metadata.get("lists", {}).get("probes"),
        }
    )


def use_index(folder: Path, rows: int, out: Any) -> None:
    from amclr.search.index import Index

    batch, base, began = queries(rows), memory("VmRSS"), time.perf_counter()
    index = Index(folder)
    index.search(batch[:1])
    opened = time.perf_counter() - began
    found, one, many = timed(lambda q: index.search(q, 10)[1], batch)
    out.put({"opened": opened, "MB": memory("VmRSS") - base, "found": found, "one": one, "many": many})


def direct(rows: int, count: int, probes: int, out: Any) -> None:
    """FAISS directly; exact if `count`, the number of lists, is 0."""
    import faiss

    base = memory("VmRSS")
    vectors, batch, began = np.concatenate(list(blocks(rows))), queries(rows), time.perf_counter()
    if count:
        index = faiss.index_factory(DIM, f"IVF{count},Flat", faiss.METRIC_INNER_PRODUCT)
        index.cp.spherical, index.cp.niter, index.cp.max_points_per_centroid = True, 10, 64
        index.train(vectors)
        index.nprobe = probes
    else:
        index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    seconds, peak = time.perf_counter() - began, memory("VmHWM") - base
    del vectors
    found, one, many = timed(lambda q: index.search(q, 10)[1], batch)
    out.put({"seconds": seconds, "MB": peak, "found": found, "one": one, "many": many})


def alone(work: Any, *arguments: Any) -> dict[str, Any]:
    """Run `work` in a process of its own, and return its result."""
    context = multiprocessing.get_context("spawn")
    out: Any = context.Queue()
    process = context.Process(target=work, args=(*arguments, out))
    process.start()
    found = out.get()
    process.join()
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="folder to write the indexes to; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        exact, lists = Path(place) / "exact", Path(place) / "lists"
        made = {
            exact: alone(make_index, exact, options.rows, False),
            lists: alone(make_index, lists, options.rows, True),
        }
        lists_metadata = json.loads((lists / "index.json").read_text())["lists"]
        count = len(np.load(lists / "lists" / "centroids.npy"))
        used = {f: alone(use_index, f, options.rows) for f in (exact, lists)}
        size = {f: sum(x.stat().st_size for x in f.rglob("*") if x.is_file()) / 2**20 for f in (exact, lists)}
        flat, ivf = alone(direct, options.rows, 0, 0), alone(direct, options.rows, count, lists_metadata["probes"])
    true = flat["found"]

    def recall(found: np.ndarray) -> str:
        return f"{100 * (found[:, :, None] == true[:, None, :]).any(2).mean():.1f}%"

    print(f"{options.rows:,} vectors of {DIM} dimensions, {QUERIES:,} queries, {os.cpu_count()} cores; "
          f"{count:,} lists, of which a query looks at {lists_metadata['probes']}\n")  # fmt: skip
    print("| | made, s | its peak, MB | on disk, MB | opened, s | in use, MB | recall@10 | queries/s, one by one "
          f"| in batches of {BATCH} |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for name, folder in (("amclr, exact", exact), ("amclr, lists", lists)):
        m, u = made[folder], used[folder]
        print(f"| {name} | {m['seconds']:.0f} | {m['MB']:,.0f} | {size[folder]:,.0f} | {u['opened']:.1f} | {u['MB']:,.0f} "
              f"| {recall(u['found'])} | {u['one']:,.0f} | {u['many']:,.0f} |")  # fmt: skip
    for name, d in (("FAISS, IndexFlatIP", flat), (f"FAISS, IVF{count},Flat", ivf)):
        print(f"| {name} | {d['seconds']:.0f} | {d['MB']:,.0f} | | | | {recall(d['found'])} | {d['one']:,.0f} "
              f"| {d['many']:,.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
