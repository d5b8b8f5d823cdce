"""The filter on meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amclr.data.text.store import read_store
from amclr.models import packaged
from amclr.paraphrase import paraphrase
from amclr.paraphrase.similarity import TextSimilarity
from tests.paraphrase.conftest import captioned, options


def test_far_meanings_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packaged.available():
        pytest.skip("needs pip install 'amclr[pretrained]'")
    near, far = "The puppy sprints along the shore", "A train is late in the station"
    similarity = TextSimilarity("minilm", torch.device("cpu"))
    cosines = similarity(["A dog runs on the beach"] * 2, [near, far])
    assert cosines[0] > 0.5 > 0.3 > cosines[1]
    data = captioned(tmp_path / "data", 1)
    (data / "captions.txt").write_text("image,caption\n0.png,A dog runs on the beach\n")
    monkeypatch.setattr("amclr.paraphrase.generators.RuleParaphraser.__call__", lambda *_: [[far, near]])
    report = paraphrase(options("rules", similarity=0.5), str(data))
    assert read_store(data / "paraphrases").texts == {"A dog runs on the beach": (near,)}
    assert "1 similarity" in report
