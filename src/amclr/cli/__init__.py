"""The command line: `amclr COMMAND`."""

from amclr.cli.main import main

__all__ = ["main"]
