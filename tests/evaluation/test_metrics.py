"""Retrieval, zero-shot and paraphrase figures: hand-drawn cases, oracles in loops, and CLIP_benchmark's own functions."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

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
    results = evaluate.retrieval(images, texts, [0, 0, 1, 2])
    # Texts of image 0: rank 1; of image 1: rank 2 (0.6 above 0.5); of image 2: rank 4.
    assert results["txt_r1"] == pytest.approx(100 / 3)
    assert results["txt_r5"] == 100
    assert results["txt_median_rank"] == 2
    # Images of texts: 0.9 first; 0.1 last of (0.1, 0.6, 0.2); 0.5 second of (0.8, 0.5, 0.1); 0.0 last.
    assert results["img_r1"] == 25
    assert results["img_r_mean"] == pytest.approx((25 + 100 + 100) / 3)
    assert results["r_mean"] == pytest.approx((results["txt_r_mean"] + results["img_r_mean"]) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_equals_sorting(seed: int) -> None:
    draw = np.random.default_rng(seed)
    images, captions = int(draw.integers(12, 60)), int(draw.integers(1, 5))
    owner = draw.permutation(np.repeat(np.arange(images), captions))
    i = unit(torch.from_numpy(draw.normal(size=(images, 6))))
    t = unit(torch.from_numpy(draw.normal(size=(len(owner), 6))) + 1.5 * i[owner])
    results = evaluate.retrieval(i, t, owner, chunk=7)
    scores = (i @ t.T).numpy()
    first = [min(np.flatnonzero(owner[np.argsort(-row)] == k)) for k, row in enumerate(scores)]
    mine = [list(np.argsort(-column)).index(o) for column, o in zip(scores.T, owner, strict=True)]
    for k in (1, 5, 10):
        assert results[f"txt_r{k}"] == pytest.approx(100 * np.mean(np.array(first) < k))
        assert results[f"img_r{k}"] == pytest.approx(100 * np.mean(np.array(mine) < k))


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
    results = evaluate.retrieval(i, t, owner)
    scores = t @ i.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(250), owner] = True
    for k in (1, 5, 10):
        theirs = (benchmark.recall_at_k(scores, positive, k) > 0).float().mean()
        assert results[f"img_r{k}"] == pytest.approx(100 * float(theirs), abs=1e-4)
        theirs = (benchmark.recall_at_k(scores.T, positive.T, k) > 0).float().mean()
        assert results[f"txt_r{k}"] == pytest.approx(100 * float(theirs), abs=1e-4)
    labels = torch.randint(0, 20, (200,), generator=draw)
    logits = torch.randn(200, 20, generator=draw) + 2 * F.one_hot(labels, 20)
    mine = evaluate.classify(logits, labels)
    top1, top5 = classification.accuracy(logits, labels, topk=(1, 5))
    assert mine["zeroshot_top1"] == pytest.approx(100 * top1, abs=1e-4)
    assert mine["zeroshot_top5"] == pytest.approx(100 * top5, abs=1e-4)


def test_a_collapsed_model_scores_chance() -> None:
    ones = unit(torch.ones(50, 4))
    results = evaluate.retrieval(ones, ones.repeat_interleave(2, dim=0), torch.arange(50).repeat_interleave(2))
    assert results["img_r1"] == pytest.approx(2)
    assert results["img_r10"] == pytest.approx(20)
    # 100 texts in random order, two of them right: P(one among the first 5).
    assert results["txt_r5"] == pytest.approx(100 * (1 - _miss(100, 2, 5)))


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
    """An encoder of words by their letters, whose images are words."""

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return unit(torch.stack([torch.tensor([float(t.count(chr(97 + k))) for k in range(26)]) for t in texts]) + 1e-3)

    encode_image = encode_text


def test_zeroshot() -> None:
    words = ["zebra", "quokka", "fox", "lynx"]
    results = evaluate.zeroshot(Letters(), ["zebra", "fox", "lynx", "zebra"], [0, 2, 3, 1], words, ["{}"])
    assert results["zeroshot_top1"] == 75
    assert set(results) == {"zeroshot_top1", "zeroshot_top3"}
    ready = Letters().encode_image(["zebra", "fox", "lynx", "zebra"])
    assert evaluate.zeroshot(Letters(), ready.numpy(), [0, 2, 3, 1], words, [lambda w: w]) == results
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
    # As in test_hand_drawn_ranks; a fourth image without a text is a candidate and asks nothing.
    images, texts = from_scores([[0.9, 0.1, 0.8, 0.7], [0.2, 0.6, 0.5, 0.4], [0.3, 0.2, 0.1, 0.0], [-1, -1, -1, -1]])
    hits = evaluate.retrieval_hits(images, texts, [0, 0, 1, 2])
    assert hits["txt"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert hits["img"].tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]]
    scores, labels = torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.2, 0.3], [0.1, 0.2, 0.3]]), torch.tensor([0, 1, 2])
    assert evaluate.class_hits(scores, labels, (1, 2)).tolist() == [[0.5, 1], [0, 0], [1, 1]]


# -- CLIP_benchmark's own evaluation as the oracle ------------------------------------------------


class Lookup:
    """An encoder whose images and texts are rows of two tables, for us and for CLIP_benchmark."""

    def __init__(self, images: torch.Tensor, texts: dict[str, torch.Tensor]) -> None:
        self.images, self.texts, self.known = images, texts, list(texts)

    def encode_image(self, images: Any) -> torch.Tensor:
        return self.images[torch.as_tensor(images)]

    def encode_text(self, texts: Any) -> torch.Tensor:
        names = [self.known[int(t)] for t in texts] if isinstance(texts, torch.Tensor) else texts
        return torch.stack([self.texts[t] for t in names])

    def tokenizer(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([self.known.index(t) for t in texts])


def test_retrieval_equals_clip_benchmark_from_end_to_end() -> None:
    """Five captions an image, or fewer; COCO's five folds as five evaluations of their own."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    draw = torch.Generator().manual_seed(3)
    images = unit(torch.randn(60, 12, generator=draw))
    counts = [3 if k % 7 == 0 else 5 for k in range(60)]
    captions = [[f"{k}, caption {c}" for c in range(n)] for k, n in enumerate(counts)]
    rows = {c: unit(images[k] + 0.6 * torch.randn(12, generator=draw)) for k, own in enumerate(captions) for c in own}
    model = Lookup(images, rows)
    owner = np.repeat(np.arange(60), counts)
    texts = torch.stack(list(rows.values()))

    def benchmark(indices: list[int]) -> dict[str, float]:
        batches = [(torch.tensor(indices[k : k + 8]), [captions[p] for p in indices[k : k + 8]])
                   for k in range(0, len(indices), 8)]  # fmt: skip
        results = theirs.evaluate(model, batches, model.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
        return {
            f"{'txt' if key.startswith('text') else 'img'}_r{key.split('@')[1]}": 100 * v for key, v in results.items()
        }

    whole = evaluate.retrieval(images, texts, owner)
    for key, value in benchmark(list(range(60))).items():
        assert whole[key] == pytest.approx(value, abs=1e-4)
    order = np.random.default_rng(0).permutation(60)
    folded = evaluate.retrieval_in_folds(images.numpy(), texts, owner, 5, order)
    folds = [benchmark(order[k : k + 12].tolist()) for k in range(0, 60, 12)]
    for key in folds[0]:
        assert folded[key] == pytest.approx(np.mean([fold[key] for fold in folds]), abs=1e-4)
    assert folded["r_mean"] > whole["r_mean"] + 5  # among fewer indices
    for folds_, order_, message in ((0, None, "between 1 and the 60"), (61, None, "got 61"), (2, [0] * 60, "once")):
        with pytest.raises(ValueError, match=message):
            evaluate.retrieval_in_folds(images, texts, owner, folds_, order_)


def test_zeroshot_equals_clip_benchmark_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    # Its accuracy() calls float() on an array of one element, which NumPy 2.4 refuses.
    monkeypatch.setattr(theirs, "float", lambda x: np.ravel(x)[0], raising=False)
    draw = torch.Generator().manual_seed(5)
    names, templates = [f"class {k}" for k in range(9)], ["a {}", "the {} of {}", "{}"]
    labels = torch.cat([torch.arange(9), torch.randint(0, 4, (60,), generator=draw)])  # of unequal sizes
    centres = torch.randn(9, 12, generator=draw)
    images = unit(centres[labels] + torch.randn(69, 12, generator=draw))
    prompts = {t.replace("{}", n): centres[k] + torch.randn(12, generator=draw)
               for k, n in enumerate(names) for t in templates}  # fmt: skip
    model = Lookup(images, {text: unit(row) for text, row in prompts.items()})

    class Batches(list):  # type: ignore[type-arg]
        dataset = SimpleNamespace(classes=names)

    batches = Batches([(torch.arange(k, min(k + 16, 69)), labels[k : k + 16]) for k in range(0, 69, 16)])
    braced = [t.replace("{}", "{c}") for t in templates]
    results = theirs.evaluate(model, batches, model.tokenizer, names, braced, "cpu", amp=False)
    mine = evaluate.zeroshot(model, range(69), labels, names, templates)
    assert mine["zeroshot_top1"] == pytest.approx(100 * results["acc1"], abs=1e-4)
    assert mine["zeroshot_top5"] == pytest.approx(100 * results["acc5"], abs=1e-4)
    scores, target = evaluate.class_scores(model, range(69), labels, names, templates)
    recall = evaluate.mean_class_recall(scores, target)
    assert recall == pytest.approx(100 * results["mean_per_class_recall"], abs=1e-4)
    assert abs(recall - mine["zeroshot_top1"]) > 1
    # A class without images counts for nothing; a tie is what it is by chance.
    assert evaluate.mean_class_recall(torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 0]]), torch.tensor([0, 1])) == 75


# -- other words for the same ---------------------------------------------------------------------


def rbo_in_loops(first: list[int], second: list[int], p: float, depth: int = 2_000) -> float:
    """The endless sum, far beyond the lists' end, where the agreement is that at their end."""
    total, agreement = 0.0, 0.0
    for d in range(1, depth + 1):
        if d <= len(first):
            agreement = len(set(first[:d]) & set(second[:d])) / d
        total += p ** (d - 1) * agreement
    return (1 - p) * total


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_agreement_of_lists_equals_loops(p: float) -> None:
    draw = np.random.default_rng(int(100 * p))
    first = np.stack([draw.permutation(30)[:12] for _ in range(300)])
    second = np.stack([draw.permutation(30)[:12] for _ in range(300)])
    second[:100] = first[:100]
    for row in second[50:100]:  # near the first ones
        i, j = draw.integers(0, 12, 2)
        row[[i, j]] = row[[j, i]]
    results = evaluate.rank_biased_overlap(first, second, p)
    assert results.tolist() == pytest.approx(
        [rbo_in_loops(list(a), list(b), p) for a, b in zip(first, second, strict=True)]
    )
    assert torch.allclose(results, evaluate.rank_biased_overlap(second, first, p))
    assert results[:50].tolist() == pytest.approx([1] * 50)
    shares = [len(set(a) & set(b)) / 12 for a, b in zip(first, second, strict=True)]
    assert evaluate.overlap(first, second).tolist() == pytest.approx(shares)
    assert evaluate.rank_biased_overlap([[1, 2, 3]], [[4, 5, 6]], p).tolist() == [0]


def test_the_upper_places_count_most() -> None:
    """By hand, p = 0.5: A = 0, 1/2, 2/3 when the first place differs; 1, 1, 2/3 when the third does."""
    above, below = evaluate.rank_biased_overlap([[1, 2, 3], [1, 2, 3]], [[9, 1, 2], [1, 2, 9]], 0.5).tolist()
    assert above == pytest.approx(0.5 * (0 + 0.5 * 0.5 + 0.25 * 2 / 3) + 0.125 * 2 / 3)
    assert below == pytest.approx(0.5 * (1 + 0.5 + 0.25 * 2 / 3) + 0.125 * 2 / 3)
    # A published value, from the README of an implementation of the extrapolated form: b4ny4n/rankmeasures.
    assert evaluate.rank_biased_overlap([[1, 2, 3, 4, 5]], [[2, 3, 4, 1, 5]], 0.9).tolist() == pytest.approx([0.828])
    with pytest.raises(ValueError, match="p must lie between 0 and 1"):
        evaluate.rank_biased_overlap([[1]], [[1]], 1.0)
    for one, other in ([[1, 2]], [[1]]), ([1], [1]), ([[]], [[]]):
        with pytest.raises(ValueError, match=r"one shape \(Q, k\)"):
            evaluate.overlap(one, other)


def test_agreement_of_what_texts_and_paraphrases_find() -> None:
    draw = torch.Generator().manual_seed(1)
    images = unit(torch.randn(150, 8, generator=draw))
    texts = unit(torch.randn(40, 8, generator=draw))
    again = unit(texts + 0.3 * torch.randn(40, 8, generator=draw))
    results = evaluate.agreement(texts, again, images.numpy(), chunk=7)
    for k in range(40):
        lists = [sorted(range(150), key=lambda i: -float(row[k] @ images[i]))[:100] for row in (texts, again)]
        assert float(results["overlap"][k]) == pytest.approx(len(set(lists[0][:10]) & set(lists[1][:10])) / 10)
        assert float(results["rbo"][k]) == pytest.approx(rbo_in_loops(*lists, 0.9), abs=1e-6)
    same = evaluate.agreement(texts, texts, images)
    assert same["overlap"].min() == 1 and same["rbo"].min() == pytest.approx(1)
    few = evaluate.agreement(texts, again, images[:4])  # of four images the first ten are all
    assert few["overlap"].min() == 1 and few["rbo"].min() < 0.99


def test_a_collapsed_model_agrees_by_chance() -> None:
    ones = unit(torch.ones(400, 4))
    results = evaluate.agreement(ones[:5], ones[:5], ones)
    assert results["overlap"].max() < 0.3 and results["rbo"].max() < 0.3
    with pytest.raises(ValueError, match="do not match"):
        evaluate.agreement(ones[:5], ones[:4], ones)


def test_the_default_prompts_stay_as_published() -> None:
    """Zero-shot figures in the documentation were measured with these."""
    assert evaluate.TEMPLATES == (
        "a photo of a {}.", "a picture of the {}.", "a blurry photo of a {}.", "a close-up photo of a {}.",
        "a photo of one {}.", "a photo of a small {}.", "a photo of a big {}.",
    )  # fmt: skip
