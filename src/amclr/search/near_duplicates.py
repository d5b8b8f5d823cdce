"""`amclr dedup`: near-duplicates among the images of an index, by perceptual hash or by embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from amclr.data.images.decode import BadImage, read_image
from amclr.data.images.duplicates import alone_unnumbered, as_rows, joined, largest, near_duplicates
from amclr.search.csv_output import csv_text, spreadsheet_safe
from amclr.search.index import Index
from amclr.search.parts import COLUMNS
from amclr.utils.errors import UserError
from amclr.utils.files import written

if TYPE_CHECKING:
    from torch import Tensor


def dedup(
    folder: Path | str, out: Path, threshold: float | None = None, progress: bool = True
) -> tuple[Index, list[np.ndarray]]:
    """Group the near-duplicates of an index, write them to a CSV, and return the index and the groups, largest first.

    Without a threshold, by perceptual hash: the same image re-encoded, resized or brightened
    (`amclr.data.images.duplicates`). With one, by embedding: images with at least that cosine are joined. Columns:
    group, image, file, cosine to the group's first image.
    """
    index = Index(folder)
    if threshold is None:
        labels = near_duplicates(as_rows(index.table[COLUMNS["perceptual_hash"]].to_pylist()))
    elif not 0 < threshold <= 1:
        raise UserError(f"--threshold must lie between 0 and 1, got {threshold:g}")
    else:
        labels = _group_by_cosine(index, threshold, progress)
    groups = largest(labels)
    lines: list[list[Any]] = [["group", "image", "file", "cosine"]]
    for number, members in enumerate(groups, 1):
        first = index.vector(int(members[0]))
        for row in members.tolist():
            image, cosine = index.image(row), float(first @ index.vector(row))
            lines.append([number, spreadsheet_safe(image.name), spreadsheet_safe(image.file), f"{cosine:.4f}"])
    with written(out) as handle:
        handle.write(csv_text(lines).encode("utf-8", "backslashreplace"))
    return index, groups


def _group_by_cosine(index: Index, threshold: float, progress: bool) -> np.ndarray:
    """Group labels (N,): the lowest row of the group, or -1 for images without a near-duplicate. Exact, O(N^2)."""
    vectors = torch.from_numpy(np.concatenate([*index.vectors(), np.zeros((0, index.dim), np.float32)]))
    labels = np.arange(len(vectors))
    starts = range(0, len(vectors), 1024)
    for start in tqdm(starts, "Comparing images", unit="block", leave=False, disable=not progress):
        block = vectors[start : start + 1024]
        for column in range(start, len(vectors), 1 << 16):
            i, j = torch.nonzero(block @ vectors[column : column + (1 << 16)].T >= threshold, as_tuple=True)
            first, second = (start + i).numpy(), (column + j).numpy()
            labels = joined(labels, first[first < second], second[first < second])
    return alone_unnumbered(labels)


def draw_groups(index: Index, groups: Sequence[np.ndarray], file: Path) -> bool:
    """Draw some members of the largest groups, with the captions of the first two. False if there was none to draw."""
    from amclr.inspection.sheets import draw_look_alikes

    def read(row: int) -> tuple[str, Tensor, str] | None:
        image = index.image(row)
        try:
            return image.name, read_image(index.thumbnail(row), 96), (*image.captions, "")[0]
        except BadImage:
            return None

    return draw_look_alikes(groups, read, file)
