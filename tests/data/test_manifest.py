"""Reading captioned folders: what is used, what is left out and why, and what is refused with advice."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclr.config.checks import problems
from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.images.decode import BadImage, read_image, scan
from amclr.data.sources import tables
from amclr.utils.errors import UserError
from tests.conftest import make_folder


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


def deep(mode: str) -> Image.Image:
    return Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)).convert(mode)


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""
    chunk = lambda kind, body: (  # noqa: E731
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


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


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I", "F", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1)))
    image = deep("I;16") if mode == "I;16" else ramp.convert("RGB").convert(mode) if mode != "F" else ramp.convert("F")
    if mode == "I":
        image = ramp.convert("I")
    out = read_image(image, 32)
    assert out.shape == (3, 40, 40) and out.dtype.is_floating_point is False
    assert int(out.max()) > 240 and int(out.min()) < 15


def test_images_are_turned_upright_and_made_smaller() -> None:
    wide = Image.new("RGB", (400, 200), "red")
    exif = wide.getexif()
    exif[0x0112] = 6
    out = io.BytesIO()
    wide.save(out, "JPEG", exif=exif)
    assert read_image(out.getvalue(), 32).shape == (3, 128, 64)
    with pytest.raises(BadImage, match="no such image"):
        read_image("absent.jpg", 32)


def test_transparent_is_white_not_black() -> None:
    assert int(read_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8).min()) == 255


def test_a_scan_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for k in range(900):
        content = b"" if k % 100 == 7 else encoded(Image.new("RGB", (300, 200), (k % 256, 0, 0)))
        (images / f"{k:03d}.jpg").write_bytes(content)
    code = (
        "import sys; from pathlib import Path; from amclr.data.images.decode import Location, scan\n"
        "places = [Location(str(f)) for f in sorted(Path(sys.argv[1]).iterdir())]\n"
        "print(*(Path(p.file).name for p, v in scan(places, 32, Path(sys.argv[2]), progress=False).items() if v.reason))\n"
    )
    verdicts = tmp_path / "verdicts.jsonl"
    command = [sys.executable, "-c", code, str(images), str(verdicts)]
    scanning = subprocess.Popen(command)
    while not (verdicts.is_file() and verdicts.stat().st_size):
        time.sleep(0.002)
    scanning.kill()
    scanning.wait()
    with verdicts.open("ab") as handle:
        handle.write(b'["half of a li')
    done = verdicts.read_text().count("\n")
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert out == [f"{k:03d}.jpg" for k in range(7, 900, 100)]
    rows = [line for line in verdicts.read_text().splitlines() if line.endswith("]")]
    assert 256 <= done <= 900 and len(rows) == 900, "every image was decoded once"


def test_scan_takes_its_verdicts_from_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [s.image for s in read(folder).samples]
    Path(paths[0].file).write_bytes(b"x")
    first = scan(paths, 32, folder / "verdicts.json", progress=False)
    monkeypatch.setattr("amclr.data.images.read_image", lambda *_: pytest.fail("decoded again"))
    assert scan(paths, 32, folder / "verdicts.json", progress=False) == first
    assert [p for p, v in first.items() if v.reason] == paths[:1]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_encodings(folder: Path, encoding: str) -> None:
    file = folder / "captions.txt"
    file.write_bytes((file.read_text() + "001.png,un café\n").encode(encoding))
    found = read(folder, encoding="latin-1" if encoding == "latin-1" else "utf-8")
    assert not found.rejects and "un café" in found.samples[1].captions


def test_a_file_in_another_encoding_says_which_option_to_give(folder: Path) -> None:
    file = folder / "captions.txt"
    file.write_bytes(file.read_text().replace("patch", "caché").encode("latin-1"))
    with pytest.raises(UserError, match="--source.encoding latin-1"):
        prepared(folder, 0.02)
    with pytest.raises(UserError, match="unknown encoding 'klingon'"):
        read(folder, encoding="klingon")


@pytest.mark.parametrize(
    ("written", "given", "message"),
    [
        ("utf-16", "utf-8", r"not utf-16 text \(truncated data\): give the right --source.encoding"),
        ("utf-16-le", "utf-8", "try --source.encoding utf-16-le"),
        ("utf-8", "punycode", "--source.encoding"),
    ],
)
def test_files_that_no_decoder_gets_through(folder: Path, written: str, given: str, message: str) -> None:
    file = folder / "captions.txt"
    file.write_bytes(file.read_text().encode(written) + b"x")  # for UTF-16 half a character
    with pytest.raises(UserError, match=message):
        read(folder, encoding=given)


def test_split_lists(folder: Path) -> None:
    names = (folder / "val.txt").read_text().split()
    (folder / "val.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(f" {n} " for n in names).encode() + b"\r\n\r\n")
    assert read(folder).splits["val"] == set(names), "a mark of byte order, Windows line ends and spaces do not count"
    (folder / "val.txt").write_text("\n".join(n.removesuffix(".png") for n in names))
    with pytest.raises(UserError, match=r"none of the 8 names in '.*val.txt' has a usable caption, such as '000'"):
        read(folder)
    (folder / "val.txt").write_bytes("caf\xe9.png\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"'.*val.txt' is not UTF-8 text .*: save it as UTF-8"):
        read(folder)


def test_a_cache_folder_that_cannot_be_made(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot make the cache folder .*: give another --cache, or set AMCLR_CACHE"):
        manifests.prepare(Config(data=str(folder)), folder / "captions.txt" / "cache", progress=False)


def test_columns_by_other_names_and_tabs(folder: Path) -> None:
    rows = [r.split(",") for r in (folder / "captions.txt").read_text().splitlines()[1:]]
    (folder / "captions.txt").unlink()
    table = ["Title\tFile_Name\tid"] + [f"{caption}\t{name}\t{k}" for k, (name, caption) in enumerate(rows)]
    (folder / "captions.tsv").write_text("\n".join(table) + "\n")
    assert len(read(folder).samples) == 40
    (folder / "captions.tsv").write_text("\n".join(["words\tphotograph\tid", *table[1:]]) + "\n")
    with pytest.raises(
        UserError, match=r"no column 'image': it has 'words', 'photograph', 'id'.*--source.image_column"
    ):
        read(folder)
    assert len(read(folder, image_column="photograph", caption_column="words").samples) == 40


def test_paraphrase_column(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "patches", lists=False)
    (folder / "captions.txt").write_text("image,caption,paraphrase\n001.png,a dog,one dog\n001.png,a dog,a hound\n")
    (sample,) = read(folder).samples
    assert sample.captions == ("a dog",) and sample.paraphrases == (("one dog", "a hound"),)


def test_held_out_images_stay_when_others_come(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", images=60, lists=False)
    config = Config(data=str(root), source=SourceConfig(val_fraction=0.2))
    before = manifests.load(config, tmp_path)
    held = {s.name for s in before.split("val")}
    assert 4 <= len(held) <= 24 and not held & {s.name for s in before.split("train")}
    (root / "Images" / "new.png").write_bytes((root / "Images" / "001.png").read_bytes())
    append(root, b"new.png,a new patch")
    after = manifests.load(config, tmp_path)
    assert held == {s.name for s in after.split("val")} - {"new.png"}


def test_folds_are_parts_of_the_training_images(tmp_path: Path) -> None:
    """Each training image is validated on in one fold, in another order of the rows too; the usual ones in none."""
    root = make_folder(tmp_path / "a", images=52)
    whole = manifests.load(Config(data=str(root)), tmp_path)
    train, val = ({s.name for s in whole.split(split)} for split in ("train", "val"))
    assert len(train) == 42 and len(val) == 10

    def parts(fold: str) -> tuple[set[str], set[str]]:
        found = manifests.load(Config(data=str(root), source=SourceConfig(fold=fold)), tmp_path)
        assert any("10 of val rest" in note for note in found.notes)
        return {s.name for s in found.split("train")}, {s.name for s in found.split("val")}

    folds = [parts(f"{k}/4") for k in range(1, 5)]
    assert [len(held) for _, held in folds] == [10, 11, 10, 11]
    assert set.union(*(held for _, held in folds)) == train and all(t | h == train and not t & h for t, h in folds)
    assert folds[0][1] != set(sorted(train)[:10]), "parts are drawn"
    lines = (root / "captions.txt").read_text().splitlines()
    (root / "captions.txt").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert parts("2/4") == folds[1]
    # What is measured on is read without the training images, but for a fold, which is of them.
    config = Config(data=str(root), source=SourceConfig(fold="2/4"))
    measured = manifests.prepare(config, tmp_path, only="val")
    assert {s.name for s in measured.samples} == folds[1][1]
    assert [*dict.fromkeys(line.split(",")[0] for line in reversed(lines[1:]))] == [*measured.order]
    with pytest.raises(UserError, match="has 42 training images: they cannot be cut into 43 parts"):
        parts("1/43")
    for slip in ("0/4", "5/4", "1/1", "1", "a/b", "1/4/2"):
        assert "--source.fold is K/N, such as 1/6" in problems(Config(source=SourceConfig(fold=slip)))[0]
        with pytest.raises(UserError, match="--source.fold is K/N"):
            parts(slip)
    # What is wrong with rows counts as a share of all of them, whichever part is read.
    (root / "Images" / "020.png").unlink()
    config = Config(data=str(root), source=SourceConfig(fold="2/4", max_bad=0.05))
    assert len(manifests.prepare(config, tmp_path, only="val").samples) in (10, 11)
    (tmp_path / "mix.yaml").write_text("- data: a\n  source: {fold: 1/4}\n")
    with pytest.raises(UserError, match="fold is one of the whole mix"):
        manifests.load(Config(data=str(tmp_path / "mix.yaml")), tmp_path)


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
    assert "is of no known format: its name must end with .csv" in message(tmp_path / "photos.zip")


def test_class_folders(tmp_path: Path) -> None:
    for wnid, count in (("n02", 2), ("n01", 1), ("n03", 0)):
        (tmp_path / "val" / wnid).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / "val" / wnid / f"{k}.png")
    (tmp_path / "classnames.txt").write_text("n01\ttench, Tinca tinca\nn02\tgoldfish\n")
    paths, labels, names = tables.class_folders(tmp_path / "val")
    assert (
        names == ["tench", "goldfish"]
        and labels == [0, 1, 1]
        and [p.parent.name for p in paths] == ["n01", "n02", "n02"]
    )
    (tmp_path / "classnames.txt").write_bytes("n01\tcaf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match="classnames.txt' is not UTF-8 text"):
        tables.class_folders(tmp_path / "val")
    with pytest.raises(UserError, match="needs a folder with one folder per class"):
        tables.class_folders(tmp_path / "absent")
    with pytest.raises(UserError, match="expected .*CLASS/IMAGE.jpg"):
        tables.class_folders(tmp_path / "val" / "n01")
