"""Filters that decide which candidates are paraphrases of a caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amclr.data.text.wording import changed, words

MAX_CHARACTERS = 20_000

REASONS = {
    "unfinished": "cut off before its end",
    "garbled": "unreadable characters",
    "same": "the caption itself, or a paraphrase that was kept already",
    "short": "too short",
    "long": "too long",
    "numbers": "different numbers",
    "colours": "different colours",
    "negation": "different negation",
    "sides": "left and right differ",
    "similarity": "too far from the caption's meaning",
}
"""Why a candidate is rejected, in the order of the checks."""


@dataclass(frozen=True)
class Filters:
    """The conditions that a candidate must meet to be a paraphrase of its caption."""

    shortest: float = 0.5
    """Minimum number of words, relative to the caption."""
    longest: float = 2.0
    """Maximum number of words, relative to the caption; four more words than the caption are always allowed."""
    keep_facts: bool = True
    """Reject candidates that change numbers, colours, negation, or left and right."""

    def fault(self, caption: str, candidate: str) -> str | None:
        """The key in `REASONS` of why a candidate is rejected; None if it passes."""
        if "\ufffd" in candidate or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in candidate):
            return "garbled"
        before, after = words(caption[:MAX_CHARACTERS]), words(candidate[:MAX_CHARACTERS])
        if before == after:
            return "same"
        if not after or len(after) < self.shortest * len(before):
            return "short"
        if len(after) > max(self.longest * len(before), len(before) + 4) or len(candidate) > MAX_CHARACTERS:
            return "long"
        return changed(caption, candidate) if self.keep_facts else None


def choose(
    caption: str,
    candidates: Sequence[str | None],
    k: int,
    filters: Filters,
    similar: Callable[[str, str], bool] = lambda caption, candidate: True,
) -> tuple[list[str], Counter[str]]:
    """The first k candidates that pass the filters and differ from each other, and counts of rejects by reason.

    A candidate of None was cut off before its end. similar: (caption, candidate) -> whether both mean the same.
    Candidates after the k-th that passes are not examined.
    """
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    rejected: Counter[str] = Counter()
    for candidate in candidates:
        if len(kept) == k:
            break
        text = " ".join((candidate or "").split())
        reason = "unfinished" if candidate is None else filters.fault(caption, text)
        if reason is None and tuple(words(text)) in seen:
            reason = "same"
        if reason is None and not similar(caption, text):
            reason = "similarity"
        if reason:
            rejected[reason] += 1
            continue
        seen.add(tuple(words(text)))
        kept.append(text)
    return kept, rejected
