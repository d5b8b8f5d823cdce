"""Which terms each objective has: methods as rows of a table.

A **view** is one rendering of a sample (`image`, `image_aug`, `text`, `text_aug`). A directed
**term** contrasts an anchor view with a candidate view; a **method** is a list of terms, a contrast
and a temperature. Adding an objective means adding a row to `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from amclr.config.schema import LossConfig
from amclr.objectives.contrasts import CONTRASTS

VIEWS = ("image", "image_aug", "text", "text_aug")

Temperature = Literal["fixed", "learnable", "individual"]
Pairs = Literal["none", "first", "aligned", "all"]

PAIRS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "first": (("image", "text"),),
    "aligned": (("image", "text"), ("image_aug", "text_aug")),
    "all": (("image", "text"), ("image", "text_aug"), ("image_aug", "text"), ("image_aug", "text_aug")),
}
"""The image-text pairs that an objective aligns, by name."""


def modality(view: str) -> str:
    """`image` for both image views, `text` for both text views."""
    return view.removesuffix("_aug")


@dataclass(frozen=True)
class Term:
    """One directed term: every anchor row against the candidate rows of the other samples.

    `also` names further views whose other samples are negatives too (NT-Xent, pooled terms).
    """

    anchor: str
    candidate: str
    weight: float = 1.0
    also: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """`cross` between the modalities; `image` or `text` within one."""
        a, c = modality(self.anchor), modality(self.candidate)
        return a if a == c else "cross"

    def __str__(self) -> str:
        return f"{self.anchor}->{'+'.join((self.candidate, *self.also))}"


@dataclass(frozen=True)
class Method:
    """One objective: which pairs are aligned, by which contrast, at which temperature."""

    summary: str
    contrast: str
    """Its name in `amclr.objectives.contrasts.CONTRASTS`."""
    pairs: Pairs
    intra: tuple[str, ...] = ()
    """Modalities whose two views are aligned with each other."""
    pool_negatives: bool = False
    """Also use the anchor's own view of the other samples as negatives (NT-Xent)."""
    cyclic: float = 0.0
    """Weight of each of CyCLIP's two consistency penalties, by default."""
    temperature: Temperature = "fixed"
    default_temperature: float = 0.01
    source: str = ""

    def terms(self, settings: LossConfig | None = None) -> tuple[Term, ...]:
        """The directed terms, image anchors first, with the pairs and weights of the settings.

        Global objectives sum their terms (SogCLR 2, AmCLR 8, xAmCLR 12). Mini-batch objectives average theirs, so that
        CLIP is the mean of its two cross-entropies however many pairs it has.
        """
        settings = settings or LossConfig()
        weights = {"cross": settings.cross_weight, "image": settings.image_weight, "text": settings.text_weight}
        cross = PAIRS[settings.pairs or self.pairs]
        terms = [Term(i, t) for i, t in cross] + self._intra_terms("image")
        terms += [Term(t, i) for i, t in cross] + self._intra_terms("text")
        if CONTRASTS[self.contrast].averages_terms:
            terms = [replace(t, weight=1 / len(terms)) for t in terms]
        terms = [replace(t, weight=t.weight * float(weights[t.kind])) for t in terms]
        return tuple(t for t in terms if t.weight)

    def resolved(self, settings: LossConfig) -> LossConfig:
        """Settings with the method's own values for empty ones."""
        temperature = self.default_temperature if settings.temperature is None else settings.temperature
        return replace(
            settings,
            temperature=float(temperature),
            temperature_mode=settings.temperature_mode or self.temperature,
            cyclic_weight=self.cyclic if settings.cyclic_weight is None else settings.cyclic_weight,
        )

    def _intra_terms(self, of: str) -> list[Term]:
        if of not in self.intra:
            return []
        a, b = of, f"{of}_aug"
        pools = ((a,), (b,)) if self.pool_negatives else ((), ())
        return [Term(a, b, also=pools[0]), Term(b, a, also=pools[1])]


BOTH = ("image", "text")

METHODS: Mapping[str, Method] = {
    "simclr": Method(
        "two views of each image against all other images of the batch (NT-Xent)",
        "batch", "none", intra=("image",), pool_negatives=True, default_temperature=0.1,
        source="Chen et al. 2020, arXiv 2002.05709, eq. 1",
    ),
    "clip": Method(
        "symmetric cross-entropy over the batch", "batch", "first",
        temperature="learnable", default_temperature=0.07, source="Radford et al. 2021, arXiv 2103.00020, figure 3",
    ),
    "cyclip": Method(
        "CLIP with cross- and in-modal cyclic consistency", "batch", "first", cyclic=0.25,
        temperature="learnable", default_temperature=0.07, source="Goel et al. 2022, arXiv 2205.14459, section 3",
    ),
    "siglip": Method(
        "pairwise sigmoid loss with a learnable bias", "sigmoid", "first",
        temperature="learnable", default_temperature=0.1, source="Zhai et al. 2023, arXiv 2303.15343, algorithm 1",
    ),
    "sogclr": Method(
        "global contrastive loss: 2 terms, a running denominator per sample", "global", "first",
        source="Yuan et al. 2022, arXiv 2202.12387, eq. 4 and algorithm 1",
    ),
    "isogclr": Method(
        "SogCLR with an individual temperature per sample", "global", "first",
        temperature="individual", source="Qiu et al. 2023, arXiv 2305.11965, algorithm 1",
    ),
    "amclr": Method(
        "all four image-text pairs of two views each: 8 terms", "global", "all", source="arXiv 2412.07979, AmCLR",
    ),
    "xamclr": Method(
        "AmCLR and each modality with its own augmentation: 12 terms", "global", "all", intra=BOTH,
        source="arXiv 2412.07979, xAmCLR",
    ),
    "xamclr-image": Method(
        "xAmCLR without its terms between texts: 10 terms", "global", "all", intra=("image",),
        source="this project, docs/method.md",
    ),
    "xamclr-text": Method(
        "xAmCLR without its terms between images: 10 terms", "global", "all", intra=("text",),
        source="this project, docs/method.md",
    ),
    "iamclr": Method(
        "AmCLR with individual temperatures", "global", "all", temperature="individual",
        source="named as future work in arXiv 2412.07979",
    ),
    "ixamclr": Method(
        "xAmCLR with individual temperatures", "global", "all", intra=BOTH, temperature="individual",
        source="named as future work in arXiv 2412.07979",
    ),
}  # fmt: skip
"""Every objective by name."""
