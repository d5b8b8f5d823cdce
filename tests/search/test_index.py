"""An index of images: made, brought up to date, killed, damaged, shared by processes, large."""

from __future__ import annotations

import io
import json
import os
import shutil
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
from PIL import Image

from amclr.config.schema import ModelConfig, ScenesConfig
from amclr.data import scenes
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.search import index as indices
from amclr.search.index import Index, Lists, Row, build, searcher, write_part
from amclr.utils.errors import UserError
from tests.conftest import COLOURS, make_folder, paint

TINY = ModelConfig(image_size=32, dim=16)
CAPTIONS = [f"a {c} patch number {k}" for k, c in enumerate(COLOURS)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `save_pretrained` leaves it; its weights are random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    DualEncoder(TINY, build_tokenizer(TINY, CAPTIONS)).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images at several depths, without captions but for one."""
    root = tmp_path / "photos"
    for k, name in enumerate(("a.png", "2024/b.png", "2024/05/c.jpg", "2024/05/d.jpg", "e.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        paint(list(COLOURS)[k % 4], k).save(root / name)
    (root / "e.txt").write_text("the last one")
    (root / "notes.md").write_text("no image")
    return root


def made(saved: Path, data: Path | str, out: Path, **settings: Any) -> Index:
    built = build(saved, str(data), out, progress=False, **settings)
    assert built is not None and built.rows == len(Index(out))
    made.last = built  # type: ignore[attr-defined]
    return Index(out)


def counts() -> tuple[int, int, int, int]:
    built = made.last  # type: ignore[attr-defined]
    return built.rows, built.embedded, built.gone, built.bad


def content(index: Index) -> dict[str, tuple[Any, ...]]:
    """Everything that an index says, by name."""
    rows = [index.row(k) for k in range(len(index))]
    return {r.name: (r, index.vector(k).tobytes(), index.thumbnail(k)) for k, r in enumerate(rows)}


def test_a_folder_of_images(saved: Path, photos: Path, tmp_path: Path) -> None:
    index = made(saved, photos, tmp_path / "index")
    assert counts() == (5, 5, 0, 0)
    found = content(index)
    assert sorted(found) == ["2024/05/c.jpg", "2024/05/d.jpg", "2024/b.png", "a.png", "e.png"]
    assert [found[n][0].captions for n in ("a.png", "e.png")] == [(), ("the last one",)]
    model = DualEncoder.from_pretrained(saved)
    for name, (_, vector, thumb) in found.items():
        own = model.encode_image([photos / name])[0].numpy()
        np.testing.assert_allclose(np.frombuffer(vector, np.float32), own, atol=1e-6)
        image = Image.open(io.BytesIO(thumb))
        assert image.format == "JPEG" and max(image.size) == 40, "no larger than the image"
    scores, rows = index.search(model.encode_image([photos / "a.png"]), k=2)
    assert index.row(int(rows[0, 0])).name == "a.png" and scores[0, 0] == pytest.approx(1, abs=1e-5)
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
        scenes.write_scenes(tmp_path / "set", small, progress=False)
        data = tmp_path / "set"
    index = made(saved, data, tmp_path / "index")
    assert len(index) == 6
    captions = [index.row(k).captions for k in range(6)]
    assert sum(map(bool, captions)) == (3 if kind == "tar" else 6)


def test_only_what_changed_is_embedded_again(
    saved: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = content(made(saved, photos, tmp_path / "index"))
    assert content(made(saved, photos, tmp_path / "index")) == first and counts() == (5, 0, 0, 0)
    paint("blue", 77).save(photos / "a.png")
    paint("green", 78).save(photos / "new.png")
    (photos / "2024" / "b.png").unlink()
    (photos / "broken.png").write_bytes(b"junk")
    seen: list[int] = []
    real = DualEncoder.encode_image
    monkeypatch.setattr(DualEncoder, "encode_image", lambda m, p, *a: seen.append(len(p)) or real(m, p, *a))
    second = content(made(saved, photos, tmp_path / "index"))
    assert counts() == (5, 2, 1, 1) and sum(seen) == 2
    assert {n for n in first if first[n] == second.get(n)} == {"2024/05/c.jpg", "2024/05/d.jpg", "e.png"}
    assert "new.png" in second and "2024/b.png" not in second and first["a.png"] != second["a.png"]
    fault = json.loads((tmp_path / "index" / "rejects.jsonl").read_text())
    assert fault["name"] == "broken.png" and "cannot be decoded" in fault["reason"]
    assert content(made(saved, photos, tmp_path / "index")) == second and counts() == (5, 0, 0, 1)
    assert sum(seen) == 2, "what is broken is not tried again either"
    paint("green", 79).save(photos / "broken.png")
    made(saved, photos, tmp_path / "index")
    assert counts() == (6, 1, 0, 0) and len(list((tmp_path / "index" / "parts").iterdir())) == 3


def test_parts_are_put_together_and_large_ones_stay(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indices, "CHUNK", 3)
    monkeypatch.setattr(indices, "PART", 8)
    photos = make_folder(tmp_path / "set", images=20)
    index = made(saved, photos, tmp_path / "index")
    assert sorted(p.rows for p in index.parts) == [4, 8, 8]
    before = {p.name for p in index.parts if p.rows == 8}
    whole = content(index)
    gone = next(iter(whole))  # in the first part, which is one of 8
    (photos / "Images" / gone).unlink()
    rest = content(made(saved, photos, tmp_path / "index"))
    assert {n: v for n, v in whole.items() if n != gone} == rest
    assert len(before & {p.name for p in Index(tmp_path / "index").parts}) == 1, "the one that nothing left"


@pytest.mark.slow
def test_killed_ten_times(saved: Path, tmp_path: Path) -> None:
    """Nothing is lost, and nothing that a part holds is embedded again."""
    photos = make_folder(tmp_path / "set", images=48)
    log, out = tmp_path / "log", tmp_path / "index"
    code = f"""
import os, signal, sys, pathlib
from amclr.search import index
from amclr.models.dual_encoder import DualEncoder
index.CHUNK, index.PART = 4, 16
where, left = sys.argv[1], int(sys.argv[2])
real = getattr(index if where != "replace" else os, where)
def dies(*a, **k):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
setattr(index if where != "replace" else os, where, dies)
encode = DualEncoder.encode_image
def encoded(model, images, *a):
    done = encode(model, images, *a)
    with open({str(log)!r}, "a") as handle:
        handle.write(f"{{len(images)}}\\n")
    return done
DualEncoder.encode_image = encoded
built = index.build({str(saved)!r}, {str(photos)!r}, pathlib.Path({str(out)!r}), progress=False)
print(built.rows, built.gone, built.bad)
"""
    kills = [("replace", 1), ("replace", 3), ("write_part", 1), ("replace", 6), ("replace", 8), ("write_part", 2),
             ("replace", 10), ("_merged", 1), ("_merged", 2), ("_write_about", 2)]  # fmt: skip
    # One process imports, and forks for each kill.
    driver = f"""
import os, sys
import amclr.search.index
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
    undisturbed = content(made(saved, photos, tmp_path / "other"))
    assert content(Index(out)) == undisturbed
    embedded = sum(map(int, log.read_text().split()))
    assert embedded <= 48 + 4 * 7, "a kill costs the part that was at work, and the finished ones are not repeated"
    assert {f.name.partition(".")[0] for f in (out / "parts").iterdir()} == {p.name for p in Index(out).parts}


@pytest.mark.slow
def test_processes_share_the_images(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = make_folder(tmp_path / "set", images=22)
    code = (
        "import sys, pathlib; from amclr import index; index.CHUNK = 4\n"
        f"built = index.build({str(saved)!r}, {str(photos)!r}, pathlib.Path(sys.argv[1]), progress=False)\n"
        "print(built and (built.rows, built.embedded))"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python", sys.executable, "-c", code,
               str(tmp_path / "two")]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")[:2]) == ["(22, 22)", "None"]
    monkeypatch.setattr(indices, "CHUNK", 4)  # of other sizes, sums are rounded in other ways
    assert content(Index(tmp_path / "two")) == content(made(saved, photos, tmp_path / "one"))


def test_what_is_no_index_or_in_use(saved: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no index .*make one by amclr index RUN IMAGES --out"):
        Index(tmp_path / "absent")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="in use, and no index: give another --out"):
        build(saved, str(photos), tmp_path / "full", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no image in"):
        build(saved, str(tmp_path / "empty"), tmp_path / "index", progress=False)
    with pytest.raises(UserError, match="--thumbnails must be 0, or 16 to 2048"):
        build(saved, str(photos), tmp_path / "index", thumbnails=5, progress=False)
    made(saved, photos, tmp_path / "index", thumbnails=0)
    assert Index(tmp_path / "index").thumbnail(0) == b""
    torch.manual_seed(1)
    DualEncoder(TINY, build_tokenizer(TINY, CAPTIONS)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="was made by another model"):
        build(tmp_path / "other", str(photos), tmp_path / "index", progress=False)
    held = indices.FileLock(tmp_path / "index" / ".lock")
    with held, pytest.raises(UserError, match="another amclr index is at work"):
        build(saved, str(photos), tmp_path / "index", progress=False)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("kind", "spoil", "told"),
    [
        ("npy", _cut, "is damaged"),
        ("npy", _flip, "are not those that were written"),
        ("npy", lambda f: f.unlink(), "is damaged"),
        ("parquet", _cut, "is damaged"),
        ("json", lambda f: f.write_text("{"), "is damaged"),
        ("json", lambda f: f.write_text('{"amclr index": 9}'), "of format 9"),
    ],
)
def test_a_damaged_index(kind: str, spoil: Any, told: str, saved: Path, photos: Path, tmp_path: Path) -> None:
    made(saved, photos, tmp_path / "index")
    spoil(next((tmp_path / "index").rglob(f"parts/*.{kind}"), tmp_path / "index" / "index.json"))
    with pytest.raises(UserError, match=told):
        index = Index(tmp_path / "index")
        index.search(np.eye(16, dtype=np.float32)[:1])
        index.row(0)


def test_an_object_array_is_not_unpickled(saved: Path, photos: Path, tmp_path: Path) -> None:
    made(saved, photos, tmp_path / "index")

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    np.save(next((tmp_path / "index").rglob("*.npy")), np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is damaged"):
        Index(tmp_path / "index").search(np.eye(16, dtype=np.float32)[:1])
    assert not (tmp_path / "ran").exists()


def test_search_is_exact_among_what_is_asked_for(saved: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(300, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = written(saved, vectors, tmp_path / "index")
    queries = vectors[:7] + 0.1
    among = draw.random(300) < 0.3
    for some in (None, among, np.zeros(300, dtype=bool)):
        scores, rows = index.search(queries, 10, some)
        true = queries @ vectors.T
        if some is not None:
            true[:, ~some] = -np.inf
        order = np.argsort(-true, axis=1)[:, :10]
        there = np.isfinite(np.take_along_axis(true, order, 1))
        assert np.array_equal(rows, np.where(there, order, -1))
        np.testing.assert_allclose(scores[there], np.take_along_axis(true, order, 1)[there], atol=1e-5)
    assert index.search(queries, 1000)[1].shape == (7, 300)
    with pytest.raises(IndexError, match="row 300 of an index of 300"):
        index.vector(300)


def written(saved: Path, vectors: np.ndarray, out: Path, lists: Lists | None = None) -> Index:
    """An index of given embeddings, in two parts."""
    (out / "parts").mkdir(parents=True)
    shutil.copytree(saved, out / "model")
    half = len(vectors) // 2
    parts = []
    for start, some in ((0, vectors[:half]), (half, vectors[half:])):
        rows = [Row(f"{start + k}.png", "", 0, -1, "", (f"caption {start + k}",), b"") for k in range(len(some))]
        parts.append(write_part(out, some, rows, [b""] * len(some), "made"))
    about = {"amclr index": 1, "data": "", "dim": vectors.shape[1], "model": "made", "parts": [vars(p) for p in parts]}
    if lists:
        about["lists"] = lists.write(out / "lists")
    (out / "index.json").write_text(json.dumps(about))
    return Index(out)


def test_approximate_search(saved: Path, tmp_path: Path) -> None:
    """In lists the same answers are found for most queries, by looking at a few of them; written and read alike."""
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(40, 16))
    vectors = (centres[draw.integers(0, 40, 6000)] + 0.3 * draw.normal(size=(6000, 16))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    lists = Lists.make(vectors, vectors[::20])
    assert lists.recall >= 0.95 and 1 <= lists.probes < len(lists.centroids) // 4
    index = written(saved, vectors, tmp_path / "index", lists)
    exact = searcher([vectors], 16, None).search(vectors[::20], 10)[1]
    found = index.search(vectors[::20], 10)[1]
    share = (found[:, :, None] == exact[:, None, :]).any(2).mean()
    assert share == pytest.approx(lists.recall)
    one = np.zeros(6000, dtype=bool)
    one[4321] = True
    assert index.search(vectors[:1], 3, one)[1].tolist() == [[4321, -1, -1]], "wherever the rare one lies"
    _flip(tmp_path / "index" / "lists" / "centroids.npy")
    with pytest.raises(UserError, match=r"centroids.npy' is damaged"):
        Index(tmp_path / "index").search(vectors[:1])


def test_lists_follow_the_rows(saved: Path, tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "set", images=44)
    index = made(saved, photos, tmp_path / "index", approximate=True)
    assert made.last.lists.recall >= 0.95 and index.about["lists"]["rows"] == 44  # type: ignore[attr-defined]
    (photos / "Images" / "000.png").unlink()
    index = made(saved, photos, tmp_path / "index", approximate=True)
    assert index.about["lists"]["rows"] == 43 and index.search(index.vector(7), 3)[1][0, 0] == 7
    index = made(saved, photos, tmp_path / "index")
    assert "lists" not in index.about and not (tmp_path / "index" / "lists").exists()


@pytest.mark.slow
def test_a_signal_keeps_what_was_embedded(saved: Path, tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "set", images=400)
    code = "from amclr import cli, index; index.CHUNK = 8; raise SystemExit(cli.main())"
    command = [sys.executable, "-c", code, "index", saved, photos, "--out", tmp_path / "index"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parts, until = tmp_path / "index" / "parts", time.monotonic() + 120
    while len(list(parts.glob("*.parquet") if parts.is_dir() else [])) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it had ended before the signal came")
    assert process.returncode == 130 and "the same command goes on" in told, told
    made(saved, photos, tmp_path / "index")
    rows, embedded, *_ = counts()
    assert rows == 400 and embedded <= 384
