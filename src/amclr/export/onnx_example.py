"""Search images by captions with a model exported to ONNX. Needs only numpy, pillow, onnxruntime and tokenizers.

python example.py IMAGE ... --captions "a dog on the beach" "two people at a desk"

Prints every caption with the images that match it, best first. Copy `Model` into your own program.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from onnxruntime import InferenceSession, SessionOptions
from PIL import Image, ImageOps
from tokenizers import Tokenizer


class Model:
    """The two towers of a folder that `amclr export --to onnx` wrote. threads: 0 lets onnxruntime choose."""

    def __init__(self, folder: Path, threads: int = 0) -> None:
        options = SessionOptions()
        options.intra_op_num_threads = threads
        self.size = int(json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))["image_size"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.image, self.text = (
            InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in ("image.onnx", "text.onnx")
        )

    def embed_images(self, images: Sequence[str | Path | IO[bytes]]) -> np.ndarray:
        """Embed image files as unit rows (N, D)."""
        return self.run(self.image, images=np.stack([prepare(image, self.size) for image in images]))

    def embed_texts(self, captions: Sequence[str]) -> np.ndarray:
        """Embed captions as unit rows (N, D)."""
        encodings = self.tokenizer.encode_batch(list(captions))
        ids, mask = (np.array([getattr(e, name) for e in encodings], np.int64) for name in ("ids", "attention_mask"))
        return self.run(self.text, input_ids=ids, attention_mask=mask)

    @staticmethod
    def run(session: InferenceSession, **inputs: np.ndarray) -> np.ndarray:
        """Run a tower, and return its only output."""
        rows: Any = session.run(None, inputs)[0]
        return np.asarray(rows)


def prepare(source: str | Path | IO[bytes], size: int) -> np.ndarray:
    """Prepare an image for the image tower: upright RGB, (3, S, S) uint8, shorter side resized, centre crop."""
    with Image.open(source) as opened:
        opened.draft("RGB", (2 * size, 2 * size))  # JPEG decoders can downscale large images while decoding
        image = ImageOps.exif_transpose(opened)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    # In two steps, as in training, which stores decoded images at up to twice the size.
    scale = 2 * size / min(image.size)
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    shorter = min(image.size)
    width, height = size * image.width // shorter, size * image.height // shorter
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def main() -> None:
    """Rank the given images for every caption."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="+")
    parser.add_argument("--captions", nargs="+", required=True)
    options = parser.parse_args()
    model = Model(Path(__file__).parent)
    scores = model.embed_texts(options.captions) @ model.embed_images(options.images).T
    for caption, row in zip(options.captions, scores, strict=True):
        print(caption)
        for k in np.argsort(-row)[:10]:
            print(f"  {row[k]:.4f}  {options.images[k]}")


if __name__ == "__main__":
    main()
