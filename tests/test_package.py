"""The package as others import it: types, public names."""

from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files

import amclr


def test_type_checkers_of_others_read_our_types() -> None:
    assert (files("amclr") / "py.typed").is_file()


def test_every_public_name_is_there() -> None:
    assert {"objectives", "evaluate", "load", "train", "Config"} <= set(dir(amclr))
    for name in amclr.__all__:
        assert getattr(amclr, name) is not None
    assert amclr.__version__ == version("amclr")
