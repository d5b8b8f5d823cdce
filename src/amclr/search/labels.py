"""`amclr label`: the nearest of some classes for every image, as a CSV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from amclr.config.schema import SourceConfig
from amclr.data.images.decode import BadImage
from amclr.data.sources.folders import read_lines
from amclr.evaluation import metrics
from amclr.evaluation.classes import read_prompts
from amclr.runs.loading import load
from amclr.search.builder import CHUNK, read_samples
from amclr.search.csv_output import csv_text, spreadsheet_safe
from amclr.utils.errors import UserError
from amclr.utils.files import written

MAX_TOP = 64
"""Maximum number of classes listed for an image."""


def read_labels(classes: str) -> list[str]:
    """Read class names from a file, one a line, or a text with commas. Raises UserError for fewer than two."""
    listed = read_lines(Path(classes)) if Path(classes).is_file() else classes.split(",")
    names = list(dict.fromkeys(" ".join(name.split()) for name in listed if name.strip()))
    if len(names) < 2:
        raise UserError(f"--classes must name at least two classes, with commas or in a file, got '{classes}'")
    return names


def label(
    run: str | Path, data: str, classes: str, out: Path, templates: str = "amclr", top: int = 1,
    source: SourceConfig | None = None, cache: str = "", progress: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Write the class of every image of a folder, archive or data set to a CSV; return how many images each class has.

    run: what `amclr.load` takes, or an index. classes: what `read_labels` takes. Columns: image, label, cosine, those
    of the next best classes if top > 1, and fault: why an image, whose other cells are empty, cannot be decoded.
    """
    names = read_labels(classes)
    if not 1 <= top <= min(MAX_TOP, len(names)):
        raise UserError(f"--top must be 1 to {min(MAX_TOP, len(names))}, got {top}")
    samples = read_samples(data, source, cache, progress)
    model = load(Path(run) / "model" if (Path(run) / "index.json").is_file() else run)
    class_vectors = metrics.class_embeddings(model, names, read_prompts(templates)[0])
    counts = dict.fromkeys(names, 0)
    with written(out) as handle, tqdm(total=len(samples), desc="Labels", unit="image", disable=not progress) as bar:
        handle.write(csv_text([["image", *_columns(top), "fault"]]).encode())
        for chunk in (samples[k : k + CHUNK] for k in range(0, len(samples), CHUNK)):
            pixels, faults = {}, {}
            for sample in chunk:
                try:
                    pixels[sample.name] = model.prepare(sample.image)
                except BadImage as error:
                    faults[sample.name] = str(error)
            scores = model.encode_image(list(pixels.values())) @ class_vectors.T
            best = scores.topk(top, dim=1)
            positions = {name: k for k, name in enumerate(pixels)}
            lines = []
            for sample in chunk:
                cells: list[Any] = [""] * (2 * top)
                if (position := positions.get(sample.name)) is not None:
                    cosines, indices = best.values[position].tolist(), best.indices[position].tolist()
                    cells = [cell for v, c in zip(cosines, indices, strict=True) for cell in (names[c], f"{v:.4f}")]
                    counts[names[indices[0]]] += 1
                lines.append([spreadsheet_safe(sample.name), *cells, faults.get(sample.name, "")])
            handle.write(csv_text(lines).encode("utf-8", "backslashreplace"))
            bar.update(len(chunk))
    return counts


def _columns(top: int) -> Iterator[str]:
    for k in range(1, top + 1):
        yield from (f"label{k if k > 1 else ''}", f"cosine{k if k > 1 else ''}")
