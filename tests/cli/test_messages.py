"""What users get wrong, as one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from amclr.cli.commands import COMMANDS
from amclr.cli.messages import fail, nearest
from amclr.cli.parsing import parse
from amclr.utils.errors import UserError


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (
            "train",
            ["--lr", "1"],
            "unknown option '--lr': did you mean --optim.lr? (amclr train --help lists the options)",
        ),
        (
            "train",
            ["--captions", "1"],
            "unknown option '--captions': did you mean --source.captions or --scenes.captions?",
        ),
        ("train", ["--temprature", "1"], "unknown option '--temprature': did you mean --loss.temperature?"),
        ("train", ["--loss.gama", "1"], "unknown option '--loss.gama': did you mean --loss.gamma?"),
        ("train", ["--xyzzy", "1"], "unknown option '--xyzzy' (amclr train --help"),
        ("train", ["--resume"], "--resume needs a value"),
        ("train", ["--tf32", "maybe"], "--tf32 must be true or false, got 'maybe'"),
        ("train", ["--loss.temperature", "hot"], "--loss.temperature must be a number, got 'hot'"),
        ("train", ["--config", "nowhere.yaml"], "--config: File does not exist: "),
        ("search", ["idx", "-k", "few"], "-k must be a whole number, got 'few'"),
        ("search", ["idx", "a", "dog"], "one argument too many: 'dog'"),
        ("search", [], "it needs INDEX"),
        ("label", ["run", "photos"], "it needs --classes"),
        (
            "evaluate",
            ["--zeroshot", "classes", "run"],
            "name the run first: amclr evaluate RUN, and then --zeroshot FOLDER ...",
        ),
    ],
)
def test_slips_in_arguments(command: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse(COMMANDS[command], arguments)
    assert str(error.value).startswith(message)


def test_the_last_part_of_a_name_is_enough_to_find_it() -> None:
    known = ["--optim.lr", "--model.image_lr", "--epochs", "-k"]
    assert nearest("--lr", known) == ["--optim.lr"] and nearest("--loss.epochs", known) == ["--epochs"]
    assert nearest("--epoch", known) == ["--epochs"] and nearest("--imagelr", known) == ["--model.image_lr"]
    assert nearest("--k", known) == ["-k"] and nearest("--nothing", known) == []


def test_messages_are_one_line_that_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert fail("no\x1b[2J\nfile", 3) == 3
    assert capsys.readouterr().err == "amclr: no\N{REPLACEMENT CHARACTER}[2J file\n"
    assert fail("", 3) == 3 and capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", ["[]", "['trian']", "['train', '--help']", "['train', '--epochs', 'many']"])
def test_help_and_slips_import_no_torch(arguments: str) -> None:
    code = (
        "import sys; from amclr.cli import main\n"
        f"try: main({arguments})\nexcept SystemExit: pass\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'numpy', 'lightning', 'timm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
