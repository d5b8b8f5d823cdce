"""English wording: the facts that no paraphrase of a caption may change.

`changed` names what two texts disagree on: numbers, colours, negation, left and right. It only compares words, so
it is fast and errs towards finding a change.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits; hyphenated words are split."""
    joined = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.casefold().replace("’", "'"))
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", joined)


def split_words(text: str) -> list[str]:
    """The words of a literal list that is written as one string."""
    return text.split()


UNIT_WORDS = split_words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
UNITS = {w: n for n, w in enumerate(UNIT_WORDS)}
_TENS = {w: 10 * n for n, w in enumerate(split_words("twenty thirty forty fifty sixty seventy eighty ninety"), 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000}
_ORDINALS = split_words("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")
_ORDINAL_OF = {w: f"{n}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(n, 'th') }" for n, w in enumerate(_ORDINALS, 1)}
_PAIRS = frozenset({"couple", "pair", "both", "twins"})

_SHADES = {
    "grey": "gray", "silver": "gray", "blonde": "blond", "crimson": "red", "scarlet": "red", "maroon": "red",
    "burgundy": "red", "navy": "blue", "azure": "blue", "turquoise": "blue", "teal": "blue", "cyan": "blue",
    "lime": "green", "olive": "green", "emerald": "green", "violet": "purple", "lavender": "purple",
    "lilac": "purple", "magenta": "pink", "fuchsia": "pink", "golden": "gold", "gold": "yellow", "tan": "brown",
    "beige": "brown", "khaki": "brown",
}  # fmt: skip
COLOURS = frozenset({*split_words("red green blue yellow purple orange white black pink brown gray blond"), *_SHADES})
_SPELLINGS = {"grey": "gray", "blonde": "blond", "golden": "gold"}

_NOT = frozenset(split_words("no not never without none nobody nothing nowhere neither nor cannot"))
_NOT_LESS = frozenset(split_words("unless regardless nevertheless nonetheless countless bless less"))
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot"}


def changed(caption: str, paraphrase: str) -> str | None:
    """What a paraphrase changes in its caption: `numbers`, `colours`, `negation`, `sides`, or None.

    Numbers may be words or digits, and two may be a couple. A shade may become its colour (crimson: red), which
    stays true, but no colour may become a shade. Numbers and colours must stay with their nouns, and so must
    negation.
    """
    one, other = words(caption), words(paraphrase)
    if not _same_numbers(one, other) or _crossed(_counted(one), _counted(other)):
        return "numbers"
    if not _same_colours(one, other) or _crossed(_coloured(one), _coloured(other)):
        return "colours"
    if not _same_negation(one, other):
        return "negation"
    if {"left", "right"} & set(one) != {"left", "right"} & set(other):
        return "sides"
    return None


def _same_numbers(one: list[str], other: list[str]) -> bool:
    """One is ignored, as it is also an article and a pronoun. A couple may stand for two, or for a couple."""
    numbers = [Counter(str(n) for _, n in _numbers(w) if n not in (1, "1")) for w in (one, other)]
    pairs = [Counter({"2": sum(w in _PAIRS for w in text)}) for text in (one, other)]
    return numbers[0] <= numbers[1] + pairs[1] and numbers[1] <= numbers[0] + pairs[0]


def _numbers(tokens: list[str]) -> Iterator[tuple[int, int | str]]:
    """The numbers of a text, and ordinals as '2nd', each with the index of its last word."""
    k = 0
    while k < len(tokens):
        word = tokens[k]
        value: int | str | None = UNITS.get(word, _TENS.get(word))
        if word.isdecimal():
            value = int(word[:30])
        elif word == "dozen":
            value = 12
        elif word in _ORDINAL_OF or re.fullmatch(r"\d+(?:st|nd|rd|th)", word):
            value = _ORDINAL_OF.get(word, word)
        if isinstance(value, int):
            if word in _TENS and k + 1 < len(tokens) and 0 < UNITS.get(tokens[k + 1], 0) < 10:
                k += 1
                value += UNITS[tokens[k]]
            while k + 1 < len(tokens) and tokens[k + 1] in _SCALES:
                k += 1
                value *= _SCALES[tokens[k]]
        if value is not None:
            yield k, value
        k += 1


def _same_colours(one: list[str], other: list[str]) -> bool:
    before, after = ({_SPELLINGS.get(w, w) for w in text if w in COLOURS} for text in (one, other))
    bases = {_base(c) for c in before}
    return after <= before | bases and all(c in after or _base(c) in after for c in before)


def _base(colour: str) -> str:
    while colour in _SHADES:
        colour = _SHADES[colour]
    return colour


Bound = dict[str, set[str]]
"""Nouns, each with the numbers or colours right before it."""


def _counted(tokens: list[str]) -> Bound:
    places = {k: str(n) for k, n in _numbers(tokens)} | {k: "1" for k, w in enumerate(tokens) if w in ("a", "an")}
    return _bound(tokens, places)


def _coloured(tokens: list[str]) -> Bound:
    return _bound(tokens, {k: _base(w) for k, w in enumerate(tokens) if w in COLOURS})


def _bound(tokens: list[str], places: dict[int, str]) -> Bound:
    bound: Bound = {}
    waiting: set[str] = set()
    for k, word in enumerate(tokens):
        if k in places:
            waiting.add(places[k])
        elif waiting and word not in ("and", "or"):  # "a black and white dog" binds both
            bound.setdefault(_stem(word), set()).update(waiting)
            waiting.clear()
    return bound


def _crossed(one: Bound, other: Bound) -> bool:
    """Whether a noun has different numbers or colours in the two texts, such as a red ball and a blue ball."""
    return any(one[noun].isdisjoint(other[noun]) for noun in one.keys() & other.keys())


def _stem(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _same_negation(one: list[str], other: list[str]) -> bool:
    heads = [_negated(one), _negated(other)]
    if (heads[0] is None) != (heads[1] is None):
        return False
    for negated, negated_in_other, text in ((heads[0], heads[1], other), (heads[1], heads[0], one)):
        stems = {_stem(w) for w in text}
        if negated and negated_in_other is not None and any(h in stems and h not in negated_in_other for h in negated):
            return False
    return True


def _negated(tokens: list[str]) -> set[str] | None:
    """The nouns that a text negates (no dog, without a hat, not wearing a hat); None if it negates nothing."""
    heads: set[str] = set()
    negates = False
    for k, word in enumerate(tokens):
        if word.endswith("less") and len(word) > 5 and word not in _NOT_LESS:
            negates = True
            heads.add(word.removesuffix("less"))
        elif word in _NOT or word.endswith("n't"):
            negates = True
            rest = (w for w in tokens[k + 1 : k + 6] if w not in ("a", "an", "any", "the") and not w.endswith("ing"))
            heads.update(_stem(w) for w in list(rest)[:1])
    return heads if negates else None
