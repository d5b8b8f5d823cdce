"""The API: its results are those of the search, its errors reveal nothing, and it describes itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from amclr.search.parts import FORMAT, IndexedImage, write_part
from amclr.search.query import embed, find
from amclr.serve.api import create_app
from amclr.serve.service import Service
from tests.serve.conftest import assert_same, png, search_directly


@pytest.mark.parametrize(
    "parameters",
    [
        {"query": "a red patch"},
        {"query": "a patch -blue -\"number 7\"", "k": 20},
        {"query": "-red", "k": 5, "skip": 7},
        {"query": "a red patch", "only": "BLUE", "k": 100},
        {"query": "green", "threshold": 0.0, "k": 61},
        {"query": "  a\n yellow\tpatch ☃ 黄色 ", "skip": 58},
    ],
)  # fmt: skip
def test_texts(parameters: dict[str, Any], client: TestClient, service: Service) -> None:
    answer = client.get("/search", params=parameters)
    assert answer.status_code == 200 and answer.json() == client.post("/search", json=parameters).json()
    options = {"k": 12, **parameters}
    expected = search_directly(service.index, options.pop("query"), **options)
    assert expected
    assert_same(answer.json()["results"], expected)
    in_all = search_directly(
        service.index,
        parameters["query"],
        parameters.get("only", ""),
        k=100,
        threshold=parameters.get("threshold", -1.0),
    )
    assert answer.json()["more"] == (in_all[-1].place > expected[-1].place)


def test_images(client: TestClient, service: Service) -> None:
    index, image = service.index, png("blue", 1)
    for text, share in (("", 0.5), ("a red patch", 0.3)):
        answer = client.post("/search/image", files={"image": image}, params={"k": 9, "skip": 2},
                             data={"text": text, "image_share": share})  # fmt: skip
        vector = embed(index.model, [text] if text else [], [image], image_share=share)
        assert_same(answer.json()["results"], find(index, vector, 9, 2))


def test_more_like_one(client: TestClient, service: Service) -> None:
    answer = client.get("/similar/5", params={"k": 100}).json()
    assert_same(answer["results"], find(service.index, service.index.vector(5), 100, exclude=5))
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
    images = [
        IndexedImage(name, f"/srv/secret/{k}.jpg", 0, -1, "", (), b"")
        for k, name in enumerate(("a.jpg", "/srv/secret/b"))
    ]
    part = write_part(tmp_path / "index", np.eye(2, 16, dtype=np.float32), images, [b"", b""], "digest")
    metadata = {"amclr index": FORMAT, "data": "", "dim": 16, "model": "digest", "parts": [vars(part)]}
    (tmp_path / "index" / "index.json").write_text(str(metadata).replace("'", '"'))
    service = Service(tmp_path / "index")
    try:
        client = TestClient(create_app(service), base_url="http://localhost")
        answer = client.get("/search", params={"query": "a patch"})
        assert {r["name"] for r in answer.json()["results"]} == {"a.jpg", "b"} and "secret" not in answer.text
        assert answer.json()["results"][0]["thumbnail"] is None
        assert client.get("/thumbnail/0").status_code == 404
    finally:
        service.close()


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

    def increase(name: str) -> float:
        counts = [re.search(rf"^{re.escape(name)} (\S+)$", text, re.M) for text in (before, after)]
        return float(counts[1][1]) - (float(counts[0][1]) if counts[0] else 0)  # type: ignore[index]

    assert increase('amclr_requests_total{route="/search",status="200"}') == 2
    assert increase('amclr_requests_total{route="/search",status="400"}') == 1
    assert increase('amclr_texts_total{how="embedded"}') == 1 == increase('amclr_texts_total{how="kept"}')
    assert increase("amclr_batch_queries_sum") == 2
    assert "amclr_index_images 61.0" in after and "process_resident_memory_bytes" in after


def test_a_failure_tells_nothing(service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("/srv/secret/file")

    monkeypatch.setattr(service.index, "search", fail)
    answer = client.get("/search", params={"query": "a dog"})
    assert answer.status_code == 500 and list(answer.json()) == ["error"] and "secret" not in answer.text
