"""The files of an index: damage is found, and nothing in them is executed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amclr.search.index import Index
from amclr.utils.errors import UserError
from tests.search.conftest import build_index, flip_bit, truncate


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("npy", truncate, "is damaged"),
        ("npy", flip_bit, "do not match their checksum"),
        ("npy", lambda f: f.unlink(), "is damaged"),
        ("parquet", truncate, "is damaged"),
        ("json", lambda f: f.write_text("{"), "is damaged"),
        ("json", lambda f: f.write_text('{"amclr index": 9}'), "of format 9"),
    ],
)
def test_a_damaged_index(kind: str, spoil: Any, message: str, saved: Path, photos: Path, tmp_path: Path) -> None:
    build_index(saved, photos, tmp_path / "index")
    spoil(next((tmp_path / "index").rglob(f"parts/*.{kind}"), tmp_path / "index" / "index.json"))
    with pytest.raises(UserError, match=message):
        index = Index(tmp_path / "index")
        index.search(np.eye(16, dtype=np.float32)[:1])
        index.image(0)


def test_an_object_array_is_not_unpickled(saved: Path, photos: Path, tmp_path: Path) -> None:
    build_index(saved, photos, tmp_path / "index")

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    np.save(next((tmp_path / "index").rglob("*.npy")), np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is damaged"):
        Index(tmp_path / "index").search(np.eye(16, dtype=np.float32)[:1])
    assert not (tmp_path / "ran").exists()
