"""Statistics of captions: how long they are, in words and tokens, and how often each word occurs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from amclr.config.schema import Config
from amclr.data import manifest as manifests
from amclr.models.tokenizer import build_tokenizer
from amclr.utils import figures
from amclr.utils.errors import UserError

TOKENIZED = 100_000
"""The most captions that are tokenized."""


@dataclass(frozen=True)
class CaptionStatistics:
    """Lengths of captions, and the frequencies of their words."""

    words: np.ndarray
    """Words of each caption, (T,)."""
    tokens: np.ndarray | None
    """Tokens of each caption, or of an evenly spaced subset, before truncation; None without the text tower."""
    occurrences: np.ndarray
    """How often each word occurs, most frequent first."""

    @classmethod
    def of(cls, config: Config, captions: Sequence[str]) -> CaptionStatistics:
        """The statistics of captions, with the tokenizer of a configuration."""
        words = Counter(w for c in captions for w in re.findall(r"\w+", c.lower()))
        return cls(
            np.array([len(c.split()) for c in captions]),
            _token_counts(config, captions),
            np.array(sorted(words.values(), reverse=True) or [0]),
        )

    def lines(self, config: Config) -> list[str]:
        """The statistics as text."""
        counts = self.occurrences
        half = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 1
        lines = [
            f"words        {np.count_nonzero(counts)}; {self.words.min()} to {self.words.max()} per caption, median "
            f"{np.median(self.words):.0f}; {np.mean(counts == 1):.0%} of them occur once, the {half} most frequent are "
            "half of all"
        ]
        if self.tokens is not None:
            limit, truncated = config.model.max_tokens, np.mean(self.tokens > config.model.max_tokens)
            share = f"{truncated:.1%} are" if truncated else "none is"
            lines.append(
                f"tokens       {self.tokens.min()} to {self.tokens.max()} per caption, median "
                f"{np.median(self.tokens):.0f}, for the text tower '{config.model.text_tower}'; {share} cut at "
                f"--model.max_tokens {limit}"
            )
        return lines

    def draw(self, config: Config, file: Path) -> None:
        """Draw the distributions of lengths and words."""
        figures.caption_statistics(
            self.words, self.tokens, config.model.max_tokens, self.occurrences, file, manifests.label(config.data)
        )


def _token_counts(config: Config, captions: Sequence[str]) -> np.ndarray | None:
    subset = captions[:: -(-len(captions) // TOKENIZED) or 1]
    try:
        tokenizer = build_tokenizer(config.model, subset)
    except UserError:
        return None
    return np.array([len(row) for row in tokenizer(list(subset), verbose=False)["input_ids"]])
