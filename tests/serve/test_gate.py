"""The gate: hostile requests, tokens, host names, rate limits."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import time
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from amclr.config.schema import ServeConfig
from amclr.serve.api import create_app
from amclr.serve.gate import RateLimiter
from amclr.serve.service import Service
from tests.serve.conftest import TOKEN, assert_tells_nothing, join, png


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


@pytest.mark.parametrize("case", range(len(HOSTILE)), ids=lambda k: f"{HOSTILE[k][0]} {HOSTILE[k][1][:40]} {k}")
def test_hostile(case: int, shared: TestClient, folder: Path) -> None:
    method, path, options = HOSTILE[case]
    answer = shared.request(method, path, **options)
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

    login = client.get("/")
    assert login.status_code == 401 and 'type="password"' in login.text and "gradio" not in login.text
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


def test_rates() -> None:
    rates = RateLimiter(rate=2, burst=3)
    assert [rates.take("1.2.3.4") == 0 for _ in range(4)] == [True, True, True, False]
    assert 0.3 < rates.take("1.2.3.4") <= 0.5
    assert rates.take("1.2.3.5") == 0, "another client"
    time.sleep(0.55)
    assert rates.take("1.2.3.4") == 0 and rates.take("1.2.3.4") > 0
    assert all(RateLimiter(0, 1).take("1.2.3.4") == 0 for _ in range(9))
    one = RateLimiter(1, 1)
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
