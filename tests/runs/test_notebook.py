"""What a notebook shows of a run: its measures and images, and no text as code."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from amclr.config.schema import Config
from amclr.runs.folder import Run
from amclr.runs.notebook import FIGURES
from amclr.utils import html

HOSTILE = "<script>alert(1)<|script> \" onerror='x' & <img src=x>"
"""The name of a folder, so without a slash."""


class Shown(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


TAGS = {"div", "h2", "h3", "p", "br", "table", "tr", "th", "td", "figure", "img", "figcaption"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", Config(epochs=3, data="photos"))


def test_a_finished_run_shows_its_measures_and_images(run: Run) -> None:
    recalls = {f"{side}_{k}": 10.0 * s + c for s, side in enumerate(("txt", "img"))
               for c, k in enumerate(("r1", "r5", "r10", "r_mean"))}  # fmt: skip
    (run.folder / "results.json").write_text(
        json.dumps({"split": "val", **recalls, "r_mean": 6.25, "zeroshot_top1": 7.26})
    )
    for name in FIGURES:
        Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(run.folder / name)
    assert repr(run) == f"<amclr run '{run.folder}': amclr on 'photos', 3 epochs, mean recall 6.2 %>"
    shown = Shown(run._repr_html_())
    output = " ".join(shown.texts)
    assert "run data photos objective amclr epochs 3 " in output.replace(str(run.folder) + " ", "")
    assert "text retrieval 0.0 1.0 2.0 3.0 image retrieval 10.0 11.0 12.0 13.0" in output
    assert "zero-shot 7.3 – – –" in output
    sources = [v for k, v in shown.attributes if k == "src" and v]
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [
        (run.folder / name).read_bytes() for name in FIGURES
    ]
    assert shown.tags <= TAGS


def test_a_run_on_its_way_shows_how_far_it_is(run: Run) -> None:
    assert "0.0 of 3 epochs" in repr(run) and "retrieval" not in run._repr_html_()
    run.log({"kind": "eval", "step": 4, "epoch": 1.0, "txt_r1": 12.5, "r_mean": 20.0})
    run.log({"kind": "train", "step": 6, "epoch": 1.5, "loss": 1.0})
    run.log({"kind": "replaced", "step": 6, "sample": "a"})
    assert "1.5 of 3 epochs, mean recall 20.0 %" in repr(run)
    assert "text retrieval 12.5 – – –" in " ".join(Shown(run._repr_html_()).texts)


def test_damaged_files_do_not_keep_a_run_from_showing(run: Run) -> None:
    (run.folder / "results.json").write_text('{"r_mean": "<b>", "txt_r1": null, "img_r1"')
    (run.folder / "metrics.jsonl").write_text('[1]\n{"kind": "eval", "epoch": "<b>", "r_mean": "<b>"}\n{"ki')
    assert "0.0 of 3 epochs>" in repr(run) and Shown(run._repr_html_()).tags <= TAGS


def test_names_are_text(tmp_path: Path) -> None:
    config = replace(Config(), data=HOSTILE.replace("|", "/"), objective="</td><script>")
    run = Run.create(tmp_path / HOSTILE, config)
    (run.folder / "results.json").write_text(json.dumps({"txt_r1": 1.0, "<script>": "<script>"}))
    shown = Shown(Run.open(str(run.folder))._repr_html_())
    assert shown.tags <= TAGS and {name for name, _ in shown.attributes} <= {"alt", "src", "style"}
    assert {HOSTILE, config.data, config.objective} <= set(shown.texts)
    assert "\\x1b[31m" in repr(Run(tmp_path / "run", replace(config, data="\x1b[31m\n")))


def test_markup_escapes_all_that_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"png")
    page = html.table([HOSTILE], [[HOSTILE]]) + html.paragraph(HOSTILE) + html.image(file, HOSTILE)
    shown = Shown(page)
    assert shown.tags <= TAGS and shown.texts == [HOSTILE] * 4
    assert sorted(name for name, _ in shown.attributes) == ["alt", "src"] and ("alt", HOSTILE) in shown.attributes
    assert html.image(tmp_path / "none.png", "gone") == ""
