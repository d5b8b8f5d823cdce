"""`amclr paraphrase` on tiny language models made here: kills, processes, filters, and what cannot be loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from amclr import cli
from amclr.config.schema import Config, ParaphraseConfig, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.text.store import read_store
from amclr.data.text.version import Version
from amclr.data.text.wording import changed, words
from amclr.evaluation import evaluator as measure
from amclr.models import packaged
from amclr.paraphrase.generate import Encoder, ModelParaphraser, RuleParaphraser, paraphrase
from amclr.utils.errors import UserError
from tests.conftest import Command

WORDS = [
    "dog",
    "cat",
    "man",
    "child",
    "runs",
    "sits",
    "plays",
    "holds",
    "ball",
    "stick",
    "grass",
    "water",
    "street",
    "near",
    "the",
    "under",
    "over",
    "happy",
    "wet",
    "old",
]


def captioned(root: Path, count: int = 24, seed: int = 0) -> Path:
    """A folder of captioned images; the captions are random words, of many lengths, with some said twice."""
    (root / "Images").mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    rows = ["image,caption"]
    for i in range(count):
        Image.new("RGB", (8, 8)).save(root / "Images" / f"{i}.png")
        rows.append(f"{i}.png,{' '.join(draw.choices(WORDS, k=draw.randint(3, 9)))}")
    rows.append(rows[1])
    rows.append(f"1.png,{rows[1].split(',')[1]}")
    (root / "captions.txt").write_text("\n".join(rows) + "\n")
    return root


def word_tokenizer(end: str = "</s>") -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "paraphrase", ":", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        inner.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of two layers that knows the words and nothing else."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of two layers."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = word_tokenizer(end="")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=16, n_layer=2, n_head=2, eos_token_id=1, bos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path | str, **others: Any) -> ParaphraseConfig:
    base = ParaphraseConfig(
        model=str(model), k=2, candidates=6, batch_size=4, max_tokens=12, similarity=0.0, shortest=0.2, longest=4.0,
        accelerator="cpu", progress=False,
    )  # fmt: skip
    return replace(base, **others)


def bytes_of(store: Path) -> dict[str, bytes]:
    """Every file of a store, but for the lock."""
    return {str(p.relative_to(store)): p.read_bytes() for p in store.rglob("*") if p.is_file() and p.name != ".lock"}


def child(work: Callable[[], object]) -> int:
    """Run something in a fork of this process, which has imported all there is; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def parts(store: Path) -> int:
    """Batches that are done."""
    return sum(p.read_bytes().count(b"]\n") for p in store.glob("*/parts/*.jsonl"))


# -- the whole way --------------------------------------------------------------------------------


def test_a_seq2seq_model_fills_a_store_that_training_reads(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data")
    told = paraphrase(options(seq2seq), str(data))
    found = read_store(data / "paraphrases")
    captions = {c for s in manifests.load(Config(data=str(data)), tmp_path).samples for c in s.captions}
    assert set(found.texts) == captions and f"captions     {len(captions)} different ones" in told
    assert found.version.startswith(f"{seq2seq.name}-k2-") and str(found.path) in told
    kept = [(c, p) for c, texts in found.texts.items() for p in texts]
    assert len(kept) > 12 and all(set(words(p)) <= {*WORDS, "paraphrase"} for _, p in kept)
    assert all(len(t) <= 2 and len(set(t)) == len(t) and c not in t for c, t in found.texts.items())
    report = json.loads((found.path / "report.json").read_text())
    assert report["paraphrases"] == len(kept) and report["rejected"]["unfinished"] > 0
    samples = manifests.load(Config(data=str(data)), tmp_path).samples
    drawn_from = [(s.paraphrases or ((),) * len(s.captions), s.captions) for s in samples]
    assert all(had == tuple(map(found.of, of)) for had, of in drawn_from) and any(any(had) for had, _ in drawn_from)
    unused = manifests.load(Config(data=str(data), source=SourceConfig(paraphrases="none")), tmp_path).samples
    assert not any(any(s.paraphrases) for s in unused)


def test_what_is_drawn_follows_from_seed_and_settings(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data")
    for out, others in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"top_k": 5})):
        paraphrase(options(seq2seq, out=str(tmp_path / out), **others), str(data))
        torch.rand(3)  # what others draw in between makes no difference
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


def test_a_causal_model_gives_its_new_tokens_alone(causal: Path, tmp_path: Path) -> None:
    """Greedy by hand, without padding, against a batch of prompts of different lengths."""
    made = ModelParaphraser(options(causal, top_k=1, max_tokens=8, prompt="{} :"), torch.device("cpu"))
    assert not made.seq2seq and made.tokenizer.padding_side == "left"
    made.ends = frozenset(range(100))  # any token may end it: the texts come whole
    captions = ["dog runs", "the old man sits near the wet grass under the water", "cat"]
    got = made(captions, 2)
    for caption, texts in zip(captions, got, strict=True):
        ids = made.tokenizer(f"{caption} :", return_tensors="pt").input_ids
        start = ids.shape[1]
        with torch.inference_mode():
            while ids.shape[1] < start + 8 and ids[0, -1] != 1:
                ids = torch.cat([ids, made.model(ids).logits[:, -1:].argmax(-1)], 1)
        assert texts == [made.tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()] * 2
    told = paraphrase(options(causal, out=str(tmp_path / "out")), str(captioned(tmp_path / "data")))
    assert "paraphrases  " in told and len(read_store(tmp_path / "out").texts) > 20


def test_an_answer_ends_with_its_line_or_its_end_token(causal: Path) -> None:
    made = ModelParaphraser(options(causal), torch.device("cpu"))
    ids = made.tokenizer("dog runs").input_ids
    assert made._answer(ids) is None and made._answer([*ids, 1, 0, 0]) == "dog runs"
    made.tokenizer.decode = lambda row, **_: " a dog\nCaption: another"
    assert made._answer(ids) == "a dog"


def test_a_chat_model_is_asked_in_its_own_template(causal: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(causal, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %} the")
    made = ModelParaphraser(options(folder), torch.device("cpu"))
    assert made.chat and made._prompted("dog runs").endswith("\n\ndog runs] the")
    assert len(made(["dog runs"], 3)[0]) == 3


# -- kills ----------------------------------------------------------------------------------------


def kill_and_go_on(start: Callable[[], int], store: Path, kills: int, seed: int) -> int:
    """Kill a job at random moments, some before it is done; then let it end. Returns the kills that hit it at work."""
    draw = random.Random(seed)
    hits = 0
    for _ in range(kills):
        had = parts(store)
        pid = start()
        deadline = time.monotonic() + 60
        while parts(store) == had and os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.random() * 0.15)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            break
        hits += not list(store.glob("*/paraphrases.jsonl"))
    assert os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]) == 0
    return hits


def test_two_kills_leave_no_trace(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data", 120)
    paraphrase(options(seq2seq, out=str(tmp_path / "whole")), str(data))
    store = tmp_path / "killed"
    start = lambda: child(lambda: paraphrase(options(seq2seq, out=str(store)), str(data)))  # noqa: E731
    assert kill_and_go_on(start, store, kills=2, seed=0) == 2
    assert bytes_of(store) == bytes_of(tmp_path / "whole")


@pytest.mark.slow
def test_ten_kills_of_the_command_leave_no_trace(seq2seq: Path, tmp_path: Path, amclr: Command) -> None:
    """The real command, in processes of its own."""
    data = captioned(tmp_path / "data", 600)
    chosen = {k: v for k, v in vars(options(seq2seq)).items() if v != getattr(ParaphraseConfig(), k)}
    arguments = ["paraphrase", str(data), *(f"--{k}={str(v).lower() if v is False else v}" for k, v in chosen.items())]
    whole = amclr(*arguments, "--out", "whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    store = tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start() -> int:
        command = [sys.executable, "-m", "amclr", *arguments, "--out", str(store)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL).pid

    assert kill_and_go_on(start, store, kills=10, seed=1) == 10
    assert bytes_of(store) == bytes_of(tmp_path / "whole")


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("operation", ["fsync", "replace", "unlink"])
def test_a_cut_at_any_write_leaves_no_trace(
    operation: str, seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is cut at its first, second, ... write in turn, then gone on with, until one is not cut any more."""
    data = captioned(tmp_path / "data", 12)
    paraphrase(options("rules", out=str(tmp_path / "whole")), str(data))
    module = Path if operation == "unlink" else os
    real = getattr(module, operation)
    for n in range(1, 40):
        store, calls = tmp_path / f"cut{n}", 0

        def cut(*arguments: Any, n: int = n) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                raise PowerCut
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, operation, cut)
            with suppress(PowerCut):
                paraphrase(options("rules", out=str(store)), str(data))
        if calls < n:
            break
        paraphrase(options("rules", out=str(store)), str(data))
        assert bytes_of(store) == bytes_of(tmp_path / "whole"), n
    assert n > (1 if operation == "unlink" else 4) and calls < n


@pytest.mark.parametrize("process", [0, 7])
def test_a_line_cut_anywhere_is_done_again(process: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the part of this process, and in that of one which this time does not take part."""
    data = captioned(tmp_path / "data", 12)
    settings = options("rules", out=str(tmp_path / "store"))
    with monkeypatch.context() as patch:
        patch.setattr(Version, "finish", lambda self: {})
        paraphrase(settings, str(data))
    (part,) = (tmp_path / "store").glob("*/parts/*.jsonl")
    whole = part.read_bytes()
    paraphrase(settings, str(data))
    expected = bytes_of(tmp_path / "store")
    for cut in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1, len(whole) // 2, len(whole) - 1):
        for name in ("paraphrases.jsonl", "report.json", "sample.txt"):
            next((tmp_path / "store").glob(f"*/{name}")).unlink()
        part.parent.mkdir()
        part.with_name(f"{process:05d}.jsonl").write_bytes(whole[:cut])
        paraphrase(settings, str(data))
        assert bytes_of(tmp_path / "store") == expected


def test_new_captions_alone_are_paraphrased_later(
    seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = captioned(tmp_path / "data")
    paraphrase(options(seq2seq), str(data))
    before = read_store(data / "paraphrases").texts
    with (data / "captions.txt").open("a") as handle:
        handle.write("0.png,the wet old dog plays over the street\n3.png,cat near water\n")
    asked: list[str] = []
    real = ModelParaphraser.__call__
    monkeypatch.setattr(ModelParaphraser, "__call__", lambda self, c, n: asked.extend(c) or real(self, c, n))
    told = paraphrase(options(seq2seq), str(data))
    assert asked == ["the wet old dog plays over the street", "cat near water"] and "2 new" in told
    after = read_store(data / "paraphrases").texts
    assert {c: after[c] for c in before} == dict(before) and len(after) == len(before) + 2
    paraphrase(options(seq2seq), str(data))
    assert len(asked) == 2


def test_captions_that_come_during_a_stop_keep_what_is_done(
    seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = captioned(tmp_path / "data")
    real, asked = ModelParaphraser.__call__, []

    def stops(self: ModelParaphraser, captions: list[str], count: int) -> list[list[str | None]]:
        if len(asked) >= 8:
            raise KeyboardInterrupt
        asked.extend(captions)
        return real(self, captions, count)

    with monkeypatch.context() as patch:
        patch.setattr(ModelParaphraser, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            paraphrase(options(seq2seq), str(data))
    assert len(asked) == 8
    with pytest.raises(UserError, match="are not complete: give the same `amclr paraphrase` command again"):
        manifests.load(Config(data=str(data)), tmp_path)
    with (data / "captions.txt").open("a") as handle:
        handle.write("0.png,the wet old dog plays over the old street near the happy cat\n")
    again: list[str] = []
    monkeypatch.setattr(ModelParaphraser, "__call__", lambda self, c, n: again.extend(c) or real(self, c, n))
    told = paraphrase(options(seq2seq), str(data))
    assert not set(again) & set(asked) and "8 of them done before a stop" in told
    assert len(read_store(data / "paraphrases").texts) == len(again) + 8


# -- processes ------------------------------------------------------------------------------------


def test_two_processes_make_the_store_of_one(seq2seq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = captioned(tmp_path / "data")
    paraphrase(options(seq2seq, out=str(tmp_path / "one")), str(data))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        paraphrase(options(seq2seq, out=str(tmp_path / "two")), str(data))

    pids = [child(lambda r=r: work(r)) for r in range(2)]  # type: ignore[misc]
    assert [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids] == [0, 0]
    assert bytes_of(tmp_path / "two") == bytes_of(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_goes_on_where_one_process_was_killed(seq2seq: Path, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data", 200)
    paraphrase(options(seq2seq, out=str(tmp_path / "one")), str(data))
    store = tmp_path / "store"
    pid = child(lambda: paraphrase(options(seq2seq, out=str(store)), str(data)))
    while parts(store) < 5:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    had = parts(store)
    chosen = {k: v for k, v in vars(options(seq2seq)).items() if v != getattr(ParaphraseConfig(), k)}
    arguments = [f"--{k}={str(v).lower() if v is False else v}" for k, v in chosen.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "amclr"]
    done = subprocess.run(
        [*command, "paraphrase", str(data), *arguments, "--out", str(store)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("paraphrases  ") == 1 and had >= 5
    assert bytes_of(store) == bytes_of(tmp_path / "one")


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = captioned(tmp_path / "data")
    real, batches = RuleParaphraser.__call__, []

    def stops(self: RuleParaphraser, captions: list[str], count: int) -> list[list[str | None]]:
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(captions)
        return real(self, captions, count)

    with monkeypatch.context() as patch:
        patch.setattr(RuleParaphraser, "__call__", stops)
        command = ["paraphrase", str(data), "--model", "rules", "--batch_size", "4", "--progress", "false"]
        assert cli.main(command) == 130
    assert capsys.readouterr().err == (
        "amclr: stopped, with every batch kept that was done; the same command goes on\n"
    )
    assert parts(data / "paraphrases") == 3 and cli.main(command) == 0
    assert "12 of them done before a stop" in capsys.readouterr().out


def test_one_at_a_time(tmp_path: Path) -> None:
    data = captioned(tmp_path / "data")
    version = Version(data / "paraphrases", {"model": "rules", "k": 2})
    from amclr.paraphrase.generate import _alone

    with _alone(version.folder), pytest.raises(UserError, match="another `amclr paraphrase` is at work in"):
        _alone(version.folder)
    with _alone(version.folder):
        pass


# -- filters --------------------------------------------------------------------------------------


def test_filters_reject_what_a_model_gets_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    (data / "Images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / "Images" / "0.png")
    (data / "captions.txt").write_text("image,caption\n0.png,Two dogs with a red ball on the left .\n")
    made = [
        "two dogs, with a red ball, on the left", "Three dogs with a red ball on the left", "2 dogs and a blue ball at left",
        "Two dogs without a red ball on the left", "Two dogs with a red ball on the right", "dogs", None,
        "2 dogs with a red ball, on the left hand side", " ".join(["dog"] * 60), "2 dogs with\x07 a red ball at left",
        "2 dogs with a red ball on the left hand side!", "On the left, a pair of dogs with a red ball",
    ]  # fmt: skip
    monkeypatch.setattr(
        "amclr.paraphrase.generate.RuleParaphraser.__call__", lambda self, captions, count: [made for _ in captions]
    )
    told = paraphrase(options("rules", k=3, shortest=0.5, longest=2.0), str(data))
    found = read_store(data / "paraphrases")
    assert found.texts["Two dogs with a red ball on the left ."] == (made[7], made[11])
    report = json.loads((found.path / "report.json").read_text())
    expected = {"same": 2, "numbers": 1, "colours": 1, "negation": 1, "sides": 1, "short": 1, "unfinished": 1, "long": 1,
                "garbled": 1}  # fmt: skip
    assert report["rejected"] == expected and report["captions_with"] == {"0": 0, "1": 0, "2": 1, "3": 0}
    assert "1 with 2" in told and "1 negation (different negation)" in told
    assert "pair of dogs" in (found.path / "sample.txt").read_text()
    told = paraphrase(options("rules", k=3, shortest=0.5, longest=2.0, keep_facts=False), str(data))
    assert made[1] in read_store(data / "paraphrases").texts["Two dogs with a red ball on the left ."]


def test_far_meanings_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packaged.available():
        pytest.skip("needs pip install 'amclr[pretrained]'")
    near, far = "The puppy sprints along the shore", "A train is late in the station"
    encoder = Encoder("minilm", torch.device("cpu"))
    cosines = encoder(["A dog runs on the beach"] * 2, [near, far])
    assert cosines[0] > 0.5 > 0.3 > cosines[1]
    data = captioned(tmp_path / "data", 1)
    (data / "captions.txt").write_text("image,caption\n0.png,A dog runs on the beach\n")
    monkeypatch.setattr("amclr.paraphrase.generate.RuleParaphraser.__call__", lambda *_: [[far, near]])
    told = paraphrase(options("rules", similarity=0.5), str(data))
    assert read_store(data / "paraphrases").texts == {"A dog runs on the beach": (near,)}
    assert "1 similarity" in told


# -- what cannot be done --------------------------------------------------------------------------


def one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["paraphrase", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("amclr: ") and "\n" not in error
    return error


def test_slips_are_one_line_with_advice(
    tmp_path: Path, seq2seq: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data = captioned(tmp_path / "data", 2)
    offline = one_line(capsys, data)
    assert "cannot load the language model 'humarin/chatgpt_paraphraser_on_T5_base'" in offline
    assert "--model FOLDER" in offline and "--model rules, which needs no model" in offline
    assert "captions of scenes are paraphrases of each other already" in one_line(capsys, "scenes", "--model", "rules")
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


def test_the_command(main: Command, tmp_path: Path) -> None:
    data = captioned(tmp_path / "data", 6)
    (data / "captions.txt").write_text("image,caption\n0.png,A dog runs on the beach .\n1.png,\n2.png,Zyx .\n")
    done = main("paraphrase", data, "--model", "rules", "--source.max_bad", "0.5")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "captions     2 different ones, 2 new" in done.stdout and "caption/s" in done.stderr
    store = read_store(data / "paraphrases")
    assert all(changed("A dog runs on the beach .", p) is None for p in store.of("A dog runs on the beach ."))
    told = measure.inspect(Config(data=str(data)), tmp_path / "sheet.png", progress=False)
    assert f"paraphrases  of 1 captions, from {store.path}" in told
