"""The one exception that the command line turns into a one-line message."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user can put right; the message says how, in one line."""
