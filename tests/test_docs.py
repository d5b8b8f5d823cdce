"""What the guides show is what the code does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest

from amclr.config.checks import flat
from amclr.config.recipes import RECIPES
from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.objectives import METHODS
from amclr.objectives.reference import reference_loss
from tests.conftest import paint

ROOT = Path(__file__).parents[1]
PAGES = {
    p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
}
GUIDE = PAGES["docs/data.md"]
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


def prose(text: str) -> str:
    """A page without its code: fenced, indented and inline."""
    text = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.S | re.M)
    return re.sub(r"``.+?``|`[^`]+`|<!--.*?-->|^ {4}.*$", "", text, flags=re.M)


def anchors(text: str) -> set[str]:
    """What headings are linked by, on code hosts and on the site."""
    lines = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        place = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert place.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(place.read_text(encoding="utf-8")), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_code_begin_and_end(page: str) -> None:
    fences = re.findall(r"^ *(`{2,})(\w*)$", PAGES[page], re.M)
    assert all(ticks == "```" for ticks, _ in fences)
    assert [bool(language) for _, language in fences[1::2]] == [False] * (len(fences) // 2) and len(fences) % 2 == 0


@pytest.mark.parametrize("page", PAGES)
def test_no_formula_reads_as_html(page: str) -> None:
    # The site's Markdown takes <a_i, c_j> for a tag, and shows nothing.
    assert not re.findall(r"<(?!https?:)\w[^>]*>", prose(PAGES[page]))


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    known = flat(asdict(Config()))
    assert not [name for name in re.findall(r"--([a-z]+\.[a-z_]+)\b", PAGES[page]) if name not in known]


def test_the_guide_to_objectives_says_what_the_results_say() -> None:
    guide, results = PAGES["docs/choosing.md"], PAGES["docs/results.md"]
    figures = re.findall(r"\d+\.\d ± \d\.\d", guide)
    assert len(figures) > 10 and not [f for f in figures if f not in results]
    by_name, recipes = (guide.split(f"## {title}")[1].split("\n## ")[0] for title in ("By name", "Recipes"))
    assert set(re.findall(r"`([a-z-]+)`", by_name)) == set(METHODS)
    assert re.findall(r"^\| `(\w+)`", recipes, re.M) == list(RECIPES)


def test_the_guide_to_objectives_knows_the_defaults() -> None:
    rows = dict(re.findall(r"^\| `--(loss\.\w+)` \| (.+?) \|", PAGES["docs/choosing.md"], re.M))
    assert rows["loss.gamma"] == str(Config().loss.gamma)
    taus = {name: method.default_temperature for name, method in METHODS.items()}
    assert rows["loss.temperature"] == (
        "0.01 for global objectives, 0.07 for CLIP and CyCLIP, 0.1 for SigLIP and SimCLR"
    )
    assert [taus[n] for n in ("clip", "cyclip", "siglip", "simclr")] == [0.07, 0.07, 0.1, 0.1]
    assert {tau for name, tau in taus.items() if METHODS[name].contrast == "global"} == {0.01}


def test_the_method_shows_the_definition_as_it_is() -> None:
    """The first code block of the page is the body of `reference_loss`, to the letter."""
    shown = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "method.md").read_text(), re.DOTALL)
    assert shown is not None
    source = textwrap.dedent(inspect.getsource(reference_loss).split('"""')[-1]).strip()
    assert shown[1].strip() == source
