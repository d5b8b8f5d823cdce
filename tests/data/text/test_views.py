"""Text views: which text a visit draws, and that cached features hold every text that can be drawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from amclr.config.checks import problems
from amclr.config.schema import Config, SourceConfig, ViewsConfig
from amclr.data.text.views import TextPolicy, noisy_words

CAPTIONS = ["one", "two", "three"]


def test_text_views() -> None:
    drawn = [TextPolicy().draw(CAPTIONS, (), 0, epoch, 3) for epoch in range(200)]
    assert {d[1] for d in drawn} == set(CAPTIONS)
    assert all(d[1] != d[2] and CAPTIONS[d[0]] == d[1] for d in drawn)
    assert drawn == [TextPolicy().draw(CAPTIONS, (), 0, epoch, 3) for epoch in range(200)]
    only_first = [TextPolicy(one=True).draw(CAPTIONS, (), 0, epoch, 3) for epoch in range(50)]
    assert {d[1] for d in only_first} == {"one"} and {d[2] for d in only_first} == {"two", "three"}
    uno = (("uno",), (), ())
    assert {TextPolicy().draw(CAPTIONS[:1], uno, 0, epoch, 3)[2] for epoch in range(20)} == {"uno"}
    for policy in (TextPolicy(), TextPolicy(one=True)):  # what people say goes before what rewords it
        assert {policy.draw(CAPTIONS, uno, 0, epoch, 3)[2] for epoch in range(50)} <= set(CAPTIONS)


def test_draws_without_weights_are_those_of_earlier_versions() -> None:
    """Recorded before weights came; runs that resume must draw the same."""
    reworded = (("uno", "un"), (), ())
    drawn = [TextPolicy().draw(CAPTIONS, reworded, 7, epoch, "text") for epoch in range(8)]
    second = ["one", "two", "one", "three", "three", "one", "two", "three"]
    assert [TextPolicy().draw(CAPTIONS[:1], reworded, 7, epoch, "text")[2] for epoch in range(8)] == [
        "uno", "uno", "un", "uno", "uno", "un", "un", "uno",
    ]  # fmt: skip
    assert drawn == [
        (CAPTIONS.index(c), c, s)
        for c, s in zip(["two", "one", "three", "two", "one", "three", "three", "two"], second, strict=True)
    ]
    text = "a small brown dog runs over the green grass"
    assert [TextPolicy(noise=0.3).draw([text], (), 0, epoch, 3)[2] for epoch in (0, 1)] == [
        "a small dog runs green the grass", "a brown small dog runs the over green grass",
    ]  # fmt: skip


def shares(policy: TextPolicy, captions: list[str], paraphrases: tuple[tuple[str, ...], ...]) -> Counter[str]:
    drawn = (policy.draw(captions, paraphrases, "shares", k) for k in range(3000))
    kinds: Counter[str] = Counter()
    for index, text, second in drawn:
        if index < len(paraphrases) and second in paraphrases[index]:
            kinds["paraphrase"] += 1
        elif second in captions and second != text:
            kinds["other"] += 1
        else:
            kinds["words"] += 1
    return kinds


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 1, 2), (0.25, 0.25, 0.5)),
        ((3, 1, 0), (0.75, 0.25, 0)),
        ((0, 0, 1), (0, 0, 1)),
        ((0, 1, 0), (0, 1, 0)),
        ((0, 0, 0), (0, 1, 0)),
    ],
)
def test_the_kind_is_drawn_in_proportion_to_the_weights(
    weights: tuple[float, float, float], expected: tuple[float, float, float]
) -> None:
    captions = ["a dog runs over grass", "some dog on a lawn"]
    found = shares(
        TextPolicy(noise=0.9, paraphrases=weights[0], other_captions=weights[1], words=weights[2]),
        captions, (("dog runs",), ("lawn with dog",)),
    )  # fmt: skip
    assert [found[k] / 3000 for k in ("paraphrase", "other", "words")] == pytest.approx(expected, abs=0.03)


def test_what_is_not_there_is_not_drawn() -> None:
    even = TextPolicy(noise=0.9, paraphrases=1, other_captions=1, words=1)
    assert shares(even, ["a dog runs over grass"], ())["words"] == 3000
    half = shares(even, ["a dog runs over grass", "some dog on a lawn"], ())
    assert half["paraphrase"] == 0 and half["other"] / 3000 == pytest.approx(0.5, abs=0.03)
    # A weight for what is not there leaves the first thing that is there.
    assert TextPolicy(other_captions=1).draw(["dog"], (("hound",),), 0)[2] == "hound"


def test_seconds_are_all_that_second_views_are_drawn_from() -> None:
    captions, some = ["a b", "c d", "e f"], (("x y",), (), ("z",))
    for policy in (
        TextPolicy(),
        TextPolicy(paraphrases=1),
        TextPolicy(paraphrases=1, other_captions=1),
        TextPolicy(one=True),
    ):
        drawn = {policy.draw(captions, some, k)[2] for k in range(300)}
        assert set(policy.seconds(captions, some)) == drawn
    assert set(TextPolicy().seconds(captions, some)) == set(captions)  # so the features of paraphrases are not computed


def test_word_noise_drops_and_swaps_words() -> None:
    text = "a small brown dog runs over the green grass"
    noisy = [TextPolicy(noise=0.3).draw([text], (), 0, epoch, 3)[2] for epoch in range(100)]
    assert len(set(noisy)) > 50
    assert all(set(n.split()) <= set(text.split()) and n for n in noisy)
    assert any(len(n.split()) < 9 for n in noisy) and any(len(n.split()) == 9 and n != text for n in noisy)
    assert noisy_words("dog", 1.0, np.random.default_rng(0)) == "dog"


def test_synonyms_are_a_word_operation() -> None:
    text = "a small dog on a large couch"
    always = noisy_words(text, 0.0, np.random.default_rng(0), synonym=1.0)
    assert always == "a little dog on a big sofa"
    some = [noisy_words(text, 0.0, np.random.default_rng(k), synonym=0.3) for k in range(300)]
    assert sum("sofa" in s for s in some) / 300 == pytest.approx(0.3, abs=0.08)
    assert noisy_words(text, 0.0, np.random.default_rng(0)) == text


def test_noisy_names_exactly_the_captions_that_may_be_drawn_with_noise() -> None:
    captions, some = ["a b c", "d e f"], (("x y z",), ())
    assert TextPolicy().noisy(captions, some) == [] and TextPolicy().noisy(["a b c"], ()) == [0]
    assert TextPolicy(words=1).noisy(captions, some) == [0, 1] and TextPolicy(one=True, words=1).noisy(
        captions, some
    ) == [0]
    assert TextPolicy(paraphrases=1).noisy(captions, some) == []


def test_settings_reach_the_policy_and_have_bounds() -> None:
    views = ViewsConfig(word_noise=0.2, word_synonyms=0.1, paraphrases=3, other_captions=2, words=1)
    policy = TextPolicy.of(Config(views=views, source=SourceConfig(captions="one")))
    assert policy == TextPolicy(True, 0.2, 0.1, 3, 2, 1)
    assert problems(Config(views=replace(views, words=-1))) == ["--views.words must lie between 0 and 1e+09, got -1"]
