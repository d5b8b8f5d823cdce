"""Retrieval, zero-shot classification and robustness to paraphrase, from embeddings. Needs torch and numpy alone.

Ranks are counted, not sorted: a query's rank is the number of candidates that score above its
answer. Where candidates tie with the answer, the recall is the expectation over a random order of
the tied ones, so that a collapsed model scores chance and not 100 %.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

RECALLS = (1, 5, 10)
TOPS = (1, 3, 5, 10)
COMMON = 10
"""Places of two result lists whose images are compared by `overlap`."""
PERSISTENCE = 0.9
"""p of `rank_biased_overlap`: the chance that a reader of a list looks at the next place too."""
LISTED = 100
"""Places of a result list that `agreement` looks at; what lies beyond weighs p^100, less than 3e-5."""

TEMPLATES = (
    "a photo of a {}.",
    "an image of the {}.",
    "a blurry photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
    "a photo of a small {}.",
    "a photo of a big {}.",
)
"""Prompt templates used where none are given."""

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
        txt_r1, txt_r5, txt_r10 (an image asks for any of its texts), img_r1, ... (a text asks for
        its image), txt_r_mean, img_r_mean, r_mean, and txt_median_rank, img_median_rank (1 is best).
        Images without a text are candidates, and not queries.

    Raises:
        ValueError: for shapes that do not agree, rows out of range, NaN.
    """
    found: dict[str, float] = {}
    for side, (above, ties, right) in _ranks(image_embeddings, text_embeddings, image_of_text, chunk).items():
        for k in RECALLS:
            found[f"{side}_r{k}"] = 100 * float(_hit(above, ties, right, k).mean())
        found[f"{side}_r_mean"] = float(np.mean([found[f"{side}_r{k}"] for k in RECALLS]))
        found[f"{side}_median_rank"] = float((above + ties / (right + 1) + 1).median())
    found["r_mean"] = (found["txt_r_mean"] + found["img_r_mean"]) / 2
    return found


def retrieval_hits(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, *, chunk: int = 1024
) -> dict[str, Tensor]:
    """What `retrieval` takes the means of: by side, a row per query with its hit among the first 1, 5 and 10.

    txt: (images that have texts, in their order; 3); img: (T, 3). In [0, 1], the expectation where there are ties.
    """
    ranks = _ranks(image_embeddings, text_embeddings, image_of_text, chunk)
    return {side: torch.stack([_hit(*counted, k) for k in RECALLS], dim=1) for side, counted in ranks.items()}


def retrieval_in_folds(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, folds: int, order: Any = None
) -> dict[str, float]:
    """The mean of what `retrieval` finds within each fold of the images, every fold having its own texts alone.

    COCO's "1k" figures are the mean over five folds of 1,000 of the 5,000 test images, in the order of Karpathy's
    file (Karpathy and Fei-Fei 2015).

    Args:
        image_embeddings: (N, D) unit rows, numpy or torch.
        text_embeddings: (T, D) unit rows.
        image_of_text: (T,) ints, the row of each text's image.
        folds: how many; their sizes differ by one where it does not divide N.
        order: (N,) ints, the rows of the images in the order in which they are cut into folds; as they are by default.

    Raises:
        ValueError: for what `retrieval` refuses, and for folds without an image or a text.
    """
    images, texts = torch.as_tensor(image_embeddings), torch.as_tensor(text_embeddings)
    owner = np.asarray(image_of_text)
    rows = np.arange(len(images)) if order is None else np.asarray(order)
    if not 0 < folds <= len(images):
        raise ValueError(f"folds must lie between 1 and the {len(images)} images, got {folds}")
    if sorted(rows.tolist()) != list(range(len(images))):
        raise ValueError(f"order must name each of the {len(images)} rows once")
    found = []
    for fold in np.array_split(rows, folds):
        place = np.full(len(images), -1)
        place[fold] = np.arange(len(fold))
        own = np.flatnonzero(place[owner] >= 0)
        found.append(retrieval(images[torch.from_numpy(fold)], texts[torch.from_numpy(own)], place[owner[own]]))
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def overlap(first: Any, second: Any) -> Tensor:
    """Share of two lists' items that are in both, in [0, 1]. first, second: (Q, k) ints, no item twice in a list. (Q,).

    At a depth of ten (`COMMON`), how much of a first page of results stays the same.
    """
    _, common = _common(first, second)
    return common[:, -1] / common.shape[1]


def rank_biased_overlap(first: Any, second: Any, p: float = PERSISTENCE) -> Tensor:
    """Agreement of two rankings in which the upper places count most. first, second: (Q, k) ints. (Q,) in [0, 1].

    Rank-biased overlap (Webber, Moffat and Zobel 2010, equation 4) of two endless lists S and T is

        RBO(S, T, p) = (1 - p) * sum over d = 1, 2, ... of p^(d-1) * A_d,    A_d = |S[:d] and T[:d] in common| / d,

    the agreement that a reader meets who goes from each place to the next one with probability p; with p = 0.9 the
    first ten places have 86 % of the weight. Of lists known to a depth of k this is their RBO_EXT: beyond k the
    agreement is taken to stay A_k, so that equal lists have 1, and lists without a common item 0:

        A_k * p^k + (1 - p) * sum over d = 1 .. k of p^(d-1) * A_d.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must lie between 0 and 1, got {p}")
    depths, common = _common(first, second)
    agreement = common / depths
    weights = (1 - p) * p ** (depths - 1)
    return agreement @ weights + agreement[:, -1] * p ** len(depths)


def _common(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Depths 1 .. k, and how many items the first d places of two lists have in common: (k,) and (Q, k) float64."""
    one, other = (torch.as_tensor(rows).long() for rows in (first, second))
    if one.dim() != 2 or one.shape != other.shape or not one.shape[1]:
        raise ValueError(f"two lists must have one shape (Q, k), got {tuple(one.shape)} and {tuple(other.shape)}")
    depths = torch.arange(1, one.shape[1] + 1, dtype=torch.float64, device=one.device)
    counts = torch.zeros(one.shape, dtype=torch.float64, device=one.device)
    for row in range(0, len(one), 256):
        query, i, j = torch.nonzero(one[row : row + 256, :, None] == other[row : row + 256, None, :], as_tuple=True)
        # An item at places i and j is in common from the later of the two on.
        counts.index_put_((query + row, torch.maximum(i, j)), torch.ones_like(i, dtype=torch.float64), accumulate=True)
    return depths, counts.cumsum(dim=1)


def agreement(
    text_embeddings: Any, paraphrase_embeddings: Any, image_embeddings: Any, *, chunk: int = 1024
) -> dict[str, Tensor]:
    """How alike the images are that a text and its paraphrase find: overlap and rbo, (T,) each, in [0, 1].

    Args:
        text_embeddings: (T, D) unit rows.
        paraphrase_embeddings: (T, D) unit rows, of a paraphrase of each text.
        image_embeddings: (N, D) unit rows, what is searched.
        chunk: queries compared at once.

    Images with equal scores stand in a drawn order, another one for each list, so that a collapsed model agrees
    by chance and not wholly. `overlap` looks at the first ten images, or all where there are fewer,
    `rank_biased_overlap` at the first hundred.
    """
    images = _matrix("image_embeddings", image_embeddings)
    sides = [_matrix("text_embeddings", text_embeddings), _matrix("paraphrase_embeddings", paraphrase_embeddings)]
    if sides[0].shape != sides[1].shape or sides[0].shape[1] != images.shape[1]:
        raise ValueError(f"texts {tuple(sides[0].shape)}, paraphrases {tuple(sides[1].shape)} and images "
                         f"{tuple(images.shape)} do not agree: (T, D), (T, D) and (N, D)")  # fmt: skip
    draw, lists = torch.Generator().manual_seed(0), []
    for queries in sides:
        order = torch.randperm(len(images), generator=draw).to(images.device)
        mixed, depth = images[order], min(LISTED, len(images))
        lists.append(torch.cat([order[(q @ mixed.T).topk(depth).indices] for q in queries.split(chunk)]))
    first, second = lists
    return {"overlap": overlap(first[:, :COMMON], second[:, :COMMON]), "rbo": rank_biased_overlap(first, second)}


def _ranks(
    image_embeddings: Any, text_embeddings: Any, image_of_text: Any, chunk: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By side, what `_rank` counts of every query."""
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
    asking = torch.unique(owner)
    image_index = torch.arange(len(images), device=images.device)
    for_texts = [
        _rank(images[rows] @ texts.T, rows[:, None] == owner[None, :]) for rows in asking.split(chunk)
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
    """Per query: wrong candidates above the best answer, wrong ones equal to it, and answers equal to it. Each (Q,)."""
    best = scores.masked_fill(~is_answer, -torch.inf).amax(dim=1, keepdim=True)
    equal = scores == best
    above = ((scores > best) & ~is_answer).sum(dim=1)
    ties, right = (equal & ~is_answer).sum(dim=1), (equal & is_answer).sum(dim=1)
    return above.double(), ties.double(), right.double()


def _hit(above: Tensor, ties: Tensor, right: Tensor, k: int) -> Tensor:
    """Chance that an answer is among the first k, the tied candidates being in random order. (Q,) float64."""
    free = (k - above).clamp(min=0)
    miss = torch.ones_like(above)
    # All of the `free` places go to wrong ones: prod over places of (ties - i) / (ties + right - i).
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
    """Zero-shot classification in percent: zeroshot_top1, 3, 5, 10 (as far as there are classes).

    Args:
        model: has encode_image and encode_text.
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
    """What `zeroshot` classifies by: cosine of every image and class (n, C), and the labels (n,)."""
    ready = isinstance(images, Tensor | np.ndarray) and images.ndim == 2
    rows = _matrix("image embeddings", images if ready else model.encode_image(images))
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
    """Per image, whether its class is among the first k, for every k of `tops`; ties in expectation. (n, len)."""
    answers = torch.nn.functional.one_hot(labels, scores.shape[1]).bool()
    counted = _rank(scores, answers)
    return torch.stack([_hit(*counted, k) for k in tops], dim=1)


def mean_class_recall(scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the share of their images that are named right, in percent; ties in expectation.

    scores (n, C), labels (n,). Classes without an image are left out. Equal to top-1 accuracy where classes are of
    one size.
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
