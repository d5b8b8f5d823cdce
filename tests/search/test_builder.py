"""Building an index: any data, updates, kills, several processes, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from amclr.config.schema import ScenesConfig
from amclr.data.scenes.dataset import write_scenes
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.search import builder
from amclr.search.builder import BuildResult, build
from amclr.search.index import Index
from amclr.utils.errors import UserError
from tests.conftest import make_folder, paint
from tests.search.conftest import CAPTIONS, TINY, build_index, content


def counts(result: BuildResult) -> tuple[int, int, int, int]:
    return result.rows, result.embedded, result.removed, result.rejected


def test_a_folder_of_images(saved: Path, photos: Path, tmp_path: Path) -> None:
    index, result = build_index(saved, photos, tmp_path / "index")
    assert counts(result) == (5, 5, 0, 0)
    stored = content(index)
    assert sorted(stored) == ["2024/05/c.jpg", "2024/05/d.jpg", "2024/b.png", "a.png", "e.png"]
    assert [stored[n][0].captions for n in ("a.png", "e.png")] == [(), ("the last one",)]
    model = DualEncoder.from_pretrained(saved)
    for name, (_, vector, thumb) in stored.items():
        expected = model.encode_image([photos / name])[0].numpy()
        np.testing.assert_allclose(np.frombuffer(vector, np.float32), expected, atol=1e-6)
        image = Image.open(io.BytesIO(thumb))
        assert image.format == "JPEG" and max(image.size) == 40, "no larger than the image"
    scores, rows = index.search(model.encode_image([photos / "a.png"]), k=2)
    assert index.image(int(rows[0, 0])).name == "a.png" and scores[0, 0] == pytest.approx(1, abs=1e-5)
    assert "5 images" in repr(index)


@pytest.mark.parametrize("kind", ["csv", "tar", "scenes"])
def test_any_data_set(kind: str, saved: Path, tmp_path: Path, own_cache: Path) -> None:
    if kind == "csv":
        data: Path | str = make_folder(tmp_path / "set", images=6)
    elif kind == "tar":
        data = tmp_path / "some.tar"
        with tarfile.open(data, "w") as tar:
            for k in range(6):
                paint("red", k).save(tmp_path / f"{k}.png")
                tar.add(tmp_path / f"{k}.png", f"{k}.png")
                if k % 2:
                    (tmp_path / f"{k}.txt").write_text(f"number {k}")
                    tar.add(tmp_path / f"{k}.txt", f"{k}.txt")
    else:
        small = ScenesConfig(train=3, val=2, test=1, zeroshot=4)
        write_scenes(tmp_path / "set", small, progress=False)
        data = tmp_path / "set"
    index, _ = build_index(saved, data, tmp_path / "index")
    assert len(index) == 6
    captions = [index.image(k).captions for k in range(6)]
    assert sum(map(bool, captions)) == (3 if kind == "tar" else 6)


def test_only_what_changed_is_embedded_again(
    saved: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebuild() -> tuple[dict[str, tuple[Any, ...]], tuple[int, int, int, int]]:
        index, result = build_index(saved, photos, tmp_path / "index")
        return content(index), counts(result)

    first, _ = rebuild()
    assert rebuild() == (first, (5, 0, 0, 0))
    paint("blue", 77).save(photos / "a.png")
    paint("green", 78).save(photos / "new.png")
    (photos / "2024" / "b.png").unlink()
    (photos / "broken.png").write_bytes(b"junk")
    seen: list[int] = []
    real = DualEncoder.encode_image
    monkeypatch.setattr(DualEncoder, "encode_image", lambda m, p, *a: seen.append(len(p)) or real(m, p, *a))
    second, second_counts = rebuild()
    assert second_counts == (5, 2, 1, 1) and sum(seen) == 2
    assert {n for n in first if first[n] == second.get(n)} == {"2024/05/c.jpg", "2024/05/d.jpg", "e.png"}
    assert "new.png" in second and "2024/b.png" not in second and first["a.png"] != second["a.png"]
    reject = json.loads((tmp_path / "index" / "rejects.jsonl").read_text())
    assert reject["name"] == "broken.png" and "cannot be decoded" in reject["reason"]
    assert rebuild() == (second, (5, 0, 0, 1))
    assert sum(seen) == 2, "the broken image is not retried either"
    paint("green", 79).save(photos / "broken.png")
    assert rebuild()[1] == (6, 1, 0, 0) and len(list((tmp_path / "index" / "parts").iterdir())) == 3


def test_small_parts_are_merged_and_large_ones_stay(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "CHUNK", 3)
    monkeypatch.setattr(builder, "PART_ROWS", 8)
    photos = make_folder(tmp_path / "set", images=20)
    index, _ = build_index(saved, photos, tmp_path / "index")
    assert sorted(p.rows for p in index.parts) == [4, 8, 8]
    before = {p.name for p in index.parts if p.rows == 8}
    whole = content(index)
    removed = next(iter(whole))  # in the first part, which is one of 8
    (photos / "Images" / removed).unlink()
    rest = content(build_index(saved, photos, tmp_path / "index")[0])
    assert {n: v for n, v in whole.items() if n != removed} == rest
    assert len(before & {p.name for p in Index(tmp_path / "index").parts}) == 1, "the one that lost no row"


def test_lists_follow_the_rows(saved: Path, tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "set", images=44)
    index, result = build_index(saved, photos, tmp_path / "index", approximate=True)
    assert result.lists is not None and result.lists.recall >= 0.95 and index.metadata["lists"]["rows"] == 44
    (photos / "Images" / "000.png").unlink()
    index, _ = build_index(saved, photos, tmp_path / "index", approximate=True)
    assert index.metadata["lists"]["rows"] == 43 and index.search(index.vector(7), 3)[1][0, 0] == 7
    index, _ = build_index(saved, photos, tmp_path / "index")
    assert "lists" not in index.metadata and not (tmp_path / "index" / "lists").exists()


@pytest.mark.slow
def test_ten_kills_lose_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, and no image of a finished part is embedded again."""
    photos = make_folder(tmp_path / "set", images=48)
    log, out = tmp_path / "log", tmp_path / "index"
    code = f"""
import os, signal, sys, pathlib
from amclr.search import builder
from amclr.models.dual_encoder import DualEncoder
builder.CHUNK, builder.PART_ROWS = 4, 16
where, left = sys.argv[1], int(sys.argv[2])
real = getattr(builder if where != "replace" else os, where)
def dies(*a, **k):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
setattr(builder if where != "replace" else os, where, dies)
encode = DualEncoder.encode_image
def encoded(model, images, *a):
    done = encode(model, images, *a)
    with open({str(log)!r}, "a") as handle:
        handle.write(f"{{len(images)}}\\n")
    return done
DualEncoder.encode_image = encoded
result = builder.build({str(saved)!r}, {str(photos)!r}, pathlib.Path({str(out)!r}), progress=False)
print(result.rows, result.removed, result.rejected)
"""
    kills = [("replace", 1), ("replace", 3), ("write_part", 1), ("replace", 6), ("replace", 8), ("write_part", 2),
             ("replace", 10), ("merge_parts", 1), ("merge_parts", 2), ("write_metadata", 2)]  # fmt: skip
    # One process imports, and forks for each kill.
    driver = f"""
import os, sys
import amclr.search.builder
code = {code!r}
for where, left in {[*kills, ("write_part", 10**6)]!r}:
    child = os.fork()
    if not child:
        sys.argv = ["x", where, str(left)]
        exec(code, {{"__name__": "__main__"}})
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print("killed" if os.WIFSIGNALED(status) else "ended", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", driver], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ended = done.stdout.split("\n")
    assert ended.count("killed") == 10, done.stdout + done.stderr
    assert "48 0 0" in ended
    monkeypatch.setattr(builder, "CHUNK", 4)  # batches of another size round sums differently
    undisturbed = content(build_index(saved, photos, tmp_path / "other")[0])
    assert content(Index(out)) == undisturbed
    embedded = sum(map(int, log.read_text().split()))
    assert embedded <= 48 + 4 * 7, "a kill costs the part being written, and finished parts are not repeated"
    assert {f.name.partition(".")[0] for f in (out / "parts").iterdir()} == {p.name for p in Index(out).parts}


@pytest.mark.slow
def test_processes_share_the_images(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_folder(tmp_path / "set", images=22)
    code = (
        "import sys, pathlib; from amclr.search import builder; builder.CHUNK = 4\n"
        f"result = builder.build({str(saved)!r}, {str(photos)!r}, pathlib.Path(sys.argv[1]), progress=False)\n"
        "print(result and (result.rows, result.embedded))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python", sys.executable, "-c", code,
               str(tmp_path / "two")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["(22, 22)", "None"]
    monkeypatch.setattr(builder, "CHUNK", 4)  # batches of another size round sums differently
    assert content(Index(tmp_path / "two")) == content(build_index(saved, photos, tmp_path / "one")[0])


@pytest.mark.slow
def test_a_signal_keeps_what_was_embedded(saved: Path, tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "set", images=400)
    code = "from amclr import cli; from amclr.search import builder; builder.CHUNK = 8; raise SystemExit(cli.main())"
    command = [sys.executable, "-c", code, "index", saved, photos, "--out", tmp_path / "index"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parts, until = tmp_path / "index" / "parts", time.monotonic() + 120
    while len(list(parts.glob("*.parquet") if parts.is_dir() else [])) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it had ended before the signal came")
    assert process.returncode == 130 and "rerun the same command to resume" in error, error
    _, result = build_index(saved, photos, tmp_path / "index")
    assert result.rows == 400 and result.embedded <= 384


def test_refuses_folders_that_are_in_use_and_other_models(saved: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an index .*build one with amclr index RUN IMAGES --out"):
        Index(tmp_path / "absent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="in use and not an index: give another --out"):
        build(saved, str(photos), tmp_path / "full", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no image in"):
        build(saved, str(tmp_path / "empty"), tmp_path / "index", progress=False)
    with pytest.raises(UserError, match="--thumbnails must be 0, or 16 to 2048"):
        build(saved, str(photos), tmp_path / "index", thumbnails=5, progress=False)
    build_index(saved, photos, tmp_path / "index", thumbnails=0)
    assert Index(tmp_path / "index").thumbnail(0) == b""
    torch.manual_seed(1)
    DualEncoder(TINY, build_tokenizer(TINY, CAPTIONS)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was built with another model"):
        build(tmp_path / "other", str(photos), tmp_path / "index", progress=False)
    lock = FileLock(tmp_path / "index" / ".lock")
    with lock, pytest.raises(UserError, match="another amclr index is writing"):
        build(saved, str(photos), tmp_path / "index", progress=False)
