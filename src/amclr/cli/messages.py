"""What users get wrong, in one line that says what to type."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def fail(message: str, code: int) -> int:
    """Print a message as one line on stderr, unless it is empty, and return the exit code."""
    if message:
        # File names in it must not control the terminal. `printable` of the data package takes long to import.
        text = " ".join(message.splitlines())
        print("amclr: " + "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), file=sys.stderr)
    return code


def of_system(error: OSError) -> str:
    """The message for a missing file, a full disk and the like."""
    if os.environ.get("AMCLR_TRACEBACK"):
        raise error
    file = f"'{error.filename}': " if error.filename else ""
    return f"{file}{error.strerror or error} (AMCLR_TRACEBACK=1 shows where)"


def of_parser(error: Exception, parser: ArgumentParser, arguments: list[str]) -> str:
    """The message for arguments that the parser did not accept."""
    options = {action.dest: action.option_strings[0] for action in parser._actions if action.option_strings}
    message = " ".join(str(error).split())
    if match := re.search(r"arguments are required: ([\w, ]+)", message):
        missing = match[1].split(", ")
        lists = [a for a in parser._actions if a.nargs == "*" and options.get(a.dest) in arguments]
        if lists and missing[0] not in options:  # the list has taken it
            rest = f"{options[lists[0].dest]} {lists[0].metavar} ..."
            return f"name the {missing[0]} first: {parser.prog} {missing[0].upper()}, and then {rest}"
        message = f"it needs {', '.join(options.get(name, name.upper()) for name in missing)}"
    elif match := re.search(r"argument (\S+): expected", message):
        message = f"{match[1]} needs a value"
    elif option := _unknown_option(message):
        near = nearest(option, options.values())
        message = f"unknown option '{option}'" + (f": did you mean {' or '.join(near)}?" if near else "")
        if not option.startswith("-"):
            message = f"one argument too many: '{option}'"
    elif match := re.search(r'key "([\w.]+)": (.*)(?:Got|Given) value: (.*)', message):
        choices, kind = re.search(r"Literal\[(.*?)\]", match[2]), re.search(r"<class '(\w+)'>", match[2])
        wanted = "of another type"
        if choices:
            wanted = f"one of {choices[1].replace(chr(39), '')}"
        elif kind:
            wanted = KINDS.get(kind[1], kind[1])
        message = f"{options.get(match[1], match[1])} must be {wanted}, got '{match[3]}'"
    elif match := re.match(r'Parser key "([\w.]+)":', message):
        message = f"{options.get(match[1], match[1])}{message[match.end() - 1 :]}"
    return f"{message.rstrip()} ({parser.prog} --help lists the options)"


def nearest(option: str, known: Iterable[str]) -> list[str]:
    """The options that an unknown one may stand for: those with the same last part, or else the most similar one."""
    by_tail: dict[str, list[str]] = {}
    for name in known:
        by_tail.setdefault(name.rpartition(".")[2].lstrip("-"), []).append(name)
    tail = option.rpartition(".")[2].lstrip("-")
    if tail in by_tail:
        return by_tail[tail]
    similar = difflib.get_close_matches(option, [name for names in by_tail.values() for name in names], n=1)
    return similar or [name for t in difflib.get_close_matches(tail, by_tail, n=1) for name in by_tail[t]]


def _unknown_option(message: str) -> str | None:
    """The option that the parser's message calls unknown, as it would be typed; it may be a key of a YAML file."""
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        return f"--{match[1]}.{match[2]}"
    if match := re.search(r"Option '(\S+)' is not accepted", message):
        return f"--{match[1]}"
    match = re.search(r"(?:Unrecognized arguments|Unknown option): ([^\s=]+)", message, re.I)
    return match[1] if match else None
