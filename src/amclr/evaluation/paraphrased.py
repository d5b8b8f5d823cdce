"""Robustness to paraphrase: retrieval with reworded captions, and how much the results of both wordings agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclr.config.schema import Config
from amclr.data.text.rewording import Rewording
from amclr.evaluation import metrics
from amclr.evaluation.embedding import CachedEncoder, text_digest
from amclr.evaluation.evaluator import Evaluator
from amclr.utils.errors import UserError
from amclr.utils.files import write_arrays


def measure_paraphrased(
    evaluator: Evaluator, images: Tensor, texts: Tensor, rewording: Rewording, config: Config, progress: bool = True,
    hits: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure recalls with captions as they are and paraphrased, and how much the images that both find agree.

    Captions without a paraphrase are left out, as queries and as candidates, and counted.

    Args:
        evaluator: what the embeddings are of.
        images: (N, D), the evaluator's.
        texts: (T, D), the evaluator's.
        rewording: where paraphrases come from.
        config: says where features are cached.
        progress: show progress bars.
        hits: a file to write the hits and agreement of each caption to, for comparing runs query by query.

    Returns:
        by, captions, without; as_is and paraphrased, each as of `metrics.retrieval` (text retrieval: among the captions
        as they are, or among the paraphrases); overlap in percent, at a depth of `places`; rbo in [0, 1].

    Raises:
        UserError: if no caption has a paraphrase.
    """
    reworded = [rewording.of(caption) for caption in evaluator.captions]
    rows = np.flatnonzero([p is not None for p in reworded])
    paraphrases = [p for p in reworded if p is not None]
    if not paraphrases:
        raise UserError(
            f"none of the {len(reworded)} captions has a paraphrase by '{rewording.by}': give --paraphrased rules (for "
            "English), or a store of these captions: amclr paraphrase DATA"
        )
    image_of_text = evaluator.image_of_text[rows]
    sides = {
        "as_is": texts[torch.from_numpy(rows)],
        "paraphrased": CachedEncoder(evaluator.model, config, progress).encode_text(paraphrases),
    }
    agreement = metrics.agreement(sides["as_is"], sides["paraphrased"], images)
    if hits:
        by_side = {name: metrics.retrieval_hits(images, side, image_of_text)["img"] for name, side in sides.items()}
        queries = evaluator.queries_digest()
        write_arrays(hits, {
            **{name: values.cpu().numpy().astype(np.float32) for name, values in {**by_side, **agreement}.items()},
            "image_of_text": image_of_text, "by": np.array(rewording.digest), "of": np.array(queries),
            "queries": np.array(text_digest([queries, *(p or "" for p in reworded)])),
        })  # fmt: skip
    return {
        "by": rewording.by, "captions": len(paraphrases), "without": len(reworded) - len(paraphrases),
        **{name: metrics.retrieval(images, side, image_of_text) for name, side in sides.items()},
        "places": min(metrics.OVERLAP_DEPTH, len(images)),
        "overlap": 100 * float(agreement["overlap"].mean()), "rbo": float(agreement["rbo"].mean()),
    }  # fmt: skip
