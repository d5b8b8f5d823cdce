"""Reading captioned folders: what is used, what is left out and why, and what is refused with advice."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.utils.errors import UserError
from tests.data.encoded import bomb, encoded


def read(root: Path, **source: object) -> manifests.Manifest:
    return manifests.load(Config(data=str(root), source=SourceConfig(**source)), root.parent / "cache")  # type: ignore[arg-type]


def prepared(root: Path, max_bad: float = 1.0) -> manifests.Manifest:
    config = Config(data=str(root), source=SourceConfig(max_bad=max_bad))
    return manifests.prepare(config, root.parent / "cache", progress=False)


def append(root: Path, *rows: bytes) -> None:
    with (root / "captions.txt").open("ab") as handle:
        handle.writelines(row + b"\n" for row in rows)


def test_reads_captions_and_lists(folder: Path) -> None:
    found = read(folder)
    assert [s.name for s in found.samples] == sorted(s.name for s in found.samples)
    assert len(found.samples) == 40 and found.rows == 80 and not found.rejects
    assert found.samples[5].captions == ("a green patch number 5", "one green patch number 5")
    assert len(found.split("val")) == 8 and len(found.split("train")) == 32
    with pytest.raises(UserError, match="no split 'dev': choose from all, train, val"):
        found.split("dev")


def test_row_order_changes_no_sample(folder: Path) -> None:
    before = read(folder).samples
    file = folder / "captions.txt"
    header, *rows = file.read_text().splitlines()
    file.write_text("\n".join([header, *sorted(rows, key=lambda r: r.split(",")[1], reverse=True)]) + "\n")
    assert [s.name for s in read(folder).samples] == [s.name for s in before]


def test_every_bad_row_is_listed_with_line_and_reason(folder: Path) -> None:
    outside = folder.parent / "secret.png"
    Image.new("RGB", (8, 8)).save(outside)
    os.symlink(outside, folder / "Images" / "link.png")
    append(
        folder,
        b"001.png,",
        b"001.png,   ",
        b"absent.png,a caption",
        b"../secret.png,a caption",
        b"/etc/hostname,a caption",
        b"C:\\secret.png,a caption",
        b"link.png,a caption",
        b"001.png,caf\xe9 in latin-1",
        b"001.png,one,column too many",
        b"001.png",
        b",no image",
        b'002.png,"a quoted, valid ""caption"""',
        b"003.png," + b"x" * 30_000,
    )
    found = read(folder)
    reasons = {r.line: r.reason for r in found.rejects}
    expected = {
        82: "empty caption", 83: "empty caption", 84: "no such image", 85: "leaves the folder",
        86: "leaves the folder", 87: "leaves the folder", 88: "is a link out of it", 89: "not valid utf-8",
        90: "row has 3 columns", 91: "row has 1 columns", 92: "empty image name", 94: "over the limit",
    }  # fmt: skip
    assert set(reasons) == set(expected)
    for line, reason in expected.items():
        assert reason in reasons[line]
    assert found.rows == 93
    assert 'a quoted, valid "caption"' in found.samples[2].captions
    assert all("secret" not in s.name for s in found.samples)


def test_too_many_bad_rows_fail_with_the_commonest_reasons(folder: Path) -> None:
    append(folder, *[b"absent.png,a caption"] * 5)
    with pytest.raises(UserError, match=r"5 of 85 rows cannot be used, over the limit of 2.0%; 5 x no such image"):
        prepared(folder, 0.02)
    assert len(prepared(folder, 0.1).samples) == 40


def test_bad_images_are_left_out_and_listed(folder: Path) -> None:
    whole = encoded(Image.effect_noise((200, 200), 80).convert("RGB"))
    faults = {
        "001.png": (b"", "0 bytes"),
        "002.png": (whole[: len(whole) // 2], "cannot be decoded"),
        "003.png": (b"this is text", "cannot be decoded"),
        "004.png": (bomb(30_000), "too large: Image size (900000000 pixels)"),
        "005.png": (bomb(9_000), "too large"),
    }
    for name, (content, _) in faults.items():
        (folder / "Images" / name).write_bytes(content)
    found = prepared(folder)
    assert {Path(r.file).name for r in found.rejects} == set(faults)
    for reject in found.rejects:
        assert faults[Path(reject.file).name][1] in reject.reason
    assert len(found.samples) == 35
    # A mended image is found again: verdicts are kept by length and time of change.
    (folder / "Images" / "001.png").write_bytes(encoded(Image.new("RGB", (30, 30)), "PNG"))
    assert len(prepared(folder).samples) == 36


def test_a_cache_folder_that_cannot_be_made(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot make the cache folder .*: give another --cache, or set AMCLR_CACHE"):
        manifests.prepare(Config(data=str(folder)), folder / "captions.txt" / "cache", progress=False)


def test_refusals_say_what_to_do(tmp_path: Path) -> None:
    def message(data: Path) -> str:
        with pytest.raises(UserError) as error:
            manifests.load(replace(Config(), data=str(data)), tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no data set at" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "has no captions file: expected captions.txt" in message(tmp_path / "empty")
    (tmp_path / "empty" / "captions.txt").write_text("")
    assert "is empty: expected a header line image,caption" in message(tmp_path / "empty")
    (tmp_path / "photos.zip").write_bytes(b"PK")
    assert "has no known format: its name must end with .csv" in message(tmp_path / "photos.zip")
