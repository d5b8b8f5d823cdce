"""Language models and rules: what they generate, when an answer ends, and what does not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from amclr.data.text.store import read_store
from amclr.paraphrase import paraphrase
from amclr.paraphrase.generators import ModelParaphraser
from tests.paraphrase.conftest import captioned, one_line, options


def test_a_causal_model_gives_its_new_tokens_alone(causal: Path, tmp_path: Path) -> None:
    """Greedy by hand, without padding, against a batch of prompts of different lengths."""
    paraphraser = ModelParaphraser(options(causal, top_k=1, max_tokens=8, prompt="{} :"), torch.device("cpu"))
    assert not paraphraser.seq2seq and paraphraser.tokenizer.padding_side == "left"
    paraphraser.ends = frozenset(range(100))  # any token may end it: the texts come whole
    captions = ["dog runs", "the old man sits near the wet grass under the water", "cat"]
    generated = paraphraser(captions, 2)
    for caption, texts in zip(captions, generated, strict=True):
        ids = paraphraser.tokenizer(f"{caption} :", return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.inference_mode():
            while ids.shape[1] < start + 8 and ids[0, -1] != 1:
                ids = torch.cat([ids, paraphraser.model(ids).logits[:, -1:].argmax(-1)], 1)
        assert texts == [paraphraser.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()] * 2
    report = paraphrase(options(causal, out=str(tmp_path / "out")), str(captioned(tmp_path / "data")))
    assert "paraphrases  " in report and len(read_store(tmp_path / "out").texts) > 20


def test_an_answer_ends_with_its_line_or_its_end_token(causal: Path) -> None:
    paraphraser = ModelParaphraser(options(causal), torch.device("cpu"))
    ids = paraphraser.tokenizer("dog runs").input_ids
    assert paraphraser._answer(ids) is None and paraphraser._answer([*ids, 1, 0, 0]) == "dog runs"
    paraphraser.tokenizer.decode = lambda row, **_: " a dog\nCaption: another"
    assert paraphraser._answer(ids) == "a dog"


def test_a_chat_model_is_asked_in_its_own_template(causal: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(causal, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %} the")
    paraphraser = ModelParaphraser(options(folder), torch.device("cpu"))
    assert paraphraser.chat and paraphraser._prompted("dog runs").endswith("\n\ndog runs] the")
    assert len(paraphraser(["dog runs"], 3)[0]) == 3


def test_code_that_comes_with_a_model_does_not_run(
    seq2seq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(seq2seq, tmp_path / "hostile")
    about = json.loads((folder / "config.json").read_text())
    about |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForSeq2SeqLM": "code.Mine"}}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "cannot load the language model" in one_line(capsys, captioned(tmp_path / "data", 2), "--model", folder)
    assert not (tmp_path / "ran").exists()
