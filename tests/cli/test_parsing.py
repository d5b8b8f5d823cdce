"""The command line of a function: its options, its help, and the settings that it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amclr.cli.commands import COMMANDS
from amclr.cli.parsing import build, parse
from amclr.config.recipes import RECIPES
from amclr.config.schema import ParaphraseConfig, SourceConfig
from amclr.utils.errors import UserError

TRAIN_OPTIONS = Path(__file__).with_name("train_options.txt")


def test_a_new_option_of_train_is_a_decision() -> None:
    parser, _ = build(COMMANDS["train"])
    options = {name for action in parser._actions for name in action.option_strings if not name.endswith("+")}
    listed = set(TRAIN_OPTIONS.read_text().split())
    assert options == listed, (
        f"the options of `amclr train` changed: new {sorted(options - listed)}, gone {sorted(listed - options)}. An option "
        "exists because somebody needs to turn it. If that is so, or if nobody needs it any more, and the documentation "
        f"says so too, change {TRAIN_OPTIONS.name} (one option a line, sorted)"
    )
    assert TRAIN_OPTIONS.read_text().splitlines() == sorted(listed)


def test_positional_arguments_flags_and_lists() -> None:
    values = parse(COMMANDS["search"], ["idx", "a beach -people", "-k", "3", "--json"])
    assert (
        values["index"] == Path("idx") and values["query"] == "a beach -people" and values["k"] == 3 and values["json"]
    )
    assert parse(COMMANDS["search"], ["idx", "--image=a.png"])["query"] == ""
    values = parse(
        COMMANDS["evaluate"], ["run", "--zeroshot", "a", "b", "--retrieval", "false", "--source.encoding", "cp1252"]
    )
    assert values["zeroshot"] == ["a", "b"] and values["retrieval"] is False
    assert values["source"] == SourceConfig(encoding="cp1252")
    assert parse(COMMANDS["paraphrase"], ["photos", "--k", "2"])["settings"] == ParaphraseConfig(k=2)


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ([], "scenes"),
        (["--data", "scenes"], "scenes"),
        (["--data", "photos"], "frozen"),
        (["--data=photos"], "frozen"),
        (["--recipe", "paper"], "paper"),
        (["--data", "photos", "--recipe=scratch"], "scratch"),
    ],
)
def test_defaults_come_from_a_recipe(arguments: list[str], recipe: str) -> None:
    expected = RECIPES[recipe]()
    settings = parse(COMMANDS["train"], [*arguments, "--optim.lr", "0.5"])["settings"]
    assert (settings.model, settings.loss, settings.views) == (expected.model, expected.loss, expected.views)
    assert settings.optim.lr == 0.5


def test_files_hold_settings_only(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("loss: {temperature: 0.2}\n")
    values = parse(COMMANDS["train"], ["--config", str(file), "--profile"])
    assert values["settings"].loss.temperature == 0.2 and values["profile"] is True
    file.write_text("recipe: paper\n")
    with pytest.raises(UserError, match="'recipe' is not a setting of a file: give --recipe on the command line"):
        parse(COMMANDS["train"], ["--config", str(file)])
    file.write_text("model: 3\n")
    with pytest.raises(UserError, match="ModelConfig must be a mapping of settings, got 3"):
        parse(COMMANDS["train"], ["--config", str(file)])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser, _ = build(COMMANDS[name])
    assert parser.format_usage().startswith(f"usage: amclr {name} ")
    assert all(action.help for action in parser._actions)
    summary: Any = COMMANDS[name].__doc__
    assert summary.partition("\n")[0] in parser.format_help()
