"""What a run is assembled from, and the settings that are refused."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from amclr.config.checks import from_dict, problems
from amclr.config.recipes import RECIPES
from amclr.config.schema import Config, LossConfig, ModelConfig, OptimConfig, ViewsConfig
from amclr.runs.folder import Run
from amclr.training.loop import train
from amclr.utils.errors import UserError
from tests.training.configs import config_for, frozen, weights

pytestmark = pytest.mark.usefixtures("undrawn")


def test_captions_that_all_say_the_same_are_refused(folder: Path) -> None:
    listed = folder / "captions.txt"
    names = sorted({row.split(",")[0] for row in listed.read_text().splitlines()[1:]})
    listed.write_text("image,caption\n" + "".join(f"{n},a patch\n" for n in names))
    with pytest.raises(UserError, match="every training caption of .* is 'a patch': none tells images apart"):
        train(config_for(folder), progress=False)
    assert not (folder.parent / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "amlcr"}, "unknown objective 'amlcr': did you mean 'amclr'"),
        ({"epochs": 0}, "--epochs must lie between 1 and"),
        ({"batch_size": 1, "epochs": -1}, "--epochs .*; --batch_size must lie between 2"),
        ({"batch_size": 64}, "32 training images are fewer than one batch of 64"),
        ({"optim": OptimConfig(name="adamx")}, "unknown optimiser '--optim.name adamx'"),
        ({"loss": LossConfig(gamma=0.0)}, "--loss.gamma must be greater than 0 and at most 1, got 0"),
        ({"loss": LossConfig(estimator="reference"), "objective": "clip"}, "'reference' needs a global objective"),
        ({"model": ModelConfig(image_tower="resnet5000")}, "cannot load image tower"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    config = config_for(folder, **changes)
    with pytest.raises(UserError, match=message):
        train(config, progress=False)
    assert not Path(config.out).exists(), "a refused run leaves no folder"


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    run = train(frozen(folder), progress=False)
    with pytest.raises(UserError, match=f"is in use: resume it with: amclr train --resume {run.folder}"):
        train(frozen(folder), progress=False)
    (folder.parent / "file").write_text("x")
    with pytest.raises(UserError, match="is in use: choose another --out"):
        train(frozen(folder, "file"), progress=False)
    with pytest.raises(UserError, match="cannot create the run folder '.*file/run': Not a directory"):
        train(frozen(folder, "file/run"), progress=False)
    with pytest.raises(UserError, match="is not a run folder"):
        train(resume=folder, progress=False)


def test_config_round_trip() -> None:
    from dataclasses import asdict

    config = config_for(Path("x"), loss=LossConfig(temperature=None, pairs="all"))
    assert from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="LossConfig has no setting gama"):
        from_dict({"loss": {"gama": 1}})
    assert problems(Config()) == []
    for recipe in RECIPES.values():
        assert problems(recipe()) == []


def test_second_views_are_made_only_for_methods_that_use_them(folder: Path, own_cache: Path) -> None:
    """A baseline computes one policy's features; `pairs` gives it the views of AmCLR, and so both."""
    views = ViewsConfig(image="weak", image_aug="single")

    def trained(out: str, **changes: Any) -> tuple[Run, int]:
        run = train(frozen(folder, out, views=views, **changes), progress=False)
        return run, len(list(own_cache.glob("images-*")))

    _, one = trained("plain", objective="sogclr")
    assert one == 2, "weak views to train on, and plain images to evaluate on"
    same, two = trained("pairs", objective="sogclr", loss=LossConfig(temperature=0.1, pairs="all"))
    assert two == 3
    published, three = trained("amclr", objective="amclr")
    assert three == 3
    expected = weights(published)
    assert all(torch.equal(v, expected[k]) for k, v in weights(same).items())


def test_logs_to_wandb_where_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amclr.utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'amclr\[wandb\]'"):
        train(frozen(folder, "without", wandb=True), progress=False)
    assert not (folder.parent / "without").exists()
    monkeypatch.setattr("amclr.utils.errors.find_spec", lambda name: True)
    seen: list[Any] = []
    board = types.SimpleNamespace(
        log=lambda values, step: seen.append((step, values)), finish=lambda: seen.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kw: seen.append(kw) or board))
    train(frozen(folder, wandb=True), progress=False)
    assert seen[0]["config"]["batch_size"] == 8 and seen[0]["resume"] == "allow" and seen[-1] == "end"
    assert any("eval/r_mean" in values for _, values in seen[1:-1])
