"""Export as a Hugging Face folder: what `save_pretrained` writes, and `amclr.load` reads."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from amclr.export.base import Exported, Format
from amclr.models.dual_encoder import DualEncoder


def write(model: DualEncoder, folder: Path, temperature: float, precision: str) -> None:
    """Write the folder that `amclr.load` reads, ready to be pushed to the Hub."""
    model.save_pretrained(folder)


def load(folder: Path) -> Exported:
    """Load the folder as `amclr.load` does."""
    loaded = DualEncoder.from_folder(folder)

    def images(pixels: Tensor) -> Tensor:
        rows, _ = loaded(pixels, None)
        assert rows is not None
        return rows

    def texts(tokens: dict[str, Tensor]) -> Tensor:
        _, rows = loaded(None, tokens)
        assert rows is not None
        return rows

    return Exported(images, texts, lambda p: loaded.encode_image(p), lambda c: loaded.encode_text(c))


FORMAT = Format(write, load, {"fp32": 1e-6}, usage="amclr.load('{home}')")
