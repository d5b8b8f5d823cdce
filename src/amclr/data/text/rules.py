"""A rule-based paraphraser of English captions.

`reword` rewrites a caption with a small lexicon and a few patterns, each of which preserves the meaning of the
captions it matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from amclr.data.text.wording import COLOURS, UNIT_WORDS, UNITS, changed, split_words, words
from amclr.utils.randomness import Key, generator

RULES = 1
"""Version of the rules and the lexicon; `reword` is a function of it, the caption and the key."""


# -- the lexicon ----------------------------------------------------------------------------------

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "photo": ("picture", "photograph"), "photograph": ("photo", "picture"), "bicycle": ("bike",),
    "bicycles": ("bikes",), "large": ("big",), "big": ("large",), "huge": ("very large",), "small": ("little",),
    "little": ("small",), "tiny": ("very small",), "street": ("road",), "couch": ("sofa",), "sofa": ("couch",),
    "sidewalk": ("pavement",), "ocean": ("sea",), "sea": ("ocean",), "automobile": ("car",),
    "automobiles": ("cars",), "sunglasses": ("shades",), "beside": ("next to",), "next to": ("beside",),
    "near": ("close to",), "close to": ("near",), "on top of": ("atop",), "atop": ("on top of",),
    "outdoors": ("outside",), "toward": ("towards",), "towards": ("toward",), "whilst": ("while",),
    "while": ("whilst",), "talking to": ("speaking to",), "talks to": ("speaks to",),
    "speaking to": ("talking to",), "guy": ("man",), "guys": ("men",), "man": ("guy",), "men": ("guys",),
    "lady": ("woman",), "ladies": ("women",), "woman": ("lady",), "women": ("ladies",), "kid": ("child",),
    "kids": ("children",), "child": ("kid",), "children": ("kids",), "person": ("individual",),
    "infant": ("baby",), "motorcycle": ("motorbike",), "motorcycles": ("motorbikes",),
    "motorbike": ("motorcycle",), "swimming pool": ("pool",), "a group of": ("a bunch of",),
    "several": ("a number of",), "many": ("lots of",), "lots of": ("many", "a lot of"),
    "a lot of": ("lots of",), "is about to": ("is going to",), "tries to": ("attempts to",),
    "attempts to": ("tries to",), "trying to": ("attempting to",), "attempting to": ("trying to",),
    "doing a trick": ("performing a trick",), "does a trick": ("performs a trick",),
    "performing a trick": ("doing a trick",), "performs a trick": ("does a trick",),
    "doing tricks": ("performing tricks",), "dressed in": ("wearing",), "in midair": ("in mid-air", "in the air"),
    "upon": ("on",), "inside of": ("inside",), "snowy": ("snow-covered",), "grassy field": ("field of grass",),
    "backyard": ("back yard",), "chasing": ("running after",), "chases": ("runs after",),
    "running after": ("chasing",), "runs after": ("chases",), "hugging": ("embracing",), "hugs": ("embraces",),
    "taking a picture of": ("photographing",), "takes a picture of": ("photographs",),
    "looking at": ("gazing at",), "looks at": ("gazes at",), "gazing at": ("looking at",),
    "gazes at": ("looks at",), "watching": ("observing",), "riding a bike": ("cycling",),
    "riding a bicycle": ("cycling",), "bicyclist": ("cyclist",), "bicyclists": ("cyclists",),
    "stairs": ("steps",), "is asleep": ("is sleeping",), "sitting on": ("seated on",),
    "sitting in": ("seated in",), "sitting at": ("seated at",), "seated on": ("sitting on",),
    "sits on": ("is seated on",), "sits in": ("is seated in",), "jumps over": ("leaps over",),
    "jumping over": ("leaping over",), "jumps into": ("leaps into",), "jumping into": ("leaping into",),
    "leaps over": ("jumps over",), "leaping over": ("jumping over",), "leaps into": ("jumps into",),
    "laying on": ("lying on",), "lays on": ("lies on",), "very big": ("huge",), "hillside": ("side of a hill",),
}  # fmt: skip

_PEOPLE = split_words(
    "man woman boy girl child kid person guy lady toddler baby player skateboarder snowboarder skier surfer biker "
    "cyclist bicyclist rider climber swimmer hiker adult couple teenager worker runner individual"
)
_ANIMALS = split_words("dog puppy cat kitten horse bird cow sheep")
_PLURAL = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "lady": "ladies", "baby": "babies",
    "puppy": "puppies", "sheep": "sheep",
}  # fmt: skip
_ONE_PERSON, _ONE_ANIMAL = frozenset(_PEOPLE), frozenset(_ANIMALS) - {"sheep"}
_MANY_PEOPLE = frozenset(_PLURAL.get(n, f"{n}s") for n in _PEOPLE)
_MANY_ANIMALS = frozenset(_PLURAL.get(n, f"{n}s") for n in _ANIMALS) - {"sheep"}

_ING = {
    "run": "running", "jump": "jumping", "sit": "sitting", "stand": "standing", "play": "playing",
    "walk": "walking", "ride": "riding", "hold": "holding", "wear": "wearing", "look": "looking",
    "catch": "catching", "swim": "swimming", "climb": "climbing", "carry": "carrying", "throw": "throwing",
    "leap": "leaping", "watch": "watching", "chase": "chasing", "smile": "smiling", "sleep": "sleeping",
    "eat": "eating", "drink": "drinking", "dance": "dancing", "talk": "talking", "lie": "lying", "fly": "flying",
    "kick": "kicking", "push": "pushing", "pull": "pulling", "slide": "sliding", "swing": "swinging",
    "perform": "performing", "pose": "posing", "laugh": "laughing", "read": "reading", "rest": "resting",
    "hike": "hiking", "race": "racing", "skate": "skating", "surf": "surfing", "wait": "waiting",
    "sing": "singing", "cook": "cooking",
    "try": "trying", "lean": "leaning", "gather": "gathering", "kneel": "kneeling", "dig": "digging",
    "hug": "hugging", "kiss": "kissing", "show": "showing", "cross": "crossing", "bite": "biting",
    "lick": "licking", "float": "floating", "drive": "driving", "paint": "painting", "move": "moving",
    "enjoy": "enjoying", "wade": "wading", "take": "taking", "make": "making", "cut": "cutting",
    "stare": "staring", "point": "pointing", "splash": "splashing",
}  # fmt: skip


def _third(base: str) -> str:
    if base.endswith(("ch", "sh", "s")):
        return f"{base}es"
    return f"{base[:-1]}ies" if base.endswith("y") and base[-2] not in "aeiou" else f"{base}s"


_THIRD = {_third(base): base for base in _ING}
_OF_ING = {ing: base for base, ing in _ING.items()}
_PLACES = split_words(
    "beach park street field snow water grass road forest woods city pool sand mountain lake river ocean yard "
    "kitchen restaurant sidewalk stage hill desert playground garden store market dirt trail lawn"
)


def _any(options: Sequence[str] | frozenset[str]) -> str:
    return f"(?:{'|'.join(sorted(map(re.escape, options), key=lambda w: (-len(w), w)))})"


_ONE, _MANY = _any(_ONE_PERSON | _ONE_ANIMAL), _any(_MANY_PEOPLE | _MANY_ANIMALS)
_NOUN = _any(_ONE_PERSON | _ONE_ANIMAL | _MANY_PEOPLE | _MANY_ANIMALS)
_COUNT = _any([*UNIT_WORDS[2:13], "some", "several", *"23456789"])
# Words before a noun that are no preposition, verb or second noun phrase.
_MIXED = rf"(?:{_any(COLOURS)} and (?={_any(COLOURS)} ))?"
_BEFORE = rf"{_MIXED}(?:(?!(?:and|or|in|on|at|of|with|by|who|that|is|are|to|{_NOUN})\b)[\w-]+ ){{0,3}}?"
_GROUP = rf"(?:an?|the) {_BEFORE}(?:group|crowd|bunch|couple) of {_BEFORE}{_MANY}"
_ONE_NP, _MANY_NP = rf"(?:an?|the|one) {_BEFORE}{_ONE}", rf"(?:the|{_COUNT}) {_BEFORE}{_MANY}"
_NP = rf"(?:{_GROUP}|{_ONE_NP}|{_MANY_NP})"
_DOING, _DOES = _any(list(_OF_ING)), _any(list(_THIRD))
_GARMENT = _any(
    split_words("shirt jacket dress coat sweater uniform suit swimsuit costume vest hat helmet cap outfit jersey")
)


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.I)


_IS_DOING, _ONE_DOES, _NP_DOING = (
    _pattern(rf"({_NP}) (is|are) ({_DOING})\b"),
    _pattern(rf"({_ONE_NP}) ({_DOES})\b"),
    _pattern(rf"({_NP}) ({_DOING})\b"),
)
_THERE_IS, _FINITE_NP = _pattern(rf"there (is|are) ({_NP}) ({_DOING})\b"), _pattern(rf"{_NP} (?:is|are|{_DOES})\b")
_TITLE = _pattern(r"(?:an?|the) (?:photo|picture|photograph|image) of (?=(?:an?|the|two|three|four|some) )")
_BOTH = _pattern(rf"((?:there are )?)({_NP}) and ({_NP})(?= are\b|$)")
_WHERE = _pattern(
    rf"({_NP} (?:is|are) {_DOING}(?: (?:together|around|alone|happily|quickly))?)"
    rf" ((?:in|on|at|near|beside|through|down|along|across) (?:(?:the|an?) )?(?:[a-z]+ )?{_any(_PLACES)})"
)
_WORN = _pattern(rf"\b(in|wearing) ((?:an?|his|her) (?:[\w-]+ ){{0,2}}?{_GARMENT})\b")
_SUBJECT, _BARE = _pattern(rf"(an?|the) ({_BEFORE}{_ONE})\b"), _pattern(rf"{_BEFORE}{_ONE}\b")
_STARTS = _pattern(rf"(?:an?|the|there|young|little|small|large|big|{_COUNT}|{_any(COLOURS)}|{_NOUN})\b")
_NAMES = r"(?<!number )(?<!no )(?<!jersey )(?<!# )(?<!#)(?<![\w.,:/'-])"
_WORD_OF = {str(n): w for w, n in UNITS.items() if 2 <= n <= 12}
_AS_WORD = _pattern(rf"{_NAMES}({_any(UNIT_WORDS[2:13])})(?= [a-z])")
_AS_DIGIT = _pattern(rf"{_NAMES}({_any(list(_WORD_OF))})(?= [a-z])")
_FINITE = _pattern(rf"\b(?:is|are|was|were|has|have|do|does|{_DOES})\b")
# An unknown word in -s may be a verb ("snowboards"), which would give the sentence two verbs.
_NOUNS_IN_S = _any(split_words(
    "his this its across grass glass dress grassy sunglasses glasses shorts jeans pants clothes stairs steps trees "
    "woods rocks waves others hands arms"
))  # fmt: skip
_MAYBE_FINITE = _pattern(rf"\b(?!{_NOUNS_IN_S}\b)[a-z]+[^s\W]s\b")

Draw = np.random.Generator
Rule = Callable[[str, Draw], str | None]


def synonyms(word: str) -> tuple[str, ...]:
    """Synonyms of a single word from the lexicon; most words have none."""
    return _SYNONYMS.get(word.lower(), ())


_LEXICON = _pattern(rf"(?<![\w-])(?:(an?) )?({_any(list(_SYNONYMS))})(?![\w'-])")


def _by_lexicon(text: str, draw: Draw) -> str | None:
    def swap(match: re.Match[str]) -> str:
        article, word = match[1], match[2]
        if float(draw.random()) < 0.5:
            return match[0]
        options = _SYNONYMS[word.lower()]
        new = options[int(draw.integers(len(options)))]
        new = new[0].upper() + new[1:] if word[0].isupper() else new
        return f"{_article(new, article)} {new}" if article else new

    return _LEXICON.sub(swap, text)


def _article(word: str, like: str = "a") -> str:
    out = "an" if word[0].lower() in "aeiou" and not word.lower().startswith(("one", "uni", "use")) else "a"
    return out.capitalize() if like[0].isupper() else out


def _digits(text: str, draw: Draw) -> str | None:
    """Two: 2; and back, unless it is a name, as in player number 2."""
    if float(draw.random()) < 0.5:
        return _AS_WORD.sub(lambda m: str(UNITS[m[1].lower()]), text)
    return _AS_DIGIT.sub(lambda m: _WORD_OF[m[1]], text)


def _other_article(text: str, draw: Draw) -> str | None:
    """A dog: the dog; and back. The subject is the one in the image either way."""
    if match := _SUBJECT.match(text):
        new = "the" if match[1].lower() != "the" else _article(match[2])
        return f"{new} {match[2]}{text[match.end() :]}"
    return f"{_article(text)} {text}" if _BARE.match(text) and not _FINITE.match(text) else None


def _garment(text: str, draw: Draw) -> str | None:
    """In a red shirt: wearing a red shirt; and back."""
    return _WORN.sub(lambda m: f"{'wearing' if m[1].lower() == 'in' else 'in'} {m[2]}", text, count=1)


def _many(noun_phrase: str) -> bool:
    return noun_phrase.split()[-1].lower() in _MANY_PEOPLE | _MANY_ANIMALS


def _tense(text: str, draw: Draw) -> str | None:
    """A dog runs: a dog is running; and back."""
    if match := _ONE_DOES.match(text):
        return f"{match[1]} is {_ING[_THIRD[match[2].lower()]]}{text[match.end() :]}"
    if not (match := _IS_DOING.match(text)):
        return None
    base = _OF_ING[match[3].lower()]
    return f"{match[1]} {_third(base) if match[2].lower() == 'is' else base}{text[match.end() :]}"


def _relative(text: str, draw: Draw) -> str | None:
    """A man wearing a hat: a man who is wearing a hat."""
    if not (match := _NP_DOING.match(text)):
        return None
    link = "who" if match[1].split()[-1].lower() in _ONE_PERSON | _MANY_PEOPLE else "that"
    return f"{match[1]} {link} {'are' if _many(match[1]) else 'is'} {match[2]}{text[match.end() :]}"


def _sentence(text: str, draw: Draw) -> str | None:
    """A man wearing a hat: a man is wearing a hat. Only if the man has no other verb."""
    match = _NP_DOING.match(text)
    if not match or _FINITE.search(text) or _MAYBE_FINITE.search(text, match.end()):
        return None
    return f"{match[1]} {'are' if _many(match[1]) else 'is'} {match[2]}{text[match.end() :]}"


def _existential(text: str, draw: Draw) -> str | None:
    """A dog is running: there is a dog running; and back."""
    if match := _THERE_IS.match(text):
        return f"{match[2]} {match[1]} {match[3]}{text[match.end() :]}"
    match = None if text.lower().startswith("the ") else _IS_DOING.match(text)
    return f"there {match[2]} {match[1]} {match[3]}{text[match.end() :]}" if match else None


def _titled(text: str, draw: Draw) -> str | None:
    """A dog running: a photo of a dog running; a dog is running: a photo in which a dog is running; and back."""
    if match := _TITLE.match(text):
        return text[match.end() :]
    what = ("a photo", "a picture", "an image")[int(draw.integers(3))]
    if (match := _NP_DOING.match(text)) and not _FINITE.search(text) and not _MAYBE_FINITE.search(text, match.end()):
        return f"{what} of {text}"
    return f"{what} in which {text}" if _FINITE_NP.match(text) else None


def _swapped(text: str, draw: Draw) -> str | None:
    """A man and a woman are walking: a woman and a man are walking."""
    match = _BOTH.match(text)
    return f"{match[1]}{match[3]} and {match[2]}{text[match.end() :]}" if match else None


def _fronted(text: str, draw: Draw) -> str | None:
    """A dog is running on the beach: on the beach, a dog is running.

    Only if the place follows the verb, as then it belongs to the subject.
    """
    match = _WHERE.fullmatch(text)
    return f"{match[2]}, {match[1]}" if match else None


_STRUCTURE: tuple[Rule, ...] = (_tense, _relative, _sentence, _existential, _titled, _swapped, _fronted)
_WORDING: tuple[tuple[Rule, float], ...] = (
    (_garment, 0.4), (_other_article, 0.35), (_digits, 0.25), (_by_lexicon, 0.9),
)  # fmt: skip
LONGEST = 1000
PATIENCE = 16


def reword(caption: str, count: int, *key: Key) -> list[str]:
    """Up to `count` different rewordings of an English caption by rules, a function of the caption and `key`.

    Fewer, or none, if the rules do not match it. None of them changes what `changed` checks.
    """
    out: list[str] = []
    if len(caption) > LONGEST:
        return out
    draw = generator("reword", RULES, *key, caption)
    text = caption.rstrip(" .!")
    end, capital = caption[len(text) :], text[:1].isupper()
    if capital and _STARTS.match(text):
        text = text[0].lower() + text[1:]
    seen = {tuple(words(caption))}
    idle = 0
    while len(out) < count and idle < PATIENCE:
        idle += 1
        new = _reworded(text, draw)
        new = (new[:1].upper() + new[1:] if capital else new) + end
        if (new_words := tuple(words(new))) not in seen:
            seen.add(new_words)
            if changed(caption, new) is None:
                out.append(new)
                idle = 0
    return out


def _reworded(text: str, draw: Draw) -> str:
    """One pass of the rules: at most one that changes the structure, then those that change words."""
    order = draw.permutation(len(_STRUCTURE))[: int(draw.integers(1, len(_STRUCTURE) + 1))]
    text = next((new for k in order if (new := _STRUCTURE[k](text, draw))), text)
    for rule, chance in _WORDING:
        if float(draw.random()) < chance:
            text = rule(text, draw) or text
    return text
