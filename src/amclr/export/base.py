"""What a format of export consists of, and the list of formats.

To add a format, write a module of this package that ends in `FORMAT = Format(...)`, and list it in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from amclr.data.images.decode import Location
    from amclr.models.dual_encoder import DualEncoder

FORMATS = {"open_clip": "open_clip", "onnx": "onnx", "hf": "huggingface"}
"""Names of the formats, and their modules in this package."""


@dataclass(frozen=True)
class Exported:
    """An export, loaded by the software that it is for. Each function returns unit rows (B, D).

    images: embeds uint8 images (B, 3, S, S), prepared by the model. texts: embeds token tensors, made by the model.
    own_images, own_texts: embed image files and captions, read by the other software itself.
    """

    images: Callable[[Tensor], Tensor]
    texts: Callable[[dict[str, Tensor]], Tensor]
    own_images: Callable[[Sequence[Location]], Tensor]
    own_texts: Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Format:
    """How a format is written and loaded.

    write(model, folder, temperature, precision); load(folder). limits: the largest allowed difference of an
    embedding's component, by precision. needs: packages. relocate(folder, home): called before the folder is renamed
    to `home`. usage: how to load the export.
    """

    write: Callable[[DualEncoder, Path, float, str], None]
    load: Callable[[Path], Exported]
    limits: dict[str, float]
    needs: tuple[str, ...] = ()
    relocate: Callable[[Path, Path], None] = lambda folder, home: None
    usage: str = ""


def get_format(name: str) -> Format:
    """Import a format by its name in `FORMATS`."""
    exporter: Format = import_module(f"amclr.export.{FORMATS[name]}").FORMAT
    return exporter
