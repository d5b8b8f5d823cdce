"""Data sets as people have them: downloaded, exported and unpacked, with the quirks that come with it."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.manifest import Manifest
from amclr.utils.errors import UserError
from tests.conftest import make_folder, paint
from tests.data.formats import WRITERS, Item, items_of, tar_of, write_jsonl


def read(data: Path | str, cache: Path, **source: object) -> Manifest:
    config = Config(data=str(data), source=SourceConfig(**source))  # type: ignore[arg-type]
    return manifests.load(config, cache, progress=False)


def images(folder: Path, *names: str) -> None:
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        paint("red", k).save(folder / name, "JPEG")


def captions(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    assert not manifest.rejects, [str(r) for r in manifest.rejects]
    return {s.name: s.captions for s in manifest.samples}


def message(data: Path | str, cache: Path, **source: object) -> str:
    with pytest.raises(UserError) as error:
        read(data, cache, **source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_coco_as_it_is_unpacked(tmp_path: Path, own_cache: Path) -> None:
    for split, number in (("train", 9), ("val", 25)):
        images(tmp_path, f"{split}2017/{number:012d}.jpg")
        data = {
            "images": [{"id": number, "file_name": f"{number:012d}.jpg"}],
            "annotations": [{"image_id": number, "id": k, "caption": f"{split} {k}"} for k in range(2)],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(data))
    found = read(tmp_path, own_cache)
    train, val = "train2017/000000000009.jpg", "val2017/000000000025.jpg"
    assert captions(found) == {train: ("train 0", "train 1"), val: ("val 0", "val 1")}
    assert found.splits == {"train": {train}, "val": {val}}


def test_an_image_folder_with_metadata_in_its_splits(tmp_path: Path, own_cache: Path) -> None:
    for split in ("train", "test"):
        images(tmp_path, f"{split}/0.jpg", f"{split}/1.jpg")
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\n0.jpg,a {split} dog\n1.jpg,a {split} cat\n")
    found = read(tmp_path, own_cache)
    assert captions(found)["train/1.jpg"] == ("a train cat",) and found.splits["test"] == {"test/0.jpg", "test/1.jpg"}


def test_texts_beside_images(tmp_path: Path, own_cache: Path) -> None:
    images(tmp_path, "00000/000000000.jpg", "00000/000000001.jpg", "00001/000010000.jpg")
    (tmp_path / "00000" / "000000000.txt").write_text("a dog on the beach")
    (tmp_path / "00000" / "000000000.json").write_text('{"caption": "a dog on the beach", "status": "success"}')
    (tmp_path / "00001" / "000010000.txt").write_bytes(b"caf\xe9")
    found = read(tmp_path, own_cache)
    assert {s.name: s.captions for s in found.samples} == {"00000/000000000.jpg": ("a dog on the beach",)}
    assert [(r.key, r.reason[:22]) for r in found.rejects] == [
        ("00000/000000001.jpg", "no caption file 000000"), ("00001/000010000.jpg", "caption cannot be read"),
    ]  # fmt: skip


def test_tars_of_img2dataset_come_before_the_tables_beside_them(tmp_path: Path, own_cache: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = make_folder(tmp_path / "patches", images=4, captions=1)
    (item, *_) = items_of(root)
    none = json.dumps({"caption": None, "status": "success"}).encode()
    empty = json.dumps({"caption": "", "status": "success"}).encode()
    (tmp_path / "laion").mkdir()
    tar_of(tmp_path / "laion" / "00000.tar", [
        ("000000000.jpg", item.content), ("000000000.txt", b"a dog"), ("000000000.json", none),
        ("000000001.jpg", item.content), ("000000001.txt", b"a cat"), ("000000001.json", empty),
    ])  # fmt: skip
    pq.write_table(pa.table({"url": ["x", "y"], "caption": ["a dog", "a cat"]}), tmp_path / "laion" / "00000.parquet")
    (tmp_path / "laion" / "00000_stats.json").write_text("{}")
    assert captions(read(tmp_path / "laion", own_cache)) == {"000000000.jpg": ("a dog",), "000000001.jpg": ("a cat",)}


TABLES = {
    "results.csv": "image_name| comment_number| comment\na.jpg| 0| a dog , running\na.jpg| 1| a \"brown\" dog\nb.jpg| 0| a cat\n",
    "captions.csv": "filename;caption\na.jpg;a dog , running\na.jpg;a \"brown\" dog\nb.jpg;a cat\n",
    "metadata.csv": "filepath\ttitle\na.jpg\ta dog , running\na.jpg\ta \"brown\" dog\nb.jpg\ta cat\n",
    "captions.tsv": "filepath\ttitle\r\na.jpg\ta dog , running\r\na.jpg\ta \"brown\" dog\r\nb.jpg\ta cat\r\n",
    "Flickr8k.token.txt": 'a.jpg#0\ta dog , running\na.jpg#1\ta "brown" dog\nb.jpg#0\ta cat\n',
    "captions.txt": 'a.jpg,"a dog , running"\na.jpg,a "brown" dog\nb.jpg,a cat\n',
    "raw.csv": '\ufefffilename,raw,split\na.jpg,"[""a dog , running"", ""a \\""brown\\"" dog""]",train\nb.jpg,a cat,train\n',
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables_however_they_are_parted(name: str, tmp_path: Path, own_cache: Path) -> None:
    images(tmp_path, "images/a.jpg", "images/b.jpg")
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8")
    expected = {"a.jpg": ("a dog , running", 'a "brown" dog'), "b.jpg": ("a cat",)}
    assert captions(read(tmp_path / name, own_cache)) == expected
    if name != "raw.csv":
        assert captions(read(tmp_path, own_cache)) == expected
    (tmp_path / name.swapcase()).write_text(TABLES[name], encoding="utf-8")
    assert captions(read(tmp_path / name.swapcase(), own_cache)) == expected


def test_a_table_without_a_header_says_so(tmp_path: Path, own_cache: Path) -> None:
    images(tmp_path, "a.jpg")
    (tmp_path / "captions.csv").write_text("a.jpg,3,a dog\n")
    assert "is not a header: add one that names the columns, such as image,caption" in message(tmp_path, own_cache)
    (tmp_path / "captions.csv").write_text("image\na.jpg\n")
    assert "has no column 'caption': it has 'image'" in message(tmp_path, own_cache)


@pytest.mark.parametrize("part", [",", "\t"])
def test_a_stray_quote_takes_in_no_other_row(part: str, tmp_path: Path, own_cache: Path) -> None:
    images(tmp_path, *(f"{k}.jpg" for k in range(6)))
    rows = [
        ("0.jpg", '"the sign says stop'), ("1.jpg", "a dog"), ("2.jpg", '"over two\nlines, as it should be"'),
        ("3.jpg", '"half a quote" and more'), ("4.jpg", '"never closed'), ("5.jpg", "a cat"),
    ]  # fmt: skip
    file = tmp_path / ("captions.csv" if part == "," else "captions.tsv")
    file.write_text("".join(f"{a}{part}{b}\n" for a, b in [("image", "caption"), *rows]))
    found = captions(read(tmp_path, own_cache))
    assert found == {
        "0.jpg": ('"the sign says stop',), "1.jpg": ("a dog",), "2.jpg": ("over two lines, as it should be",),
        "3.jpg": ("half a quote and more",), "4.jpg": ('"never closed',), "5.jpg": ("a cat",),
    }  # fmt: skip


def test_lists_name_images_as_captions_files_may(tmp_path: Path, own_cache: Path) -> None:
    root = make_folder(tmp_path / "patches", images=10, lists=False)
    (root / "test.txt").write_text(
        "Images/000.png\n./001.png\n" + str((root / "Images" / "002.png").resolve()) + "\nno.png\n"
    )
    (root / "val.txt").write_text("001.png\n003.png\n")
    found = read(root, own_cache)
    assert found.splits["test"] == {"000.png", "001.png", "002.png"} and len(found.splits["train"]) == 6
    assert list(found.notes) == [
        "test.txt lists 1 of 4 names without a sample, such as no.png",
        "1 images are in both val and test, such as 001.png",
    ]
    (root / "test.txt").write_text("x/000.png\n")
    assert "none of the 1 names in" in message(root, own_cache)


@pytest.mark.parametrize("name", [n for n in WRITERS if not n.startswith(("parquet", "tars", "saved"))])
def test_the_limit_is_one_of_images_whatever_the_format(name: str, tmp_path: Path, own_cache: Path) -> None:
    items = items_of(make_folder(tmp_path / "patches", images=100, captions=5))
    data = WRITERS[name](tmp_path / "other" / "set", items)
    folder = next(f for f in (tmp_path / "other" / "set").iterdir() if f.is_dir() and f.name.lower() == "images")
    for item in items[:9]:
        (folder / item.name).unlink()
    found = read(data, own_cache)
    assert found.lost == 9 and len(found.samples) == 91
    with pytest.raises(UserError, match=r"over the limit of 8.5%.*no such image"):
        found.enforce_limit(0.085)
    found.enforce_limit(0.095)


def test_only_what_is_named_is_opened_outside(tmp_path: Path, own_cache: Path) -> None:
    root = tmp_path / "set"
    images(root, "a.jpg")
    (tmp_path / "secret.csv").write_text("secret line\n")
    os.symlink(tmp_path / "secret.csv", root / "captions.csv")
    told = message(root, own_cache)
    assert (
        "captions.csv' is a link out of the data set: to read it, name it: --data" in told and "secret line" not in told
    )
    # A data set may itself be reached over a link, and its paths written over it.
    (root / "captions.csv").unlink()
    os.symlink(root, tmp_path / "link")
    (root / "captions.csv").write_text(f"image,caption\n{tmp_path / 'link' / 'a.jpg'},a dog\n")
    assert captions(read(tmp_path / "link", own_cache)) == {"a.jpg": ("a dog",)}
    (root / "captions.csv").write_text("image,caption\n/etc/hostname,a dog\n")
    with pytest.raises(UserError, match=r"leaves the folder \(images elsewhere: --source.images FOLDER\)"):
        read(root, own_cache).enforce_limit(1.0)


def test_names_as_other_systems_write_them(tmp_path: Path, own_cache: Path) -> None:
    images(tmp_path, "img/a b.jpg", unicodedata.normalize("NFD", "café.jpg"), "100%.JPG", "q#1.jpg")
    rows = ["img\\a b.jpg", unicodedata.normalize("NFC", "café.jpg"), "100%.JPG", "q#1.jpg"]
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{r},a dog\n" for r in rows), encoding="utf-8")
    assert set(captions(read(tmp_path, own_cache))) == {
        "img/a b.jpg", unicodedata.normalize("NFD", "café.jpg"), "100%.JPG", "q#1.jpg"
    }  # fmt: skip


def test_class_folders_by_split_and_what_archivers_leave(tmp_path: Path, own_cache: Path) -> None:
    for split in ("train", "val"):
        images(tmp_path / "pets", f"{split}/cat/0.jpg", f"{split}/dog/1.jpg")
    images(tmp_path / "pets", "train/__MACOSX/2.jpg", "train/cat/._0.jpg", ".cache/3.jpg")
    found = read(tmp_path / "pets", own_cache)
    assert captions(found)["val/dog/1.jpg"] == ("a photo of a dog",) and len(found.samples) == 4
    assert found.splits["val"] == {"val/cat/0.jpg", "val/dog/1.jpg"}
    images(tmp_path / "numbers", "00000/0.jpg", "00001/1.jpg")
    assert "are numbers, not names: name the classes in" in message(tmp_path / "numbers", own_cache)
    images(tmp_path / "pets", "birds/0.jpg")
    assert "mixes splits and classes, train and birds" in message(tmp_path / "pets", own_cache)


def test_splits_that_leave_nothing_to_train_on(tmp_path: Path, own_cache: Path) -> None:
    items = items_of(make_folder(tmp_path / "patches"))
    write_jsonl(tmp_path / "a", [Item(i.name, i.content, i.captions, f"fold{k % 2}") for k, i in enumerate(items)])
    told = message(tmp_path / "a", own_cache)
    assert "has no training images: its splits are fold0 (20), fold1 (20); call one of them train" in told
    # A file that is given alone is the whole set, whatever its name.
    rows = (tmp_path / "a" / "metadata.jsonl").read_text().replace('"split"', '"fold"')
    (tmp_path / "a" / "val.jsonl").write_text(rows)
    assert len(read(tmp_path / "a" / "val.jsonl", own_cache).splits["train"]) > 30
    some = write_jsonl(
        tmp_path / "b", [Item(i.name, i.content, i.captions, "" if k % 4 else i.split) for k, i in enumerate(items)]
    )
    assert read(some, own_cache).notes == ("30 images are in no split, and not used",)


def test_patterns_that_name_what_is_not_there(tmp_path: Path, own_cache: Path) -> None:
    root = make_folder(tmp_path / "patches", images=4)
    content = [
        (f"{k}.{s}", items_of(root)[0].content if s == "png" else b"a dog") for k in range(2) for s in ("png", "txt")
    ]
    for k in range(2):
        tar_of(tmp_path / f"{k}.tar", [(f"{k}{name}", c) for name, c in content])
    told = message(f"{tmp_path}/{{0..9}}.tar", own_cache)
    assert "8 of the 10 files of" in told and "do not exist, such as" in told
    assert len(read(f"{tmp_path}/{{0..1}}.tar", own_cache).samples) == 4


def test_a_shard_that_is_none_is_listed_and_the_others_read(tmp_path: Path, own_cache: Path) -> None:
    root = make_folder(tmp_path / "patches", images=4, captions=1)
    item = items_of(root)[0]
    for k in range(3):
        whole = [
            (f"{k}{n}.{s}", item.content if s == "input.png" else b"a dog")
            for n in range(3)
            for s in ("input.png", "txt")
        ]
        tar_of(
            tmp_path / "shards" / f"{k}.tar" if (tmp_path / "shards").mkdir(exist_ok=True) is None else tmp_path, whole
        )
    (tmp_path / "shards" / "3.tar").write_bytes(b"<html>404</html>" * 100)
    (tmp_path / "shards" / "4.tar").write_bytes(b"")
    last = tmp_path / "shards" / "2.tar"
    with last.open("r+b") as handle:  # at the border between two samples: nothing but the end is missing
        size = len(item.content)
        handle.truncate(2 * (512 + -(-size // 512) * 512 + 1024))
    found = read(tmp_path / "shards", own_cache, image_column="input.png")
    assert len(found.samples) == 8
    assert [(r.file, r.reason[:22]) for r in found.rejects] == [
        ("2.tar", "tar has no end marker:"), ("3.tar", "is not a tar: corrupt "), ("4.tar", "is empty (0 bytes)"),
    ]  # fmt: skip
    assert [n[:30] for n in found.notes] == ["3.tar cannot be read at all: i", "4.tar cannot be read at all: i"]


def test_captions_that_are_no_captions(tmp_path: Path, own_cache: Path) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    deep: object = "a dog"
    for _ in range(400):
        deep = [deep]
    rows = [{"image": "a.jpg", "caption": deep}, {"image": "b.jpg", "caption": ["a cat", float("nan"), 3, None]}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read(tmp_path, own_cache)
    assert {s.name: s.captions for s in found.samples} == {"b.jpg": ("a cat",)}
    assert [r.reason for r in found.rejects] == [
        "caption is not a text but list", "caption is not a text but float", "caption is not a text but int", "empty caption",
    ]  # fmt: skip
    (tmp_path / "captions.json").write_text('{"annotations": [], "images": 5}')
    assert read(tmp_path / "captions.json", own_cache).samples == ()


def test_names_of_the_parts_of_a_mix(tmp_path: Path, own_cache: Path) -> None:
    make_folder(tmp_path / "patches", images=6)
    for name in ("a/b", "..", "", "\x1b[2J"):
        (tmp_path / "mix.yaml").write_text(json.dumps([{"data": "patches", "name": name, "weight": 1}]))
        if name:
            assert "a name may contain letters, digits" in message(tmp_path / "mix.yaml", own_cache)
        else:
            assert read(tmp_path / "mix.yaml", own_cache).parts == {"patches": 1.0}
