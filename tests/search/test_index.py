"""The reader of an index: exact search, and rows that do not exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.search.conftest import write_index


def test_search_is_exact_within_a_mask(saved: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(300, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = write_index(saved, vectors, tmp_path / "index")
    queries = vectors[:7] + 0.1
    some = draw.random(300) < 0.3
    for mask in (None, some, np.zeros(300, dtype=bool)):
        scores, rows = index.search(queries, 10, mask)
        cosines = queries @ vectors.T
        if mask is not None:
            cosines[:, ~mask] = -np.inf
        order = np.argsort(-cosines, axis=1)[:, :10]
        exists = np.isfinite(np.take_along_axis(cosines, order, 1))
        assert np.array_equal(rows, np.where(exists, order, -1))
        np.testing.assert_allclose(scores[exists], np.take_along_axis(cosines, order, 1)[exists], atol=1e-5)
    assert index.search(queries, 1000)[1].shape == (7, 300)
    with pytest.raises(IndexError, match="row 300 of an index of 300"):
        index.vector(300)
