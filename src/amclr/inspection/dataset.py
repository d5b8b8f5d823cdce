"""`amclr inspect`: a data set in a few lines of text and two figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from amclr.config.checks import problems
from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.data.images import duplicates
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policies
from amclr.data.manifest import Manifest
from amclr.data.sources.rows import printable, write_rejects
from amclr.evaluation.embedding import image_or_none
from amclr.inspection.captions import CaptionStatistics
from amclr.inspection.sheets import draw_look_alikes, draw_samples
from amclr.utils.errors import UserError

REJECTS_SHOWN = 10


def inspect(
    config: Config, sheet: Path, scan_all: bool = False, listing: Path | None = None, progress: bool = True
) -> str:
    """Describe a data set in a few lines; draw a contact sheet of samples with their views, and caption statistics.

    Writes rejected rows and images beside the sheet; the limit on their number does not apply here.

    Args:
        config: the data set and its views.
        sheet: the contact sheet to write: a .png, .jpg, .pdf or .svg file.
        scan_all: decode every image, however many there are.
        listing: a file to write every sample to, as JSON lines.
        progress: show progress bars.

    Raises:
        UserError: for settings that are wrong, or if there is no image to show.
    """
    if sheet.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg"):
        raise UserError(f"cannot draw a contact sheet as '{sheet}': name a .png, .jpg, .pdf or .svg file")
    if wrong := problems(config):  # before the data is read
        raise UserError("; ".join(wrong))
    policies(config)
    lenient = replace(config, source=replace(config.source, max_bad=1.0, duplicates="positives"))
    manifest = manifests.prepare(lenient, manifests.cache_folder(config), progress, scan_all)
    samples = manifest.samples
    hashes = [manifest.perceptual_hashes.get(s.image) for s in samples]
    groups = duplicates.image_groups(hashes) if any(hashes) else None
    statistics = CaptionStatistics.of(config, [c for s in samples for c in s.captions])
    lines = [
        f"{manifest.root}" + (f" ({manifest.format})" if manifest.format else ""),
        *_count_lines(manifest),
        *statistics.lines(config),
        *duplicates.report(groups, [s.name for s in samples], [s.captions for s in samples], manifest.splits),
        *_note_lines(manifest),
        *_reject_lines(manifest, beside=sheet),
    ]
    draw_samples(manifest, config, sheet)
    plot = sheet.with_name(f"{sheet.stem}-captions{sheet.suffix}")
    statistics.draw(config, plot)
    lines += [f"contact sheet: {sheet}", f"caption lengths and words: {plot}"]
    if groups is not None and (largest := duplicates.largest(groups)):
        store = ImageStore([s.image for s in samples], config.model.image_size)
        file = sheet.with_name(f"{sheet.stem}-duplicates{sheet.suffix}")

        def member(i: int) -> tuple[str, Tensor, str] | None:
            image = image_or_none(store.__getitem__, i)
            return None if image is None else (samples[i].name, image, samples[i].captions[0])

        if draw_look_alikes(largest, member, file):
            lines.append(f"images that look the same: {file}")
    if listing:
        manifest.write(listing)
        lines.append(f"every sample: {listing}")
    return "\n".join(map(printable, lines))


def _count_lines(manifest: Manifest) -> list[str]:
    """Images by split and part, and how many captions they have."""
    samples = manifest.samples
    captions = Counter(len(s.captions) for s in samples)
    commonest = sorted(captions.items(), key=lambda item: -item[1])[:3]
    return [
        f"images       {len(samples)}" + "".join(f", {n} {len(manifest.split(n))}" for n in manifest.splits),
        *(
            f"  {part:10} {sum(s.name.startswith(f'{part}/') for s in samples)}, each visited {weight:g} times an epoch"
            for part, weight in manifest.parts.items()
        ),
        f"captions     {sum(n * images for n, images in captions.items())}: "
        + ", ".join(f"{images} images with {n}" for n, images in commonest),
    ]


def _note_lines(manifest: Manifest) -> list[str]:
    """Rows left out, notes of the readers, paraphrases and images by class."""
    lines = [f"left out     {len(manifest.rejects)} of {manifest.rows} rows"]
    lines += [f"note         {note}" for note in manifest.notes]
    if paraphrased := sum(1 for s in manifest.samples for p in s.paraphrases if p):
        stores = ", ".join(manifest.paraphrases) or "the data set"
        lines.append(f"paraphrases  of {paraphrased} captions, from {stores}")
    if manifest.zeroshot:
        lines.append(f"zero-shot    {manifest.zeroshot}")
    return lines


def _reject_lines(manifest: Manifest, beside: Path) -> list[str]:
    """The first rejects; all of them are written to a file beside another one."""
    if not manifest.rejects:
        return []
    file = beside.with_name(f"{beside.stem}-rejects.jsonl")
    write_rejects(manifest.rejects, file)
    more = "... " if len(manifest.rejects) > REJECTS_SHOWN else ""
    return [*(f"  {reject}" for reject in manifest.rejects[:REJECTS_SHOWN]), f"  {more}all of them listed in {file}"]
