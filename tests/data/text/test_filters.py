"""Filters of paraphrases: what passes, what is rejected and why, and how many are kept."""

from __future__ import annotations

import pytest

from amclr.data.text.filters import Filters, choose


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ("a wet dog is running along the beach", None),
        ("The wet dog runs on the beach!", None),
        ("A WET dog runs on a beach .", "same"),
        ("", "short"),
        ("...", "short"),
        ("dog beach", "short"),
        ("a wet dog " * 5, "long"),
        ("a wet dog runs on a beach " + "x" * 30_000, "long"),
        ("a wet dog \x00 is running along the beach", "garbled"),
        ("a wet dog \ufffd is running along the beach", "garbled"),
        ("two wet dogs run on the beach", "numbers"),
        ("a wet brown dog runs on a beach", "colours"),
        ("no dog runs on the wet beach", "negation"),
        ("a wet dog runs left on a beach", "sides"),
    ],
)
def test_filters(candidate: str, reason: str | None) -> None:
    assert Filters().fault("a wet dog runs on a beach", candidate) == reason


def test_short_captions_may_grow_by_four_words() -> None:
    assert Filters().fault("red cube", "a photo of a red cube") is None
    assert Filters().fault("red cube", "here we see a photo of a red cube") == "long"
    assert Filters(keep_facts=False).fault("a red cube", "the blue cubes") is None


def test_the_first_that_pass_are_chosen_and_the_rest_not_looked_at() -> None:
    candidates = ["a dog", "the dog", "One dog !", "The Dog.", None, "hound", "one  dog", "that dog", "two dogs"]
    kept, rejected = choose("a dog", candidates, 3, Filters(), lambda caption, text: text != "hound")
    assert kept == ["the dog", "One dog !", "that dog"]
    assert rejected == {"same": 3, "unfinished": 1, "similarity": 1}
