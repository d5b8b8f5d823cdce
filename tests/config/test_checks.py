"""Problems of settings are all named at once; settings read from a file are checked; some may differ on resume."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest

from amclr.config.checks import fixed_differences, flat, from_dict, problems
from amclr.config.schema import Config, LossConfig, ParaphraseConfig, ScenesConfig, ServeConfig, ViewsConfig


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


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (Config(epochs=0, scenes=ScenesConfig(test=-1)), ["--epochs", "--scenes.test"]),
        (Config(loss=LossConfig(gamma=0.0, temperature=-1.0)), ["--loss.temperature", "--loss.gamma"]),
        (ParaphraseConfig(k=9, candidates=3, prompt="reword", top_p=0), ["--top_p", "--candidates", "--prompt"]),
        (ServeConfig(port=-1, token="short"), ["--port", "--token"]),
    ],
)
def test_all_problems_are_named_at_once(settings: Any, names: list[str]) -> None:
    assert [problem.split()[0] for problem in problems(settings)] == names


def test_problems_of_a_part_can_be_named_as_arguments() -> None:
    assert problems(LossConfig(rho=-1), prefix="") == ["rho must be at least 0, got -1"]


RESUMABLE = """
accelerator cache checkpoint_minutes decoded deterministic devices disk_cache epochs eval_every keep loss.storage
micro_batch model.activation_checkpointing model.compile monitor nan_limit on_nan out ram_cache source.max_bad
source.scan_up_to strategy views.where wandb watchdog_timeout workers
"""


def test_what_may_differ_when_a_run_is_resumed() -> None:
    def altered(values: dict[str, Any]) -> dict[str, Any]:
        return {name: altered(v) if isinstance(v, dict) else ("other", v) for name, v in values.items()}

    def settings(cls: type[Any], values: dict[str, Any]) -> Any:
        nested = {name: settings(type(getattr(cls(), name)), v) for name, v in values.items() if isinstance(v, dict)}
        return cls(**{**values, **nested})

    before = Config()
    after = settings(Config, altered(asdict(before)))
    assert sorted(set(flat(asdict(before))) - set(fixed_differences(before, after))) == RESUMABLE.split()
    assert fixed_differences(before, replace(before, seed=1, epochs=99)) == {"seed": (0, 1)}
