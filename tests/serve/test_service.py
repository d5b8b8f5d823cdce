"""The service: batches equal single queries, failures stay alone, full queues refuse, deadlines hold."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from amclr.config.schema import ServeConfig
from amclr.serve.api import create_app
from amclr.serve.service import Busy, DeadlineExceeded, NoSuchImage, Query, Service, display_name
from amclr.utils.errors import UserError
from tests.serve.conftest import assert_same, blocked, png, search_directly

QUERIES = [
    Query("a red patch", k=30), Query("a red patch", k=3, skip=4), Query("-blue"), Query("a patch -blue -green"),
    Query("number 7", only="number 7"), Query("blue", only=" Number 7 "), Query(row=3, k=7), Query(row=60),
    Query("x", threshold=0.5), Query("deep", skip=50), Query("ünïcödé"),
]  # fmt: skip


def test_batches_equal_single_queries(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [service.submit(query).result(60) for query in QUERIES]
    images = [service.decode(png("green", k)).result(60) for k in range(3)]
    alone += [service.submit(Query(image=p)).result(60) for p in images]
    monkeypatch.setattr(service._texts, "_values", type(service._texts._values)())  # all are embedded again
    calls, real = [], service.index.model.encode_text
    with blocked(service) as go:
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
    with blocked(service) as go:
        futures = [service.submit(Query(row=r)) for r in (6, 7, 8)]
        go.set()
        assert len(futures[0].result(60).hits) == 12 == len(futures[2].result(60).hits)
        with pytest.raises(RuntimeError, match="unreadable"):
            futures[1].result(60)


def test_too_many_wait(folder: Path) -> None:
    service = Service(folder, ServeConfig(rate=0, waiting=2, batch=1))
    client = TestClient(create_app(service), base_url="http://127.0.0.1")
    try:
        with blocked(service) as go:
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
        with blocked(service) as go:
            began = time.monotonic()
            assert client.get("/search", params={"query": "a"}).status_code == 504
            assert time.monotonic() - began < 5
            left = service.submit(Query("b"))  # nobody waits for it any more, and it is not searched for
            time.sleep(0.5)
            go.set()
            with pytest.raises(DeadlineExceeded):
                left.result(60)
    finally:
        service.close()


def test_ask_validates_and_pages(service: Service) -> None:
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
        [vars(h) | {"captions": list(h.captions)} for h in following.hits],
        search_directly(service.index, "red", k=12, skip=12),
    )


def test_display_names_of_absolute_paths() -> None:
    assert display_name("2024/a.jpg") == "2024/a.jpg"
    assert (
        display_name("/home/me/a.jpg")
        == display_name("C:\\me\\a.jpg")
        == display_name("\\\\host\\me\\a.jpg")
        == "a.jpg"
    )
