"""Approximate search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amclr.search.index import Index
from amclr.search.inverted_lists import InvertedLists, faiss_index
from amclr.utils.errors import UserError
from tests.search.conftest import flip_bit, write_index


def test_approximate_search(saved: Path, tmp_path: Path) -> None:
    """A few lists hold most of the exact top ten; written and read lists give the same results."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(40, 16))
    vectors = (centres[draw.integers(0, 40, 6000)] + 0.3 * draw.normal(size=(6000, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lists = InvertedLists.train(vectors, vectors[::20])
    assert lists.recall >= 0.95 and 1 <= lists.probes < len(lists.centroids) // 4
    index = write_index(saved, vectors, tmp_path / "index", lists)
    exact = faiss_index([vectors], 16, None).search(vectors[::20], 10)[1]
    rows = index.search(vectors[::20], 10)[1]
    share = (rows[:, :, None] == exact[:, None, :]).any(2).mean()
    assert share == pytest.approx(lists.recall)
    one = np.zeros(6000, dtype=bool)
    one[4321] = True
    assert index.search(vectors[:1], 3, one)[1].tolist() == [[4321, -1, -1]], (
        "a single allowed row is found in any list"
    )
    flip_bit(tmp_path / "index" / "lists" / "centroids.npy")
    with pytest.raises(UserError, match=r"centroids.npy' is damaged"):
        Index(tmp_path / "index").search(vectors[:1])
