"""`amclr paraphrase`: from captions to a store that training reads, filters, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.text.store import read_store
from amclr.data.text.wording import changed, words
from amclr.inspection.dataset import inspect
from amclr.paraphrase import paraphrase
from amclr.paraphrase.generators import ModelParaphraser
from tests.conftest import Command
from tests.paraphrase.conftest import WORDS, bytes_of, captioned, one_line, options


def test_a_seq2seq_model_fills_a_store_that_training_reads(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data")
    report = paraphrase(options(seq2seq), str(data))
    store = read_store(data / "paraphrases")
    captions = {c for s in manifests.load(Config(data=str(data)), tmp_path).samples for c in s.captions}
    assert set(store.texts) == captions and f"captions     {len(captions)} different ones" in report
    assert store.version.startswith(f"{seq2seq.name}-k2-") and str(store.path) in report
    pairs = [(c, p) for c, texts in store.texts.items() for p in texts]
    assert len(pairs) > 12 and all(set(words(p)) <= {*WORDS, "paraphrase"} for _, p in pairs)
    assert all(len(t) <= 2 and len(set(t)) == len(t) and c not in t for c, t in store.texts.items())
    report = json.loads((store.path / "report.json").read_text())
    assert report["paraphrases"] == len(pairs) and report["rejected"]["unfinished"] > 0
    samples = manifests.load(Config(data=str(data)), tmp_path).samples
    drawn_from = [(s.paraphrases or ((),) * len(s.captions), s.captions) for s in samples]
    assert all(had == tuple(map(store.of, of)) for had, of in drawn_from) and any(any(had) for had, _ in drawn_from)
    unused = manifests.load(Config(data=str(data), source=SourceConfig(paraphrases="none")), tmp_path).samples
    assert not any(any(s.paraphrases) for s in unused)


def test_what_is_drawn_follows_from_seed_and_settings(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data")
    for out, settings in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"top_k": 5})):
        paraphrase(options(seq2seq, out=str(tmp_path / out), **settings), str(data))
        torch.rand(3)  # other random draws make no difference
    texts = [read_store(tmp_path / out).texts for out in "abcd"]
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert texts[0] != texts[2] and texts[0] != texts[3]
    both = tmp_path / "both"
    paraphrase(options(seq2seq, out=str(both)), str(data))
    paraphrase(options(seq2seq, out=str(both), seed=1), str(data))
    versions = sorted(p.name for p in both.iterdir() if p.is_dir())
    assert len(versions) == 2 and read_store(both).texts == texts[2]
    first = next(v for v in versions if json.loads((both / v / "store.json").read_text())["settings"]["seed"] == 0)
    assert read_store(both / first).texts == texts[0]


def test_only_new_captions_are_paraphrased_later(
    seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = captioned(tmp_path / "data")
    paraphrase(options(seq2seq), str(data))
    before = read_store(data / "paraphrases").texts
    with (data / "captions.txt").open("a") as handle:
        handle.write("0.png,the wet old dog plays over the street\n3.png,cat near water\n")
    captions: list[str] = []
    real = ModelParaphraser.__call__
    monkeypatch.setattr(ModelParaphraser, "__call__", lambda self, c, n: captions.extend(c) or real(self, c, n))
    report = paraphrase(options(seq2seq), str(data))
    assert captions == ["the wet old dog plays over the street", "cat near water"] and "2 new" in report
    after = read_store(data / "paraphrases").texts
    assert {c: after[c] for c in before} == dict(before) and len(after) == len(before) + 2
    paraphrase(options(seq2seq), str(data))
    assert len(captions) == 2


def test_filters_reject_what_a_model_gets_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    (data / "Images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / "Images" / "0.png")
    (data / "captions.txt").write_text("image,caption\n0.png,Two dogs with a red ball on the left .\n")
    generated = [
        "two dogs, with a red ball, on the left", "Three dogs with a red ball on the left", "2 dogs and a blue ball at left",
        "Two dogs without a red ball on the left", "Two dogs with a red ball on the right", "dogs", None,
        "2 dogs with a red ball, on the left hand side", " ".join(["dog"] * 60), "2 dogs with\x07 a red ball at left",
        "2 dogs with a red ball on the left hand side!", "On the left, a pair of dogs with a red ball",
    ]  # fmt: skip
    monkeypatch.setattr(
        "amclr.paraphrase.generators.RuleParaphraser.__call__",
        lambda self, captions, count: [generated for _ in captions],
    )
    report = paraphrase(options("rules", k=3, shortest=0.5, longest=2.0), str(data))
    store = read_store(data / "paraphrases")
    assert store.texts["Two dogs with a red ball on the left ."] == (generated[7], generated[11])
    counts = json.loads((store.path / "report.json").read_text())
    expected = {"same": 2, "numbers": 1, "colours": 1, "negation": 1, "sides": 1, "short": 1, "unfinished": 1, "long": 1,
                "garbled": 1}  # fmt: skip
    assert counts["rejected"] == expected and counts["captions_with"] == {"0": 0, "1": 0, "2": 1, "3": 0}
    assert "1 with 2" in report and "1 negation (different negation)" in report
    assert "pair of dogs" in (store.path / "sample.txt").read_text()
    paraphrase(options("rules", k=3, shortest=0.5, longest=2.0, keep_facts=False), str(data))
    assert generated[1] in read_store(data / "paraphrases").texts["Two dogs with a red ball on the left ."]


def test_slips_are_one_line_with_advice(
    tmp_path: Path, seq2seq: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = captioned(tmp_path / "data", 2)
    offline = one_line(capsys, data)
    assert "cannot load the language model 'humarin/chatgpt_paraphraser_on_T5_base'" in offline
    assert "--model FOLDER" in offline and "--model rules, which needs no model" in offline
    assert "captions of scenes already paraphrase each other" in one_line(capsys, "scenes", "--model", "rules")
    assert "no data set at" in one_line(capsys, tmp_path / "absent", "--model", "rules")
    assert "give one with --out" in one_line(capsys, data / "captions.txt", "--model", "rules")
    assert "--k must lie between 1 and 64, got 0" in one_line(capsys, data, "--k", "0")
    assert "--candidates must be at least k" in one_line(capsys, data, "--k", "3", "--candidates", "2")
    assert "--prompt must hold {}" in one_line(capsys, data, "--prompt", "Say it again")
    assert "unknown option '--topk': did you mean --top_k?" in one_line(capsys, data, "--topk", "3")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "give --model FOLDER" not in one_line(capsys, data, "--model", "rules", "--similarity", "2")
    assert "cannot load the language model" in one_line(capsys, data, "--model", empty)
    broken = shutil.copytree(seq2seq, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"broken")
    assert "cannot load the language model" in one_line(capsys, data, "--model", broken)
    (tmp_path / "file").write_text("")
    assert "give a folder with --out" in one_line(capsys, data, "--model", "rules", "--out", tmp_path / "file" / "x")


def test_the_command(main: Command, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data", 6)
    (data / "captions.txt").write_text("image,caption\n0.png,A dog runs on the beach .\n1.png,\n2.png,Zyx .\n")
    done = main("paraphrase", data, "--model", "rules", "--source.max_bad", "0.5")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "captions     2 different ones, 2 new" in done.stdout and "caption/s" in done.stderr
    store = read_store(data / "paraphrases")
    assert all(changed("A dog runs on the beach .", p) is None for p in store.of("A dog runs on the beach ."))
    report = inspect(Config(data=str(data)), tmp_path / "sheet.png", progress=False)
    assert f"paraphrases  of 1 captions, from {store.path}" in report
