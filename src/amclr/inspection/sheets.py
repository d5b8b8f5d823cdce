"""Contact sheets: samples with the views that training draws of them, and groups of images that look the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.data.images.store import ImageStore
from amclr.data.images.views import policies, title, whole
from amclr.data.manifest import Manifest
from amclr.data.sources.rows import printable
from amclr.data.text.views import TextPolicy
from amclr.evaluation.embedding import image_or_none
from amclr.utils import figures
from amclr.utils.errors import UserError

SAMPLES, GROUPS, MEMBERS = 8, 12, 4


def draw_samples(manifest: Manifest, config: Config, file: Path) -> None:
    """Draw random samples with their image and text views of the first epoch.

    Raises UserError if no image can be decoded.
    """
    samples, size = manifest.samples, config.model.image_size
    order = map(int, np.random.default_rng(config.seed).permutation(len(samples)))
    store = ImageStore([s.image for s in samples], size)
    decoded = ((samples[i], image) for i in order if (image := image_or_none(store.__getitem__, i)) is not None)
    cards = []
    for sample, image in islice(decoded, SAMPLES):
        views = [("as evaluated", whole(image, size))]
        for view, policy in policies(config).items():
            (augmented,) = policy([image], np.array([sample.id]), config.seed, 0, view)
            views.append((f"{view}: {title(getattr(config.views, view))}", augmented))
        key = (config.seed, 0, sample.name)
        _, text, text_aug = TextPolicy.of(config).draw(sample.captions, sample.paraphrases, *key, "text")
        cards.append((views, printable(text), printable(text_aug)))
    if not cards:
        raise UserError(f"no image of '{config.data}' can be decoded: amclr inspect --scan lists them")
    file.parent.mkdir(parents=True, exist_ok=True)
    figures.contact_sheet(
        cards, file, f"{manifests.label(config.data)}: {len(samples)} images; text in black, text_aug in blue"
    )


def draw_look_alikes(
    groups: Sequence[np.ndarray], member: Callable[[int], tuple[str, Tensor, str] | None], file: Path
) -> bool:
    """Draw some members of the largest groups of images that look the same, with the captions of the first two.

    member: name, image and caption of one; None if it can no longer be decoded. Returns False, and draws nothing, if
    no group has two members that can be decoded.
    """
    cards = []
    for rows in groups[:GROUPS]:
        members = [m for i in map(int, rows[:MEMBERS]) if (m := member(i)) is not None]
        if len(members) > 1:
            first, second = (printable(caption) for _, _, caption in members[:2])
            cards.append(([(printable(name[-16:]), whole(image, 96)) for name, image, _ in members], first, second))
    if cards:
        heading = f"{sum(map(len, groups))} images in {len(groups)} groups look the same"
        figures.contact_sheet(cards, file, heading)
    return bool(cards)
