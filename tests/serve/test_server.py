"""`amclr serve` as a process: what it refuses, raw requests, shutdown."""

from __future__ import annotations

import itertools
import re
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from amclr.config.schema import ServeConfig
from amclr.serve.server import listen
from amclr.utils.errors import UserError
from tests.conftest import Command
from tests.serve.conftest import TOKEN, join, png, serving

BODY = b"--x\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n" + png() + b"\r\n--x--\r\n"


def test_sigterm_finishes_requests_in_progress(folder: Path) -> None:
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
                answer = other.recv(1 << 16)
            assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
        assert httpx.get(f"{address}/health").status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


def test_other_hosts_need_a_token(folder: Path, main: Command) -> None:
    refused = main("serve", folder, "--host", "0.0.0.0", AMCLR_TOKEN="")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert re.search(r"add --token [0-9a-f]{32}", refused.stderr)
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
