"""Randomness as a function of what is drawn, never of what was drawn before.

Sample order, views and dropout are each seeded from a key such as (seed, epoch, sample, view).
So a run resumes at step k by starting at step k, with any number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Key = int | str


def derive(*key: Key) -> int:
    """A 63-bit seed from a key: stable across processes, machines and Python versions."""
    # A file name that is no UTF-8 comes from the system with lone surrogates in it: a key like any other.
    text = "/".join(map(str, key)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: Key) -> np.random.Generator:
    """A NumPy generator for a key."""
    return np.random.default_rng(derive(*key))


def mixed(ids: np.ndarray, *key: Key) -> np.ndarray:
    """A hash of each of many ids (int64) under a key: uint64, as if drawn at random for each.

    splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), with
    the key as its starting state.
    """
    z = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(derive(*key))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(ids: np.ndarray, count: int, *key: Key) -> np.ndarray:
    """`count` uniform numbers in [0, 1) for each of many ids under a key: (B, count) float64.

    What an id draws does not depend on which others are asked with it.
    """
    state = mixed(ids, *key)[:, None] + np.arange(count, dtype=np.uint64)
    return (mixed(state, "uniforms") >> np.uint64(11)) * 2.0**-53


@contextmanager
def torch_seeded(*key: Key) -> Iterator[None]:
    """Run a block with torch's CPU generator seeded from a key, and put it back afterwards.

    For code such as torchvision's transforms that draws from the global generator alone.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(derive(*key))
    try:
        yield
    finally:
        torch.set_rng_state(state)
