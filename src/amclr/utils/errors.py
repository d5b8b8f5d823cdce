"""What users get wrong: the one exception that becomes a one-line message, and the pieces such messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.util import find_spec


class UserError(ValueError):
    """Something that the user can put right; the message says how, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, or the error's type where it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def did_you_mean(name: object, known: Iterable[str], otherwise: str | None = None) -> str:
    """What to type instead of an unknown name: the nearest known one, or else `otherwise` or all of them."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose from {', '.join(known)}" if otherwise is None else otherwise


def require(what: str, extra: str, *modules: str) -> None:
    """Raise UserError, naming the extra to install, where one of the modules is not installed."""
    missing = [module.replace("_", "-") for module in modules if not find_spec(module)]
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install 'amclr[{extra}]'")
