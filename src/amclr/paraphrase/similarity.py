"""The filter on meaning: how similar a candidate is to its caption."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from amclr.config.schema import ModelConfig
from amclr.data.text.filters import Filters
from amclr.models.dual_encoder import build_text_tower
from amclr.models.tokenizer import build_tokenizer
from amclr.utils.errors import UserError

SIMILARITY = 0.5
"""Default minimum cosine for language models. With minilm on Flickr8k, 0.7 % of the pairs of captions of different
images reach it, 75 % of the pairs of captions of one image, and every paraphrase by rules."""


class TextSimilarity:
    """Cosines between the embeddings of texts by a text tower."""

    def __init__(self, name: str, device: torch.device) -> None:
        config = ModelConfig(text_tower=name, max_tokens=128)
        if name == "small":
            raise UserError("--encoder small is untrained: give minilm, a transformers model or a folder")
        self.tokenizer = build_tokenizer(config, [])
        self.tower = build_text_tower(config, self.tokenizer).to(device).eval()
        self.device = device

    @torch.inference_mode()
    def __call__(self, first: Sequence[str], second: Sequence[str]) -> list[float]:
        """Compute the cosine of each pair of texts."""
        texts = list(dict.fromkeys([*first, *second]))
        position = {text: i for i, text in enumerate(texts)}
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        rows = torch.empty(len(texts), self.tower.width)
        for start in range(0, len(texts), 64):
            batch = order[start : start + 64]
            tokens = self.tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, max_length=128, return_tensors="pt"
            ).to(self.device)
            features = self.tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            rows[batch] = F.normalize(features.float(), dim=-1).cpu()
        a, b = (rows[[position[t] for t in side]] for side in (first, second))
        cosines: list[float] = (a * b).sum(-1).tolist()
        return cosines


def similar_pairs(
    similarity: TextSimilarity,
    threshold: float,
    filters: Filters,
    captions: list[str],
    candidates: list[list[str | None]],
) -> set[tuple[str, str]]:
    """The pairs of caption and candidate that pass the other filters and have at least that cosine."""
    pairs = [
        (c, text)
        for c, texts in zip(captions, candidates, strict=True)
        for text in dict.fromkeys(" ".join(t.split()) for t in texts if t is not None)
        if filters.fault(c, text) is None
    ]
    cosines = similarity([c for c, _ in pairs], [t for _, t in pairs])
    return {pair for pair, cosine in zip(pairs, cosines, strict=True) if cosine >= threshold}
