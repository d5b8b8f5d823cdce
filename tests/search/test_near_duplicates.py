"""Near-duplicates by embedding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from amclr.search.index import Index
from amclr.search.near_duplicates import dedup


def test_alike_embeddings_are_joined(index: Index, tmp_path: Path) -> None:
    """Against all pairs, and what is joined by such, in loops."""
    vectors = torch.from_numpy(np.concatenate(list(index.vectors())))
    cosines = vectors @ vectors.T
    threshold = float(cosines.flatten().sort().values[-260])
    _, groups = dedup(index.folder, tmp_path / "d.csv", threshold, progress=False)
    label = list(range(len(vectors)))
    for i in range(len(label)):
        for j in range(i):
            if cosines[i, j] >= threshold and label[i] != label[j]:
                label = [min(label[i], label[j]) if x in (label[i], label[j]) else x for x in label]
    expected = [{k for k, x in enumerate(label) if x == g} for g in set(label)]
    assert sorted(map(sorted, (e for e in expected if len(e) > 1))) == sorted(g.tolist() for g in groups)
    assert groups and any(len(g) > 2 for g in groups)
