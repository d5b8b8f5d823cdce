"""Retrieval, zero-shot classification and robustness to paraphrase, from embeddings. Needs torch and numpy alone.

Ranks are counted, not sorted: a query's rank is the number of candidates that score above its answer. If candidates tie
with the answer, the recall is the expectation over a random order of the tied ones, so that a collapsed model scores
chance and not 100 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

RECALLS = (1, 5, 10)
TOPS = (1, 3, 5, 10)
OVERLAP_DEPTH = 10
"""How many results of each list `agreement` takes the `overlap` of."""
RBO_PERSISTENCE = 0.9
"""p of `rank_biased_overlap`: the probability that a reader goes on to the next result."""
RBO_DEPTH = 100
"""How many results of each list `agreement` ranks; those beyond weigh p^100, less than 3e-5."""

TEMPLATES = (
    "a photo of a {}.",
    "a picture of the {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
)
"""The default prompt templates."""

Template = str | Callable[[str], str]


class Encoder(Protocol):
    """What zero-shot classification needs of a model."""

    def encode_image(self, images: Iterable[Any]) -> Any:
        """Images -> (n, D) unit rows."""

    def encode_text(self, texts: Iterable[str]) -> Any:
        """Captions -> (n, D) unit rows."""


def retrieval(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, *, chunk: int = 1024
) -> dict[str, float]:
    """Image-text retrieval in percent: R@1/5/10, their means, and median ranks.

    Args:
        image_embeddings: (N, D) unit rows, numpy or torch.
        text_embeddings: (T, D) unit rows; an image may have several texts.
        image_of_text: (T,) ints, the row of each text's image.
        chunk: queries compared at once; bounds the memory to chunk * max(N, T) scores.

    Returns:
        txt_r1, txt_r5, txt_r10 (text retrieval: the query is an image, any of its texts is right), img_r1, ... (image
        retrieval: the query is a text), txt_r_mean, img_r_mean, r_mean, and txt_median_rank, img_median_rank (1 is
        best). Images without a text are candidates but not queries.

    Raises:
        ValueError: for shapes that do not match, rows out of range, NaN.
    """
    recalls: dict[str, float] = {}
    for side, (above, ties, right) in _ranks(image_embeddings, text_embeddings, image_of_text, chunk).items():
        for k in RECALLS:
            recalls[f"{side}_r{k}"] = 100 * float(_hit(above, ties, right, k).mean())
        recalls[f"{side}_r_mean"] = float(np.mean([recalls[f"{side}_r{k}"] for k in RECALLS]))
        recalls[f"{side}_median_rank"] = float((above + ties / (right + 1) + 1).median())
    recalls["r_mean"] = (recalls["txt_r_mean"] + recalls["img_r_mean"]) / 2
    return recalls


def chance_recalls(images: int) -> list[float]:
    """R@1, R@5 and R@10 in percent of image retrieval that ranks the images at random."""
    return [100 * min(1.0, k / max(1, images)) for k in RECALLS]


def retrieval_hits(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, *, chunk: int = 1024
) -> dict[str, Tensor]:
    """Hits of each query among the first 1, 5 and 10, by side: `retrieval` reports their means.

    txt: (N', 3) for the N' images that have texts, in their order; img: (T, 3). In [0, 1]: the expectation over ties.
    """
    ranks = _ranks(image_embeddings, text_embeddings, image_of_text, chunk)
    return {side: torch.stack([_hit(*counts, k) for k in RECALLS], dim=1) for side, counts in ranks.items()}


def retrieval_in_folds(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, folds: int, order: Any = None
) -> dict[str, float]:
    """Mean of `retrieval` over folds of the images, each with its own images and texts as the only candidates.

    COCO's "1k" figures are the mean over five folds of 1,000 of the 5,000 test images, in the order of Karpathy's
    file (Karpathy and Fei-Fei 2015).

    Args:
        image_embeddings: (N, D) unit rows, numpy or torch.
        text_embeddings: (T, D) unit rows.
        image_of_text: (T,) ints, the row of each text's image.
        folds: how many; their sizes differ by one if it does not divide N.
        order: (N,) ints, the rows of the images in the order in which they are cut into folds. Default: as they are.

    Raises:
        ValueError: as `retrieval`, and for folds without an image or a text.
    """
    images, texts = torch.as_tensor(image_embeddings), torch.as_tensor(text_embeddings)
    owner = np.asarray(image_of_text)
    rows = np.arange(len(images)) if order is None else np.asarray(order)
    if not 0 < folds <= len(images):
        raise ValueError(f"folds must lie between 1 and the {len(images)} images, got {folds}")
    if sorted(rows.tolist()) != list(range(len(images))):
        raise ValueError(f"order must name each of the {len(images)} rows once")
    recalls = []
    for fold in np.array_split(rows, folds):
        row_in_fold = np.full(len(images), -1)
        row_in_fold[fold] = np.arange(len(fold))
        its_texts = np.flatnonzero(row_in_fold[owner] >= 0)
        recalls.append(
            retrieval(images[torch.from_numpy(fold)], texts[torch.from_numpy(its_texts)], row_in_fold[owner[its_texts]])
        )
    return {name: float(np.mean([of_fold[name] for of_fold in recalls])) for name in recalls[0]}


def overlap(first: Any, second: Any) -> Tensor:
    """Share of the items that two lists have in common, (Q,) in [0, 1].

    first, second: (Q, k) ints, no item twice in a list. With k = 10: how much of a first page of results is kept.
    """
    _, common = _common_items(first, second)
    return common[:, -1] / common.shape[1]


def rank_biased_overlap(first: Any, second: Any, p: float = RBO_PERSISTENCE) -> Tensor:
    """Agreement of two rankings that counts the top ranks most, (Q,) in [0, 1]. first, second: (Q, k) ints.

    Rank-biased overlap (Webber, Moffat and Zobel 2010, equation 4) of two endless lists S and T is

        RBO(S, T, p) = (1 - p) * sum over d = 1, 2, ... of p^(d-1) * A_d,    A_d = |S[:d] and T[:d] in common| / d,

    the expected agreement for a reader who goes on from each rank to the next one with probability p. With p = 0.9 the
    first ten ranks have 86 % of the weight. For lists of k items this computes RBO_EXT, which assumes that the
    agreement stays A_k beyond k, so that equal lists have 1 and lists without a common item 0:

        A_k * p^k + (1 - p) * sum over d = 1 .. k of p^(d-1) * A_d.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must lie between 0 and 1, got {p}")
    depths, common = _common_items(first, second)
    agreement = common / depths
    weights = (1 - p) * p ** (depths - 1)
    return agreement @ weights + agreement[:, -1] * p ** len(depths)


def _common_items(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Depths d = 1 .. k, (k,), and how many items two lists have in common to depth d, (Q, k). Both float64."""
    one, other = (torch.as_tensor(rows).long() for rows in (first, second))
    if one.dim() != 2 or one.shape != other.shape or not one.shape[1]:
        raise ValueError(f"the lists must have one shape (Q, k), got {tuple(one.shape)} and {tuple(other.shape)}")
    depths = torch.arange(1, one.shape[1] + 1, dtype=torch.float64, device=one.device)
    counts = torch.zeros(one.shape, dtype=torch.float64, device=one.device)
    for row in range(0, len(one), 256):
        query, i, j = torch.nonzero(one[row : row + 256, :, None] == other[row : row + 256, None, :], as_tuple=True)
        # An item at ranks i and j is in both lists from the greater of the two on.
        counts.index_put_((query + row, torch.maximum(i, j)), torch.ones_like(i, dtype=torch.float64), accumulate=True)
    return depths, counts.cumsum(dim=1)


def agreement(
    text_embeddings: Any, paraphrase_embeddings: Any, image_embeddings: Any, *, chunk: int = 1024
) -> dict[str, Tensor]:
    """Agreement of the images that a text and its paraphrase find: overlap and rbo, (T,) each, in [0, 1].

    Args:
        text_embeddings: (T, D) unit rows.
        paraphrase_embeddings: (T, D) unit rows, a paraphrase of each text.
        image_embeddings: (N, D) unit rows, the candidates.
        chunk: queries compared at once.

    Images with equal scores are in random order, a different one for each list, so that a collapsed model agrees by
    chance and not fully. `overlap` is of the first ten images, `rank_biased_overlap` of the first hundred.
    """
    images = _matrix("image_embeddings", image_embeddings)
    sides = [_matrix("text_embeddings", text_embeddings), _matrix("paraphrase_embeddings", paraphrase_embeddings)]
    if sides[0].shape != sides[1].shape or sides[0].shape[1] != images.shape[1]:
        raise ValueError(f"texts {tuple(sides[0].shape)}, paraphrases {tuple(sides[1].shape)} and images "
                         f"{tuple(images.shape)} do not match: (T, D), (T, D) and (N, D)")  # fmt: skip
    draw, lists = torch.Generator().manual_seed(0), []
    for queries in sides:
        order = torch.randperm(len(images), generator=draw).to(images.device)
        shuffled, depth = images[order], min(RBO_DEPTH, len(images))
        lists.append(torch.cat([order[(q @ shuffled.T).topk(depth).indices] for q in queries.split(chunk)]))
    first, second = lists
    return {
        "overlap": overlap(first[:, :OVERLAP_DEPTH], second[:, :OVERLAP_DEPTH]),
        "rbo": rank_biased_overlap(first, second),
    }


def _ranks(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, chunk: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By side, the counts of `_rank` for every query."""
    images, texts = _matrix("image_embeddings", image_embeddings), _matrix("text_embeddings", text_embeddings)
    owner = torch.as_tensor(np.asarray(image_of_text)).to(images.device)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"image_embeddings have {images.shape[1]} dimensions, text_embeddings {texts.shape[1]}")
    if owner.shape != (len(texts),) or owner.is_floating_point():
        raise ValueError(
            f"image_of_text must be {len(texts)} ints, one per text, got {owner.dtype} {tuple(owner.shape)}"
        )
    owner = owner.long()
    if len(owner) and (int(owner.min()) < 0 or int(owner.max()) >= len(images)):
        raise ValueError(f"image_of_text must lie in [0, {len(images)}), got {int(owner.min())} to {int(owner.max())}")
    with_texts = torch.unique(owner)
    image_index = torch.arange(len(images), device=images.device)
    for_texts = [
        _rank(images[rows] @ texts.T, rows[:, None] == owner[None, :]) for rows in with_texts.split(chunk)
    ]  # fmt: skip
    for_images = [
        _rank(t @ images.T, o[:, None] == image_index[None, :])
        for t, o in zip(texts.split(chunk), owner.split(chunk), strict=True)
    ]
    return {
        side: tuple(torch.cat(parts) for parts in zip(*ranks, strict=True))  # type: ignore[misc]
        for side, ranks in (("txt", for_texts), ("img", for_images))
    }


def _rank(scores: Tensor, is_answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per query, (Q,) each: wrong candidates above the best answer, wrong ones tied with it, answers tied with it."""
    best = scores.masked_fill(~is_answer, -torch.inf).amax(dim=1, keepdim=True)
    equal = scores == best
    above = ((scores > best) & ~is_answer).sum(dim=1)
    ties, right = (equal & ~is_answer).sum(dim=1), (equal & is_answer).sum(dim=1)
    return above.double(), ties.double(), right.double()


def _hit(above: Tensor, ties: Tensor, right: Tensor, k: int) -> Tensor:
    """Probability that an answer is among the first k if tied candidates are in random order. (Q,) float64."""
    free = (k - above).clamp(min=0)
    miss = torch.ones_like(above)
    # A miss gives all `free` ranks to wrong candidates: the product of (ties - i) / (ties + right - i) over them.
    for i in range(k):
        step = ((ties - i) / (ties + right - i).clamp(min=1)).clamp(min=0)
        miss = torch.where(free > i, miss * step, miss)
    return 1 - miss


def class_embeddings(model: Encoder, classnames: Sequence[str], templates: Sequence[Template] = TEMPLATES) -> Tensor:
    """One unit row per class, (C, D): the mean over the templates' captions (CLIP's prompt ensemble)."""
    if not classnames:
        raise ValueError("classnames is empty")
    if isinstance(templates, str) or not templates:
        raise ValueError("templates must be a list such as ['a photo of a {}.']")
    for t in templates:
        if isinstance(t, str) and "{}" not in t:
            raise ValueError(f"template {t!r} has no {{}} for the class name")
    prompts = [t.replace("{}", c) if isinstance(t, str) else t(c) for c in classnames for t in templates]
    rows = _matrix("text embeddings", model.encode_text(prompts))
    means = rows.view(len(classnames), len(templates), -1).mean(dim=1)
    return torch.nn.functional.normalize(means, dim=-1)


def zeroshot(
    model: Encoder,
    images: Any,
    labels: Sequence[int] | Tensor | np.ndarray,
    classnames: Sequence[str],
    templates: Sequence[Template] = TEMPLATES,
) -> dict[str, float]:
    """Zero-shot classification in percent: zeroshot_top1, 3, 5, 10 (as many as there are classes for).

    Args:
        model: anything with encode_image and encode_text.
        images: images that `model.encode_image` takes, or their embeddings as an (n, D) array or tensor.
        labels: (n,) ints, rows of `classnames`.
        classnames: names of the classes.
        templates: prompts with {} for the name, or functions of the name.
    """
    return classify(*class_scores(model, images, labels, classnames, templates))


def class_scores(
    model: Encoder,
    images: Any,
    labels: Sequence[int] | Tensor | np.ndarray,
    classnames: Sequence[str],
    templates: Sequence[Template] = TEMPLATES,
) -> tuple[Tensor, Tensor]:
    """Cosine similarity of every image and class (n, C), and the labels (n,), for the arguments of `zeroshot`."""
    embedded = isinstance(images, Tensor | np.ndarray) and images.ndim == 2
    rows = _matrix("image embeddings", images if embedded else model.encode_image(images))
    target = torch.as_tensor(np.asarray(labels)).long()
    if target.shape != (len(rows),):
        raise ValueError(f"labels must be {len(rows)} ints, one per image, got shape {tuple(target.shape)}")
    if len(target) and (int(target.min()) < 0 or int(target.max()) >= len(classnames)):
        raise ValueError(f"labels must lie in [0, {len(classnames)}), got {int(target.min())} to {int(target.max())}")
    classes = class_embeddings(model, classnames, templates).to(rows.device)
    return rows @ classes.T, target.to(rows.device)


def classify(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-k accuracy in percent of class scores (n, C) against labels (n,), ties in expectation."""
    tops = [k for k in TOPS if k == 1 or k <= scores.shape[1]]
    hits = class_hits(scores, labels, tops)
    return {f"zeroshot_top{k}": 100 * float(hits[:, c].mean()) for c, k in enumerate(tops)}


def class_hits(scores: Tensor, labels: Tensor, tops: Sequence[int]) -> Tensor:
    """Whether the class of each image is among the first k, for every k of `tops`; ties in expectation. (n, len)."""
    answers = torch.nn.functional.one_hot(labels, scores.shape[1]).bool()
    counts = _rank(scores, answers)
    return torch.stack([_hit(*counts, k) for k in tops], dim=1)


def mean_class_recall(scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the share of their images that are classified right, in percent; ties in expectation.

    scores (n, C), labels (n,). Classes without an image are left out. Equals top-1 accuracy if all classes have the
    same size.
    """
    hits = class_hits(scores, labels, (1,))[:, 0]
    sizes = torch.bincount(labels, minlength=scores.shape[1])
    right = torch.bincount(labels, weights=hits, minlength=scores.shape[1])
    return 100 * float((right[sizes > 0] / sizes[sizes > 0]).mean())


def _matrix(name: str, values: Any) -> Tensor:
    rows = torch.as_tensor(values).detach()
    if rows.dim() != 2 or not len(rows):
        raise ValueError(f"{name} must be a matrix (n, D) with n > 0, got shape {tuple(rows.shape)}")
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} hold NaN or infinite values")
    return rows
