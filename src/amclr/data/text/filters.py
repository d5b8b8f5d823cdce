"""Filters: which candidates are paraphrases of a caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from amclr.data.text.wording import changed, words

MAX_CHARACTERS = 20_000

REASONS = {
    "unfinished": "cut off before its end",
    "garbled": "unreadable characters",
    "same": "the caption itself, or a paraphrase that is there already",
    "short": "too short",
    "long": "too long",
    "numbers": "other numbers",
    "colours": "other colours",
    "negation": "other negation",
    "sides": "other sides, left and right",
    "similarity": "too far from the caption's meaning",
}
"""Why a candidate is rejected, in the order in which the filters look."""


@dataclass(frozen=True)
class Filters:
    """What a candidate must meet to be a paraphrase of its caption."""

    shortest: float = 0.5
    """Words of a paraphrase, as a share of its caption's."""
    longest: float = 2.0
    """The same, from above; four words more than the caption are always allowed."""
    keep_facts: bool = True
    """Reject what changes numbers, colours, negation, or left and right."""

    def fault(self, caption: str, candidate: str) -> str | None:
        """Why a candidate is no paraphrase of the caption, one of `REASONS`; None if it may be one."""
        if "\ufffd" in candidate or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in candidate):
            return "garbled"
        had, has = words(caption[:MAX_CHARACTERS]), words(candidate[:MAX_CHARACTERS])
        if had == has:
            return "same"
        if not has or len(has) < self.shortest * len(had):
            return "short"
        if len(has) > max(self.longest * len(had), len(had) + 4) or len(candidate) > MAX_CHARACTERS:
            return "long"
        return changed(caption, candidate) if self.keep_facts else None


def choose(
    caption: str,
    candidates: Sequence[str | None],
    k: int,
    filters: Filters,
    similar: Callable[[str, str], bool] = lambda caption, candidate: True,
) -> tuple[list[str], Counter[str]]:
    """The first k candidates that pass the filters and differ from each other, and why others were rejected.

    A candidate that is None was cut off before its end. similar: whether a candidate means what its
    caption means, of (caption, candidate). Candidates after the k-th that passes are not looked at.
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
