"""What the fields of the settings carry."""

from __future__ import annotations

import subprocess
import sys
from math import inf, nan

import pytest

from amclr.config.schema import Bounds


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "message"),
    [
        (Bounds(low=8, high=4096), (8, 4096), (7, 4097, nan), "lie between 8 and 4096"),
        (Bounds(low=0), (0, 1e30), (-1e-9, inf, nan), "be at least 0"),
        (Bounds(above=0), (1e-9,), (0, inf, nan), "be greater than 0"),
        (Bounds(above=0, high=1), (1e-9, 1), (0, 1.1, nan), "be greater than 0 and at most 1"),
        (Bounds(low=0, below=1), (0, 0.999), (-1, 1, nan), "be at least 0 and less than 1"),
    ],
)
def test_bounds(bounds: Bounds, inside: tuple[float, ...], outside: tuple[float, ...], message: str) -> None:
    assert all(value in bounds for value in inside) and not any(value in bounds for value in outside)
    assert str(bounds) == message


def test_settings_import_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, amclr.config.checks, amclr.config.recipes; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
