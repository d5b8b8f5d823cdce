"""Faults caused on purpose: each is listed with its place and reason, one by one, and nothing else is lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclr.config.schema import Config, ModelConfig, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.manifest import Manifest
from amclr.data.sources.tars import Damage, Member, members
from amclr.utils.errors import UserError
from tests.conftest import COLOURS, Command, paint
from tests.data.encoded import bomb, encoded
from tests.data.formats import Item, tar_of, write_parquet


def image(index: int) -> Image.Image:
    return paint(list(COLOURS)[index % 4], index)


def caption(index: int) -> str:
    return f"a {list(COLOURS)[index % 4]} patch number {index}"


def oddities() -> list[bytes]:
    """Images that are unusual and sound: each must be used."""
    base = image(1)
    frames = io.BytesIO()
    base.save(frames, "GIF", save_all=True, append_images=[image(k) for k in (2, 3)])
    alpha = base.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    turned = Image.Exif()
    turned[0x0112] = 6
    rotated = io.BytesIO()
    base.save(rotated, "JPEG", exif=turned)
    deep = Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16))
    return [
        encoded(base.convert("CMYK")), encoded(deep, "PNG"), encoded(alpha.quantize(), "PNG"), frames.getvalue(),
        encoded(base, "PNG"), encoded(base, "WEBP"), encoded(base.convert("L")), encoded(base.convert("1"), "PNG"),
        rotated.getvalue(), encoded(base, "TIFF"),
    ]  # fmt: skip


def folder_with_faults(root: Path) -> dict[tuple[str, int, str], str]:
    """500 images with a CSV, 50 of them spoiled in 13 ways. Returns place (file, line, key) -> reason."""
    (root / "Images").mkdir(parents=True)
    outside = root.parent / "outside.jpg"
    image(0).save(outside)
    whole = encoded(Image.effect_noise((160, 160), 60).convert("RGB"))
    spoiled = {
        "truncated": (whole[: len(whole) // 2], "cannot be decoded"),
        "empty": (b"", r"0 bytes"),
        "text": (b"%PDF-1.7 not an image at all", "cannot be decoded"),
        "html": (b"<html><script>alert(1)</script></html>", "cannot be decoded"),
        "bomb": (bomb(30_000), "too large"),
        "bomb below PIL's limit": (bomb(9_000), "too large"),
        "zeros": (bytes(4000), "cannot be decoded"),
    }
    rows: dict[str, tuple[bytes, str]] = {
        "missing": (b"absent-{n}.jpg,a caption", "no such image"),
        "bad utf-8": (b"{n:04d}.jpg,caf\xe9", "not valid utf-8"),
        "empty caption": (b"{n:04d}.jpg,   ", "empty caption"),
        "traversal": (b"../outside.jpg,a caption", "leaves the folder"),
        "link": (b"link-{n}.jpg,a caption", "is a link out of it"),
        "columns": (b"{n:04d}.jpg,one,too many", "row has 3 columns"),
        "url": (b"https://example.org/{n}.jpg,a caption", "image is a URL"),
    }
    expected: dict[tuple[str, int, str], str] = {}
    odd = oddities()
    lines = [b"image,caption"]
    for n in range(500):
        name, line = f"{n:04d}.jpg", len(lines) + 1
        row = f"{name},{caption(n)}".encode()
        content = odd[n // 10 % len(odd)] if n % 10 == 5 else encoded(image(n))
        if n % 10 == 0:
            kinds = [*spoiled, *rows]
            kind = kinds[n // 10 % len(kinds)]
            if kind in spoiled:
                content, reason = spoiled[kind]
                expected[(str(root / "Images" / name), 0, f"photos/{name}")] = reason
            else:
                text, reason = rows[kind]
                row = text.replace(b"{n:04d}", b"%04d" % n).replace(b"{n}", b"%d" % n)
                expected[("photos/captions.csv", line, "")] = reason
                if kind == "link":
                    os.symlink(outside, root / "Images" / f"link-{n}.jpg")
        lines.append(row)
        (root / "Images" / name).write_bytes(content)
    (root / "captions.csv").write_bytes(b"\n".join(lines) + b"\n")
    return expected


def tars_with_faults(root: Path) -> dict[tuple[str, int, str], str]:
    """500 samples in shards of unequal length, 50 of them spoiled in 10 ways."""
    root.mkdir(parents=True)
    expected: dict[tuple[str, int, str], str] = {}
    kinds = ["no caption", "no image", "bad utf-8", "not json", "empty caption", "duplicate", "corrupt image header",
             "corrupt caption header", "truncated image", "megabyte"]  # fmt: skip
    n, shard = 0, 0
    while n < 500:
        size = min(500 - n, (30, 80, 10, 55)[shard % 4])
        content: list[tuple[str, bytes]] = []
        corrupt: list[str] = []
        for n in range(n, n + size):  # noqa: B020
            key = f"{n:06d}"
            kind = kinds[n // 10 % len(kinds)] if n % 10 == 3 else ""
            place = (f"web/{shard:03d}.tar", 0, key)
            sample = [
                (f"{key}.jpg", encoded(image(n))),
                (f"{key}.json", json.dumps({"caption": caption(n)}).encode()),
            ]
            if n % 7 == 0:
                sample.append((f"{key}.pyd", b"cos\nsystem\n(S'touch owned'\ntR."))
            if kind == "no caption":
                sample, expected[place] = sample[:1], "no caption"
            elif kind == "no image":
                sample, expected[place] = sample[1:2], "no image beside json"
            elif kind == "bad utf-8":
                sample = [sample[0], (f"{key}.txt", b"caf\xe9")]
                expected[place] = "txt is not valid utf-8"
            elif kind == "not json":
                sample = [sample[0], (f"{key}.json", b"{'caption': 1}")]
                expected[place] = "json is not JSON"
            elif kind == "empty caption":
                sample = [sample[0], (f"{key}.txt", b" \n ")]
                expected[(place[0], 0, f"{key}.jpg")] = "empty caption"
            elif kind == "duplicate":
                sample = [(name.replace(key, f"{n - 1:06d}"), c) for name, c in sample]
                expected[(place[0], 0, f"{n - 1:06d}.jpg")] = "duplicate key"
            elif kind == "corrupt image header":
                corrupt.append(f"{key}.jpg")
                expected[place] = r"no image beside json.* \(corrupt tar header at byte \d+"
            elif kind == "corrupt caption header":
                corrupt.append(f"{key}.json")
                expected[place] = r"no caption \(corrupt tar header at byte \d+"
            elif kind == "truncated image":
                sample[0] = (f"{key}.jpg", sample[0][1][:200])
                expected[(str(root / f"{shard:03d}.tar"), 0, f"web/{key}.jpg")] = "cannot be decoded"
            elif kind == "megabyte":
                sample[1] = (f"{key}.txt", b"x" * (1 << 20))
                expected[(place[0], 0, f"{key}.jpg")] = "caption of 1048576 characters"
            content += sample
        n += 1
        file = tar_of(root / f"{shard:03d}.tar", content)
        with tarfile.open(file) as tar:
            end = next(m for m in reversed(tar.getmembers()) if m.name.endswith(".jpg"))
        spoil_headers(file, corrupt)
        shard += 1
    # The last shard is cut off in the middle of its last image.
    with (root / f"{shard - 1:03d}.tar").open("r+b") as handle:
        handle.truncate(end.offset_data + end.size // 2)
    key = end.name.removesuffix(".jpg")
    expected[(f"web/{shard - 1:03d}.tar", 0, "")] = rf"tar is cut off at byte \d+: '{key}.jpg' would end at"
    return expected


def spoil_headers(file: Path, names: Sequence[str]) -> None:
    with tarfile.open(file) as tar:
        offsets = [tar.getmember(name).offset for name in names]
    with file.open("r+b") as handle:
        for offset in offsets:
            handle.seek(offset + 124)
            handle.write(b"\xff" * 40)


def faulty(tmp_path: Path) -> tuple[Path, dict[tuple[str, int, str], str]]:
    expected = {**folder_with_faults(tmp_path / "photos"), **tars_with_faults(tmp_path / "web")}
    (tmp_path / "mix.yaml").write_text("- data: photos\n- data: web\n")
    return tmp_path / "mix.yaml", expected


@pytest.mark.usefixtures("undrawn")
def test_a_thousand_samples_with_a_tenth_spoiled(tmp_path: Path, main: Command) -> None:
    data, expected = faulty(tmp_path)
    assert len(expected) >= 100
    done = main(
        "train", "--recipe", "scratch", "--data", data, "--out", tmp_path / "run", "--epochs", 1, "--batch_size", 64,
        "--model.image_size", 16, "--model.dim", 16, "--source.max_bad", 0.2, "--accelerator", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    found = {(r["file"], r["line"], "" if r["line"] else r["key"]): r["reason"] for r in rows}
    assert len(found) == len(rows)
    assert not found.keys() ^ expected.keys()
    for place, reason in expected.items():
        assert re.search(reason, found[place]), (place, found[place])
    assert f"{len(rows)} rows or images left out" in done.stderr
    pinned = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert 780 < pinned["training images"] <= 1000 - len(expected) + 1
    assert not (tmp_path / "owned").exists()


def test_rejects_beyond_the_limit_stop_the_run_before_it_starts(tmp_path: Path, main: Command) -> None:
    data, expected = faulty(tmp_path)
    done = main("train", "--recipe", "scratch", "--data", data, "--out", tmp_path / "run", "--accelerator", "cpu")
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert re.search(r"cannot be used, over the limit of 2.0%; .*the first: .*raise --source.max_bad", done.stderr)
    assert "amclr: " in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    kinds = main("inspect", "--data", data)
    assert kinds.returncode == 0 and f"left out     {len(expected)} " in kinds.stdout


def read(data: Path, cache: Path, **source: object) -> Manifest:
    config = Config(data=str(data), source=SourceConfig(max_bad=1.0, **source), model=ModelConfig(image_size=16))  # type: ignore[arg-type]
    return manifests.prepare(config, cache, progress=False)


def reasons(manifest: Manifest) -> dict[str, str]:
    return {r.key: r.reason for r in manifest.rejects}


def memory_of(code: str, *arguments: object) -> float:
    """Peak memory in MB of a fresh process that runs `code`, above that of one which only imports."""
    prelude = (
        "import resource, sys\nfrom pathlib import Path\nfrom amclr.config.schema import *\nimport datasets, pyarrow.parquet\n"
        "from amclr.data import manifest as manifests\nfrom amclr.utils.errors import UserError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    )
    ending = "\nprint((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code + ending, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_names_that_reach_outside_open_nothing(tmp_path: Path, own_cache: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    image(0).save(secret / "a.png")
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    image(1).save(root / "images" / "fine.png")
    os.symlink(secret, root / "images" / "linked")
    os.symlink(secret / "a.png", root / "images" / "link.png")
    os.symlink(root / "images" / "fine.png", root / "images" / "inside.png")
    names = [
        "../../secret/a.png", str(secret / "a.png"), "linked/a.png", "link.png", "images/../../secret/a.png",
        "C:\\secret\\a.png", "file:///etc/hostname", "pipe:touch owned", "nul\0byte.png", "x" * 5000, "", ".", "images",
    ]  # fmt: skip
    rows = [{"image": n, "caption": "a caption"} for n in [*names, "fine.png", "inside.png"]]
    (root / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read(root, own_cache)
    assert [s.name for s in found.samples] == ["fine.png", "inside.png"]
    assert [r.line for r in found.rejects] == list(range(1, len(names) + 1))
    told = " ".join(r.reason for r in found.rejects)
    assert told.count("leaves the folder") == 6 and told.count("is a URL") == 2
    assert all(len(str(r)) < 1200 and str(r).isprintable() for r in found.rejects)
    with pytest.raises(UserError, match="would run a command: save its output"):
        read("pipe:touch owned", own_cache)  # type: ignore[arg-type]
    # What the user names is opened: the folder above, on purpose.
    allowed = read(root, own_cache, images=str(tmp_path))
    assert {s.name for s in allowed.samples} == {"secret/a.png"}


def test_nothing_in_a_tar_is_unpacked_or_run(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "set"
    root.mkdir()
    bomb_ = b"cos\nsystem\n(S'touch owned'\ntR."
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, content in [
            ("../../escape.jpg", encoded(image(1))), ("../../escape.txt", b"a caption"),
            ("/absolute.jpg", encoded(image(2))), ("/absolute.txt", b"a caption"),
            ("x.jpg", encoded(image(3))), ("x.txt", b"<script>alert(1)</script> \x1b[2J $x^{$"),
            ("x.pkl", bomb_), ("x.pyd", bomb_), ("x.pth", bomb_),
        ]:  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for kind, target in ((tarfile.SYMTYPE, "/etc/hostname"), (tarfile.LNKTYPE, "x.jpg"), (tarfile.FIFOTYPE, "")):
            info = tarfile.TarInfo("y.jpg")
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("y.txt")
        info.size = 9
        tar.addfile(info, io.BytesIO(b"a caption"))
    before = {p for p in tmp_path.rglob("*") if own_cache not in p.parents}
    found = read(root, own_cache)
    assert [s.name for s in found.samples] == ["../../escape.jpg", "/absolute.jpg", "x.jpg"]
    assert found.samples[2].captions == ("<script>alert(1)</script> [2J $x^{$",)
    assert reasons(found) == {"y": "no image beside txt"}
    assert {p for p in tmp_path.rglob("*") if own_cache not in p.parents} - {own_cache} == before - {own_cache}


def test_claims_are_not_believed(tmp_path: Path) -> None:
    """Headers that claim exabytes, a table of long rows, lines without end: memory stays as it is.

    The table, the line and the name that are long have more than 250 MB each.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "images").mkdir()
    image(1).save(tmp_path / "images" / "a.png")
    huge = tarfile.TarInfo("a.jpg")
    huge.size = 1 << 62
    (tmp_path / "huge.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + b"x" * 2048)
    long = tarfile.TarInfo("a.jpg")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 28
    with (tmp_path / "long.tar").open("wb") as handle:
        handle.write(long.tobuf(tarfile.GNU_FORMAT))
        handle.truncate(1 << 29)
    with (tmp_path / "line.jsonl").open("wb") as handle:
        handle.write(b'{"image": "a.png", "caption": "')
        handle.seek(1 << 28)
        handle.write(b'"}\n{"image": "a.png", "caption": "a caption"}\n')
    with (tmp_path / "line.csv").open("wb") as handle:
        handle.write(b'image,caption\na.png,"' + b"x" * (1 << 25) + b'"\na.png,a caption\n')
    one = pa.array(np.zeros(120_000, dtype=np.int8))
    columns = {"image": "a.png", "caption": "the same " * 250}
    table = pa.table({name: pa.DictionaryArray.from_arrays(one, [text]) for name, text in columns.items()})
    pq.write_table(table, tmp_path / "rows.parquet", store_schema=False)
    assert (tmp_path / "rows.parquet").stat().st_size < 100_000
    (tmp_path / "deep.json").write_text("[" * 100_000)
    code = """
root = Path(sys.argv[1])
for file, wanted in (("line.jsonl", 1), ("line.csv", 1), ("rows.parquet", 1), ("huge.tar", 0), ("long.tar", 0), ("deep.json", 0)):
    try:
        found = manifests.load(Config(data=str(root / file)), root / "cache", progress=False)
        print(file, len(found.samples), [str(r) for r in found.rejects][:3])
        assert len(found.samples) == wanted and (wanted == 0) <= len(found.rejects)
    except UserError as error:
        print(file, str(error)[:200])
        assert wanted == 0
"""
    assert memory_of(code, tmp_path) < 200


def test_tars_of_every_make(tmp_path: Path, own_cache: Path) -> None:
    deep = "/".join(["folder"] * 30) + "/" + "k" * 120
    wanted = {}
    parts = []
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
            for name in (f"{number}a", f"{number}é", *([f"{number}{deep}"] if kind != tarfile.USTAR_FORMAT else [])):
                for suffix, content in (("png", encoded(image(number), "PNG")), ("txt", name[:9].encode())):
                    info = tarfile.TarInfo(f"{name}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                    if suffix == "png":
                        wanted[f"{name}.png"] = content
        parts.append(out.getvalue())
    (tmp_path / "all.tar").write_bytes(b"".join(parts))  # archives appended to each other
    found = read(tmp_path / "all.tar", own_cache)
    assert not found.rejects and {s.name: s.image.read() for s in found.samples} == wanted
    (tmp_path / "zip.tar").write_bytes(gzip.compress(parts[0]))
    with pytest.raises(UserError, match="is compressed.*unpack it"):
        read(tmp_path / "zip.tar", own_cache)
    (tmp_path / "no.tar").write_bytes(b"this is no tar" * 500)
    with pytest.raises(UserError, match="'.*no.tar' is not a tar"):
        read(tmp_path / "no.tar", own_cache)


@pytest.mark.parametrize("cut", range(0, 5000, 331))
def test_a_tar_cut_anywhere_gives_what_is_whole_before_the_cut(cut: int, tmp_path: Path, own_cache: Path) -> None:
    content = [(f"{k}.{s}", b"x" * 700 if s == "jpg" else b"a caption") for k in range(3) for s in ("jpg", "txt")]
    file = tar_of(tmp_path / "a.tar", content)
    with tarfile.open(file) as tar:
        ends = [m.offset_data + m.size for m in tar.getmembers()]
    with file.open("r+b") as handle:
        handle.truncate(cut)
    whole = sum(end <= cut for end in ends)
    with file.open("rb") as handle:
        found = list(members(handle, cut))
    assert [m.name for m in found if isinstance(m, Member)] == [name for name, _ in content[:whole]]
    if cut > 512 and whole < 6 and cut not in (ends[whole - 1] if whole else 0,):
        assert isinstance(found[-1], Damage) or cut - ends[whole - 1] < 512


def test_a_damaged_table_is_named(tmp_path: Path, own_cache: Path) -> None:
    items = [Item(f"{k}.jpg", encoded(image(k)), (caption(k),), "train") for k in range(30)]
    file = write_parquet(tmp_path / "set", items) / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 4000] = bytes(4000)
    file.write_bytes(content)
    with pytest.raises(UserError, match="'train-00000-of-00001.parquet' is damaged: .*repair it"):
        read(tmp_path / "set", own_cache)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot read '.*train-00000-of-00001.parquet' as Parquet"):
        read(tmp_path / "set", own_cache)


def test_images_beside_the_usual_folder_and_behind_a_link_to_it(tmp_path: Path, own_cache: Path) -> None:
    (tmp_path / "disk").mkdir()
    image(1).save(tmp_path / "disk" / "a.png")
    root = tmp_path / "set"
    (root / "val2014").mkdir(parents=True)
    image(2).save(root / "val2014" / "b.png")
    os.symlink(tmp_path / "disk", root / "images")
    (root / "captions.csv").write_text("image,caption\na.png,one\nimages/a.png,two\nval2014/b.png,three\n")
    with pytest.raises(UserError, match="images' is a link out of the data set: .*give --source.images images"):
        read(root, own_cache)
    found = read(root, own_cache, images="images")
    assert {s.name: s.captions for s in found.samples} == {"a.png": ("one",)}
    (root / "images").unlink()
    (tmp_path / "disk").rename(root / "images")
    found = read(root, own_cache)
    assert {s.name: s.captions for s in found.samples} == {"a.png": ("one", "two"), "val2014/b.png": ("three",)}
    assert not found.rejects
