"""The commands index, search, label and dedup."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from amclr import cli
from amclr.runs.folder import Run
from tests.conftest import COLOURS, paint


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands(
    run: Run, folder_and_index: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder, _ = folder_and_index
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_command(capsys, "index", run.folder, folder, "--out", "idx")
    assert code == 0 and "40 images, 40 newly embedded, 0 already there" in out
    code, out, _ = run_command(capsys, "search", "idx", "a green patch number 1 -red", "-k", 5)
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[0] == "1" and "green" in lines[0] and Image.open("search.png").width > 400
    code, out, _ = run_command(capsys, "search", "idx", "--image", folder / "Images/002.png", "--json", "-k", 3)
    hits = json.loads(out)
    assert code == 0 and hits[0]["name"] == "002.png" and hits[0]["score"] == pytest.approx(1, abs=1e-5)
    code, out, _ = run_command(capsys, "search", "idx", "a patch", "--threshold", 0.9999999, "--sheet", "none.png")
    assert code == 0 and "nothing found" in out and Path("none.png").is_file()
    code, out, _ = run_command(
        capsys, "label", "idx", folder, "--classes", "red,green, blue ,yellow", "--templates", "simple"
    )
    rows = list(csv.DictReader(Path("labels.csv").read_text().splitlines()))
    names = [r["image"] for r in rows]
    right = sum(r["label"] == list(COLOURS)[k % 4] for k, r in enumerate(rows))
    assert code == 0 and names == [f"{k:03d}.png" for k in range(40)] and right >= 30 and "labels.csv" in out
    shutil.copytree(folder / "Images", "more")
    shutil.copy("more/004.png", "more/again.png")
    assert run_command(capsys, "index", run.folder, "more", "--out", "idx2")[0] == 0
    code, out, _ = run_command(capsys, "dedup", "idx2")
    rows = list(csv.DictReader(Path("duplicates.csv").read_text().splitlines()))
    assert code == 0 and "2 of 41 images, in 1 groups" in out and Path("duplicates.png").is_file()
    assert {r["image"] for r in rows} == {"004.png", "again.png"} and all(float(r["cosine"]) > 0.999 for r in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "absent", "a dog"), "is not an index"),
        (("search", "idx"), "the query is empty"),
        (("search", "idx", "--image", "absent.png"), "there is no image 'absent.png'"),
        (("search", "idx", "--image", "junk.png"), "'junk.png': "),
        (("search", "idx", "a", "-k", "0"), "results must be 1 to"),
        (("search", "idx", "a", "-k", "many"), "must be a whole number"),
        (("label", "idx", "images", "--classes", "dog"), "must name at least two classes"),
        (("label", "idx", "images", "--classes", "a,b", "--top", "3"), "--top must be 1 to 2"),
        (("label", "idx", "images", "--classes", "a,b", "--templates", "absent"), "no templates file"),
        (("label", "idx", "empty", "--classes", "a,b"), "there is no image in 'empty'"),
        (("label", "absent", "images", "--classes", "a,b"), "is not a run folder"),
        (("dedup", "absent"), "is not an index"),
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
    code, out, err = run_command(capsys, *arguments)
    assert code == 1 and message in err and len(err.splitlines()) == 1, (out, err)
