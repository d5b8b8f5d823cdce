"""Near-duplicate images and identical captions: found by hashes, joined into groups, reported.

A group is a number that its members share; -1 stands for what is like nothing else.
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
"""An image is hashed at these sizes: its waves, and its patches."""
LUMA_BITS, CHROMA_BITS = 128, 32
SIGNS = (LUMA_BITS + 2 * CHROMA_BITS) // 8
LEVEL_BITS = 5
HASH_BYTES = SIGNS + 3 * COARSE**2 * LEVEL_BITS // 8
DISTANCE, LEVELS = 24, 3
"""Of 192 signs, so many may differ between near-duplicates, and by so many steps each patch."""
STEPS, COLOUR = 4.0, 1.5
"""Steps of a patch per standard deviation of luma; weight of its colour."""
FAINT = 1.0
"""Waves below this are nothing: else the signs of a blank image would be rounding errors."""
FLAT = 4.0
"""Added to the standard deviation, in grey levels, so that noise is not stretched to an image."""
INDEXED = (0, 1, 2, 3, 4, 5, 16, 17, 20, 21)
"""Bytes that make the keys of the search: the coarsest of luma and of both chromas, which change least."""
NEXT = 64
"""An image is compared with so many that share a key with it. Only in crowds are there more."""
FULL_STOPS = " .!?,;:…。！？"
YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def image_hash(image: Tensor) -> bytes:
    """A hash of what an image looks like: 144 bytes that change little when it is saved anew or made brighter.

    image: uint8 (3, H, W). The first 24 bytes are the signs of the lowest frequencies of a cosine transform, 128
    of luma and 32 of each chroma, whatever the size and proportions: Zauner 2010, "Implementation and
    Benchmarking of Perceptual Image Hash Functions", section 3.2.1, without its median, and with colour. The others
    are 8 x 8 patches of luma and both chromas in 5 bits each, in units of the contrast: of images on one
    background, the signs are often the same whatever small thing is before it.
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
    """Cosines (K, SIDE) of an orthonormal transform, and which of its (K, K) coefficients count, coarsest first."""
    k = 16
    cosines = np.cos(np.pi / SIDE * np.outer(np.arange(k), np.arange(SIDE) + 0.5)) * np.sqrt(2 / SIDE)
    down, across = np.indices((k, k))
    order = np.lexsort((down.ravel(), (down + across).ravel()))[1 : LUMA_BITS + 1]  # not the mean
    return torch.from_numpy(cosines).float(), torch.from_numpy(order)


def as_rows(hashes: Iterable[bytes]) -> np.ndarray:
    """Hashes as an array (N, 144) uint8."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, HASH_BYTES)


def near_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Groups (N,) int64 of images by their hashes (N, 144) uint8: the least index of the group's members, or -1.

    Two images whose hashes differ in at most `DISTANCE` signs, and by at most `LEVELS` in every patch, are of a
    group, and so are those that each is in a group with. Only images that agree in three whole bytes of
    `INDEXED` are compared (as in Manku et al. 2007, "Detecting near-duplicates for web crawling"): each of the 120
    choices of three sorts the images by a key of 24 bits. So it takes O(N log N) time and O(N) memory, and
    misses few pairs: some of those that differ in more than 7 of the indexed signs.
    """
    first, every = _collapsed(hashes)
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
            near = _alike(unique, signs, one, other)
            label = joined(label, one[near], other[near])
    return alone_unnumbered(first[label][every])


def image_groups(hashes: Sequence[bytes | None]) -> np.ndarray:
    """Groups (N,) of images as by `near_duplicates`, -1 where a hash is not known."""
    known = np.array([k for k, h in enumerate(hashes) if h is not None], dtype=np.int64)
    groups = np.full(len(hashes), -1, dtype=np.int64)
    found = near_duplicates(as_rows(h for h in hashes if h is not None))
    groups[known[found >= 0]] = known[found[found >= 0]]
    return groups


def _collapsed(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first of each set of equal rows, and which of those each row is."""
    words = np.ascontiguousarray(hashes).view(np.uint64)
    factors = mixed(np.arange(words.shape[1]), "columns") | np.uint64(1)
    order = np.argsort((words * factors).sum(1, dtype=np.uint64), kind="stable")
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    every = np.empty(len(order), dtype=np.int64)
    every[order] = np.cumsum(starts) - 1
    return order[starts], every


def _alike(hashes: np.ndarray, signs: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the images of each pair of rows are near-duplicates, bool; some pairs at a time."""
    found = np.zeros(len(one), dtype=bool)
    for start in range(0, len(one), 1 << 16):
        a, b = one[start : start + (1 << 16)], other[start : start + (1 << 16)]
        near = np.flatnonzero(_ones()[signs[a] ^ signs[b]].sum(1, dtype=np.int64) <= DISTANCE)
        apart = np.abs(_levels(hashes[a[near]]) - _levels(hashes[b[near]])).max(1, initial=0)
        found[start + near[apart <= LEVELS]] = True
    return found


def _levels(hashes: np.ndarray) -> np.ndarray:
    """The patches of some hashes, (n, 192) int8."""
    bits = np.unpackbits(hashes[:, SIGNS:], axis=1).reshape(len(hashes), 3 * COARSE**2, LEVEL_BITS)
    return (bits @ (1 << np.arange(LEVEL_BITS, dtype=np.uint8)[::-1])).astype(np.int8)


@cache
def _ones() -> np.ndarray:
    """How many bits are set in each number of 16 bits."""
    return np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8)).reshape(-1, 16).sum(1, dtype=np.uint8)


def joined(label: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Labels with the sets of each pair joined under the lower of their labels; `label[label] == label` throughout."""
    while len(one):
        a, b = label[one], label[other]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(further := label[label], label):
            label = further
        apart = label[one] != label[other]
        one, other = one[apart], other[apart]
    return label


def alone_unnumbered(groups: np.ndarray) -> np.ndarray:
    """Groups with the least index of their members as their number, and -1 for those of one."""
    _, first, which, size = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    return np.where(size > 1, first, -1)[which]


def normalised(caption: str) -> str:
    """A caption without what does not change its meaning: case, white space, width of letters, final punctuation."""
    text = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return text.rstrip(FULL_STOPS) or text


def caption_groups(captions: Sequence[str]) -> np.ndarray:
    """Groups (T,) int64 of captions that are the same once normalised: the index of the first of them, or -1."""
    first: dict[str, int] = {}
    found = np.array([first.setdefault(normalised(c), k) for k, c in enumerate(captions)], dtype=np.int64)
    return alone_unnumbered(found)


@dataclass(frozen=True)
class Duplicates:
    """What stands more than once in a data set.

    images: groups (N,) of the samples' images, or None where their hashes are not known.
    captions: the group of each caption that stands, but for `normalised`, under several samples.
    """

    images: np.ndarray | None = None
    captions: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def find(cls, texts: Sequence[Sequence[str]], hashes: Sequence[bytes | None] | None) -> Duplicates:
        """Among N samples: texts, the captions of each, and hashes, of their images, as far as they are known."""
        every = [t for own in texts for t in own]
        sample = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
        group = caption_groups(every)
        elsewhere = (group >= 0) & (sample[group] != sample)
        shared = set(group[elsewhere].tolist())
        captions = {t: g for t, g in zip(every, group.tolist(), strict=True) if g in shared}
        return cls(None if hashes is None else image_groups(hashes), captions)

    def groups(self, rows: Sequence[int] | np.ndarray, texts: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
        """The groups of a batch by view, as an objective takes them: of the samples `rows` (B,) and of drawn texts."""
        found: dict[str, Tensor] = {}
        if self.captions:
            found = {view: torch.tensor([self.captions.get(t, -1) for t in drawn]) for view, drawn in texts.items()}
        if self.images is not None:
            found["image"] = torch.from_numpy(self.images[np.asarray(rows)])
        return found


def largest(groups: np.ndarray) -> list[np.ndarray]:
    """The members of each group, the largest group first."""
    order = np.argsort(groups, kind="stable")[np.count_nonzero(groups < 0) :]
    found = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1) if len(order) else []
    return sorted(found, key=len, reverse=True)


def report(
    images: np.ndarray | None,
    names: Sequence[str],
    captions: Sequence[Sequence[str]],
    splits: Mapping[str, Iterable[str]],
) -> list[str]:
    """What stands more than once in a data set, a line each: near-duplicate images, also across splits; captions.

    images: groups (N,), None where they are not known; names and captions of the N samples; names by split.
    """
    return [*([] if images is None else _report_images(images, names, splits)), _report_captions(captions)]


def _report_images(images: np.ndarray, names: Sequence[str], splits: Mapping[str, Iterable[str]]) -> list[str]:
    sets = largest(images)
    count = f"{len(sets)} group{'s' * (len(sets) != 1)}"
    lines = [f"look-alikes  {sum(map(len, sets))} images in {count} look the same"]
    if sets:
        some = ", ".join(names[i] for i in sets[0][:3])
        lines[0] += f"; the largest is of {len(sets[0])}: {some}{', ...' if len(sets[0]) > 3 else ''}"
    within = {split: np.isin(np.array(names), list(own)) for split, own in splits.items()}
    for one, other in combinations(within, 2):
        leaks = [(i, j) for own in sets for i in own[within[other][own]] for j in own[within[one][own]][:1] if i != j]
        if leaks:
            i, j = leaks[0]
            lines.append(f"leakage      {len(leaks)} images of {other} look like one of {one}, "
                         f"such as {names[i]} and {names[j]}")  # fmt: skip
    return lines


def _report_captions(captions: Sequence[Sequence[str]]) -> str:
    stands = Counter(text for own in captions for text in {normalised(c) for c in own})
    shared = {text: count for text, count in stands.items() if count > 1}
    those = sum(normalised(c) in shared for own in captions for c in own)
    line = f"repeated     {those} captions, {len(shared)} different ones, stand under several images"
    if shared:
        text, most = max(shared.items(), key=lambda item: item[1])
        line += f", such as '{text[:60]}' under {most}"
    return line
