"""Models, indexes and images that several tests of the search share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amclr.config.schema import ModelConfig, OptimConfig
from amclr.models.dual_encoder import DualEncoder
from amclr.models.tokenizer import build_tokenizer
from amclr.runs.folder import Run
from amclr.search.builder import BuildResult, build
from amclr.search.index import Index
from amclr.search.inverted_lists import InvertedLists
from amclr.search.parts import FORMAT, IndexedImage, write_part
from amclr.training.loop import train
from tests.conftest import COLOURS, make_folder, paint
from tests.training.configs import config_for

TINY = ModelConfig(image_size=32, dim=16)
CAPTIONS = [f"a {c} patch number {k}" for k, c in enumerate(COLOURS)]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `save_pretrained` writes it, with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    DualEncoder(TINY, build_tokenizer(TINY, CAPTIONS)).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images at several depths, one of them with a caption."""
    root = tmp_path / "photos"
    for k, name in enumerate(("a.png", "2024/b.png", "2024/05/c.jpg", "2024/05/d.jpg", "e.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        paint(list(COLOURS)[k % 4], k).save(root / name)
    (root / "e.txt").write_text("the last one")
    (root / "notes.md").write_text("no image")
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model that has learned to tell the colours."""
    place = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMCLR_CACHE", str(place / "cache"))
        # As in tests/training/test_loop.py: it then tells them apart.
        config = config_for(
            make_folder(place / "patches", images=80), epochs=25, batch_size=16, objective="clip",
            optim=OptimConfig(lr=3e-3), model=ModelConfig(image_size=32, dim=16, text_lr=0.1),
        )  # fmt: skip
        return train(config, progress=False)


@pytest.fixture(scope="session")
def folder_and_index(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMCLR_CACHE", str(place / "cache"))
        folder = make_folder(place / "patches")
        build(run.folder, str(folder), place / "index", progress=False)
    return folder, place / "index"


@pytest.fixture
def index(folder_and_index: tuple[Path, Path]) -> Index:
    return Index(folder_and_index[1])


def build_index(saved: Path, data: Path | str, out: Path, **settings: Any) -> tuple[Index, BuildResult]:
    result = build(saved, str(data), out, progress=False, **settings)
    assert result is not None and result.rows == len(Index(out))
    return Index(out), result


def content(index: Index) -> dict[str, tuple[Any, ...]]:
    """Everything that an index stores, by name."""
    images = [index.image(k) for k in range(len(index))]
    return {r.name: (r, index.vector(k).tobytes(), index.thumbnail(k)) for k, r in enumerate(images)}


def write_index(saved: Path, vectors: np.ndarray, out: Path, lists: InvertedLists | None = None) -> Index:
    """An index of the given embeddings, in two parts."""
    (out / "parts").mkdir(parents=True)
    shutil.copytree(saved, out / "model")
    half = len(vectors) // 2
    parts = []
    for start, block in ((0, vectors[:half]), (half, vectors[half:])):
        images = [
            IndexedImage(f"{start + k}.png", "", 0, -1, "", (f"caption {start + k}",), b"") for k in range(len(block))
        ]
        parts.append(write_part(out, block, images, [b""] * len(block), "digest"))
    metadata = {
        "amclr index": FORMAT,
        "data": "",
        "dim": vectors.shape[1],
        "model": "digest",
        "parts": [vars(p) for p in parts],
    }
    if lists:
        metadata["lists"] = lists.write(out / "lists")
    (out / "index.json").write_text(json.dumps(metadata))
    return Index(out)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
