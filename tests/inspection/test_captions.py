"""Caption statistics, by hand."""

from __future__ import annotations

from amclr.config.schema import Config, ModelConfig
from amclr.inspection.captions import CaptionStatistics


def test_statistics_by_hand() -> None:
    captions = ["A dog runs", "a dog", "a cat sleeps on a mat"]
    config = Config(model=ModelConfig(text_tower="small", max_tokens=5))
    statistics = CaptionStatistics.of(config, captions)
    assert statistics.words.tolist() == [3, 2, 6] and statistics.occurrences.tolist() == [4, 2, 1, 1, 1, 1, 1]
    assert statistics.tokens is not None and len(statistics.tokens) == 3
    words, tokens = statistics.lines(config)
    # 4 + 2 of 11 occurrences are the two most frequent words; five of seven words occur once.
    assert words.endswith(
        "7; 2 to 6 per caption, median 3; 71% of them occur once, the 2 most frequent are half of all"
    )
    share = (statistics.tokens > 5).mean()
    assert f"{share:.1%} are cut at --model.max_tokens 5" in tokens and share > 0


def test_captions_without_words() -> None:
    statistics = CaptionStatistics.of(Config(model=ModelConfig(text_tower="small")), ["!", "?"])
    assert statistics.lines(Config())[0].startswith("words        0; 1 to 1 per caption")
