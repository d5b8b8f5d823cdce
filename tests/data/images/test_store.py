"""Decoded images are kept in memory or on disk, and whatever happens to the disk, they are the right ones."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from amclr.data.images import decode, store
from amclr.data.images.decode import BadImage, Location, read_image
from amclr.data.images.store import ImageStore
from tests.data.encoded import jpeg


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


def kept_images(places: list[Location], folder: Path | None, keep: Any = "disk", **options: Any) -> ImageStore:
    return ImageStore(places, 24, keep, folder=folder, progress=False, **options)


def assert_right(kept: ImageStore, places: list[Location]) -> None:
    assert len(kept) == len(places)
    for i, place in enumerate(places):
        assert torch.equal(kept[i], read_image(place, 24))


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "read_image", lambda *_: pytest.fail("decoded again"))


# -- keeping decoded images ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["none", "ram", "disk", "auto"])
def test_kept_images_are_those_that_are_decoded(
    keep: str, places: list[Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_images(places, tmp_path / "cache", keep)
    assert kept.kept_in == ("ram" if keep == "auto" else keep)
    wanted = [read_image(p, 24) for p in places]
    if keep != "none":
        no_decoding(monkeypatch)
    for one in (kept, pickle.loads(pickle.dumps(kept))):
        assert all(torch.equal(one[i], w) for i, w in enumerate(wanted))


def test_the_file_is_found_again_until_something_that_matters_changes(
    places: list[Location], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_images(places, tmp_path / "cache")
    with monkeypatch.context() as patch:
        no_decoding(patch)
        assert kept_images(places, tmp_path / "cache").kept_in == "disk"
        assert kept_images(places, tmp_path / "cache", "auto").kept_in == "disk", "auto takes what is there already"
    Path(places[3].file).write_bytes(jpeg(99, (63, 44)))
    assert_right(kept_images(places, tmp_path / "cache"), places)
    assert_right(kept_images(places[5:30], tmp_path / "cache"), places[5:30])
    other = ImageStore(places, 8, "disk", folder=tmp_path / "cache", progress=False)
    assert torch.equal(other[0], read_image(places[0], 8))


def test_auto_goes_from_memory_to_disk_to_neither(
    places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kept_images(places, tmp_path / "a", "auto", ram=0.0).kept_in == "disk"
    assert not capsys.readouterr().err
    none = kept_images(places, tmp_path / "b", "auto", ram=0.0, disk=1e-6)
    assert (
        none.kept_in == "none"
        and "decoded at each visit: they need 0.0 GB of disk: raise --disk_cache" in capsys.readouterr().err
    )
    assert_right(none, places)
    small = kept_images(places, None, "ram", ram=1e-6)
    assert small.kept_in == "none" and "raise --ram_cache, or give --decoded disk" in capsys.readouterr().err
    assert_right(small, places)


def test_more_than_the_first_images_promise_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate looks at every second of 64 images, and those between are 20 times as large."""
    monkeypatch.setattr(decode, "CHUNK", 8)
    found = []
    for k in range(64):
        file = tmp_path / f"{k}.png"
        Image.new("RGB", (48, 48) if k % 2 else (8, 8), (k, 0, 0)).save(file)
        found.append(Location(str(file)))
    need = 32 * (48 * 48 + 64) * 3
    assert_right(kept_images(found, None, "ram", ram=need / 1e9), found)
    assert kept_images(found, None, "ram", ram=(need - 1) / 1e9).kept_in == "none"
    kept = kept_images(found, tmp_path / "cache", ram=0.0, disk=need / 2e9)
    assert kept.kept_in == "none" and "more than 0.0 GB needed: raise --disk_cache" in capsys.readouterr().err
    assert_right(kept, found)
    assert not list((tmp_path / "cache").glob("*.pixels"))


def test_an_image_that_cannot_be_decoded_says_so_at_access(places: list[Location], tmp_path: Path) -> None:
    Path(places[2].file).write_bytes(b"not an image")
    for keep in ("ram", "disk"):
        kept = kept_images(places, tmp_path / "cache", keep)
        assert kept.kept_in == keep
        with pytest.raises(BadImage, match=r"2\.jpg: image cannot be decoded"):
            kept[2]
        assert torch.equal(kept[3], read_image(places[3], 24))


# -- faults ---------------------------------------------------------------------------------------

SLOWLY = """
import sys, time
from pathlib import Path
from amclr.data.images import decode, store
decode.CHUNK = 4
real = store.read_image
store.read_image = lambda *a: time.sleep(0.02) or real(*a)
places = [decode.Location(*eval(line)) for line in Path(sys.argv[1]).read_text().splitlines()]
store.ImageStore(places, 24, "disk", folder=Path(sys.argv[2]), progress=False)
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
    real = store.read_image
    monkeypatch.setattr(store, "read_image", lambda *a: decoded.append(a[0]) or real(*a))
    kept = kept_images(places, cache)
    assert kept.kept_in == "disk" and set(places[:done]) & set(decoded[-(40 - done) :]) == set()
    monkeypatch.setattr(store, "read_image", real)
    assert_right(kept, places)


def test_pixels_that_a_power_cut_lost_are_decoded_again(places: list[Location], tmp_path: Path) -> None:
    kept_images(places, tmp_path)
    (file,) = tmp_path.glob("*.pixels")
    os.truncate(file, file.stat().st_size // 2)
    assert_right(kept_images(places, tmp_path), places)


@pytest.mark.parametrize("limit", [0, 100, 60_000])
def test_a_full_disk_is_left_as_it_was_and_the_run_goes_on(
    limit: int, places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        kept = kept_images(places, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert kept.kept_in == "none" and said.count("\n") == 1 and "File too large. Give another --cache" in said
    assert not list((tmp_path / "cache").glob("*.pixels"))
    assert_right(kept, places)
    assert_right(kept_images(places, tmp_path / "cache"), places)


def test_too_little_room_is_noticed_before_anything_is_written(
    places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type(store.shutil.disk_usage(tmp_path))(10**9, 10**9, 1000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: free)
    assert kept_images(places, tmp_path).kept_in == "none" and "0.0 GB needed, 0.0 GB free" in capsys.readouterr().err


def test_a_cache_folder_that_cannot_be_made_is_named(
    places: list[Location], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = kept_images(places, tmp_path / "file" / "cache")
    assert kept.kept_in == "none" and "file/cache': Not a directory. Give another --cache" in capsys.readouterr().err
    assert_right(kept, places)


def test_what_other_data_sets_left_makes_room_the_oldest_first(places: list[Location], tmp_path: Path) -> None:
    gigabytes = kept_images(places, tmp_path)._estimate() / 1e9
    for part in (places[:39], places[:38], places[:37]):
        kept_images(part, tmp_path)
    files = sorted(tmp_path.glob("*.pixels"), key=lambda p: p.stat().st_mtime_ns)
    for k, file in enumerate(files):
        os.utime(file, (k, k))
    kept_images(places[:39], tmp_path)  # used again, so no longer among the oldest
    newest = kept_images(places[:36], tmp_path, disk=3.2 * gigabytes)
    left = {p.name for p in tmp_path.glob("*.pixels")}
    assert newest.kept_in == "disk" and len(left) == 3 and files[0].name not in left and files[1].name in left
