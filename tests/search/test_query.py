"""Queries: what they say, their embedding, results, filters, contact sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amclr.data.images.decode import BadImage
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.folder import Run
from amclr.search.builder import build
from amclr.search.index import Index
from amclr.search.query import Hit, draw_hits, embed, find, parse, search, text_mask
from amclr.utils.errors import UserError
from tests.conftest import COLOURS


def colours(hits: list[Hit]) -> list[str]:
    return [next(c for c in COLOURS if c in h.captions[0]) for h in hits]


@pytest.mark.parametrize(
    ("query", "wanted", "unwanted"),
    [
        ("a dog on the beach", "a dog on the beach", []),
        ("a dog -people", "a dog", ["people"]),
        ('a dog -"a red car"  -cat on grass', "a dog on grass", ["a red car", "cat"]),
        ("-people", "", ["people"]),
        ("a well-known half-open door", "a well-known half-open door", []),
        ("-5 degrees, 3 - 2", "-5 degrees, 3 - 2", []),
        ('"a dog"', "a dog", []),
        ("ein Hund -Mädchen -犬", "ein Hund", ["Mädchen", "犬"]),
        ('- -- -"" -" "', "- --", []),
    ],
)
def test_queries(query: str, wanted: str, unwanted: list[str]) -> None:
    assert parse(query) == (wanted, unwanted)


def test_the_query_vector(run: Run, folder_and_index: tuple[Path, Path]) -> None:
    """Against the sums, written out."""
    model, image = DualEncoder.from_pretrained(folder_and_index[1] / "model"), folder_and_index[0] / "Images/001.png"
    t, u, v = model.encode_text(["a red patch", "a blue patch", "a green patch"]).double().numpy()
    i = model.encode_image([image])[0].double().numpy()
    for parts, expected in (
        ({"texts": ["a red patch"]}, t),
        ({"images": [image]}, i),
        ({"texts": ["a red patch"], "images": [image], "image_share": 0.3}, 0.7 * t + 0.3 * i),
        ({"texts": ["a red patch"], "negatives": ["a blue patch", "a green patch"]}, t - 0.5 * (u + v) / 2),
        ({"negatives": ["a blue patch"]}, -u),
    ):
        vector = embed(model, **parts)  # type: ignore[arg-type]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)
    with pytest.raises(UserError, match="the query is empty"):
        embed(model)
    with pytest.raises(UserError, match="share must lie between 0 and 1, got 2"):
        embed(model, ["a"], [image], image_share=2)
    with pytest.raises(BadImage):
        embed(model, images=[b"junk"])
    with pytest.raises(UserError, match="at most 2000 characters, got 2001"):
        parse("x" * 2001)


def test_results(index: Index) -> None:
    red = embed(index.model, ["a red patch number 1"])
    hits = find(index, red, 8)
    assert colours(hits).count("red") >= 6 and [h.place for h in hits] == list(range(1, 9))
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert find(index, red, 3, skip=2) == hits[2:5]
    assert find(index, red, 8, threshold=hits[3].score) == hits[:4]
    like = find(index, index.vector(hits[0].row), 3, exclude=hits[0].row)
    assert len(like) == 3 and hits[0].row not in [h.row for h in like]
    assert [h.place for h in find(index, index.vector(5), 39, exclude=5)] == list(range(1, 40))
    assert find(index, red, 50, skip=38)[0].place == 39 and find(index, red, 5, skip=40) == []
    not_red = embed(index.model, ["a patch"], negatives=["a red patch number 1"])
    assert colours(find(index, not_red, 8)).count("red") <= 1
    for k, skip in ((0, 0), (5, -1), (10_000, 1)):
        with pytest.raises(UserError, match="results must be 1 to 10,000 in all"):
            find(index, red, k, skip)


def test_masks_of_names_and_captions(index: Index) -> None:
    assert text_mask(index, "  ") is None
    red = embed(index.model, ["a red patch"])
    named = text_mask(index, "03")
    assert named is not None and sorted(index.image(int(r)).name for r in np.flatnonzero(named)) == [
        "003.png", *(f"03{k}.png" for k in range(10))
    ]  # fmt: skip
    blue = text_mask(index, "BLUE Patch")
    assert blue is not None and blue.sum() == 10
    assert set(colours(find(index, red, 40, mask=blue))) == {"blue"}
    absent = text_mask(index, "(.*")
    assert absent is not None and not absent.any() and find(index, red, 5, mask=absent) == []


def test_an_index_without_thumbnails(run: Run, folder_and_index: tuple[Path, Path], tmp_path: Path) -> None:
    build(run.folder, str(folder_and_index[0]), tmp_path / "idx", thumbnails=0, progress=False)
    index, hits = search(tmp_path / "idx", "a red patch", k=3)
    with pytest.raises(UserError, match="has no thumbnails to draw"):
        draw_hits(index, hits, tmp_path / "s.png", "x")
