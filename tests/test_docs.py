"""What the guides show is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from amclr.config import Config, SourceConfig
from amclr.data import manifest as manifests
from tests.conftest import paint

GUIDE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", GUIDE, re.S))
SNIPPETS = re.findall(r"<!-- run -->\n```python\n(.*?)```", GUIDE, re.S)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for k, name in enumerate(("beach", "office")):
        paint("red", k).save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


@pytest.mark.parametrize("name", [n for n in FILES if n != "mix.yaml"])
def test_examples_of_files_read(name: str, photos: Path, own_cache: Path) -> None:
    (photos / name).parent.mkdir(exist_ok=True)
    if "2014" in name:
        (photos / "images").rename(photos / "train2014")
    (photos / name).write_text(FILES[name])
    found = manifests.load(Config(data=str(photos)), own_cache)
    assert [Path(s.name).name for s in found.samples] == ["beach.jpg", "office.jpg"] and not found.rejects
    assert found.samples[0].captions[0] == "a dog runs on the beach"


@pytest.mark.parametrize(
    ("snippet", "data"), list(zip(SNIPPETS, ["captions.parquet", "shard-000000.tar", "saved"], strict=True))
)
def test_examples_of_code_write_what_reads(snippet: str, data: str, photos: Path, own_cache: Path) -> None:
    subprocess.run([sys.executable, "-c", snippet], cwd=photos, check=True, capture_output=True)
    source = SourceConfig(images=str(photos)) if data == "saved" else SourceConfig()
    found = manifests.load(Config(data=str(photos / data), source=source), own_cache)
    assert [Path(s.name).name for s in found.samples] == ["beach.jpg", "office.jpg"] and not found.rejects
    assert found.samples[1].captions == ("two people at a desk",)


def test_example_of_a_mix_reads(photos: Path, own_cache: Path) -> None:
    (photos / "photos").mkdir()
    (photos / "images").rename(photos / "photos" / "images")
    (photos / "photos" / "captions.csv").write_text(FILES["captions.csv"])
    (photos / "shards").mkdir()
    snippet = (
        SNIPPETS[1].replace("images/", "photos/images/").replace("shard-", "shards/").replace('"captions"', '"alt"')
    )
    subprocess.run([sys.executable, "-c", snippet], cwd=photos, check=True)
    (photos / "mix.yaml").write_text(FILES["mix.yaml"])
    found = manifests.load(Config(data=str(photos / "mix.yaml")), own_cache)
    assert {s.name: s.weight for s in found.samples} == {
        "photos/beach.jpg": 2.0, "photos/office.jpg": 2.0, "web/beach.jpg": 0.5, "web/office.jpg": 0.5,
    }  # fmt: skip
