"""`amclr serve`: what it finds, what it refuses, how it begins and ends, and its page in a browser."""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from amclr.config.schema import ModelConfig, ServeConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.search import query as search
from amclr.search.index import FORMAT, Index, Row, build, write_part
from amclr.serve.api import create_app
from amclr.serve.gate import Rates
from amclr.serve.server import listen
from amclr.serve.service import Busy, Late, NoSuchImage, Query, Service, shown_name
from amclr.utils.errors import UserError
from tests.conftest import COLOURS, Command, make_folder, paint

TINY = ModelConfig(image_size=32, dim=16)
SCRIPT = "<script>document.title='run'</script>"
EVIL = "<img src=x onerror=document.title='run'>.png"
TOKEN = "0123456789abcdef-token"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 61 coloured patches, one of which has a name and a caption that would be markup."""
    root = tmp_path_factory.mktemp("served")
    data = make_folder(root / "patches", images=60, lists=False)
    paint("red", 99).save(data / "Images" / EVIL)
    with (data / "captions.txt").open("a", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerow([EVIL, f"a red patch {SCRIPT}"])
    torch.manual_seed(0)
    captions = [f"a {c} patch number {k}" for k, c in enumerate(COLOURS)]
    DualEncoder(TINY, build_tokenizer(TINY, captions)).save_pretrained(root / "model")
    os.environ["AMCLR_CACHE"] = str(root / "cache")  # own_cache puts it back
    assert build(root / "model", str(data), root / "index", progress=False)
    return root / "index"


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    made = Service(folder, ServeConfig(rate=0, upload=0.5))
    yield made
    made.close()


@pytest.fixture
def client(service: Service) -> TestClient:
    return TestClient(create_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False)


def png(colour: str = "red", index: int = 0) -> bytes:
    out = io.BytesIO()
    paint(colour, index).save(out, "PNG")
    return out.getvalue()


def assert_same(results: list[dict[str, Any]], hits: list[search.Hit]) -> None:
    assert [(r["place"], r["row"], r["name"], r["captions"]) for r in results] == [
        (h.place, h.row, h.name, list(h.captions)) for h in hits
    ]
    np.testing.assert_allclose([r["score"] for r in results], [h.score for h in hits], atol=1e-5)


# -- what it finds --------------------------------------------------------------------------------


def found(index: Index, query: str, only: str = "", **how: Any) -> list[search.Hit]:
    wanted, unwanted = search.parse(query)
    vector = search.embed(index.model, [wanted] if wanted else [], unwanted=unwanted)
    return search.find(index, vector, among=search.matching(index, only), **how)


@pytest.mark.parametrize(
    "asked",
    [
        {"query": "a red patch"},
        {"query": "a patch -blue -\"number 7\"", "k": 20},
        {"query": "-red", "k": 5, "skip": 7},
        {"query": "a red patch", "only": "BLUE", "k": 100},
        {"query": "green", "threshold": 0.0, "k": 61},
        {"query": "  a\n yellow\tpatch ☃ 黄色 ", "skip": 58},
    ],
)  # fmt: skip
def test_texts(asked: dict[str, Any], client: TestClient, service: Service) -> None:
    answer = client.get("/search", params=asked)
    assert answer.status_code == 200 and answer.json() == client.post("/search", json=asked).json()
    how = {"k": 12, **asked}
    want = found(service.index, how.pop("query"), **how)
    assert want
    assert_same(answer.json()["results"], want)
    there = found(service.index, asked["query"], asked.get("only", ""), k=100, threshold=asked.get("threshold", -1.0))
    assert answer.json()["more"] == (there[-1].place > want[-1].place)


def test_images(client: TestClient, service: Service) -> None:
    index, image = service.index, png("blue", 1)
    for text, share in (("", 0.5), ("a red patch", 0.3)):
        answer = client.post("/search/image", files={"image": image}, params={"k": 9, "skip": 2},
                             data={"text": text, "image_share": share})  # fmt: skip
        vector = search.embed(index.model, [text] if text else [], [image], image_share=share)
        assert_same(answer.json()["results"], search.find(index, vector, 9, 2))


def test_more_like_one(client: TestClient, service: Service) -> None:
    answer = client.get("/similar/5", params={"k": 100}).json()
    assert_same(answer["results"], search.find(service.index, service.index.vector(5), 100, without=5))
    assert len(answer["results"]) == 60 and not answer["more"]
    assert client.get("/similar/61").status_code == 404 == client.get("/similar/-1").status_code


def test_thumbnails(client: TestClient, service: Service) -> None:
    result = client.get("/search", params={"query": "red"}).json()["results"][0]
    answer = client.get(result["thumbnail"])
    assert answer.content == service.index.thumbnail(result["row"])
    assert answer.headers["content-type"] == "image/jpeg" and answer.headers["x-content-type-options"] == "nosniff"
    assert "max-age" in answer.headers["cache-control"]
    again = client.get(result["thumbnail"], headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert client.get("/thumbnail/61").status_code == 404 == client.get("/thumbnail/-1").status_code


def test_an_index_without_thumbnails(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "model", tmp_path / "index" / "model")
    (tmp_path / "index" / "parts").mkdir()
    rows = [Row(name, f"/srv/secret/{k}.jpg", 0, -1, "", (), b"") for k, name in enumerate(("a.jpg", "/srv/secret/b"))]
    part = write_part(tmp_path / "index", np.eye(2, 16, dtype=np.float32), rows, [b"", b""], "made")
    about = {"amclr index": FORMAT, "data": "", "dim": 16, "model": "made", "parts": [vars(part)]}
    (tmp_path / "index" / "index.json").write_text(str(about).replace("'", '"'))
    service = Service(tmp_path / "index")
    try:
        client = TestClient(create_app(service), base_url="http://localhost")
        answer = client.get("/search", params={"query": "a patch"})
        assert {r["name"] for r in answer.json()["results"]} == {"a.jpg", "b"} and "secret" not in answer.text
        assert answer.json()["results"][0]["thumbnail"] is None
        assert client.get("/thumbnail/0").status_code == 404
    finally:
        service.close()


def test_names_that_are_whole_paths() -> None:
    assert shown_name("2024/a.jpg") == "2024/a.jpg"
    assert shown_name("/home/me/a.jpg") == shown_name("C:\\me\\a.jpg") == shown_name("\\\\host\\me\\a.jpg") == "a.jpg"


def test_described_and_measured(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/health", "/search", "/search/image", "/similar/{row}", "/thumbnail/{row}", "/metrics"} == set(paths)
    docs = client.get("/docs").text
    assert all(path in docs for path in paths) and "http://" not in docs.replace("http://127.0.0.1", "")
    assert client.get("/health").json() == {"status": "ok"}
    before = client.get("/metrics").text
    client.get("/search", params={"query": "never asked for before"})
    client.get("/search", params={"query": "never asked for before"})
    client.get("/search", params={"query": ""})
    after = client.get("/metrics").text

    def grown(what: str) -> float:
        counts = [re.search(rf"^{re.escape(what)} (\S+)$", told, re.M) for told in (before, after)]
        return float(counts[1][1]) - (float(counts[0][1]) if counts[0] else 0)  # type: ignore[index]

    assert grown('amclr_requests_total{route="/search",status="200"}') == 2
    assert grown('amclr_requests_total{route="/search",status="400"}') == 1
    assert grown('amclr_texts_total{how="embedded"}') == 1 == grown('amclr_texts_total{how="kept"}')
    assert grown("amclr_batch_queries_sum") == 2
    assert "amclr_index_images 61.0" in after and "process_resident_memory_bytes" in after


# -- many at a time -------------------------------------------------------------------------------


@contextmanager
def held(service: Service) -> Iterator[threading.Event]:
    """The worker stops at its next search until the event is set."""
    go, at, real = threading.Event(), threading.Event(), service.index.search

    def wait(*arguments: Any) -> Any:
        at.set()
        assert go.wait(60)
        return real(*arguments)

    service.index.search = wait  # type: ignore[method-assign]
    try:
        first = service.submit(Query("what holds it up"))
        assert at.wait(60)
        yield go
    finally:
        go.set()
        first.result(60)
        del service.index.search


QUERIES = [
    Query("a red patch", k=30), Query("a red patch", k=3, skip=4), Query("-blue"), Query("a patch -blue -green"),
    Query("number 7", only="number 7"), Query("blue", only=" Number 7 "), Query(row=3, k=7), Query(row=60),
    Query("x", threshold=0.5), Query("deep", skip=50), Query("ünïcödé"),
]  # fmt: skip


def test_together_as_one_by_one(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [service.submit(query).result(60) for query in QUERIES]
    images = [service.decode(png("green", k)).result(60) for k in range(3)]
    alone += [service.submit(Query(image=p)).result(60) for p in images]
    monkeypatch.setattr(service._texts, "_values", type(service._texts._values)())  # all are embedded again
    calls, real = [], service.index.model.encode_text
    with held(service) as go:
        monkeypatch.setattr(service.index.model, "encode_text", lambda t: calls.append(t) or real(t))
        futures = [service.submit(q) for q in [*QUERIES, *(Query(image=p) for p in images)]]
        go.set()
        together = [future.result(60) for future in futures]
    assert len(calls) == 1, "the texts of all are embedded at once"
    assert sorted(calls[0]) == sorted(set(calls[0])), "and none twice"
    for one, other in zip(alone, together, strict=True):
        assert [h.row for h in one.hits] == [h.row for h in other.hits] and one.more == other.more
        np.testing.assert_allclose([h.score for h in one.hits], [h.score for h in other.hits], atol=1e-5)
        np.testing.assert_allclose(one.vector, other.vector, atol=1e-5)


def test_a_query_fails_alone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    real = service.index.vector

    def vector(row: int) -> np.ndarray:
        if row == 7:
            raise RuntimeError("unreadable")
        return real(row)

    monkeypatch.setattr(service.index, "vector", vector)
    with held(service) as go:
        futures = [service.submit(Query(row=r)) for r in (6, 7, 8)]
        go.set()
        assert len(futures[0].result(60).hits) == 12 == len(futures[2].result(60).hits)
        with pytest.raises(RuntimeError, match="unreadable"):
            futures[1].result(60)


def test_a_failure_tells_nothing(service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("/srv/secret/file")

    monkeypatch.setattr(service.index, "search", fail)
    answer = client.get("/search", params={"query": "a dog"})
    assert answer.status_code == 500 and list(answer.json()) == ["error"] and "secret" not in answer.text


def test_too_many_wait(folder: Path) -> None:
    service = Service(folder, ServeConfig(rate=0, waiting=2, batch=1))
    client = TestClient(create_app(service), base_url="http://127.0.0.1")
    try:
        with held(service) as go:
            waiting = [service.submit(Query("a")) for _ in range(2)]
            with pytest.raises(Busy):
                service.submit(Query("a"))
            answer = client.get("/search", params={"query": "a"})
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            assert "try again" in answer.json()["error"]
            assert client.get("/health").status_code == 200
            go.set()
            assert all(w.result(60).hits for w in waiting)
        assert client.get("/search", params={"query": "a"}).status_code == 200
    finally:
        service.close()
    with pytest.raises(Busy):
        service.submit(Query("a"))
    assert client.get("/health").status_code == 503


def test_too_many_images_wait(service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(service.index.model, "prepare", lambda _: go.wait(60))
    waiting = []
    try:
        with pytest.raises(Busy):
            while len(waiting) < 100:
                waiting.append(service.decode(b"image"))
        assert client.post("/search/image", files={"image": png()}).status_code == 503
    finally:
        go.set()
        assert all(w.result(60) for w in waiting) and len(waiting) == 16
    monkeypatch.undo()
    assert client.post("/search/image", files={"image": png()}).status_code == 200


def test_too_late(folder: Path) -> None:
    service = Service(folder, ServeConfig(rate=0, deadline=0.3))
    client = TestClient(create_app(service), base_url="http://127.0.0.1")
    try:
        with held(service) as go:
            began = time.monotonic()
            assert client.get("/search", params={"query": "a"}).status_code == 504
            assert time.monotonic() - began < 5
            left = service.submit(Query("b"))  # nobody waits for it any more, and it is not searched for
            time.sleep(0.5)
            go.set()
            with pytest.raises(Late):
                left.result(60)
    finally:
        service.close()


def test_rates() -> None:
    rates = Rates(rate=2, burst=3)
    assert [rates.take("1.2.3.4") == 0 for _ in range(4)] == [True, True, True, False]
    assert 0.3 < rates.take("1.2.3.4") <= 0.5
    assert rates.take("1.2.3.5") == 0, "another client"
    time.sleep(0.55)
    assert rates.take("1.2.3.4") == 0 and rates.take("1.2.3.4") > 0
    assert all(Rates(0, 1).take("1.2.3.4") == 0 for _ in range(9))
    one = Rates(1, 1)
    assert one.take("2001:db8::1") == 0 and one.take("2001:db8::2") > 0, "one network of IPv6 is one client"
    assert one.take("2001:db8:1::1") == 0
    for k in range(12_000):
        one.take(f"client {k}")
    assert len(one._clients) <= 10_000


def test_too_often(service: Service) -> None:
    client = TestClient(create_app(service, ServeConfig(rate=0.5, burst=3)), base_url="http://127.0.0.1")
    answers = [client.get("/search", params={"query": "a"}) for _ in range(4)]
    assert [a.status_code for a in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[3].headers["retry-after"]) <= 3 and "too many" in answers[3].json()["error"]
    assert client.get("/similar/1").status_code == 429
    assert client.get("/thumbnail/1").status_code == 200, "what costs little is not counted"


# -- what it refuses ------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks
    )


def narrow() -> bytes:
    out = io.BytesIO()
    Image.new("1", (60_000, 2)).save(out, "PNG")
    return out.getvalue()


def join(data: Any, **more: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/gradio_api/queue/join", {"json": {"data": data, "fn_index": 0, "session_hash": "s", **more}}


def file_data(path: str) -> dict[str, Any]:
    return {"path": path, "url": path, "meta": {"_type": "gradio.FileData"}}


def upload(content: bytes, **more: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/search/image", {"files": {"image": ("a.png", content)}, **more}


def get(path: str, **params: Any) -> tuple[str, str, dict[str, Any]]:
    return "GET", path, {"params": params} if params else {}


METADATA = "http://169.254.169.254/latest/meta-data"
SELF = "http://127.0.0.1:7860/metrics"
UP = "..%2f..%2f..%2f..%2f..%2f..%2fetc%2fpasswd"
HOSTILE: list[tuple[str, str, dict[str, Any]]] = [
    # paths
    get("/thumbnail/" + UP), get("/thumbnail/%2fetc%2fpasswd"), get("/similar/" + UP), get("/static/" + UP),
    get("/assets/" + UP), get("/assets/..%5c..%5cpage.py"), get("/svelte/" + UP), get("/gradio_api/heartbeat/" + UP),
    get("/etc/passwd"), get("/%00"), get("/thumbnail/1%00.jpg"), get("/thumbnail/1e9"), get("/thumbnail/0x1"),
    get("/thumbnail/" + 5000 * "9"), get("/thumbnail/١٢٣٤"), get("/index.json"), get("/docs/../../index.json"),
    # Gradio's own routes: files, uploads, URLs
    get("/gradio_api/file=/etc/passwd"), get("/gradio_api/file=" + UP), get("/gradio_api/file/etc/passwd"),
    get("/file=/etc/passwd"), get("/gradio_api/file=" + METADATA), get("/gradio_api/proxy=" + METADATA),
    get("/gradio_api/file=" + SELF), get("/gradio_api/proxy=" + SELF), get("/gradio_api/custom_component/a/b/c/d"),
    ("POST", "/gradio_api/upload", {"files": {"files": ("a.html", b"<script>")}}), get("/gradio_api/deep_link"),
    ("POST", "/gradio_api/component_server", {"json": {"data": [], "component_id": 1, "fn_name": "x"}}),
    ("POST", "/gradio_api/call/search", {"json": {"data": ["/etc/passwd"]}}), get("/gradio_api/info"),
    ("POST", "/gradio_api/run/predict", {"json": {"data": ["a"]}}), get("/monitoring"), get("/gradio_api/runs"),
    ("POST", "/gradio_api/vibe-edit", {"json": {}}), ("POST", "/gradio_api/process_recording", {}),
    join([file_data("/etc/passwd"), "", "", -1, 0.5]), join(["a", file_data(METADATA), "", -1, 0.5]),
    join(["a", [file_data(SELF)], "", -1, 0.5]), join({"0": "a"}), join("a"),
    join([], event_data={"row": file_data("/etc/passwd")}),
    join(["a"], fn_index=9999), join(["a"], fn_index=-1), join(["a"], fn_index=None), join(["a"], fn_index=[0]),
    join(["a"], session_hash="s" * 9999), join(["a"], session_hash=None), get("/gradio_api/heartbeat/" + "s" * 9999),
    ("POST", "/gradio_api/queue/join", {"content": b"{" * 50_000}),
    ("POST", "/gradio_api/queue/join", {"content": b"[" * 10_000 + b"]" * 10_000}),
    ("POST", "/gradio_api/queue/join", {"content": b'{"data":["' + b"a" * 900_000 + b'"]}'}),
    # images
    upload(bomb(60_000, 60_000)), upload(bomb(8_001, 8_001)), upload(bomb(2**31 - 1, 2**31 - 1)), upload(narrow()),
    upload(b""), upload(b"no image"), upload(png()[:200]), upload(b"GIF89a" + bytes(100)), upload(b"%!PS\n/etc/passwd"),
    upload(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"),
    upload(bytes(600_000)), upload(png(), data={"image_share": "nan"}), upload(png(), data={"image_share": "2"}),
    upload(png(), data={"text": 3000 * "a"}), upload(png(), data={"text": "a\0b"}), ("POST", "/search/image", {}),
    ("POST", "/search/image", {"data": {"image": "/etc/passwd"}}),
    ("POST", "/search/image", {"data": {"image": METADATA}}),
    ("POST", "/search/image", {"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=y"}}),
    ("POST", "/search/image", {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}),
    # queries
    get("/search"), get("/search", query=""), get("/search", query='""'), get("/search", query=2001 * "a"),
    get("/search", query="a\0b"), get("/search", query=" ".join(f"-a{k}" for k in range(9))),
    get("/search", query="a", k=0), get("/search", query="a", k=101), get("/search", query="a", k=10**30),
    get("/search", query="a", k="all"), get("/search", query="a", k=1.5), get("/search", query="a", skip=-1),
    get("/search", query="a", skip=10_000), get("/search", query="a", threshold="nan"),
    get("/search", query="a", threshold="inf"), get("/search", query="a", threshold=2), get("/search", query="a", file="/"),
    get("/search", query="a", only=201 * "a"), get("/search", query="a", only="\0"), get("/similar/1", k=-1),
    ("POST", "/search", {"json": {"query": ["a"]}}), ("POST", "/search", {"json": {"query": {"path": "/etc/passwd"}}}),
    ("POST", "/search", {"json": ["a"]}), ("POST", "/search", {"json": None}), ("POST", "/search", {"content": b"\xff\xfe"}),
    ("POST", "/search", {"content": b'{"query": "\\ud800"}', "headers": {"content-type": "application/json"}}),
    ("POST", "/search", {"content": b'{"query":' + b"[" * 30_000, "headers": {"content-type": "application/json"}}),
    ("POST", "/search", {"json": {"query": 100_000 * "a"}}), ("POST", "/search", {"json": {"query": "a", "k": True, "z": 1}}),
    # methods and headers
    ("DELETE", "/search", {}), ("PUT", "/thumbnail/1", {}), ("POST", "/", {}), ("TRACE", "/", {}), ("POST", "/metrics", {}),
    ("POST", "/search", {"content": b"{}", "headers": {"content-length": "-5"}}),
    ("GET", "/health", {"headers": {"host": "evil.example"}}), ("GET", "/", {"headers": {"host": "localhost.evil.example"}}),
    ("GET", "/health", {"headers": {"host": "evil.example\r\nx-more: 1"}}),
    get("/search%0d%0aset-cookie:%20a=b"), get("/search", query="a", k="1\r\nset-cookie: a=b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(service: Service) -> TestClient:
    return TestClient(create_app(service), base_url="http://127.0.0.1", follow_redirects=False)


def assert_tells_nothing(answer: httpx.Response, folder: Path) -> None:
    told = answer.text + str(answer.headers)
    for secret in (
        "Traceback",
        "root:x:",
        str(folder),
        str(folder.parent),
        sys.prefix,
        os.getcwd(),
        "site-packages",
        ".py",
    ):
        assert secret not in told
    assert "set-cookie" not in answer.headers and "x-more" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("case", range(len(HOSTILE)), ids=lambda k: f"{HOSTILE[k][0]} {HOSTILE[k][1][:40]} {k}")
def test_hostile(case: int, shared: TestClient, folder: Path) -> None:
    method, path, how = HOSTILE[case]
    answer = shared.request(method, path, **how)
    assert 400 <= answer.status_code < 500, answer.text
    assert list(answer.json()) == ["error"] and answer.json()["error"]
    assert_tells_nothing(answer, folder)


def test_the_page_names_no_place(shared: TestClient, folder: Path) -> None:
    for path in (
        "/",
        "/config",
        "/theme.css",
        "/manifest.json",
        "/?deep_link=../..",
        "/config?page=../x",
        "/?view=api",
    ):
        answer = shared.get(path)
        assert answer.status_code == 200
        for secret in (str(folder.parent), sys.prefix, os.getcwd()):
            assert secret not in answer.text
    for path in ("/gradio_api/queue/data", "/assets/none.js", "/assets/etc/passwd", "/static/none"):
        answer = shared.get(path)
        assert 400 <= answer.status_code < 500
        assert_tells_nothing(answer, folder)
    assert re.search(r"frame-ancestors 'none'", shared.get("/").headers["content-security-policy"])


def test_a_token(service: Service, folder: Path) -> None:
    app = create_app(service, ServeConfig(token=TOKEN, rate=0))
    client = TestClient(app, base_url="http://images.example", follow_redirects=False)
    everything = ("/search?query=a", "/similar/1", "/thumbnail/1", "/metrics", "/docs", "/openapi.json", "/config",
                  "/assets/index.js", "/gradio_api/heartbeat/a", "/theme.css", "/gradio_api/queue/data")  # fmt: skip
    wrong: list[dict[str, str]] = [
        {}, {"Authorization": "Bearer "}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Basic {b64encode(TOKEN.encode()).decode()}"}, {"Authorization": TOKEN},
        {"Cookie": f"{app._cookie}={TOKEN}"}, {"Cookie": f"{app._cookie}="}, {"Cookie": f"a={app._session}"},
    ]  # fmt: skip
    for path in everything:
        for headers in wrong:
            answer = client.get(path, headers=headers)
            assert answer.status_code == 401 and "Bearer" in answer.headers["www-authenticate"], path
            assert_tells_nothing(answer, folder)
    assert client.get("/search?query=a", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
    assert client.get("/health").json() == {"status": "ok"}
    assert client.post("/search/image", files={"image": png()}).status_code == 401
    assert client.post(*join(["a"])[1:2], **join(["a"])[2]).status_code == 401

    asked = client.get("/")
    assert asked.status_code == 401 and 'type="password"' in asked.text and "gradio" not in asked.text
    assert client.post("/login", data={"token": "wrong"}).status_code == 401 and not client.cookies
    assert client.post("/login", content=b"token=" + b"a" * 100_000).status_code == 413
    answer = client.post("/login", data={"token": TOKEN})
    assert answer.status_code == 303 and answer.headers["location"] == "./"
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=strict" in answer.headers["set-cookie"]
    assert TOKEN not in answer.headers["set-cookie"]
    assert client.get("/").status_code == 200 and client.get("/thumbnail/1").status_code == 200
    other = TestClient(create_app(service, ServeConfig(token=TOKEN[::-1])), base_url="http://images.example",
                       cookies=dict(client.cookies))  # fmt: skip
    assert other.get("/thumbnail/1").status_code == 401, "of another token"


def test_names_of_this_machine(service: Service) -> None:
    client = TestClient(create_app(service))
    for host in ("localhost", "LOCALHOST:7860", "127.0.0.1", "127.0.0.2:80", "[::1]", "[::1]:7860"):
        assert client.get("/health", headers={"host": host}).status_code == 200, host
    for host in ("", "evil.example", "localhost.evil.example:7860", "127.0.0.1.evil.example", "10.0.0.1", "::1x"):
        assert client.get("/health", headers={"host": host}).status_code == 421, host


def test_guessing_tokens_is_slowed_down(service: Service) -> None:
    client = TestClient(create_app(service, ServeConfig(token=TOKEN, rate=0.1, burst=5)), base_url="http://a.example")
    codes = [client.get("/thumbnail/1", headers={"Authorization": f"Bearer {k}"}).status_code for k in range(4)]
    codes += [client.post("/login", data={"token": "x"}).status_code for _ in range(3)]
    assert codes == [401] * 5 + [429] * 2


def test_asked_in_python(service: Service) -> None:
    for query, error in (
        (Query(), UserError), (Query("a", k=0), UserError), (Query("a", threshold=float("nan")), UserError),
        (Query("a", skip=9_999), UserError), (Query(row=61), NoSuchImage), (Query("a", image_share=2), UserError),
        (Query(image=b"none"), UserError),
    ):  # fmt: skip
        with pytest.raises(error):
            asyncio.run(service.ask(query))
    answer = asyncio.run(service.ask(Query("red")))
    following = asyncio.run(service.ask(Query(vector=answer.vector, skip=12)))
    assert_same(
        [vars(h) | {"captions": list(h.captions)} for h in following.hits], found(service.index, "red", k=12, skip=12)
    )


# -- beginning and end ----------------------------------------------------------------------------


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server as a user starts it, at a free port, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "amclr", "serve", str(folder), "--port", "0", *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://\S+:\d+", line)
        assert address, line + process.stdout.read()
        yield process, address[0]
    finally:
        process.kill()
        process.communicate(timeout=60)


BODY = b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n" + png() + b"\r\n--x--\r\n"


def test_ends_when_told_and_answers_what_was_asked(folder: Path) -> None:
    with serving(folder) as (process, address):
        port = int(address.rsplit(":", 1)[1])
        head = (
            f"POST /search/image HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(BODY)}\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        with (
            socket.create_connection(("127.0.0.1", port), timeout=60) as asking,
            httpx.stream("GET", f"{address}/gradio_api/heartbeat/abc", timeout=60) as page,
        ):
            beats = page.iter_text()
            assert "ALIVE" in next(beats), "a page is open"
            asking.sendall(head.encode() + BODY[:50])
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5)
            asking.sendall(BODY[50:])
            answer = b""
            while chunk := asking.recv(1 << 16):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 200") and b'"results":' in answer
        assert process.wait(30) == 0
        assert process.stdout is not None and process.stdout.read().strip() == "stopped"


@pytest.mark.slow
def test_a_server_of_its_own(folder: Path) -> None:
    """Open to others, with a token: bodies without a length, requests that are none, the page's queue; Ctrl-C."""
    with serving(folder, "--host", "0.0.0.0", "--upload", "0.1", AMCLR_TOKEN=TOKEN) as (process, address):
        address = address.replace("0.0.0.0", "127.0.0.1")
        port, ours = int(address.rsplit(":", 1)[1]), {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"{address}/thumbnail/0").status_code == 401
        answer = httpx.get(f"{address}/search", params={"query": "a red patch"}, headers=ours)
        assert answer.status_code == 200 and "server" not in answer.headers
        endless = httpx.post(f"{address}/search/image", headers=ours | {"Content-Type": "multipart/form-data; boundary=x"},
                             content=itertools.chain([BODY[:-10]], (bytes(10_000) for _ in range(100))))  # fmt: skip
        assert endless.status_code == 413 and "error" in endless.json()
        with httpx.Client(headers=ours) as page:
            joined = page.post(f"{address}/gradio_api/queue/join", json=join(["x", None, None, -1, 0.5])[2]["json"])
            assert joined.status_code in (200, 422), joined.text
        for raw in (b"GET /%s HTTP/1.1\r\n\r\n" % (b"a" * 100_000), b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/9.9\r\n\r\n",
                    b"GET /search?query=a HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999999\r\n\r\n",
                    b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"):  # fmt: skip
            with socket.create_connection(("127.0.0.1", port), timeout=20) as other:
                other.sendall(raw)
                told = other.recv(1 << 16)
            assert not told or told.startswith(b"HTTP/1.1 4"), told
        assert httpx.get(f"{address}/health").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_lets_nobody_else_in_without_a_token(folder: Path, main: Command) -> None:
    refused = main("serve", folder, "--host", "0.0.0.0", AMCLR_TOKEN="")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert re.search(r"add for instance --token [0-9a-f]{32}", refused.stderr)
    for config in (ServeConfig(host="0.0.0.0"), ServeConfig(host="::"), ServeConfig(host="192.0.2.1")):
        with pytest.raises(UserError, match="--token"):
            listen(config)
    with pytest.raises(UserError, match="no address"):
        listen(ServeConfig(host="192.0.2.1", token=TOKEN))
    with pytest.raises(UserError, match="no address"):
        listen(ServeConfig(host="a b c"))
    listen(ServeConfig(host="0.0.0.0", port=0, token=TOKEN)).close()


def test_says_what_to_type(folder: Path, tmp_path: Path, main: Command) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        in_use = main("serve", folder, "--port", port)
    assert in_use.returncode == 1 and in_use.stderr.count("\n") == 1 and f"--port {port + 1}" in in_use.stderr
    none = main("serve", tmp_path, "--port", 0)
    assert none.returncode == 1 and none.stderr.count("\n") == 1 and "amclr index" in none.stderr
    short = main("serve", folder, "--token", "short", "--batch", 0)
    assert "16 characters" in short.stderr and "--batch must lie" in short.stderr and short.stderr.count("\n") == 1
    assert "--deadline" in main("serve", "--help").stdout


# -- the page -------------------------------------------------------------------------------------


@pytest.fixture
def chromium() -> Iterator[Any]:
    """A browser, and what it complained of and asked for elsewhere, which must be nothing."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def watched(page: Any, address: str) -> list[str]:
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: faults.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.on("response", lambda r: faults.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    return faults


@pytest.mark.slow
def test_the_page_in_a_browser(folder: Path, tmp_path: Path, chromium: Any) -> None:
    (tmp_path / "blue.png").write_bytes(png("blue", 1))
    (tmp_path / "none.png").write_text("no image")
    with serving(folder, "--rate", "0") as (_, address):
        page = chromium.new_page(viewport={"width": 1200, "height": 900})
        faults = watched(page, address)
        page.goto(address)
        page.wait_for_selector("text=Type what is to be seen")
        said = "#hits [role=status]"

        def after(act: Callable[[], Any], text: str) -> str:
            act()
            page.wait_for_selector(f"{said}:has-text('{text}')", timeout=30_000)
            return str(page.inner_text("#hits"))

        def ask(text: str) -> None:
            page.fill("#text input, #text textarea", text)
            page.keyboard.press("Enter")

        index = Index(folder)
        first = after(lambda: ask("a red patch"), "Results 1 to 24")
        assert "for “a red patch”" in first
        for hit, card in zip(found(index, "a red patch", k=24), page.query_selector_all("#hits li"), strict=True):
            assert hit.name in card.inner_text()
            assert float(card.inner_text().split()[0]) == pytest.approx(hit.score, abs=6e-4)
            assert hit.captions[0].replace("\n", " ") in card.inner_text()
        page.wait_for_function("[...document.querySelectorAll('#hits img')].slice(0, 4).every(i => i.naturalWidth > 0)")
        assert page.is_disabled("#back") and page.is_enabled("#on")
        after(lambda: page.click("#on"), "Results 25 to 48")
        after(lambda: page.click("#on"), "Results 49 to 61")
        assert page.is_disabled("#on")
        after(lambda: page.click("#back"), "Results 25 to 48")
        page.focus("#hits li:nth-child(3) button")
        name = page.inner_text("#hits li:nth-child(3) .line span")
        like = after(lambda: page.keyboard.press("Enter"), "for the image")
        assert f"for the image {name}" in like and name not in page.inner_text("#hits ol")
        page.click("text=Narrow down")
        page.fill("#only input, #only textarea", "BLUE")
        blue = after(lambda: page.keyboard.press("Enter"), "Results 1 to 1")
        assert f"for the image {name}" in blue and "red" not in page.inner_text("#hits ol")
        page.fill("#only input, #only textarea", "")
        page.click("text=Narrow down")

        after(lambda: ask(""), "Nothing to look for yet")
        after(lambda: ask("  "), "Nothing to look for yet")
        after(lambda: ask("?!… ☃"), "There is no word in that")
        after(lambda: ask("a" * 3000), "at the most, got 3000")
        after(lambda: ask("a -" + " -".join("bcdefghijk")), "may be unwanted")
        after(lambda: ask(SCRIPT), "Results 1 to 24")
        page.click("text=Narrow down")
        page.fill("#only input, #only textarea", "onerror")
        only = after(lambda: page.keyboard.press("Enter"), "Results 1 to 1")
        assert EVIL in only and SCRIPT in only, "names and captions are shown as they are"
        page.fill("#only input, #only textarea", "nothing has this")
        after(lambda: page.keyboard.press("Enter"), "Nothing found")
        page.fill("#only input, #only textarea", "")
        after(lambda: page.keyboard.press("Enter"), "Results 1 to 24")
        page.fill("#text input, #text textarea", "")
        upload = after(lambda: page.set_input_files("#image input", tmp_path / "blue.png"), "your image")
        assert "Results 1 to 24 for your image" in upload
        assert page.is_visible("#image img")
        both = after(lambda: ask("a red patch"), "and your image")
        assert both != upload
        page.click("#image button")
        page.wait_for_selector("#image >> text=Drop an image")
        after(lambda: page.set_input_files("#image input", tmp_path / "none.png"), "cannot be decoded")
        page.click("#image button")
        paste = """async () => {
            const canvas = document.createElement('canvas');
            canvas.width = canvas.height = 50;
            const blob = await new Promise(done => canvas.toBlob(done));
            const data = new DataTransfer();
            data.items.add(new File([blob], 'a.png', {type: 'image/png'}));
            document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        }"""
        after(lambda: ask(""), "Nothing to look for yet")
        after(lambda: page.evaluate(paste), "your image")
        assert page.title() == "Search images" and not faults

        phone = chromium.new_page(viewport={"width": 360, "height": 740})
        faults = watched(phone, address)
        phone.goto(address)
        phone.click("#examples button >> nth=0")
        phone.wait_for_selector(f"{said}:has-text('Results 1 to 24')")
        width = "document.documentElement.scrollWidth"
        assert phone.evaluate(width) <= 360, "nothing lies outside"
        cards = [phone.locator("#hits li").nth(k).bounding_box() for k in range(2)]
        assert cards[0]["y"] == cards[1]["y"] and cards[0]["width"] > 140, "two beside each other"
        assert phone.locator("#hits").bounding_box()["y"] < 740, "some of them are seen without scrolling"
        assert not faults


@pytest.mark.slow
def test_the_page_asks_for_the_token(folder: Path, chromium: Any) -> None:
    with serving(folder, "--token", TOKEN) as (_, address):
        page = chromium.new_page()
        page.goto(address)
        page.fill("input[name=token]", "not it")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=That is not the token")
        page.fill("input[name=token]", TOKEN)
        page.keyboard.press("Enter")
        page.wait_for_selector("#text")
        page.fill("#text input, #text textarea", "a red patch")
        page.keyboard.press("Enter")
        page.wait_for_selector("#hits li")
        page.wait_for_function("document.querySelector('#hits img').naturalWidth > 0")
