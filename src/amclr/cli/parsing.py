"""A command line from a function: parameters before the `*` are positional, the others are options.

Types and defaults come from the signature. Help comes from the docstring: its first line, `Usage:` if there is one, and
`Args:`, with the placeholder of a value in parentheses. A bool that is False by default is a flag; a sequence takes
several values. A dataclass gives one option per field: `--source.encoding`, or `--epochs` where the parameter is called
`settings`. The defaults of training settings are those of a recipe, or of the run to resume.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import jsonargparse

from amclr.cli.commands import Fields
from amclr.cli.messages import of_parser
from amclr.config.checks import flat, from_dict
from amclr.config.recipes import RECIPES
from amclr.config.schema import Config
from amclr.utils.errors import UserError, did_you_mean

ARGUMENT = r"^    (\w+)(?: \((.*?)\))?: (.*(?:\n {8}.*)*)"
PLACEHOLDERS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


class Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with types or choices as placeholders, and without empty defaults."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = str(action.default).lower() if isinstance(action.default, bool) else action.default
        empty = default in (None, "", [], argparse.SUPPRESS) or action.nargs == 0
        return action.help or "" if empty else f"{action.help} (default: {default})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        literals = [h for h in (hint, *get_args(hint)) if get_origin(h) is Literal]
        if literals:
            return f"{{{','.join(get_args(literals[0]))}}}"
        return PLACEHOLDERS.get((*get_args(hint), hint)[0], super()._get_default_metavar_for_optional(action))


def parse(command: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """The arguments of a command's function. Raises UserError for what the user gets wrong; exits after --help."""
    parser, parts = build(command)
    others = inspect.signature(command).parameters.keys() - parts.keys()
    if Config in parts.values():
        parser.set_defaults(flat(asdict(_starting_point(arguments, "resume" in others))))
    try:
        values = parser.parse_args(arguments).as_dict()
        from_file = values.pop("config", None)
        for name, cls in parts.items():
            part = {f.name: values.pop(f.name) for f in fields(cls)} if name == "settings" else values[name]
            values[name] = from_dict(part, cls)
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        raise UserError(of_parser(error, parser, arguments)) from None
    typed = {argument.partition("=")[0] for argument in arguments}
    for name in others if from_file else ():  # a recipe in a file would come too late
        if values[name] != parser.get_default(name) and f"--{name}" not in typed:
            raise UserError(f"'{name}' is not a setting of a file: give --{name} on the command line")
    return values


def build(command: Callable[..., Any]) -> tuple[jsonargparse.ArgumentParser, dict[str, Any]]:
    """A parser for a command, and those of its parameters that are dataclasses, with their class."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    doc = inspect.getdoc(command) or ""
    helps = {name: (metavar, " ".join(text.split())) for name, metavar, text in re.findall(ARGUMENT, doc, re.M)}
    parser = jsonargparse.ArgumentParser(
        prog=f"amclr {command.__name__}", description=doc.partition("\n")[0], exit_on_error=False, allow_abbrev=False,
        formatter_class=Formatter,
    )  # fmt: skip
    parts: dict[str, Any] = {}
    usage = [parser.prog]
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        hint, which = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name], Fields())
        if isinstance(hint, type) and is_dataclass(hint):
            parts[name] = hint
            _add_settings(parser, hint, None if name == "settings" else name, which)
        else:
            usage += _add_parameter(parser, parameter, hint, *helps[name])
    parser.usage = " ".join([*usage, "[OPTIONS]"])
    if section := re.search(r"^Usage:\n((?: {4}.*\n)+)", doc, re.M):
        parser.usage = "\n       ".join(line.strip() for line in section[1].splitlines())
    if "recipe" in helps:
        summaries = [f"  {name:10} {(f.__doc__ or '').partition(chr(10))[0]}" for name, f in RECIPES.items()]
        parser.epilog = "\n".join(["recipes:", *summaries])
    return parser, parts


def _add_parameter(
    parser: jsonargparse.ArgumentParser, parameter: inspect.Parameter, hint: Any, metavar: str, text: str
) -> list[str]:
    """Add a positional argument or an option; returns how the usage shows it, if it is positional or required."""
    name, default = parameter.name, parameter.default
    required = default is parameter.empty
    kwargs: dict[str, Any] = {"help": text} | ({} if required else {"default": default})
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
        kwargs |= {"type": hint, "metavar": name.upper()} | ({} if required else {"nargs": "?"})
        parser.add_argument(name, **kwargs)
        return [name.upper() if required else f"[{name.upper()}]"]
    option = f"-{name}" if len(name) == 1 else f"--{name}"
    if hint is bool and default is False:
        kwargs["action"] = "store_true"
    elif get_origin(hint) is Sequence:
        kwargs |= {"type": get_args(hint)[0], "nargs": "*", "default": [*default], "metavar": metavar}
    else:
        kwargs |= {"type": hint, "required": required} | ({"metavar": metavar} if metavar else {})
    parser.add_argument(option, **kwargs)
    return [f"{option} {metavar}"] if required else []


def _add_settings(parser: jsonargparse.ArgumentParser, cls: type, prefix: str | None, which: Fields) -> None:
    """Add one option per field of a dataclass."""
    if cls is Config:
        parser.add_argument("--config", action="config", help="YAML file of settings, such as a run's config.yaml.")
    before = len(parser._actions)
    parser.add_class_arguments(cls, prefix, as_group=prefix is not None, skip=set(which.without))
    for action in parser._actions[before:]:
        if which.listed and not any(action.dest == n or action.dest.startswith(f"{n}.") for n in which.listed):
            action.help = argparse.SUPPRESS


def _starting_point(arguments: list[str], resumes: bool) -> Config:
    """The settings that the options and the YAML file change: those of the run to resume, or of a recipe."""
    if resumes and (run := _value(arguments, "--resume")):
        from amclr.runs.folder import Run

        return Run.open(Path(run)).config
    generated = _value(arguments, "--data") in (None, "scenes") and _value(arguments, "--config") is None
    name = _value(arguments, "--recipe") or ("scenes" if generated else "frozen")
    if name not in RECIPES:
        raise UserError(f"unknown recipe '{name}': {did_you_mean(name, RECIPES)}")
    return RECIPES[name]()


def _value(arguments: list[str], option: str) -> str | None:
    """The value of an option, before the parser has its defaults."""
    apart = [value for name, value in pairwise(arguments) if name == option]
    joined = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{option}=")]
    return (*apart, *joined, None)[0]
