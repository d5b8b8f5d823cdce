"""The gallery of a run: some captions, and the images that they find."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from amclr.data.sources.rows import printable
from amclr.evaluation.embedding import image_or_none
from amclr.evaluation.evaluator import Evaluator
from amclr.models.dual_encoder import DualEncoder
from amclr.utils import figures

QUERIES, RESULTS = 6, 6


def draw_gallery(
    model: DualEncoder, evaluator: Evaluator, images: Tensor, texts: Tensor, file: Path, title: str
) -> None:
    """Draw some captions and the images that they find. The same data gives the same captions.

    images (N, D), texts (T, D): the evaluator's embeddings.
    """
    queries = np.random.default_rng(0).permutation(len(texts))[:QUERIES]
    top = (texts[torch.from_numpy(queries)] @ images.T).topk(min(RESULTS, len(images)))
    size = model.config.image_size
    grey = torch.full((3, size, size), 128, dtype=torch.uint8)

    def cell(query: int, row: int, score: float) -> tuple[Tensor, float, bool]:
        image = image_or_none(model.prepare, evaluator.samples[row].image)
        return grey if image is None else image, score, row == int(evaluator.image_of_text[query])

    results = [
        [cell(q, int(i), float(score)) for score, i in zip(scores, rows, strict=True)]
        for q, scores, rows in zip(queries, top.values, top.indices, strict=True)
    ]
    captions = [printable(evaluator.captions[q]) for q in queries]
    figures.gallery(captions, results, file, f"{title}: held-out captions and what they find")
