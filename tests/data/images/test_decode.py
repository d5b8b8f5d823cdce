"""Decoded images are kept in memory or on disk, and whatever happens to the disk, they are the right ones."""

from __future__ import annotations

import io
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from amclr.data.images import decode as images
from amclr.data.images.decode import BadImage, ImageStore, Location, read_image


def jpeg(seed: int, size: tuple[int, int] = (60, 44), **options: Any) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=92, **options)
    return out.getvalue()


@pytest.fixture
def places(tmp_path: Path) -> list[Location]:
    """Twenty JPEG files of several sizes, and twenty more as parts of one file, as in a tar."""
    (tmp_path / "p").mkdir()
    found = []
    for k in range(20):
        file = tmp_path / "p" / f"{k}.jpg"
        file.write_bytes(jpeg(k, (60 + k, 44 + k % 3)))
        found.append(Location(str(file)))
    shard = tmp_path / "p" / "shard"
    with shard.open("wb") as handle:
        for k in range(20, 40):
            content = jpeg(k)
            found.append(Location(str(shard), handle.tell(), len(content)))
            handle.write(content)
    return found


def store(places: list[Location], folder: Path | None, keep: Any = "disk", **options: Any) -> ImageStore:
    return ImageStore(places, 24, keep, folder=folder, progress=False, **options)


def assert_right(kept: ImageStore, places: list[Location]) -> None:
    assert len(kept) == len(places)
    for i, place in enumerate(places):
        assert torch.equal(kept[i], read_image(place, 24))


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "read_image", lambda *_: pytest.fail("decoded again"))


# -- the decoder ----------------------------------------------------------------------------------


def test_images_are_reduced_as_pillow_would() -> None:
    content = jpeg(5, (150, 100))
    wanted = Image.open(io.BytesIO(content)).resize((96, 64), Image.Resampling.BICUBIC)
    made = read_image(content, 32)
    assert made.shape == (3, 64, 96)
    assert (made.int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).int()).abs().max() <= 1


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_jpeg_that_is_cut_off_is_refused(share: float) -> None:
    for size in ((60, 44), (900, 700)):
        content = jpeg(1, size)
        with pytest.raises(BadImage, match="cannot be decoded"):
            read_image(content[: int(share * len(content))], 24)


def test_no_image_runs_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to `gs`, whatever the file is called."""
    told = tmp_path / "told"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\necho run >> '{told}'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked for once in a process
    hostile = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.jpg").write_bytes(hostile)
    with pytest.raises(OSError):
        Image.open(tmp_path / "a.jpg").load()
    assert told.read_text().startswith("run"), "Pillow alone does run it"
    told.unlink()
    for source in (hostile, tmp_path / "a.jpg"):
        with pytest.raises(BadImage, match="cannot be decoded: cannot identify image file"):
            read_image(source, 24)
    assert not told.exists()


@pytest.mark.parametrize("kind", images.KINDS)
def test_every_kind_that_is_named_is_read(kind: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 10, 10)).save(out, kind)
    assert read_image(out.getvalue(), 24).shape == (3, 20, 30)


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.jpg")
    with pytest.raises(BadImage, match="not a regular file"):
        read_image(tmp_path / "f.jpg", 24)


def test_a_line_of_pixels_is_refused() -> None:
    """Its shorter side at 24 pixels, it would be 24 million pixels long."""
    out = io.BytesIO()
    Image.new("1", (1_000_000, 1)).save(out, "PNG")
    assert len(out.getvalue()) < 1000
    with pytest.raises(BadImage, match="too narrow: 1000000 x 1 pixels, one side over 1000 times the other"):
        read_image(out.getvalue(), 24)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And small ones beside them, drafts of large ones included."""
    monkeypatch.setattr(images, "LARGE_PIXELS", 90 * 90)
    monkeypatch.setattr(images.os, "cpu_count", lambda: 8)
    now: dict[bool, int] = {True: 0, False: 0}
    most = dict(now)
    lock, real = threading.Lock(), images._to_rgb

    def watched(image: Image.Image) -> Image.Image:
        large = image.size[0] * image.size[1] > 90 * 90 or image.info.get("progressive", 0) == 1
        with lock:
            now[large] += 1
            most[large] = max(most[large], now[large])
        time.sleep(0.02)
        with lock:
            now[large] -= 1
        return real(image)

    monkeypatch.setattr(images, "_to_rgb", watched)
    found = []
    for k in range(32):
        file = tmp_path / f"{k}.png"
        if k % 4 == 0:
            Image.new("RGBA", (100, 100), (k, 0, 0, 128)).save(file)
        else:
            file.write_bytes(jpeg(k, (400, 400) if k % 4 == 1 else (40, 40), progressive=k % 8 == 1))
        found.append(Location(str(file)))
    assert not any(v.reason for v in images.scan(found, 20, progress=False).values())
    assert most[True] == 1 and most[False] > 1


# -- keeping decoded images ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["none", "ram", "disk", "auto"])
def test_kept_images_are_those_that_are_decoded(
    keep: str, places: list[Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(places, tmp_path / "cache", keep)
    assert kept.kept == ("ram" if keep == "auto" else keep)
    wanted = [read_image(p, 24) for p in places]
    if keep != "none":
        no_decoding(monkeypatch)
    for one in (kept, pickle.loads(pickle.dumps(kept))):
        assert all(torch.equal(one[i], w) for i, w in enumerate(wanted))


def test_the_file_is_found_again_until_something_that_matters_changes(
    places: list[Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(places, tmp_path / "cache")
    with monkeypatch.context() as patch:
        no_decoding(patch)
        assert store(places, tmp_path / "cache").kept == "disk"
        assert store(places, tmp_path / "cache", "auto").kept == "disk", "auto takes what is there already"
    Path(places[3].file).write_bytes(jpeg(99, (63, 44)))
    assert_right(store(places, tmp_path / "cache"), places)
    assert_right(store(places[5:30], tmp_path / "cache"), places[5:30])
    other = ImageStore(places, 8, "disk", folder=tmp_path / "cache", progress=False)
    assert torch.equal(other[0], read_image(places[0], 8))


def test_auto_goes_from_memory_to_disk_to_neither(
    places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store(places, tmp_path / "a", "auto", ram=0.0).kept == "disk"
    assert not capsys.readouterr().err
    none = store(places, tmp_path / "b", "auto", ram=0.0, disk=1e-6)
    assert (
        none.kept == "none"
        and "decoded at each visit: they need 0.0 GB of disk: raise --disk_cache" in capsys.readouterr().err
    )
    assert_right(none, places)
    small = store(places, None, "ram", ram=1e-6)
    assert small.kept == "none" and "raise --ram_cache, or give --decoded disk" in capsys.readouterr().err
    assert_right(small, places)


def test_more_than_the_first_images_promise_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate looks at every second of 64 images, and those between are 20 times as large."""
    monkeypatch.setattr(images, "CHUNK", 8)
    found = []
    for k in range(64):
        file = tmp_path / f"{k}.png"
        Image.new("RGB", (48, 48) if k % 2 else (8, 8), (k, 0, 0)).save(file)
        found.append(Location(str(file)))
    need = 32 * (48 * 48 + 64) * 3
    assert_right(store(found, None, "ram", ram=need / 1e9), found)
    assert store(found, None, "ram", ram=(need - 1) / 1e9).kept == "none"
    kept = store(found, tmp_path / "cache", ram=0.0, disk=need / 2e9)
    assert kept.kept == "none" and "more than 0.0 GB needed: raise --disk_cache" in capsys.readouterr().err
    assert_right(kept, found)
    assert not list((tmp_path / "cache").glob("*.pixels"))


def test_a_image_that_cannot_be_decoded_says_so_at_access(places: list[Location], tmp_path: Path) -> None:
    Path(places[2].file).write_bytes(b"not an image")
    for keep in ("ram", "disk"):
        kept = store(places, tmp_path / "cache", keep)
        assert kept.kept == keep
        with pytest.raises(BadImage, match=r"2\.jpg: image cannot be decoded"):
            kept[2]
        assert torch.equal(kept[3], read_image(places[3], 24))


# -- faults ---------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
from pathlib import Path
from amclr.data.images import decode as images
images.CHUNK = 4
real = images.read_image
images.read_image = lambda *a: time.sleep(0.02) or real(*a)
places = [images.Location(*eval(line)) for line in Path(sys.argv[1]).read_text().splitlines()]
images.ImageStore(places, 24, "disk", folder=Path(sys.argv[2]), progress=False)
"""


def test_a_kill_while_the_file_is_written_loses_little_and_corrupts_nothing(
    places: list[Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, cache = tmp_path / "places", tmp_path / "cache"
    listed.write_text("\n".join(repr((p.file, p.offset, p.size)) for p in places))
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(listed), str(cache)], env=os.environ)
    deadline = time.monotonic() + 60
    while not any(t.stat().st_size >= 16 * 8 for t in cache.glob("*.sizes")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (table,) = cache.glob("*.sizes")
    done = table.stat().st_size // 8
    assert 16 <= done < 40, "killed in the middle"
    # What a kill at any other moment would have left: pixels, or half a row, beyond what the table tells of.
    with table.with_suffix(".pixels").open("ab") as handle:
        handle.write(b"\7" * 1000)
    with table.open("ab") as handle:
        handle.write(b"\7" * 5)
    decoded = []
    real = images.read_image
    monkeypatch.setattr(images, "read_image", lambda *a: decoded.append(a[0]) or real(*a))
    kept = store(places, cache)
    assert kept.kept == "disk" and set(places[:done]) & set(decoded[-(40 - done) :]) == set()
    monkeypatch.setattr(images, "read_image", real)
    assert_right(kept, places)


def test_pixels_that_a_power_cut_lost_are_decoded_again(places: list[Location], tmp_path: Path) -> None:
    store(places, tmp_path)
    (file,) = tmp_path.glob("*.pixels")
    os.truncate(file, file.stat().st_size // 2)
    assert_right(store(places, tmp_path), places)


@pytest.mark.parametrize("limit", [0, 100, 60_000])
def test_a_full_disk_is_left_as_it_was_and_the_run_goes_on(
    limit: int, places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        kept = store(places, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert kept.kept == "none" and said.count("\n") == 1 and "File too large. Give another --cache" in said
    assert not list((tmp_path / "cache").glob("*.pixels"))
    assert_right(kept, places)
    assert_right(store(places, tmp_path / "cache"), places)


def test_too_little_room_is_noticed_before_anything_is_written(
    places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type(images.shutil.disk_usage(tmp_path))(10**9, 10**9, 1000)
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: free)
    assert store(places, tmp_path).kept == "none" and "0.0 GB needed, 0.0 GB free" in capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_made_is_named(
    places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = store(places, tmp_path / "file" / "cache")
    assert kept.kept == "none" and "file/cache': Not a directory. Give another --cache" in capsys.readouterr().err
    assert_right(kept, places)


def test_what_other_data_sets_left_makes_room_the_oldest_first(places: list[Location], tmp_path: Path) -> None:
    gigabytes = store(places, tmp_path)._estimate() / 1e9
    for part in (places[:39], places[:38], places[:37]):
        store(part, tmp_path)
    files = sorted(tmp_path.glob("*.pixels"), key=lambda p: p.stat().st_mtime_ns)
    for k, file in enumerate(files):
        os.utime(file, (k, k))
    store(places[:39], tmp_path)  # used again, so no longer among the oldest
    newest = store(places[:36], tmp_path, disk=3.2 * gigabytes)
    left = {p.name for p in tmp_path.glob("*.pixels")}
    assert newest.kept == "disk" and len(left) == 3 and files[0].name not in left and files[1].name in left
