"""Near-duplicate images and identical captions: found by hashes, joined into groups, and reported.

A group is a number that its members share; -1 marks an item without duplicates.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from amclr.utils.randomness import mixed

SIDE, COARSE = 32, 8
"""Sides in pixels at which an image is hashed: for the cosine transform, and for the patches."""
LUMA_BITS, CHROMA_BITS = 128, 32
SIGNS = (LUMA_BITS + 2 * CHROMA_BITS) // 8
LEVEL_BITS = 5
HASH_BYTES = SIGNS + 3 * COARSE**2 * LEVEL_BITS // 8
DISTANCE, LEVELS = 24, 3
"""Near-duplicates differ in at most this many of 192 signs, and in each patch by at most this many steps."""
STEPS, COLOUR = 4.0, 1.5
"""Steps of a patch per standard deviation of luma; weight of chroma."""
FAINT = 1.0
"""Smaller coefficients count as zero; otherwise the signs of a blank image would be rounding errors."""
FLAT = 4.0
"""Added to the standard deviation, in grey levels, so that noise in a flat image is not amplified."""
INDEXED = (0, 1, 2, 3, 4, 5, 16, 17, 20, 21)
"""Bytes that form the search keys: the lowest frequencies of luma and both chromas, which change least."""
NEXT = 64
"""An image is compared with at most this many others that share a key with it."""
FULL_STOPS = " .!?,;:…。！？"
YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def image_hash(image: Tensor) -> bytes:
    """The perceptual hash of an image: 144 bytes that change little when it is re-encoded or brightened.

    image: uint8 (3, H, W) of any size. The first 24 bytes are the signs of the lowest frequencies of a cosine
    transform, 128 of luma and 32 of each chroma: Zauner 2010, "Implementation and Benchmarking of Perceptual Image
    Hash Functions", section 3.2.1, with colour and without its median. The others are 8 x 8 patches of luma and
    both chromas at 5 bits each, in units of the contrast: they tell apart images of small objects on the same
    background, whose signs are often equal.
    """
    ycc = torch.tensordot(torch.tensor(YCC), F.adaptive_avg_pool2d(image.float(), SIDE), 1)
    cosines, order = _transform()
    luma, *chroma = ((cosines @ ycc @ cosines.T).flatten(1)[:, order] > FAINT).numpy()
    patches = F.avg_pool2d(ycc, SIDE // COARSE).flatten(1)
    patches[0] -= patches[0].mean()
    scale = torch.tensor([[1.0], [COLOUR], [COLOUR]]) * STEPS / (patches[0].square().mean().sqrt() + FLAT)
    top = 1 << (LEVEL_BITS - 1)
    levels = ((patches * scale).round().clamp(-top, top - 1) + top).byte().flatten().numpy()
    bits = np.unpackbits(levels[:, None], axis=1)[:, -LEVEL_BITS:]
    return np.packbits(np.concatenate([luma, *(c[:CHROMA_BITS] for c in chroma), bits.ravel()])).tobytes()


@cache
def _transform() -> tuple[Tensor, Tensor]:
    """Cosines (K, SIDE) of an orthonormal transform, and indices of the (K, K) coefficients used, coarsest first."""
    k = 16
    cosines = np.cos(np.pi / SIDE * np.outer(np.arange(k), np.arange(SIDE) + 0.5)) * np.sqrt(2 / SIDE)
    down, across = np.indices((k, k))
    order = np.lexsort((down.ravel(), (down + across).ravel()))[1 : LUMA_BITS + 1]  # not the mean
    return torch.from_numpy(cosines).float(), torch.from_numpy(order)


def as_rows(hashes: Iterable[bytes]) -> np.ndarray:
    """Hashes as an array (N, 144) uint8."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)


def near_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Groups (N,) int64 of images from their hashes (N, 144) uint8: the smallest index in the group, or -1.

    Two images are near-duplicates if their hashes differ in at most `DISTANCE` signs, and by at most `LEVELS` in
    every patch; groups are the transitive closure. Only images that agree in three whole bytes of `INDEXED` are
    compared (as in Manku et al. 2007, "Detecting near-duplicates for web crawling"): each of the 120 choices of
    three bytes sorts the images by a key of 24 bits. This takes O(N log N) time and O(N) memory, and misses few
    pairs: some of those that differ in more than 7 of the indexed signs.
    """
    first, set_of_row = _distinct(hashes)
    unique = hashes[first]
    signs = unique[:, :SIGNS].copy().view(np.uint16)
    label = np.arange(len(unique))
    places = np.arange(len(unique), dtype=np.uint64)
    for chosen in combinations(INDEXED, 3):
        key = np.zeros(len(unique), dtype=np.uint64)
        for byte in chosen:
            key = key << np.uint64(8) | unique[:, byte]
        ordered = np.sort(key << np.uint64(40) | places)
        key, order = ordered >> np.uint64(40), (ordered & np.uint64(2**40 - 1)).astype(np.int64)
        here = np.arange(len(unique))
        for ahead in range(1, NEXT + 1):
            here = here[: np.searchsorted(here, len(unique) - ahead)]
            here = here[key[here] == key[here + ahead]]
            if not len(here):
                break
            one, other = order[here], order[here + ahead]
            apart = label[one] != label[other]
            one, other = one[apart], other[apart]
            near = _near(unique, signs, one, other)
            label = joined(label, one[near], other[near])
    return alone_unnumbered(first[label][set_of_row])


def image_groups(hashes: Sequence[bytes | None]) -> np.ndarray:
    """Groups (N,) of images as in `near_duplicates`; -1 where the hash is None."""
    known = np.array([k for k, h in enumerate(hashes) if h is not None], dtype=np.int64)
    groups = np.full(len(hashes), -1, dtype=np.int64)
    among_known = near_duplicates(as_rows(h for h in hashes if h is not None))
    grouped = among_known >= 0
    groups[known[grouped]] = known[among_known[grouped]]
    return groups


def _distinct(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of the first row of each set of equal rows, and for each row which set it is in."""
    words = np.ascontiguousarray(hashes).view(np.uint64)
    factors = mixed(np.arange(words.shape[1]), "columns") | np.uint64(1)
    order = np.argsort((words * factors).sum(1, dtype=np.uint64), kind="stable")
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    set_of_row = np.empty(len(order), dtype=np.int64)
    set_of_row[order] = np.cumsum(starts) - 1
    return order[starts], set_of_row


def _near(hashes: np.ndarray, signs: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether each pair of rows is a pair of near-duplicates, bool; computed in chunks."""
    result = np.zeros(len(one), dtype=bool)
    for start in range(0, len(one), 1 << 16):
        a, b = one[start : start + (1 << 16)], other[start : start + (1 << 16)]
        near = np.flatnonzero(_bit_counts()[signs[a] ^ signs[b]].sum(1, dtype=np.int64) <= DISTANCE)
        apart = np.abs(_levels(hashes[a[near]]) - _levels(hashes[b[near]])).max(1, initial=0)
        result[start + near[apart <= LEVELS]] = True
    return result


def _levels(hashes: np.ndarray) -> np.ndarray:
    """The patches of some hashes, (n, 192) int8."""
    bits = np.unpackbits(hashes[:, SIGNS:], axis=1).reshape(len(hashes), 3 * COARSE**2, LEVEL_BITS)
    return (bits @ (1 << np.arange(LEVEL_BITS, dtype=np.uint8)[::-1])).astype(np.int8)


@cache
def _bit_counts() -> np.ndarray:
    """The number of set bits of every 16-bit number."""
    return np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)


def joined(label: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Labels with the sets of each pair merged under the lower label; `label[label] == label` before and after."""
    while len(one):
        a, b = label[one], label[other]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(further := label[label], label):
            label = further
        apart = label[one] != label[other]
        one, other = one[apart], other[apart]
    return label


def alone_unnumbered(groups: np.ndarray) -> np.ndarray:
    """Renumber groups by the smallest index of their members, with -1 for groups of one."""
    _, first, which, size = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    return np.where(size > 1, first, -1)[which]


def normalised(caption: str) -> str:
    """A caption without differences of case, white space, letter width and final punctuation."""
    text = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return text.rstrip(FULL_STOPS) or text


def caption_groups(captions: Sequence[str]) -> np.ndarray:
    """Groups (T,) int64 of captions that are equal once normalised: the index of the first of them, or -1."""
    first: dict[str, int] = {}
    groups = np.array([first.setdefault(normalised(c), k) for k, c in enumerate(captions)], dtype=np.int64)
    return alone_unnumbered(groups)


@dataclass(frozen=True)
class Duplicates:
    """The duplicates in a data set.

    images: groups (N,) of the samples' images, or None if their hashes are not known.
    captions: the group of each caption that several samples share, up to `normalised`.
    """

    images: np.ndarray | None = None
    captions: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def find(cls, texts: Sequence[Sequence[str]], hashes: Sequence[bytes | None] | None) -> Duplicates:
        """The duplicates among N samples. texts: captions of each. hashes: perceptual hashes, None where not known."""
        all_texts = [t for captions in texts for t in captions]
        sample = np.repeat(np.arange(len(texts)), [len(captions) for captions in texts])
        group = caption_groups(all_texts)
        in_another_sample = (group >= 0) & (sample[group] != sample)
        shared = set(group[in_another_sample].tolist())
        group_of = {t: g for t, g in zip(all_texts, group.tolist(), strict=True) if g in shared}
        return cls(None if hashes is None else image_groups(hashes), group_of)

    def groups(self, rows: Sequence[int] | np.ndarray, texts: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """The groups of a batch by view, as an objective takes them, for samples `rows` (B,) and their drawn texts."""
        groups: dict[str, Tensor] = {}
        if self.captions:
            groups = {view: torch.tensor([self.captions.get(t, -1) for t in drawn]) for view, drawn in texts.items()}
        if self.images is not None:
            groups["image"] = torch.from_numpy(self.images[np.asarray(rows)])
        return groups


def largest(groups: np.ndarray) -> list[np.ndarray]:
    """The members of each group, the largest group first."""
    order = np.argsort(groups, kind="stable")[np.count_nonzero(groups < 0) :]
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []
    return sorted(members, key=len, reverse=True)


def report(
    images: np.ndarray | None,
    names: Sequence[str],
    captions: Sequence[Sequence[str]],
    splits: Mapping[str, Iterable[str]],
) -> list[str]:
    """Lines on the duplicates in a data set: near-duplicate images, leakage between splits, repeated captions.

    images: groups (N,) or None if not known. names, captions: of the N samples. splits: names by split.
    """
    return [*([] if images is None else _report_images(images, names, splits)), _report_captions(captions)]


def _report_images(images: np.ndarray, names: Sequence[str], splits: Mapping[str, Iterable[str]]) -> list[str]:
    sets = largest(images)
    count = f"{len(sets)} group{'s' * (len(sets) != 1)}"
    lines = [f"look-alikes  {sum(map(len, sets))} images in {count} look the same"]
    if sets:
        examples = ", ".join(names[i] for i in sets[0][:3])
        lines[0] += f"; the largest is of {len(sets[0])}: {examples}{', ...' if len(sets[0]) > 3 else ''}"
    within = {split: np.isin(np.array(names), list(in_split)) for split, in_split in splits.items()}
    for one, other in combinations(within, 2):
        leaks = [
            (i, j) for rows in sets for i in rows[within[other][rows]] for j in rows[within[one][rows]][:1] if i != j
        ]
        if leaks:
            i, j = leaks[0]
            lines.append(f"leakage      {len(leaks)} images of {other} look like one of {one}, "
                         f"such as {names[i]} and {names[j]}")  # fmt: skip
    return lines


def _report_captions(captions: Sequence[Sequence[str]]) -> str:
    images_with = Counter(text for texts in captions for text in {normalised(c) for c in texts})
    shared = {text: count for text, count in images_with.items() if count > 1}
    repeated = sum(normalised(c) in shared for texts in captions for c in texts)
    line = f"repeated     {repeated} captions, {len(shared)} different ones, occur with several images"
    if shared:
        text, most = max(shared.items(), key=lambda item: item[1])
        line += f", such as '{text[:60]}' with {most}"
    return line
