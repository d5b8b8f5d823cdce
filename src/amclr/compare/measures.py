"""What the variants of a comparison are compared by: each measure, what it is called, and how it is computed.

A measure is a sum over the images of the validation split, or over the images by class: each adds its share, so that
two runs can be compared image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from amclr.evaluation.metrics import RECALLS

MEAN = np.ones(len(RECALLS)) / len(RECALLS)
FIRST = np.eye(len(RECALLS))[0]
"""Weights of the hits among the first 1, 5 and 10: their mean, and R@1 alone."""

Arrays = Mapping[str, np.ndarray]


class RetrievalHits:
    """The hits of a run's queries.npz, by image."""

    def __init__(self, arrays: Arrays) -> None:
        self.txt, self.img = arrays["txt"], arrays["img"]
        _, self.image_of_text = np.unique(arrays["image_of_text"], return_inverse=True)
        self.images = int(self.image_of_text.max()) + 1

    def text_retrieval(self, weights: np.ndarray) -> np.ndarray:
        """What each image, (N,), adds to text retrieval as a query, in percent."""
        return 100 * (self.txt @ weights) / self.images

    def image_retrieval(self, weights: np.ndarray) -> np.ndarray:
        """What the captions of each image, (N,), add to image retrieval as queries, in percent."""
        return by_image(self.img @ weights, self.image_of_text, self.images)


def by_image(per_caption: np.ndarray, image_of_text: np.ndarray, images: int) -> np.ndarray:
    """What the captions of each image, (N,), add to a mean over captions, in percent."""
    return 100 * np.bincount(image_of_text, per_caption, images) / len(per_caption)


@dataclass(frozen=True)
class RetrievalMeasure:
    """A measure of retrieval on the validation split, in percent."""

    label: str
    """Its name in tables and figures."""
    shares: Callable[[RetrievalHits], np.ndarray]
    """What each image adds to it, (N,)."""
    in_table: bool = True
    """Whether it is in the table; if not, only in table.csv, results.json and report.html."""


@dataclass(frozen=True)
class ParaphraseMeasure:
    """A measure of retrieval with paraphrased captions, in percent."""

    label: str
    per_caption: Callable[[Arrays], np.ndarray]
    """Its value for each caption, (T,) in [0, 1], from a run's queries-paraphrased.npz."""
    in_table: bool = True


RETRIEVAL = {
    "txt_r_mean": RetrievalMeasure("text retrieval", lambda hits: hits.text_retrieval(MEAN)),
    "img_r_mean": RetrievalMeasure("image retrieval", lambda hits: hits.image_retrieval(MEAN)),
    "txt_r1": RetrievalMeasure("text R@1", lambda hits: hits.text_retrieval(FIRST), in_table=False),
    "img_r1": RetrievalMeasure("image R@1", lambda hits: hits.image_retrieval(FIRST), in_table=False),
    "r_mean": RetrievalMeasure(
        "mean", lambda hits: (hits.text_retrieval(MEAN) + hits.image_retrieval(MEAN)) / 2
    ),
}  # fmt: skip
"""Means of R@1, R@5 and R@10, and R@1. The keys are those of results.json."""

PARAPHRASED = {
    "paraphrased img_r_mean": ParaphraseMeasure("image retrieval, paraphrased", lambda a: a["paraphrased"] @ MEAN),
    "paraphrased drop": ParaphraseMeasure(
        "drop, paraphrased", lambda a: (a["as_is"] - a["paraphrased"]) @ MEAN, in_table=False
    ),
    "paraphrased overlap": ParaphraseMeasure(
        "overlap at 10, paraphrased", lambda a: a["overlap"], in_table=False
    ),
    "paraphrased rbo": ParaphraseMeasure("RBO, paraphrased", lambda a: a["rbo"]),
}  # fmt: skip
"""Image retrieval by paraphrased captions, and how much the images agree that a caption and its paraphrase find."""

ZEROSHOT = "zeroshot "
"""Prefix of the measures of top-1 accuracy; the name of the images by class follows."""


def label(measure: str) -> str:
    """What a measure is called in tables and figures."""
    if measure in RETRIEVAL:
        return RETRIEVAL[measure].label
    return PARAPHRASED[measure].label if measure in PARAPHRASED else f"{measure.removeprefix(ZEROSHOT)} top-1"


def in_table(measure: str) -> bool:
    """Whether a measure is in the table, or only in table.csv, results.json and report.html."""
    if measure in RETRIEVAL:
        return RETRIEVAL[measure].in_table
    return measure not in PARAPHRASED or PARAPHRASED[measure].in_table
