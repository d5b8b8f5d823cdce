"""How closely an export reproduces the model: embeddings, and the retrieval that follows from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from amclr.data.images.decode import Location
from amclr.export.base import Exported
from amclr.models.dual_encoder import DualEncoder

TOP = 10
TIE = 1e-6
"""Similarities that differ by less are a tie: rounding alone moves them that far."""


@dataclass(frozen=True)
class Parity:
    """How far two models' embeddings of the same images and captions differ.

    difference: the largest absolute difference of any component. cosine: the smallest between the two embeddings of an
    image or caption. queries: number of retrieval queries, in both directions. same: queries with the same top ten, up
    to ties. overlap: average share of the top ten that both models find.
    """

    difference: float
    cosine: float
    same: int
    overlap: float
    queries: int


def compare(
    model: DualEncoder, exported: Exported, images: Sequence[Location], captions: Sequence[str], progress: bool = True
) -> dict[str, Parity]:
    """Compare an export with the model: `parity` on the same tensors, `own_reading` on the same files and captions.

    images, captions: pairs. `own_reading` includes the other software's image decoding, resizing and text cleaning;
    it has no limit, since it says nothing about the weights.
    """

    def tensors(locations: Sequence[Location]) -> Tensor:
        return torch.stack([model.prepare(p) for p in locations])

    ours = model.encode_image(images, progress=progress), model.encode_text(captions, progress=progress)
    rows = []
    passes: list[tuple[Callable[[Any], Tensor], Sequence[Any], str]] = [
        (lambda batch: exported.images(tensors(batch)), images, "images, exported"),
        (lambda batch: exported.texts(model.tokenize(list(batch))), captions, "captions, exported"),
        (exported.own_images, images, "images, its own reading"),
        (exported.own_texts, captions, "captions, its own reading"),
    ]
    for embed, items, description in passes:
        with tqdm(total=len(items), desc=f"Embedding {description}", disable=not progress, leave=False) as bar:
            chunks = []
            for k in range(0, len(items), model.images_at_once):
                with torch.inference_mode():
                    chunks.append(embed(items[k : k + model.images_at_once]).float().cpu())
                bar.update(len(chunks[-1]))
        rows.append(torch.cat(chunks))
    return {"parity": parity(ours, (rows[0], rows[1])), "own_reading": parity(ours, (rows[2], rows[3]))}


def parity(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Parity:
    """Compare two models' embeddings of the same images (N, D) and captions (N, D)."""
    both = list(zip(ours, theirs, strict=True))
    # torch's max propagates NaN; Python's does not.
    difference = float(torch.stack([(a - b).abs().max() for a, b in both]).max())
    cosine = min(float(F.cosine_similarity(a.double(), b.double()).min()) for a, b in both)
    if not math.isfinite(difference):
        return Parity(math.nan, math.nan, 0, 0.0, 2 * len(ours[0]))
    same, common, queries = 0, 0, 0
    mine, other = (image.double() @ text.double().T for image, text in (ours, theirs))
    for scores, their_scores in ((mine, other), (mine.T, other.T)):
        k = min(TOP, scores.shape[1])
        best, theirs_best = scores.topk(k), their_scores.topk(k).indices
        # The export's ranking by our own scores: it may differ from ours where ours has a tie.
        gaps = (scores.gather(1, theirs_best) - best.values).abs().amax(dim=1)
        same += int((gaps < TIE).sum())
        common += int((theirs_best[:, :, None] == best.indices[:, None, :]).sum())
        queries += len(scores)
    return Parity(difference, cosine, same, common / (k * queries), queries)
