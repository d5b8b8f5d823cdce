"""Training images that go bad while a run trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amclr.config.schema import (
    SourceConfig,
)
from amclr.evaluation.run import evaluate_run
from amclr.evaluation.tables import format_results
from amclr.inspection.dataset import inspect
from amclr.runs.folder import Run
from amclr.training import loop
from amclr.training.assembly import assemble
from amclr.training.loop import train
from amclr.training.state import Training
from amclr.utils.errors import UserError
from tests.training.configs import config_for, frozen

pytestmark = pytest.mark.usefixtures("undrawn")


def test_images_that_go_bad_while_training_are_listed_up_to_the_limit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(folder, decoded="none", source=SourceConfig(max_bad=0.1))
    bad = [folder / "Images" / f"{k:03d}.png" for k in (12, 25, 31)]
    whole = [file.read_bytes() for file in bad]
    fit = loop.fit

    def damaged_fit(training: Training, progress: bool, profile: bool) -> None:
        for file in bad:
            file.write_bytes(b"")
        fit(training, progress, profile)

    monkeypatch.setattr(loop, "fit", damaged_fit)
    run = train(config, progress=False)
    rows = [json.loads(line) for line in (run.folder / "rejects.jsonl").read_text().splitlines()]
    assert sorted(r["key"] for r in rows) == ["012.png", "025.png", "031.png"]
    assert all("while training: " in r["reason"] and "0 bytes" in r["reason"] for r in rows)

    def mend() -> None:
        for file, content in zip(bad, whole, strict=True):
            file.write_bytes(content)

    mend()
    train(resume=run.folder, progress=False)
    mend()
    assert [json.loads(line)["key"] for line in (run.folder / "rejects.jsonl").read_text().splitlines()] == [
        r["key"] for r in rows
    ]
    with pytest.raises(UserError, match=r"2 of 32 training images can no longer be read, over the limit of 4.0%"):
        train(replace(config, out=f"{config.out}-2", source=SourceConfig(max_bad=0.04)), progress=False)


@pytest.mark.parametrize(
    ("make", "decoded"),
    [pytest.param(config_for, "none", marks=pytest.mark.draws), (config_for, "ram"), (frozen, "none")],
)
def test_bad_images_that_were_not_scanned_are_skipped(
    make: Any, decoded: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In training another takes the place of each; evaluation, the gallery and the contact sheet leave them out."""
    (folder / "Images" / "020.png").write_bytes(b"junk")
    (folder / "Images" / "003.png").write_bytes(b"")
    source = SourceConfig(scan_up_to=10, max_bad=0.04, paraphrases="none")
    run = train(make(folder, source=source, decoded=decoded), progress=False)
    rows = [json.loads(line) for line in (run.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(r["key"], r["reason"][:15]) for r in rows] == [
        ("020.png", "while training:"),
        ("003.png", "while evaluatin"),
    ]
    assert "cannot be decoded" in rows[0]["reason"] and "0 bytes" in rows[1]["reason"]
    results = json.loads((run.folder / "results.json").read_text())
    assert (results["images"], results["captions"], results["rejects"]) == (7, 14, 1)
    assert all(np.isfinite(r["loss"]) for r in run.metrics() if r["kind"] == "train")
    assert "1 of 8 images to evaluate on cannot be decoded, and are left out; the first: " in capsys.readouterr().err
    measured = evaluate_run(run.folder, progress=False)
    assert measured["r_mean"] == pytest.approx(results["r_mean"], abs=1e-3) and measured["images"] == 7
    assert "val split: 7 images, 14 captions, 1 left out" in format_results(measured)
    assert "contact sheet" in inspect(run.config, folder.parent / "sheet.png", progress=False)
    with pytest.raises(UserError, match="1 of 32 training images can no longer be read, over the limit of 2.0%"):
        train(make(folder, "strict", source=replace(source, max_bad=0.02), decoded=decoded), progress=False)
    for file in (folder / "Images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no image to evaluate on can be decoded; the first: .*0 bytes"):
        evaluate_run(run.folder, progress=False)
    with pytest.raises(UserError, match="no (training )?image .*can be (read|decoded)"):
        train(make(folder, "none", source=source, decoded=decoded), progress=False)
    with pytest.raises(UserError, match="no image of .* can be decoded: amclr inspect --scan"):
        inspect(run.config, folder.parent / "sheet.png", progress=False)


def test_bad_images_count_until_they_are_repaired(folder: Path) -> None:
    """What went bad before a run is taken up counts again only if it is still bad, or else no mending would help."""
    run = train(frozen(folder, source=SourceConfig(max_bad=0.04)), progress=False)
    for name in ("012.png", "025.png", "gone.png"):
        run.log({"kind": "replaced", "step": 8, "sample": name, "reason": "image is empty"})
    former = Run.open(run.folder)
    training = assemble(former.config, run.folder, former, False)
    training.restore()
    training.reject("012.png", "bad again")
    with pytest.raises(UserError, match="2 of 32 training images can no longer be read"):
        training.reject("013.png", "bad as well")
    rows = [json.loads(line) for line in (run.folder / "rejects.jsonl").read_text().splitlines()]
    assert [r["key"] for r in rows] == ["012.png", "025.png", "013.png"], "what the run trains on, each once"
