"""An index, the service and clients of it, and the server as a user starts it."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from amclr.config.schema import ModelConfig, ServeConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.search.builder import build
from amclr.search.index import Index
from amclr.search.query import Hit, embed, find, parse, text_mask
from amclr.serve.api import create_app
from amclr.serve.service import Query, Service
from tests.conftest import COLOURS, make_folder, paint

TINY = ModelConfig(image_size=32, dim=16)
SCRIPT = "<script>document.title='run'</script>"
EVIL = "<img src=x onerror=document.title='run'>.png"
TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="session")
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMCLR_CACHE", str(root / "cache"))
        assert build(root / "model", str(data), root / "index", progress=False)
    return root / "index"


@pytest.fixture(scope="session")
def service(folder: Path) -> Iterator[Service]:
    service = Service(folder, ServeConfig(rate=0, upload=0.5))
    yield service
    service.close()


@pytest.fixture
def client(service: Service) -> TestClient:
    return TestClient(create_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="session")
def shared(service: Service) -> TestClient:
    return TestClient(create_app(service), base_url="http://127.0.0.1", follow_redirects=False)


def png(colour: str = "red", index: int = 0) -> bytes:
    out = io.BytesIO()
    paint(colour, index).save(out, "PNG")
    return out.getvalue()


def assert_same(results: list[dict[str, Any]], hits: list[Hit]) -> None:
    assert [(r["place"], r["row"], r["name"], r["captions"]) for r in results] == [
        (h.place, h.row, h.name, list(h.captions)) for h in hits
    ]
    np.testing.assert_allclose([r["score"] for r in results], [h.score for h in hits], atol=1e-5)


def search_directly(index: Index, query: str, only: str = "", **options: Any) -> list[Hit]:
    positive, negatives = parse(query)
    vector = embed(index.model, [positive] if positive else [], negatives=negatives)
    return find(index, vector, mask=text_mask(index, only), **options)


@contextmanager
def blocked(service: Service) -> Iterator[threading.Event]:
    """The worker blocks at its next search until the event is set."""
    go, at, real = threading.Event(), threading.Event(), service.index.search

    def wait(*arguments: Any) -> Any:
        at.set()
        assert go.wait(60)
        return real(*arguments)

    service.index.search = wait  # type: ignore[method-assign]
    try:
        first = service.submit(Query("the one it blocks at"))
        assert at.wait(60)
        yield go
    finally:
        go.set()
        first.result(60)
        del service.index.search


def join(data: Any, **more: Any) -> tuple[str, str, dict[str, Any]]:
    return "POST", "/gradio_api/queue/join", {"json": {"data": data, "fn_index": 0, "session_hash": "s", **more}}


def assert_tells_nothing(answer: httpx.Response, folder: Path) -> None:
    text = answer.text + str(answer.headers)
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
        assert secret not in text
    assert "set-cookie" not in answer.headers and "x-more" not in answer.headers
    assert answer.headers["x-content-type-options"] == "nosniff"


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
