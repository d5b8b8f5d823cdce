"""Labels of images that cannot be decoded, and of names that a spreadsheet would execute."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from amclr.runs.folder import Run
from amclr.search import labels
from amclr.search.labels import label
from tests.conftest import paint


def test_labels_of_bad_images_and_names(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "CHUNK", 2)
    (tmp_path / "images").mkdir()
    for name in ("=cmd().png", "b.png", "ü.png"):
        paint("red", 1).save(tmp_path / "images" / name)
    (tmp_path / "images" / "c.png").write_bytes(b"junk")
    (tmp_path / "classes.txt").write_text("red\nblue\n\nred\n")
    counts = label(
        run.folder, str(tmp_path / "images"), str(tmp_path / "classes.txt"), tmp_path / "l.csv", top=2, progress=False
    )
    rows = list(csv.DictReader((tmp_path / "l.csv").read_text(encoding="utf-8").splitlines()))
    assert [r["image"] for r in rows] == ["'=cmd().png", "b.png", "c.png", "ü.png"]
    assert rows[2]["label"] == rows[2]["label2"] == "" and "cannot be decoded" in rows[2]["fault"]
    assert {rows[0]["label"], rows[0]["label2"]} == {"red", "blue"} and sum(counts.values()) == 3
    assert float(rows[0]["cosine"]) >= float(rows[0]["cosine2"])
