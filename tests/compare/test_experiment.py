"""Experiment files: the forms of settings, and mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from amclr import cli
from amclr.compare import runner
from amclr.compare.experiment import read_experiment
from amclr.compare.plan import plan
from amclr.utils.errors import UserError
from tests.compare.experiments import BASE, run, written

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[2]


MISTAKES = [
    ({"variant": ["clip"]}, "unknown key 'variant': did you mean 'variants'?"),
    ({"epochs": 3}, r"unknown key 'epochs' \(a setting belongs under settings\)"),
    ({"variants": None}, "must be names with values"),
    ({"variants": []}, "variants is empty"),
    ({"variants": ["sogclr", "amlcr"]}, "unknown objective 'amlcr': did you mean 'amclr'?"),
    ({"variants": ["sogclr", "sogclr"]}, "'sogclr' is given twice"),
    ({"variants": {"sogclr": None, "mine": {"objective": "amlcr"}}}, "mine: unknown objective 'amlcr': did you mean"),
    ({"variants": {"sogclr": None, "mine": {"optim.lrr": 1}}}, "variant 'mine': unknown setting 'optim.lrr': did you mean 'optim.lr'?"),
    ({"variants": {"sogclr": None, "mine": {"optim": {"lr": "fast"}}}}, "variant 'mine': optim.lr must be float, got 'fast'"),
    ({"variants": {"sogclr": None, "mine": {"optim.lr": -1}}}, "mine: --optim.lr must lie between"),
    ({"variants": {"sogclr": None, "mine": {"objective": "sogclr"}}}, "'.*' and '.*' are the same run"),
    ({"variants": {"sogclr": None, "a b": {"epochs": 3}, "a_b": {"epochs": 4}}}, "would have one folder: rename a variant"),
    ({"variants": {"sogclr": None, "mine": {"seed": 3}}}, r"seed is not set here: give seeds: \[0, 1, 2\]"),
    ({"variants": {"sogclr": None, "mine": {"views.image": [{"ColorJiter": {}}]}}}, "mine: image views: unknown transform 'ColorJiter'"),
    ({"variants": {"sogclr": None, "mine": {"init_from": "nowhere"}}}, "mine: init_from: there is no run folder 'nowhere'"),
    ({"variants": {"sogclr": None, "mine": {"batch_size": 64}}}, "32 training images are fewer than one batch"),
    ({"variants": {"sogclr": None, "mine": {"devices": 2}}}, "trains each run in one process"),
    ({"grid": {"optim.name": "adamp"}}, "grid: optim.name must be a list of values"),
    ({"grid": {"optim.name": ["adamw", "adamx"]}}, "optim.name=adamx: unknown optimiser"),
    ({"grid": {"optim.name": ["adamw", "adamw"]}}, "would have one folder"),
    ({"grid": {"objective": ["clip", "amclr"]}}, "variant 'sogclr' sets objective, which the grid varies"),
    ({"baseline": "sogclrr"}, "baseline: there is no variant 'sogclrr': did you mean 'sogclr'?"),
    ({"recipe": "frosen"}, "unknown recipe 'frosen': did you mean 'frozen'?"),
    ({"seeds": []}, "at least one"),
    ({"folds": 1}, "folds must be a whole number, at least 2, got 1"),
    ({"folds": "six", "seeds": None}, "folds must be a whole number"),
    ({"folds": True}, "folds must be a whole number"),
    ({"folds": 2, "seeds": 3}, "3 seeds for 2 folds: give the same number for each"),
    ({"folds": 3, "seeds": None, "variants": {"sogclr": None, "mine": {"objective": "sogclr"}}}, "'.*' and '.*' are the same run"),
    ({"folds": 3, "seeds": None, "settings": BASE["settings"] | {"batch_size": 22}}, "21 training images are fewer than one batch"),
    ({"folds": 2, "seeds": None, "variants": {"sogclr": None, "mine": {"source.fold": "1/6"}}}, "mine: source.fold follows from folds"),
    ({"folds": 40, "seeds": None}, "32 training images: they cannot be cut into 40 parts"),
    ({"variants": {"sogclr": None, "mine": {"source.fold": "6/5"}}}, "mine: --source.fold is K/N"),
    ({"seeds": 0}, "at least one"),
    ({"seeds": [0, 1.5]}, "whole numbers"),
    ({"seeds": [1, 1]}, "seeds: 1 is given twice"),
    ({"zeroshot": {"a": 1}}, "zeroshot must be a list of folders"),
    ({"settings": ["epochs"]}, "settings must be names with values"),
    ({"zeroshot": ["nowhere"]}, "no folder 'nowhere'"),
    ({"zeroshot": ["Images"], "templates": "opnai"}, "no folder 'Images'"),
    ({"paraphrased": "rulez"}, "no paraphrases at 'rulez': give rules"),
    ({"equal": "pases"}, "equal: did you mean 'passes'?"),
    ({"equal": "passes", "variants": {"sogclr": None, "mine": {"epochs": 4}}}, "variant 'mine' sets epochs, which follow from equal: passes"),
    ({"cut": 5}, "cut must be names with values"),
    ({"cut": {"behnd": 5}}, "cut: unknown key 'behnd': did you mean 'behind'?"),
    ({"cut": {"behind": 0}}, "cut: behind must be a number of points above 0"),
    ({"cut": {"after": 1}}, "cut: behind must be a number of points above 0"),
    ({"cut": {"behind": 5, "after": 0}}, "cut: after must be a number of seeds, at least 1"),
]  # fmt: skip  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_show_before_anything_runs(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match=message) as error:
        run(written(tmp_path / "small.yaml", folder, **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_mistakes_in_the_file_itself(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "e.yaml"
    for text, message in (
        (None, "cannot read the experiment file"),
        ("variants: [a", "is not valid YAML"),
        ("- clip", "has no variants"),
        ("variants:\n  clip: {epochs: 2}\n  clip: {epochs: 3}\n", "duplicate key 'clip'"),
    ):
        if text:
            file.write_text(text)
        assert cli.main(["compare", str(file)]) == 1
        assert message in capsys.readouterr().err
    written(file, tmp_path / "nowhere")
    assert cli.main(["compare", str(file)]) == 1 and "no data set at" in capsys.readouterr().err
    written(file, folder)
    assert (
        cli.main(["compare", str(file), "--jobs", "0"]) == 1 and "--jobs must be 1 or more" in capsys.readouterr().err
    )
    assert cli.main(["compare", str(file), "--seeds", "none"]) == 1 and "--seeds 3" in capsys.readouterr().err
    assert cli.main(["compare", str(file), "--sedes", "2"]) == 1 and "did you mean --seeds?" in capsys.readouterr().err


def test_settings_in_any_form(tmp_path: Path, folder: Path) -> None:
    """Nested or dotted, numbers as people write them; the variant counts more than the settings."""
    file = tmp_path / "e.yaml"
    file.write_text(
        f"settings: {{data: {folder}, batch_size: 8, optim: {{lr: 3e-4}}, loss.temperature: 1}}\n"
        "variants: {clip: , hot: {objective: clip, loss: {temperature: 2e-1}, batch_size: 16}}\nseeds: 0,7\n"
    )
    first, second = plan(read_experiment(file), tmp_path / "out")
    configs = first.configs | {k + 100: v for k, v in second.configs.items()}
    assert [(c.seed, c.objective, c.optim.lr, c.loss.temperature, c.batch_size) for c in configs.values()] == [
        (0, "clip", 3e-4, 1, 8), (7, "clip", 3e-4, 1, 8), (0, "clip", 3e-4, 0.2, 16), (7, "clip", 3e-4, 0.2, 16)
    ]  # fmt: skip
    assert first.configs[7].out == str(tmp_path / "out/runs/clip/seed7")


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda f: f.stem)
def test_our_experiments_can_be_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amclr.compare.plan._images_per_epoch", lambda _: None)  # theirs is not here
    monkeypatch.chdir(tmp_path)
    if start := read_experiment(file).settings.get("init_from"):  # a run that the file says how to make
        assert re.search(rf"^# +amclr train .*--out {start}( |$)", file.read_text(), re.M)
        Path(start).mkdir(parents=True)
        (Path(start) / "config.yaml").write_text("")
    cells = plan(read_experiment(file), tmp_path)
    assert len(cells) >= 4 and all(len(c.configs) >= 1 for c in cells)
    assert read_experiment(file).baseline and read_experiment(file).regime and read_experiment(file).name == file.stem


@pytest.mark.slow
def test_the_example_of_the_guide_runs(tmp_path: Path) -> None:
    (text,) = re.findall(r"<!-- file: \S+ -->\n```yaml\n(.*?)```", (ROOT / "docs" / "compare.md").read_text(), re.S)
    (tmp_path / "experiment.yaml").write_text(text)
    comparison = run(tmp_path / "experiment.yaml")
    assert not comparison.failed and len(comparison.results["rows"]) == 4 and "own classes" in comparison.table
