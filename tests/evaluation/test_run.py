"""`amclr evaluate`: standard splits, folds, several sets of classes, paraphrased queries; slips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import amclr
from amclr import cli, evaluate
from amclr.config.schema import Config, ModelConfig, ViewsConfig
from amclr.data import manifest as manifests
from amclr.training.loop import train
from tests.conftest import COLOURS, make_folder, paint

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a second, both towers frozen at random weights."""
    root = tmp_path_factory.mktemp("trained")
    config = Config(
        data=str(make_folder(root / "patches")), out=str(root / "run"), cache=str(root / "cache"), epochs=1, batch_size=8,
        accelerator="cpu", views=ViewsConfig(image="weak"), objective="sogclr",
        model=ModelConfig(image_size=32, dim=16, image_lr=0, text_lr=0, head="residual", hidden=32),
    )  # fmt: skip
    return train(config, progress=False).folder


def command(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def saved(run: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "evaluations" / f"{name}.json").read_text())
    return found


# -- Karpathy's splits ----------------------------------------------------------------------------


def karpathy(root: Path, folder: str, filepath: str, test: int) -> list[tuple[str, list[str]]]:
    """A Karpathy file whose test images are there, in another order than that of their names, and no others."""
    (root / folder).mkdir(parents=True)
    names = [f"COCO_val2014_{(7 * k) % test:012d}.jpg" for k in range(test)]
    entries = [{"filename": f"COCO_train2014_{k:012d}.jpg", "split": ("train", "restval", "val")[k % 3],
                "sentences": [{"raw": f"an image that is not there {k}"}]} for k in range(40)]  # fmt: skip
    found = []
    for k, name in enumerate(names):
        colour = list(COLOURS)[k % 4]
        paint(colour, 50 + k).save(root / folder / name)
        raw = [f"{word} {colour} patch number {k}" for word in ("a", "one", "this", "that", "some", "my", "your")]
        found.append((name, raw[: 5 + k % 3]))
        entries.insert(
            3 * k, {"filename": name, "split": "test", "sentences": [{"raw": text} for text in found[-1][1]]}
        )
    for entry in entries:
        entry |= {"filepath": filepath} if filepath else {}
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return found


class Adapter:
    """A run for CLIP_benchmark: its images and texts come as their places in lists."""

    def __init__(self, run: Path, images: list[Path], texts: list[str]) -> None:
        self.model, self.images, self.texts = amclr.load(run), images, texts

    def encode_image(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image([self.images[i] for i in rows])

    def encode_text(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text([self.texts[i] for i in rows])

    def tokenizer(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([self.texts.index(t) for t in texts])


def test_karpathy_test_split_as_clip_benchmark_measures_it(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five captions an image; images of other splits need not be there; folds in the file's order."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    listed = karpathy(tmp_path / "coco", "val2014", "val2014", 30)
    options = ("--split", "test", "--captions", 5, "--folds", 3)
    assert command("evaluate", trained, "--data", tmp_path / "coco" / "dataset_coco.json", *options) == 0
    output = capsys.readouterr().out
    assert "test split: 30 images, 150 captions\n" in output and "means over 3 folds of 10 images" in output
    found = saved(trained, "dataset_coco-test")
    texts = [text for _, own in listed for text in own[:5]]
    adapter = Adapter(trained, [tmp_path / "coco" / "val2014" / name for name, _ in listed], texts)

    def benchmark(start: int, stop: int) -> dict[str, float]:
        batch = torch.arange(start, stop), [own[:5] for _, own in listed[start:stop]]
        values = theirs.evaluate(adapter, [batch], adapter.tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
        return {f"{key.replace('text', 'txt').replace('image', 'img')[:3]}_r{key.split('@')[1]}": 100 * v
                for key, v in values.items()}  # fmt: skip

    whole, folds = benchmark(0, 30), [benchmark(k, k + 10) for k in (0, 10, 20)]
    for key in ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10"):
        assert found[key] == pytest.approx(whole[key], abs=1e-3)
        assert found["folds"][key] == pytest.approx(np.mean([fold[key] for fold in folds]), abs=1e-3)
    assert found["folds"]["count"] == 3


def test_where_karpathy_images_lie(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flickr30k's usual folder is found beside the file; another one is named. All captions without --captions."""
    listed = karpathy(tmp_path / "flickr30k", "flickr30k-images", "", 12)
    assert command("evaluate", trained, "--data", tmp_path / "flickr30k", "--split", "test") == 0
    captions = sum(len(own) for _, own in listed)
    assert f"test split: 12 images, {captions} captions\n" in capsys.readouterr().out
    shutil.move(tmp_path / "flickr30k" / "flickr30k-images", tmp_path / "elsewhere")
    away = ("evaluate", trained, "--data", tmp_path / "flickr30k" / "dataset_coco.json", "--split", "test")
    assert command(*away) == 1
    output = capsys.readouterr().err
    assert "has no usable sample; 12 x no such image (images elsewhere: --source.images FOLDER)" in output
    assert command(*away, "--source.images", tmp_path / "elsewhere") == 0
    assert f"test split: 12 images, {captions} captions\n" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["lists", "rows", "rows without val", "none", "mix"])
def test_a_split_read_alone_is_the_split(layout: str, tmp_path: Path, own_cache: Path) -> None:
    root = make_folder(tmp_path / "patches", lists=layout == "lists")
    if layout.startswith("rows") or layout == "mix":
        kinds = ("train", "train", "val", "test") if "without" not in layout else ("train", "train", "train", "test")
        lines = (root / "captions.txt").read_text().splitlines()
        rows = [f"{line},{kinds[int(line[:3]) % 4]}" for line in lines[1:]]
        (root / "captions.txt").write_text("\n".join(["image,caption,split", *rows]))
    data = root
    if layout == "mix":
        data = tmp_path / "mix.yaml"
        data.write_text("- {data: patches, name: one}\n- {data: patches, name: two}\n")
    config = Config(data=str(data))
    whole = manifests.load(config, own_cache, progress=False)
    for split in (*whole.splits, "all"):
        alone = manifests.prepare(config, own_cache, progress=False, only=split).samples
        assert alone == whole.split(split) and alone
    with pytest.raises(amclr.training.loop.UserError, match="has no split 'tset': choose from all, "):
        manifests.prepare(config, own_cache, progress=False, only="tset")


# -- sets of classes ------------------------------------------------------------------------------


def classes(root: Path, names: dict[str, str]) -> Path:
    """Patches by class: a folder per name, of a colour each."""
    for name, colour in names.items():
        (root / name).mkdir(parents=True)
        for k in range(3):
            paint(colour, 700 + k).save(root / name / f"{k}.png")
    return root


def test_several_sets_in_one_table(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wnids = classes(tmp_path / "tiny" / "val", {"n01443537": "red", "n01484850": "blue", "n01440764": "green"})
    colours = classes(tmp_path / "colours", {name: name for name in COLOURS})
    Image.new("RGB", (8, 8)).save(colours / "red" / "more.png")  # classes of unequal sizes
    (colours / "red" / "broken.png").write_bytes(b"broken")
    assert command("evaluate", trained, "--retrieval", "false", "--zeroshot", wnids, colours) == 0
    output = capsys.readouterr().out
    found = saved(trained, "zeroshot-tiny-colours")["zeroshot_sets"]
    header, first, second, *about = output.splitlines()
    assert header.split() == ["zero-shot", "images", "classes", "top-1", "top-3", "top-5", "top-10", "per", "class"]
    assert first.split()[:4] == ["tiny", "9", "3", f"{found['tiny']['zeroshot_top1']:.1f}"] and "–" in first
    assert second.split()[:3] == ["colours", "13", "4"]
    assert about == [
        "tiny: 3 names (imagenet, by open_clip), 80 prompts (imagenet, by open_clip)",
        "colours: 4 names (as its folders are called), 7 prompts (amclr); 1 images left out",
    ]
    # Each is what it is alone, and what the functions say of the images and the model.
    for root, label in ((wnids, "tiny"), (colours, "colours")):
        assert command("evaluate", trained, "--retrieval", "false", "--zeroshot", root) == 0
        alone = saved(trained, f"zeroshot-{root.name}")
        assert {k: v for k, v in alone.items() if k.startswith("zeroshot")} == found[label]
    output = capsys.readouterr().out
    assert "zero-shot: 13 images, 4 classes" in output and "4 names (as its folders are called)" in output
    paths = sorted(p for p in colours.glob("*/*.png") if p.name != "broken.png")
    labels = [sorted(COLOURS).index(p.parent.name) for p in paths]
    scores, _ = evaluate.class_scores(amclr.load(trained), paths, labels, sorted(COLOURS))
    by_hand = [np.mean([float(scores[i].argmax()) == y for i, y in enumerate(labels) if y == c]) for c in range(4)]
    assert found["colours"]["zeroshot_class_recall"] == pytest.approx(100 * np.mean(by_hand), abs=1e-3)


# -- paraphrased queries --------------------------------------------------------------------------


def test_paraphrases_of_a_file(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions without one are left out of both sides, as queries and as candidates; images stay what they are."""
    config = amclr.runs.folder.Run.open(trained).config
    samples = manifests.load(config, Path(config.cache), progress=False).split("val")
    captions = [c for s in samples for c in s.captions]
    again = {c: f"there is {c} to be seen" for k, c in enumerate(captions) if k % 3}
    rows = [f"{c},{text}" for c, text in again.items()] + [f"{captions[0]},{captions[0].upper()}"]  # the same words
    (tmp_path / "mine.csv").write_text("\n".join(["caption,paraphrase", *rows]))
    assert command("evaluate", trained, "--paraphrased", tmp_path / "mine.csv") == 0
    output = capsys.readouterr().out
    found = saved(trained, "patches-val")["paraphrased"]
    assert (found["captions"], found["without"]) == (len(again), len(captions) - len(again)) == (10, 6)
    assert f"{len(again)} of 16 captions, 6 without one left out" in output
    model = amclr.load(trained)
    images = model.encode_image([s.image for s in samples])
    owner = [i for i, s in enumerate(samples) for c in s.captions if c in again]
    own, reworded = model.encode_text(list(again)), model.encode_text(list(again.values()))
    for name, texts in (("as_is", own), ("paraphrased", reworded)):
        expected = evaluate.retrieval(images, texts, owner)
        assert found[name] == pytest.approx(expected, abs=1e-3)
    assert found["as_is"] != found["paraphrased"]
    lists = [[list(np.argsort(-(t @ images.T)[k].numpy())) for k in range(10)] for t in (own, reworded)]
    rbo = [sum(0.1 * 0.9 ** (d - 1) * len(set(a[:d]) & set(b[:d])) / min(d, 8) for d in range(1, 9)) + 0.9**8
           for a, b in zip(*lists, strict=True)]  # fmt: skip
    assert found["rbo"] == pytest.approx(np.mean(rbo), abs=1e-5) and found["overlap"] == 100
    assert (
        "100.0 % of the first 8 in common" in output and f"rank-biased overlap {found['rbo']:.3f} (p = 0.9)" in output
    )
    drop = next(line for line in reversed(output.splitlines()) if line.startswith("  drop"))
    expected_drop = found["as_is"]["img_r5"] - found["paraphrased"]["img_r5"]
    assert float(drop.split()[2]) == pytest.approx(expected_drop, abs=0.051)


def test_rules_are_the_store_that_they_make(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One paraphrase of a caption, the first that `amclr paraphrase` keeps, at every time the same."""
    data = tmp_path / "people"
    data.mkdir()
    who, what = ("a man", "two young women", "a little girl", "a boy"), ("rides a horse", "are talking", "runs quickly")
    captions = [f"{a} {b} on the beach near a large boat" for a in who for b in what]
    for k, _ in enumerate(captions):
        paint("red", k).save(data / f"{k:02}.png")
    rows = [f"{k:02}.png,{caption}" for k, caption in enumerate(captions)]
    (data / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    assert command("paraphrase", data, "--model", "rules", "--k", 3, "--out", tmp_path / "store") == 0
    found = []
    for by in ("rules", "rules", tmp_path / "store"):
        assert command("evaluate", trained, "--data", data, "--paraphrased", by, "--split", "all") == 0
        found.append(saved(trained, "people-all")["paraphrased"])
    assert found[0] == found[1] == found[2] | {"by": "rules"} and found[2]["by"] == str(tmp_path / "store")
    assert found[0]["captions"] == 12 and 10 < found[0]["overlap"] < 100


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--zeroshot", "nowhere"], "no folder 'nowhere'"),
        (["--zeroshot", "pets", "--templates", "opnai"], "there is no templates file or known set 'opnai'"),
        (["--zeroshot", "pets", "empty"], "'empty' holds no folder with images: expected empty/CLASS/IMAGE.jpg"),
        (["--zeroshot", "pets", "pets", "--wise", "0,1"], "give one --zeroshot FOLDER"),
        (["--templates", "openai"], "belong to --zeroshot FOLDER: give it too"),
        (["--retrieval", "false"], "nothing to measure"),
        (["--retrieval", "false", "--zeroshot", "pets", "--paraphrased", "rules"], "--paraphrased belongs to retrieval"),
        (["--paraphrased", "rulez"], "no paraphrases at 'rulez': give rules, a file with the columns caption,paraphrase"),
        (["--paraphrased", "pets"], "'pets' holds no paraphrases: make some with: amclr paraphrase DATA --out pets"),
        (["--paraphrased", "other.csv"], "none of the 16 captions has a paraphrase by 'other.csv'"),
        (["--paraphrased", "bad.csv"], "needs a header line with the columns caption,paraphrase"),
        (["--folds", "0"], "--folds 1 or more"),
        (["--folds", "9"], "--folds must be at most 8, the number of images, got 9"),
        (["--captions", "-1"], "--captions must be 0"),
        (["--folds", "many"], "--folds must be a whole number, got 'many'"),
        (["--split", "tset"], "has no split 'tset': choose from all, train, val"),
        (["--wise", "2"], "--wise must be numbers between 0 and 1 with commas, as 0,0.5,1, got '2'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_advice(
    options: list[str], message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    classes(tmp_path / "pets", {"cat": "red", "cow": "blue"})
    Path("empty").mkdir()
    Path("other.csv").write_text("caption,paraphrase\na dog,a hound\n")
    Path("bad.csv").write_text("a dog,a hound\n")
    assert command("evaluate", trained, *options) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("amclr: ") and message in errors[0]


def test_a_run_after_the_folders(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", "--zeroshot", "classes", "run") == 1
    assert capsys.readouterr().err.startswith("amclr: name the run first: amclr evaluate RUN, and then --zeroshot")


def test_the_help_lists_names_and_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("evaluate", "--help")
    output = " ".join(capsys.readouterr().out.split())
    for name in (*amclr.evaluation.classes.NAMES, *amclr.evaluation.classes.PROMPTS):
        assert name in output


def test_a_store_that_is_not_complete(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("paraphrase", trained.parent / "patches", "--model", "rules", "--out", tmp_path / "store") == 0
    (version,) = (p.parent for p in (tmp_path / "store").glob("*/paraphrases.jsonl"))
    (version / "paraphrases.jsonl").unlink()
    capsys.readouterr()
    assert command("evaluate", trained, "--paraphrased", tmp_path / "store") == 1
    output = capsys.readouterr().err
    assert "are not complete: give the same `amclr paraphrase` command again" in output and output.endswith(
        "give rules\n"
    )
