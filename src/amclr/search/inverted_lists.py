"""Inverted lists (FAISS's IVF-Flat): approximate search that compares a query with the rows of a few lists only."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from amclr.search.parts import PART_ROWS
from amclr.utils.errors import UserError
from amclr.utils.files import written

RECALL = 0.95
"""Average share of the exact top ten that approximate search should find."""


@dataclass(frozen=True)
class InvertedLists:
    """Rows grouped by their nearest centroid.

    centroids (C, D) float32; nearest (N,) int32, the list of each row; probes: lists searched per query; recall: share
    of the exact top ten found with that many probes.
    """

    centroids: np.ndarray
    nearest: np.ndarray
    probes: int
    recall: float

    @classmethod
    def train(
        cls, vectors: np.ndarray, queries: np.ndarray, recall: float = RECALL, seed: int = 0, progress: bool = False
    ) -> InvertedLists:
        """Cluster embeddings (N, D), and choose the fewest probes that reach the recall on the queries (Q, D)."""
        import faiss

        rows, dim = vectors.shape
        count = int(min(4 * math.sqrt(rows), rows / 39)) or 1  # FAISS wants at least 39 training rows per list
        with tqdm(total=4, desc="Approximate search", unit="step", disable=not progress, leave=False) as steps:
            means = faiss.Kmeans(dim, count, niter=10, spherical=True, seed=1234 + seed, max_points_per_centroid=64)
            means.train(np.ascontiguousarray(vectors))
            steps.update()
            flat = faiss.IndexFlatIP(dim)
            flat.add(means.centroids)
            nearest = np.concatenate([
                flat.search(np.ascontiguousarray(vectors[k : k + PART_ROWS]), 1)[1][:, 0]
                for k in range(0, rows, PART_ROWS)
            ]).astype(np.int32)  # fmt: skip
            steps.update()
            exact = faiss.IndexFlatIP(dim)
            exact.add(np.ascontiguousarray(vectors))
            expected = exact.search(queries, 10)[1]
            del exact
            steps.update()
            lists = cls(means.centroids, nearest, 1, 0.0)
            index = faiss_index([vectors], dim, lists)
            for probes in sorted({min(count, 2**k) for k in range(count.bit_length() + 1)}):
                retrieved = index.search(queries, 10, params=faiss.SearchParametersIVF(nprobe=probes))[1]
                share = (retrieved[:, :, None] == expected[:, None, :]).any(2).mean()
                lists = replace(lists, probes=probes, recall=float(share))
                if share >= recall:
                    break
            steps.update()
        return lists

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the arrays, and return the metadata to put into index.json."""
        folder.mkdir(exist_ok=True)
        metadata: dict[str, Any] = {"probes": self.probes, "recall": self.recall, "rows": len(self.nearest)}
        for name in ("centroids", "nearest"):
            with written(folder / f"{name}.npy") as handle:
                np.save(handle, getattr(self, name), allow_pickle=False)
            metadata[name] = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
        return metadata

    @classmethod
    def read(cls, folder: Path, metadata: Mapping[str, Any] | None, rows: int) -> InvertedLists | None:
        """Read what `write` wrote, or None without metadata. Raises UserError if damaged, or not of `rows` rows."""
        if not metadata:
            return None
        arrays = []
        for name in ("centroids", "nearest"):
            try:
                content = (folder / f"{name}.npy").read_bytes()
            except OSError:
                content = b""
            if hashlib.sha256(content).hexdigest() != metadata[name]:
                raise UserError(f"'{folder / name}.npy' is damaged: rerun the same `amclr index` command to rebuild it")
            arrays.append(np.load(io.BytesIO(content), allow_pickle=False))
        if len(arrays[1]) != rows:
            raise UserError(f"'{folder}' belongs to another state of the index: rerun the same `amclr index` command")
        return cls(arrays[0], arrays[1], int(metadata["probes"]), float(metadata["recall"]))


def faiss_index(vectors: Iterable[np.ndarray], dim: int, lists: InvertedLists | None) -> Any:
    """Build a FAISS index of embeddings, given in blocks (n, D): exact, or with inverted lists."""
    import faiss

    if lists is None:
        flat = faiss.IndexFlatIP(dim)
        for block in vectors:
            flat.add(np.ascontiguousarray(block))
        return flat
    from faiss.contrib.ivf_tools import add_preassigned

    coarse = faiss.IndexFlatIP(dim)
    coarse.add(lists.centroids)
    index = faiss.IndexIVFFlat(coarse, dim, len(lists.centroids), faiss.METRIC_INNER_PRODUCT)
    index.referenced_objects = [coarse]  # FAISS does not own it
    index.is_trained = True
    start = 0
    for block in vectors:
        ids = np.arange(start, start + len(block), dtype=np.int64)
        nearest = lists.nearest[start : start + len(block)].astype(np.int64)
        add_preassigned(index, np.ascontiguousarray(block), nearest, ids)
        start += len(block)
    return index
