"""Retrieval and zero-shot figures: hand-drawn cases, a sorting oracle, and CLIP_benchmark's own functions."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from amclr import evaluate


def unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=-1)


def from_scores(scores: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings whose products are the given (images, texts) scores, whatever their lengths."""
    s = torch.tensor(scores)
    return s, torch.eye(s.shape[1])


def test_hand_drawn_ranks() -> None:
    # Rows are images, columns texts. Image 0 owns texts 0 and 1, image 1 text 2, image 2 text 3.
    images, texts = from_scores([[0.9, 0.1, 0.8, 0.7], [0.2, 0.6, 0.5, 0.4], [0.3, 0.2, 0.1, 0.0]])
    found = evaluate.retrieval(images, texts, [0, 0, 1, 2])
    # Texts of image 0: rank 1; of image 1: rank 2 (0.6 above 0.5); of image 2: rank 4.
    assert found["txt_r1"] == pytest.approx(100 / 3)
    assert found["txt_r5"] == 100
    assert found["txt_median_rank"] == 2
    # Images of texts: 0.9 first; 0.1 last of (0.1, 0.6, 0.2); 0.5 second of (0.8, 0.5, 0.1); 0.0 last.
    assert found["img_r1"] == 25
    assert found["img_r_mean"] == pytest.approx((25 + 100 + 100) / 3)
    assert found["r_mean"] == pytest.approx((found["txt_r_mean"] + found["img_r_mean"]) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_equals_sorting(seed: int) -> None:
    draw = np.random.default_rng(seed)
    images, captions = int(draw.integers(12, 60)), int(draw.integers(1, 5))
    owner = draw.permutation(np.repeat(np.arange(images), captions))
    i = unit(torch.from_numpy(draw.normal(size=(images, 6))))
    t = unit(torch.from_numpy(draw.normal(size=(len(owner), 6))) + 1.5 * i[owner])
    found = evaluate.retrieval(i, t, owner, chunk=7)
    scores = (i @ t.T).numpy()
    first = [min(np.flatnonzero(owner[np.argsort(-row)] == k)) for k, row in enumerate(scores)]
    mine = [list(np.argsort(-column)).index(o) for column, o in zip(scores.T, owner, strict=True)]
    for k in (1, 5, 10):
        assert found[f"txt_r{k}"] == pytest.approx(100 * np.mean(np.array(first) < k))
        assert found[f"img_r{k}"] == pytest.approx(100 * np.mean(np.array(mine) < k))


def test_equals_clip_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same embeddings through CLIP_benchmark's retrieval and classification metrics."""
    benchmark = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    classification = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # Its accuracy() calls float() on an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(classification, "float", lambda x: np.ravel(x)[0], raising=False)
    draw = torch.Generator().manual_seed(0)
    i = unit(torch.randn(50, 16, generator=draw))
    owner = torch.arange(50).repeat_interleave(5)
    t = unit(i[owner] + 0.9 * torch.randn(250, 16, generator=draw) / 2)
    found = evaluate.retrieval(i, t, owner)
    scores = t @ i.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(250), owner] = True
    for k in (1, 5, 10):
        theirs = (benchmark.recall_at_k(scores, positive, k) > 0).float().mean()
        assert found[f"img_r{k}"] == pytest.approx(100 * float(theirs), abs=1e-4)
        theirs = (benchmark.recall_at_k(scores.T, positive.T, k) > 0).float().mean()
        assert found[f"txt_r{k}"] == pytest.approx(100 * float(theirs), abs=1e-4)
    labels = torch.randint(0, 20, (200,), generator=draw)
    logits = torch.randn(200, 20, generator=draw) + 2 * F.one_hot(labels, 20)
    mine = evaluate.classify(logits, labels)
    top1, top5 = classification.accuracy(logits, labels, topk=(1, 5))
    assert mine["zeroshot_top1"] == pytest.approx(100 * top1, abs=1e-4)
    assert mine["zeroshot_top5"] == pytest.approx(100 * top5, abs=1e-4)


def test_a_collapsed_model_scores_chance() -> None:
    ones = unit(torch.ones(50, 4))
    found = evaluate.retrieval(ones, ones.repeat_interleave(2, dim=0), torch.arange(50).repeat_interleave(2))
    assert found["img_r1"] == pytest.approx(2)
    assert found["img_r10"] == pytest.approx(20)
    # 100 texts in random order, two of them right: P(one among the first 5).
    assert found["txt_r5"] == pytest.approx(100 * (1 - _miss(100, 2, 5)))


def _miss(total: int, right: int, places: int) -> float:
    """Chance that none of the right ones is among the first places of a random order."""
    draws = 1.0
    for i in range(places):
        draws *= (total - right - i) / (total - i)
    return draws


@pytest.mark.parametrize(
    ("images", "texts", "owner", "message"),
    [
        (torch.eye(3), torch.eye(3), [0, 1], "one per text"),
        (torch.eye(3), torch.eye(3), [0, 1, 3], r"\[0, 3\)"),
        (torch.eye(3), torch.eye(4), [0, 1, 2, 0], "3 dimensions"),
        (torch.eye(3) * float("nan"), torch.eye(3), [0, 1, 2], "image_embeddings hold NaN"),
        (torch.ones(3), torch.eye(3), [0, 1, 2], "image_embeddings must be a matrix"),
        (torch.eye(3), torch.eye(3), [0.0, 1.0, 2.0], "must be 3 ints"),
    ],
)
def test_retrieval_refuses(images: torch.Tensor, texts: torch.Tensor, owner: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.retrieval(images, texts, owner)


class Letters:
    """An encoder of words by their letters, whose pictures are words."""

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return unit(torch.stack([torch.tensor([float(t.count(chr(97 + k))) for k in range(26)]) for t in texts]) + 1e-3)

    encode_image = encode_text


def test_zeroshot() -> None:
    words = ["zebra", "quokka", "fox", "lynx"]
    found = evaluate.zeroshot(Letters(), ["zebra", "fox", "lynx", "zebra"], [0, 2, 3, 1], words, ["{}"])
    assert found["zeroshot_top1"] == 75
    assert set(found) == {"zeroshot_top1", "zeroshot_top3"}
    ready = Letters().encode_image(["zebra", "fox", "lynx", "zebra"])
    assert evaluate.zeroshot(Letters(), ready.numpy(), [0, 2, 3, 1], words, [lambda w: w]) == found
    with pytest.raises(ValueError, match="no {} for the class name"):
        evaluate.zeroshot(Letters(), ready, [0, 2, 3, 1], words, ["a photo"])
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\)"):
        evaluate.zeroshot(Letters(), ready, [0, 2, 3, 4], words)


def test_prompt_ensemble_is_the_mean_of_unit_rows() -> None:
    templates = ["a photo of a {}.", "my {}"]
    rows = evaluate.class_embeddings(Letters(), ["cat", "dog"], templates)
    by_hand = [unit(Letters().encode_text([t.format(c) for t in templates]).mean(0)) for c in ("cat", "dog")]
    torch.testing.assert_close(rows, torch.stack(by_hand))


def test_imports_torch_and_numpy_alone() -> None:
    code = "import sys, amclr; amclr.evaluate; amclr.objectives; print([m for m in ('PIL', 'timm', 'transformers', \
'torchvision', 'lightning', 'matplotlib', 'jsonargparse') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_hits_of_each_query() -> None:
    # As in test_hand_drawn_ranks; a fourth picture without a text is a candidate and asks nothing.
    images, texts = from_scores([[0.9, 0.1, 0.8, 0.7], [0.2, 0.6, 0.5, 0.4], [0.3, 0.2, 0.1, 0.0], [-1, -1, -1, -1]])
    hits = evaluate.retrieval_hits(images, texts, [0, 0, 1, 2])
    assert hits["txt"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert hits["img"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]]
    scores, labels = torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.2, 0.3], [0.1, 0.2, 0.3]]), torch.tensor([0, 1, 2])
    assert evaluate.class_hits(scores, labels, (1, 2)).tolist() == [[0.5, 1], [0, 0], [1, 1]]
