"""Views of captions: the texts drawn at each visit of a sample, a function of (seed, epoch, sample, view)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from amclr.config.schema import Config
from amclr.data.text.rules import synonyms
from amclr.utils.randomness import Key, generator

Words = Callable[[int], str]
"""Caption index -> word noise for that caption, if it was computed in advance."""


@dataclass(frozen=True)
class TextPolicy:
    """How a caption and its second view are drawn from a sample's captions and their paraphrases.

    The second view is another caption of the image, a paraphrase of the drawn caption, or the drawn caption with
    word noise. The kind is drawn from those available, in proportion to their weights. If all weights are 0, it is
    the first available one in this order: human captions add more than rewordings do (docs/results.md).
    """

    one: bool = False
    """Always draw the first caption as the first view; the others serve only as second views."""
    noise: float = 0.1
    """Probability per word of a deletion or a swap."""
    synonyms: float = 0.0
    """Probability per word of a synonym, if the lexicon has one."""
    paraphrases: float = 0.0
    other_captions: float = 0.0
    words: float = 0.0

    @classmethod
    def of(cls, config: Config) -> TextPolicy:
        """The policy of a run's settings."""
        v = config.views
        return cls(
            config.source.captions == "one", v.word_noise, v.word_synonyms, v.paraphrases, v.other_captions, v.words
        )

    def draw(
        self, captions: Sequence[str], paraphrases: Sequence[Sequence[str]], *key: Key, words: Words | None = None
    ) -> tuple[int, str, str]:
        """Draw a caption and its second view: the caption's index, its text, and the second text.

        words: gives the text for word noise; None draws it here.
        """
        draw = generator(*key)
        index = 0 if self.one else int(draw.integers(len(captions)))
        kinds = self._kinds(captions, paraphrases, index)
        if len(kinds) == 1:
            ((options, _),) = kinds
        else:
            shares = np.cumsum([weight for _, weight in kinds])
            options, _ = kinds[int(np.searchsorted(shares, float(draw.random()) * shares[-1], side="right"))]
        if options:
            second = options[int(draw.integers(len(options)))]
        else:
            second = words(index) if words else noisy_words(captions[index], self.noise, draw, self.synonyms)
        return index, captions[index], second

    def seconds(self, captions: Sequence[str], paraphrases: Sequence[Sequence[str]]) -> Iterator[str]:
        """The captions and paraphrases that may become second views, possibly repeated."""
        for index in self._first(captions):
            for options, _ in self._kinds(captions, paraphrases, index):
                yield from options

    def noisy(self, captions: Sequence[str], paraphrases: Sequence[Sequence[str]]) -> list[int]:
        """Indices of the captions whose second view may be word noise."""
        first = self._first(captions)
        return [i for i in first if any(not options for options, _ in self._kinds(captions, paraphrases, i))]

    def _first(self, captions: Sequence[str]) -> range:
        """Indices of the captions that may be drawn as the first view."""
        return range(1 if self.one else len(captions))

    def _kinds(
        self, captions: Sequence[str], paraphrases: Sequence[Sequence[str]], index: int
    ) -> list[tuple[Sequence[str], float]]:
        """The options for the second view, with their weights. No texts means word noise."""
        rewordings = paraphrases[index] if index < len(paraphrases) else ()
        other_captions = [c for k, c in enumerate(captions) if k != index]
        options = [(other_captions, self.other_captions), (rewordings, self.paraphrases)]
        kinds: list[tuple[Sequence[str], float]] = [(texts, weight) for texts, weight in options if texts]
        kinds.append(((), self.words))
        weighted = [k for k in kinds if k[1] > 0]
        return weighted or kinds[:1]


def noisy_words(text: str, chance: float, draw: np.random.Generator, synonym: float = 0.0) -> str:
    """Word-level noise: each word is dropped, or swapped with the next one, with a total probability of `chance`.

    synonym: probability that a word is replaced by a synonym, if the lexicon has one.
    """
    words = text.split()
    out: list[str] = []
    k = 0
    while k < len(words):
        u = float(draw.random())
        if u < chance / 2 and len(words) > 2:
            pass
        elif u < chance and k + 1 < len(words):
            out += [words[k + 1], words[k]]
            k += 1
        elif chance <= u < chance + synonym and (options := synonyms(words[k])):
            out.append(options[int(draw.integers(len(options)))])
        else:
            out.append(words[k])
        k += 1
    return " ".join(out) or text
