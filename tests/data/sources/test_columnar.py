"""Images in tables, and data sets behind URLs: names, memory, damage, and what is refused."""

from __future__ import annotations

import http.server
import json
import os
import resource
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.manifest import Manifest
from amclr.data.sources.remote import REFUSED, braces, fetch
from amclr.utils.errors import UserError
from amclr.utils.randomness import derive
from tests.data.formats import Item, write_saved_dataset
from tests.data.test_faults import memory_of

A, B, C = b"first image", b"second image", b"third image"


def load(data: object, cache: Path, **source: Any) -> Manifest:
    return manifests.load(Config(data=str(data), source=SourceConfig(**source)), cache, progress=False)


def write(file: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), file, **options)
    return file


def told(content: bytes, path: str, **more: Any) -> dict[str, Any]:
    return {"image": {"bytes": content, "path": path}, "caption": f"a caption of {content.decode()}", **more}


def found(manifest: Manifest) -> dict[str, bytes]:
    return {s.name: s.image.read() for s in manifest.samples}


# -- ids ------------------------------------------------------------------------------------------


def test_ids_stay_what_they_were_and_names_that_are_no_utf8_have_one() -> None:
    assert derive("sample", "000.png") == 4822344729030980998
    assert derive("sample", "chat/été.jpg") == 3182140837677054836
    assert derive(0, "x", 5) == 6066406657456049472
    names = [os.fsdecode(b"caf\xe9.jpg"), os.fsdecode(b"caf\xe8.jpg"), "café.jpg"]
    assert len({derive("sample", n) for n in names}) == 3


# -- names ----------------------------------------------------------------------------------------


def test_a_name_is_the_path_that_goes_with_the_bytes(tmp_path: Path, own_cache: Path) -> None:
    rows = [told(A, "./cat/0.png"), told(B, "dog//0.png"), told(C, "/home/someone/0.png"), told(b"x", "../up.png")]
    assert found(load(write(tmp_path / "a.parquet", rows), own_cache)) == {
        "cat/0.png": A, "dog/0.png": B, "0.png": C, "up.png": b"x",
    }  # fmt: skip


def test_no_image_is_lost_to_a_name_that_others_have(tmp_path: Path, own_cache: Path) -> None:
    root = tmp_path / "set"
    write(root / "train.parquet", [told(A, "0.jpg"), told(A, "0.jpg"), told(B, "1.jpg")])
    write(root / "validation.parquet", [told(C, "0.jpg"), told(B, "1.jpg")])
    both = load(root, own_cache)
    assert not both.rejects and sorted(found(both).values()) == [A, B, C]
    assert [s.name.partition("#")[0] for s in both.samples] == ["0.jpg", "0.jpg", "1.jpg"]
    shared, other, alone = (s.name for s in both.samples)
    assert "#" in shared and "#" in other and alone == "1.jpg" and both.splits["val"] >= {alone}
    # The order of the files and other rows change no name.
    again = tmp_path / "again"
    write(again / "a-validation.parquet", [told(b"new", "9.jpg"), told(C, "0.jpg"), told(B, "1.jpg")])
    write(again / "b-train.parquet", [told(B, "1.jpg"), told(A, "0.jpg")])
    assert found(load(again, own_cache)) == {**found(both), "9.jpg": b"new"}


def test_columns_that_do_not_name_the_image_lose_none(tmp_path: Path, own_cache: Path) -> None:
    species = [told(A, "a.png", name="sparrow"), told(B, "b.png", name="sparrow"), told(C, "c.png", name="wren")]
    assert set(found(load(write(tmp_path / "a.parquet", species), own_cache))) == {"a.png", "b.png", "c.png"}
    bare = [{"image": c, "caption": "a bird", "name": n} for c, n in ((A, "sparrow"), (B, "sparrow"), (C, "wren"))]
    names = load(write(tmp_path / "b.parquet", bare), own_cache)
    assert sorted(found(names).values()) == [A, B, C] and "wren" in found(names)
    # `id` numbers captions here: two of them are of one image.
    rows = [{"image": c, "caption": f"caption {k}", "id": k} for k, c in enumerate((A, A, B))]
    numbered = load(write(tmp_path / "c.parquet", rows), own_cache)
    assert {s.image.read(): s.captions for s in numbered.samples} == {
        A: ("caption 0", "caption 1"),
        B: ("caption 2",),
    }
    assert sorted(s.name[:8] for s in numbered.samples) == ["2", "blake2b-"]


def test_images_are_found_behind_many_rows_without_any(tmp_path: Path, own_cache: Path) -> None:
    rows = [{"image": None, "caption": "none"}] * 600 + [{"image": A, "caption": "one"}]
    manifest = load(write(tmp_path / "a.parquet", rows), own_cache)
    assert list(found(manifest).values()) == [A] and len(manifest.rejects) == 600
    assert manifest.rejects[0].reason == "row has no image"


# -- memory ---------------------------------------------------------------------------------------


def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    """One cell of 8 MB that 100 rows point to: 800 MB if they were all made at once."""
    index, cell = pa.array([0] * 100, pa.int8()), b"x" * (8 << 20)
    content = pa.DictionaryArray.from_arrays(index, pa.array([cell]))
    text = pa.DictionaryArray.from_arrays(index, pa.array([cell.decode()]))
    paths = pa.array(["a.png"] * 100)
    captions = pa.array(["a caption"] * 100)
    tables = {
        "bytes": {"image": content, "caption": captions},
        "struct": {"image": pa.StructArray.from_arrays([content, paths], ["bytes", "path"]), "caption": captions},
        "caption": {"image": paths, "caption": text},
    }
    for name, columns in tables.items():
        # Without Arrow's own schema, in which a reader would find that these are dictionaries.
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", compression="zstd", store_schema=False)
        assert (tmp_path / f"{name}.parquet").stat().st_size < 20_000
    code = """
for name in ("bytes", "struct", "caption"):
    found = manifests.load(Config(data=str(Path(sys.argv[1]) / f"{name}.parquet")), Path(sys.argv[2]), progress=False)
    assert len(found.samples) == (name != "caption")
"""
    assert memory_of(code, tmp_path, tmp_path / "cache") < 500


# -- saved datasets -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/passwd", "../../other.arrow", "link.arrow", "", None, "a::b", 3])
def test_a_saved_dataset_reads_nothing_outside_its_folder(name: Any, tmp_path: Path, own_cache: Path) -> None:
    items = [Item(f"{k}.png", c, (f"caption {k}",), s) for k, (c, s) in enumerate(((A, "train"), (B, "val")))]
    root = write_saved_dataset(tmp_path / "set", items)
    assert len(load(root, own_cache).samples) == 2
    (tmp_path / "other.arrow").write_bytes(b"secret")
    for part in (root, root / "train"):
        (part / "link.arrow").symlink_to(tmp_path / "other.arrow")
    file = root / "train" / "state.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"train/state.json' names .*outside the folder.*save the dataset again"):
        load(root, own_cache)
    (root / "state.json").write_text(file.read_text())
    file.write_text(before)
    with pytest.raises(UserError, match=r"state.json' names .*outside the folder"):
        load(root, own_cache)
    (root / "state.json").unlink()
    if name != "link.arrow":
        (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", name]}))
        with pytest.raises(UserError, match=r"dataset_dict.json' names .*outside the folder"):
            load(root, own_cache)


@pytest.mark.parametrize("content", ["{", "[]", '{"splits": 3}', "\udc80"])
def test_a_damaged_list_of_splits_is_named(content: str, tmp_path: Path, own_cache: Path) -> None:
    root = write_saved_dataset(
        tmp_path / "set", [Item("a.png", A, ("one",), "train"), Item("b.png", B, ("two",), "val")]
    )
    (root / "dataset_dict.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"dataset_dict.json.*save the dataset again"):
        load(root, own_cache)


# -- the cache of copied images -----------------------------------------------------------------


@pytest.mark.parametrize("harm", ["cut index", "empty index", "no index", "no copy", "cut copy", "other index"])
def test_a_damaged_copy_is_made_anew(harm: str, tmp_path: Path, own_cache: Path) -> None:
    file = write(tmp_path / "a.parquet", [told(A, "a.png"), told(B, "b.png")])
    wanted = found(load(file, own_cache))
    (index,) = (own_cache / "images").glob("*.json.gz")
    (copy,) = (own_cache / "images").glob("*.bin")
    content = index.read_bytes()
    if harm == "cut index":
        index.write_bytes(content[: len(content) // 2])
    elif harm == "empty index":
        index.write_bytes(b"")
    elif harm == "other index":
        index.write_bytes(b"\x1f\x8b\x08" + os.urandom(60))
    elif harm == "no index":
        index.unlink()
    elif harm == "no copy":
        copy.unlink()
    else:
        os.truncate(copy, 5)
    assert found(load(file, own_cache)) == wanted and index.read_bytes() == content


def test_copies_of_what_a_table_was_before_are_deleted(tmp_path: Path, own_cache: Path) -> None:
    other = write(tmp_path / "other.parquet", [told(C, "c.png")])
    load(other, own_cache)
    for content in (A, B):
        assert found(load(write(tmp_path / "a.parquet", [told(content * 9, "a.png")]), own_cache)) == {
            "a.png": content * 9
        }
    assert sorted(f.read_bytes() for f in (own_cache / "images").glob("*.bin")) == sorted([B * 9, C])
    assert found(load(other, own_cache)) == {"c.png": C}


def test_a_full_disk_leaves_nothing_behind_and_says_where(tmp_path: Path, own_cache: Path) -> None:
    row = {"image": {"bytes": os.urandom(1 << 20), "path": "a.png"}, "caption": "one"}
    file = write(tmp_path / "a.parquet", [row])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(UserError, match=r"cannot copy the images of 'a.parquet' into the cache '.*--cache"):
            load(file, own_cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [f for f in (own_cache / "images").iterdir() if f.suffix != ".lock"]
    assert len(load(file, own_cache).samples) == 1


# -- URLs -----------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files` with `headers`, and counts what it was asked for."""

    files: dict[str, bytes] = {}
    headers_told: dict[str, str] = {}
    fetched: list[str] = []
    status = 404

    def do_GET(self) -> None:
        content = self.files.get(self.path)
        self.send_response(200 if content is not None else self.status)
        for key, value in {**self.headers_told, "Content-Length": str(len(content or b""))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.fetched.append(self.path)
            self.wfile.write(content or b"")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes], status: int = 404, **headers: str) -> Iterator[tuple[str, list[str]]]:
    kind = type("Kind", (Server,), {"files": files, "headers_told": headers, "fetched": [], "status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", kind.fetched
        server.shutdown()


def test_braces_stand_for_numbers_and_words() -> None:
    assert braces("a/{08..10}-{x,y}") == [f"a/{k}-{w}" for k in ("08", "09", "10") for w in "xy"]
    with pytest.raises(UserError, match="stands for"):
        braces("{0..9999999999}")


def test_patterns_of_urls_give_a_folder_of_what_they_match(tmp_path: Path, own_cache: Path) -> None:
    import fsspec

    for name, content in (("a/00.tar", A), ("b/01.tar", B), ("c/02.txt", C)):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(content)
        fsspec.filesystem("memory").pipe(f"/patterns/{name}", content)
    with serving({"/a/00.tar": A, "/b/01.tar": B}) as (host, _):
        for url in (
            f"file://{tmp_path}/set/*/*.tar", f"file://{tmp_path}/set/{{a/00,b/01}}.tar", "memory://patterns/*/*.tar",
            "memory://patterns/{a,b}", f"{host}/{{a/00,b/01}}.tar",
        ):  # fmt: skip
            folder = fetch(url, own_cache, progress=False)
            assert folder.is_dir()
            files = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
            assert files == {"a/00.tar": A, "b/01.tar": B}, url
    with pytest.raises(UserError, match=r"there is nothing at 'memory://patterns/\*.zip'"):
        fetch("memory://patterns/*.zip", own_cache, progress=False)


def test_the_signature_of_a_url_is_no_part_of_the_name(tmp_path: Path, own_cache: Path) -> None:
    with serving({"/my%20set.parquet?token=1": write(tmp_path / "a.parquet", [told(A, "a.png")]).read_bytes()}) as (
        host,
        _,
    ):
        assert fetch(f"{host}/my%20set.parquet?token=1", own_cache, progress=False).name == "my set.parquet"
        assert found(load(f"{host}/my%20set.parquet?token=1", own_cache)) == {"a.png": A}


def test_what_may_have_changed_is_copied_again(own_cache: Path) -> None:
    files = {"/a.csv": b"one"}
    with serving(files) as (host, _):  # tells the length alone
        for content in (b"one", b"two"):
            files["/a.csv"] = content
            assert fetch(f"{host}/a.csv", own_cache, progress=False).read_bytes() == content
    with serving(files, ETag="1") as (host, fetched):
        for _ in range(3):
            assert fetch(f"{host}/a.csv", own_cache, progress=False).read_bytes() == b"two"
        assert fetched == ["/a.csv"]


def test_why_a_url_cannot_be_read(own_cache: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    for url in (f"http://{host}/a.csv", f"http://{host}/{{0..1}}.tar"):
        with pytest.raises(UserError, match=f"cannot list '.*{host}.*[Cc]onnect") as told:
            fetch(url, own_cache, progress=False)
        assert "nothing at" not in str(told.value) and "\n" not in str(told.value)
    with serving({}) as (host, _), pytest.raises(UserError, match="there is nothing at"):
        fetch(f"{host}/a.csv", own_cache, progress=False)
    with serving({}, status=403) as (host, _), pytest.raises(UserError, match="cannot list .*403"):
        fetch(f"{host}/a.csv", own_cache, progress=False)
    with pytest.raises(UserError, match="there is nothing at"):
        fetch(f"file://{tmp_path}/none", own_cache, progress=False)


def test_an_error_of_any_kind_is_one_line(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class Odd(Exception):
        pass

    def odd(*arguments: Any, **options: Any) -> None:
        raise Odd("a reason\nin two lines")

    MemoryFileSystem().pipe("/odd/a.csv", A)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", odd)
        with pytest.raises(UserError, match="cannot fetch '/odd/a.csv': a reason in two lines$"):
            fetch("memory://odd/a.csv", own_cache, progress=False)
        patch.setattr(MemoryFileSystem, "info", odd)
        with pytest.raises(UserError, match="cannot list 'memory://odd/a.csv': a reason in two lines$"):
            fetch("memory://odd/a.csv", own_cache, progress=False)
    assert not list(own_cache.rglob("*.part"))


@pytest.mark.parametrize(
    "url", [*(f"{k}://host/a" for k in REFUSED), "simplecache::dask://host/a", "zip://a::file:///b"]
)
def test_urls_that_may_run_code_are_refused(url: str, own_cache: Path) -> None:
    with pytest.raises(UserError, match="save the files in a folder and give that"):
        load(url, own_cache)
    assert not own_cache.exists()
