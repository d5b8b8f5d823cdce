"""`amclr export`: write a run's model in another format, and check that the export reproduces it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.images.decode import BadImage, Location
from amclr.evaluation.run import evaluation_config
from amclr.export.base import FORMATS, get_format
from amclr.export.parity import TOP, compare
from amclr.models.dual_encoder import DualEncoder
from amclr.objectives.methods import METHODS
from amclr.runs.folder import Run
from amclr.utils.errors import UserError, require
from amclr.utils.files import write_text

PAIRS = 256
"""Maximum number of images, with a caption each, on which an export is compared."""


def export(
    run: Path, to: str, *, out: str = "", precision: str = "fp32", data: str = "", progress: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Export a run's best weights to another format, and keep the export only if it reproduces the model.

    Args:
        run: a run folder.
        to: a name of `FORMATS`.
        out: the folder to write; empty is `exports/FORMAT` in the run folder.
        precision: fp32 or, for ONNX, fp16 or int8.
        data: compare on the validation split of this data set instead of the run's own.
        progress: show progress bars.

    Returns the folder and the content of its `parity.json`. Raises UserError, and leaves nothing behind, if the run or
    the data do not exist, the folder is in use, packages are missing, the format cannot express the model, or the
    export differs from the model by more than the format's limit.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got '{to}'")
    exporter = get_format(to)
    if precision not in exporter.limits:
        raise UserError(f"--to {to} supports --precision {' or '.join(exporter.limits)}, got '{precision}'")
    require(f"--to {to}", "export", *exporter.needs)
    opened = Run.open(run)
    name = to if precision == "fp32" else f"{to}-{precision}"
    home = Path(out).expanduser().resolve() if out else (run / "exports" / name).resolve()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise UserError(f"'{home}' is in use: choose another --out, or remove it")
    model = opened.load_model()
    images, captions = parity_pairs(model, evaluation_config(opened.config, data, SourceConfig()), progress)
    with _staged(home) as folder:
        exporter.write(model, folder, final_temperature(opened), precision)
        exported = exporter.load(folder)
        parities = compare(model, exported, images, captions, progress)
        parity = parities["parity"]
        limit = exporter.limits[precision]
        # Negated, so that NaN exceeds any limit.
        if not parity.difference <= limit or (precision == "fp32" and parity.same < parity.queries):
            raise UserError(
                f"the export differs from the model: by up to {parity.difference:.1e} (limit {limit:g}), and "
                f"{parity.same} of {parity.queries} queries have the same top {TOP}; nothing was written"
            )
        record = {
            "format": to, "precision": precision, "pairs": len(images), "limit": limit,
            **{kind: asdict(p) for kind, p in parities.items()},
        }  # fmt: skip
        write_text(folder / "parity.json", json.dumps(record, indent=2) + "\n")
        exporter.relocate(folder, home)
    return home, record


def report(home: Path, record: dict[str, Any]) -> str:
    """Describe the result of `export` in a few lines: parity, folder, how to load it."""
    parity, own, to = record["parity"], record["own_reading"], record["format"]

    def top(parity: dict[str, Any]) -> str:
        same, queries = parity["same"], parity["queries"]
        return f"same top {TOP} for {same} of {queries} queries, {parity['overlap']:.1%} overlap"

    return "\n".join([
        f"{to}, {record['precision']}: {record['pairs']} images with a caption each, embedded by the export and by "
        "the model",
        f"  same tensors     largest difference {parity['difference']:.1e} (limit {record['limit']:g}), lowest cosine "
        f"{parity['cosine']:.7f}; {top(parity)}",
        f"  its own reading  largest difference {own['difference']:.1e}, lowest cosine {own['cosine']:.7f}; {top(own)}",
        f"folder: {home}",
        f"use it: {get_format(to).usage.format(home=home)}",
    ])  # fmt: skip


@contextmanager
def _staged(home: Path) -> Iterator[Path]:
    """A folder to write, which is renamed to `home` once it is complete, and removed if writing fails."""
    part = home.with_name(f"{home.name}.part")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # left by a killed export
        part.mkdir()
    except OSError as error:
        raise UserError(f"cannot create the folder '{home}': {error.strerror}: choose another --out") from None
    try:
        yield part
        if home.is_dir():
            home.rmdir()  # it is empty, as checked before
        part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def parity_pairs(model: DualEncoder, config: Config, progress: bool = True) -> tuple[list[Location], list[str]]:
    """Return the locations of up to `PAIRS` decodable validation images, and the first caption of each.

    config: names the data set and its cache. Raises UserError if no image can be decoded.
    """
    manifest = manifests.prepare(config, manifests.cache_folder(config), progress, only="val")
    images, captions = [], []
    for sample in manifest.samples:
        try:
            model.prepare(sample.image)
        except BadImage:
            continue
        images.append(sample.image)
        captions.append(sample.captions[0])
        if len(images) == PAIRS:
            break
    if not images:
        raise UserError(f"no validation image of '{config.data}' can be decoded: give another --data")
    return images, captions


def final_temperature(run: Run) -> float:
    """The final temperature of a run: the learned one, or else the configured one."""
    learned = run.load_best().get("objective", {}).get("log_temperature")
    if learned is not None:
        return math.exp(float(learned))
    configured = run.config.loss.temperature
    return METHODS[run.config.objective].default_temperature if configured is None else configured
