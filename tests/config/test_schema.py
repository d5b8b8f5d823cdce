"""Settings read back from a file: what does not exist or is of another type is named."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from amclr.config.schema import Config, LossConfig, ScenesConfig, ViewsConfig, from_dict, problems


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": "many"}, "epochs must be int, got 'many'"),
        ({"epochs": True}, "epochs must be int, got True"),
        ({"epochs": 2.5}, "epochs must be int, got 2.5"),
        ({"wandb": 1}, "wandb must be bool, got 1"),
        ({"data": None}, "data must be str, got None"),
        ({"loss": {"gamma": "0.5"}}, "gamma must be float, got '0.5'"),
        ({"loss": {"temperature": "low"}}, "temperature must be"),
        ({"loss": {"pairs": "both"}}, "pairs must be .*'aligned'.*got 'both'"),
        ({"views": {"image": 3}}, "image must be .*got 3"),
        ({"precision": "64"}, "precision must be .*'32-true'"),
        ({"loss": 3}, "LossConfig must be a mapping of settings, got 3"),
        ({1: 2}, "Config has no setting 1"),
        ([1], r"Config must be a mapping of settings, got \[1\]"),
    ],
)
def test_values_of_another_type_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_whole_numbers_do_for_fractions_and_nothing_for_optional_ones() -> None:
    read = from_dict({"loss": {"gamma": 1, "temperature": None, "pairs": None}, "checkpoint_minutes": 5})
    assert read == Config(loss=LossConfig(gamma=1, temperature=None, pairs=None), checkpoint_minutes=5)


def test_a_list_of_transforms_is_kept_as_it_is() -> None:
    entries = [{"RandomResizedCrop": {"size": 64, "scale": [0.5, 1.0]}}, "RandomHorizontalFlip"]
    config = replace(Config(), views=ViewsConfig(image=entries))
    assert from_dict(asdict(config)) == config


def test_out_of_range_settings_are_all_named() -> None:
    wrong = problems(replace(Config(), epochs=0, scenes=ScenesConfig(test=-1)))
    assert [w.split()[0] for w in wrong] == ["--epochs", "--scenes.test"]
