"""Search in an index, labels, near-duplicates; the commands."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from amclr import cli
from amclr.config.schema import ModelConfig, OptimConfig
from amclr.data.images.decode import BadImage
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.folder import Run
from amclr.search import query as search
from amclr.search.index import Index, build
from amclr.training.loop import train
from amclr.utils.errors import UserError
from tests.conftest import COLOURS, make_folder, paint
from tests.training.configs import config_for


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that has learned to tell the colours."""
    place = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMCLR_CACHE", str(place / "cache"))
        # As in test_engine: it then tells them apart.
        config = config_for(
            make_folder(place / "patches", images=80), epochs=25, batch_size=16, objective="clip",
            optim=OptimConfig(lr=3e-3), model=ModelConfig(image_size=32, dim=16, text_lr=0.1),
        )  # fmt: skip
        return train(config, progress=False)


@pytest.fixture(scope="module")
def folder_and_index(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMCLR_CACHE", str(place / "cache"))
        folder = make_folder(place / "patches")
        build(run.folder, str(folder), place / "index", progress=False)
    return folder, place / "index"


@pytest.fixture
def index(folder_and_index: tuple[Path, Path]) -> Index:
    return Index(folder_and_index[1])


def colours(hits: list[search.Hit]) -> list[str]:
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
    assert search.parse(query) == (wanted, unwanted)


def test_a_query_is_made_of_what_it_says(run: Run, folder_and_index: tuple[Path, Path]) -> None:
    """Against sums written out."""
    model, image = DualEncoder.from_pretrained(folder_and_index[1] / "model"), folder_and_index[0] / "Images/001.png"
    t, u, v = model.encode_text(["a red patch", "a blue patch", "a green patch"]).double().numpy()
    i = model.encode_image([image])[0].double().numpy()
    for parts, expected in (
        ({"texts": ["a red patch"]}, t),
        ({"images": [image]}, i),
        ({"texts": ["a red patch"], "images": [image], "image_share": 0.3}, 0.7 * t + 0.3 * i),
        ({"texts": ["a red patch"], "unwanted": ["a blue patch", "a green patch"]}, t - 0.5 * (u + v) / 2),
        ({"unwanted": ["a blue patch"]}, -u),
    ):
        found = search.embed(model, **parts)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)
    with pytest.raises(UserError, match="nothing is asked for"):
        search.embed(model)
    with pytest.raises(UserError, match="share must lie between 0 and 1, got 2"):
        search.embed(model, ["a"], [image], image_share=2)
    with pytest.raises(BadImage):
        search.embed(model, images=[b"junk"])
    with pytest.raises(UserError, match="2000 characters at the most, got 2001"):
        search.parse("x" * 2001)


def test_what_is_found(index: Index) -> None:
    red = search.embed(index.model, ["a red patch number 1"])
    hits = search.find(index, red, 8)
    assert colours(hits).count("red") >= 6 and [h.place for h in hits] == list(range(1, 9))
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    assert search.find(index, red, 3, skip=2) == hits[2:5]
    assert search.find(index, red, 8, threshold=hits[3].score) == hits[:4]
    like = search.find(index, index.vector(hits[0].row), 3, without=hits[0].row)
    assert len(like) == 3 and hits[0].row not in [h.row for h in like]
    assert [h.place for h in search.find(index, index.vector(5), 39, without=5)] == list(range(1, 40))
    assert search.find(index, red, 50, skip=38)[0].place == 39 and search.find(index, red, 5, skip=40) == []
    not_red = search.embed(index.model, ["a patch"], unwanted=["a red patch number 1"])
    assert colours(search.find(index, not_red, 8)).count("red") <= 1
    for k, skip in ((0, 0), (5, -1), (10_000, 1)):
        with pytest.raises(UserError, match="results must be 1 to 10,000 in all"):
            search.find(index, red, k, skip)


def test_among_names_and_captions(index: Index) -> None:
    assert search.matching(index, "  ") is None
    red = search.embed(index.model, ["a red patch"])
    named = search.matching(index, "03")
    assert named is not None and sorted(index.row(int(r)).name for r in np.flatnonzero(named)) == [
        "003.png", *(f"03{k}.png" for k in range(10))
    ]  # fmt: skip
    blue = search.matching(index, "BLUE Patch")
    assert blue is not None and blue.sum() == 10
    assert set(colours(search.find(index, red, 40, among=blue))) == {"blue"}
    absent = search.matching(index, "(.*")
    assert absent is not None and not absent.any() and search.find(index, red, 5, among=absent) == []


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands(
    run: Run, folder_and_index: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, _ = folder_and_index
    monkeypatch.chdir(tmp_path)
    code, out, _ = told(capsys, "index", run.folder, folder, "--out", "idx")
    assert code == 0 and "40 images, 40 embedded now, 0 there before" in out
    code, out, _ = told(capsys, "search", "idx", "a green patch number 1 -red", "-k", 5)
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[0] == "1" and "green" in lines[0] and Image.open("search.png").width > 400
    code, out, _ = told(capsys, "search", "idx", "--image", folder / "Images/002.png", "--json", "-k", 3)
    found = json.loads(out)
    assert code == 0 and found[0]["name"] == "002.png" and found[0]["score"] == pytest.approx(1, abs=1e-5)
    code, out, _ = told(capsys, "search", "idx", "a patch", "--threshold", 0.9999999, "--sheet", "none.png")
    assert code == 0 and "nothing found" in out and Path("none.png").is_file()
    code, out, _ = told(capsys, "label", "idx", folder, "--classes", "red,green, blue ,yellow", "--templates", "simple")
    rows = list(csv.DictReader(Path("labels.csv").read_text().splitlines()))
    names = [r["image"] for r in rows]
    right = sum(r["label"] == list(COLOURS)[k % 4] for k, r in enumerate(rows))
    assert code == 0 and names == [f"{k:03d}.png" for k in range(40)] and right >= 30 and "labels.csv" in out
    shutil.copytree(folder / "Images", "more")
    shutil.copy("more/004.png", "more/again.png")
    assert told(capsys, "index", run.folder, "more", "--out", "idx2")[0] == 0
    code, out, _ = told(capsys, "dedup", "idx2")
    rows = list(csv.DictReader(Path("duplicates.csv").read_text().splitlines()))
    assert code == 0 and "2 of 41 images, in 1 groups" in out and Path("duplicates.png").is_file()
    assert {r["image"] for r in rows} == {"004.png", "again.png"} and all(float(r["cosine"]) > 0.999 for r in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "absent", "a dog"), "is no index"),
        (("search", "idx"), "nothing is asked for"),
        (("search", "idx", "--image", "absent.png"), "there is no image 'absent.png'"),
        (("search", "idx", "--image", "junk.png"), "'junk.png': "),
        (("search", "idx", "a", "-k", "0"), "results must be 1 to"),
        (("search", "idx", "a", "-k", "many"), "must be a whole number"),
        (("label", "idx", "images", "--classes", "dog"), "must name two classes at least"),
        (("label", "idx", "images", "--classes", "a,b", "--top", "3"), "--top must be 1 to 2"),
        (("label", "idx", "images", "--classes", "a,b", "--templates", "absent"), "no templates file"),
        (("label", "idx", "empty", "--classes", "a,b"), "there is no image in 'empty'"),
        (("label", "absent", "images", "--classes", "a,b"), "is not a run folder"),
        (("dedup", "absent"), "is no index"),
        (("dedup", "idx", "--threshold", "3"), "--threshold must lie between 0 and 1"),
        (("label", "idx", "images"), "needs --classes"),
        (("index", "absent", "images", "--out", "new"), "is not a run folder"),
        (("index", "idx/model", "absent", "--out", "new"), "no data set at 'absent'"),
    ],
)
def test_slips(
    arguments: tuple[str, ...], message: str, folder_and_index: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("idx").symlink_to(folder_and_index[1])
    Path("images").mkdir()
    paint("red", 0).save("images/a.png")
    Path("empty").mkdir()
    Path("junk.png").write_bytes(b"junk")
    code, out, err = told(capsys, *arguments)
    assert code == 1 and message in err and len(err.splitlines()) == 1, (out, err)


def test_labels_of_bad_images_and_names(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "CHUNK", 2)
    (tmp_path / "images").mkdir()
    for name in ("=cmd().png", "b.png", "ü.png"):
        paint("red", 1).save(tmp_path / "images" / name)
    (tmp_path / "images" / "c.png").write_bytes(b"junk")
    (tmp_path / "classes.txt").write_text("red\nblue\n\nred\n")
    counts = search.label(
        run.folder, str(tmp_path / "images"), str(tmp_path / "classes.txt"), tmp_path / "l.csv", top=2, progress=False
    )
    rows = list(csv.DictReader((tmp_path / "l.csv").read_text(encoding="utf-8").splitlines()))
    assert [r["image"] for r in rows] == ["'=cmd().png", "b.png", "c.png", "ü.png"]
    assert rows[2]["label"] == rows[2]["label2"] == "" and "cannot be decoded" in rows[2]["fault"]
    assert {rows[0]["label"], rows[0]["label2"]} == {"red", "blue"} and sum(counts.values()) == 3
    assert float(rows[0]["cosine"]) >= float(rows[0]["cosine2"])


def test_alike_embeddings_are_joined(index: Index, tmp_path: Path) -> None:
    """Against all pairs, and what is joined by such, in loops."""
    vectors = torch.from_numpy(np.concatenate(list(index.vectors())))
    cosines = vectors @ vectors.T
    threshold = float(cosines.flatten().sort().values[-260])
    _, groups = search.dedup(index.folder, tmp_path / "d.csv", threshold, progress=False)
    label = list(range(len(vectors)))
    for i in range(len(label)):
        for j in range(i):
            if cosines[i, j] >= threshold and label[i] != label[j]:
                label = [min(label[i], label[j]) if x in (label[i], label[j]) else x for x in label]
    expected = [{k for k, x in enumerate(label) if x == g} for g in set(label)]
    assert sorted(map(sorted, (e for e in expected if len(e) > 1))) == sorted(g.tolist() for g in groups)
    assert groups and any(len(g) > 2 for g in groups)


def test_an_index_without_thumbnails(run: Run, folder_and_index: tuple[Path, Path], tmp_path: Path) -> None:
    build(run.folder, str(folder_and_index[0]), tmp_path / "idx", thumbnails=0, progress=False)
    index, hits = search.search(tmp_path / "idx", "a red patch", k=3)
    with pytest.raises(UserError, match="has no thumbnails to draw"):
        search.draw(index, hits, tmp_path / "s.png", "x")
