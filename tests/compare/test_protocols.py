"""The experiment files that bring a protocol: settings that are the published ones, and every step on a stand-in."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from transformers import AutoModel, DistilBertConfig

from amclr.compare.experiment import read_experiment
from amclr.compare.plan import plan
from amclr.data.scenes.scene import ranked_kinds
from amclr.models.tokenizer import train_tokenizer
from amclr.utils.files import read_arrays
from tests.conftest import COLOURS, Command, paint

ROOT = Path(__file__).parents[2]


def test_the_papers_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As arXiv 2412.07979 gives it, in every run."""
    monkeypatch.setattr("amclr.compare.plan._images_per_epoch", lambda _: None)
    cells = plan(read_experiment(ROOT / "experiments" / "paper.yaml"), tmp_path)
    configs = [c for cell in cells for c in cell.configs.values()]
    assert Counter((c.objective, c.optim.name) for c in configs) == {
        (o, n): 3 for o in ("sogclr", "isogclr", "amclr", "xamclr") for n in ("adamw", "adamp")
    }
    for c in configs:
        m, o = c.model, c.optim
        assert (m.image_tower, m.text_tower, m.image_pretrained, m.text_pretrained, m.image_lr, m.text_lr, m.head, m.dim) == (
            "resnet50", "distilbert-base-uncased", True, True, 1.0, 1.0, "linear", 256
        )  # fmt: skip
        assert (m.image_size, m.max_tokens, m.freeze_norms, c.batch_size, c.epochs) == (256, 30, False, 128, 30)
        assert (o.lr, o.min_lr, o.warmup_lr, o.warmup * c.epochs, o.weight_decay) == (2e-4, 1e-6, 1e-5, 5, 0.02)
        assert (c.loss.gamma, c.loss.temperature, c.views.image, c.views.image_aug) == (0.8, 0.01, "paper", "single")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_papers_protocol_on_a_stand_in(amclr: Command, tmp_path: Path) -> None:
    """Every step of the file's header, but for the downloads: a folder as img2dataset leaves it, and towers of its kinds."""
    file = ROOT / "experiments" / "paper.yaml"
    for i in range(40):
        place = tmp_path / "cc3m" / f"{i // 20:05d}" / f"{i // 20:05d}{i:04d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        paint(list(COLOURS)[i % 4], i).save(place)
        place.with_suffix(".txt").write_text(f"a {list(COLOURS)[i % 4]} patch on grey ground, number {i}")
    (script,) = re.findall(r"^#   python - <<'END'\n(.*?)^#   END$", file.read_text(), re.M | re.S)
    code = "".join(line.removeprefix("#   ") + "\n" for line in script.splitlines())
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    rows = json.loads((tmp_path / "cc3m" / "captions.json").read_text())
    assert len(rows) == 40 and rows[0].keys() == {"image", "caption", "image_id"}
    assert (tmp_path / "cc3m" / rows[3]["image"]).is_file() and "patch on grey" in rows[3]["caption"]
    done = amclr("paraphrase", "cc3m", "--model", "rules")
    assert done.returncode == 0, done.stderr[-2000:]

    torch.manual_seed(0)
    timm.models.save_for_hf(
        timm.create_model("resnet10t", num_classes=4), tmp_path / "resnet", model_args={"num_classes": 4}
    )
    tokenizer = train_tokenizer([row["caption"] for row in rows])
    sizes = {"dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    AutoModel.from_config(DistilBertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "distilbert")
    tokenizer.save_pretrained(tmp_path / "distilbert")
    values = yaml.safe_load(file.read_text())
    values["settings"] |= {
        "model.image_tower": "local-dir:resnet", "model.text_tower": "distilbert", "model.image_size": 64,
        "epochs": 1, "batch_size": 8, "source.val_fraction": 0.2, "workers": 0, "accelerator": "cpu",
    }  # fmt: skip
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump(values))
    for colour, wnid in zip(COLOURS, ("n01440764", "n01443537", "n01484850", "n01491361"), strict=True):
        (tmp_path / "imagenet" / "val" / wnid).mkdir(parents=True)
        for k in range(2):
            paint(colour, 300 + k).save(tmp_path / "imagenet" / "val" / wnid / f"{k}.JPEG")
    done = amclr("compare", "paper.yaml", "--seeds", "1", "--zeroshot", "imagenet/val", timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "runs/compare-paper/results.json").read_text())
    assert [(r["variant"], r["grid"]["optim.name"]) for r in results["rows"]] == [
        (v, o) for o in ("adamw", "adamp") for v in ("sogclr", "isogclr", "amclr", "xamclr")
    ]
    assert all("zeroshot imagenet" in row["measures"] for row in results["rows"])
    run = Path("runs/compare-paper/runs/xamclr,optim.name=adamp/seed0")
    store = yaml.safe_load((tmp_path / run / "config.yaml").read_text())["source"]["paraphrases"]
    assert store.startswith("cc3m/paraphrases/rules"), "second texts are paraphrases"

    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    images = []
    for i in range(12):
        name = f"COCO_val2014_{i:012d}.jpg"
        paint(list(COLOURS)[i % 4], 500 + i).save(tmp_path / "coco" / "val2014" / name)
        sentences = [{"raw": f"{w} {list(COLOURS)[i % 4]} patch"} for w in ("a", "one", "this", "that", "my")]
        images.append(
            {"filepath": "val2014", "filename": name, "split": ("test", "restval")[i % 2], "sentences": sentences}
        )
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    done = amclr("evaluate", run, "--data", "coco/dataset_coco.json", "--split", "test", "--captions", "5")
    assert done.returncode == 0 and "test split: 6 images, 30 captions" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_accuracy_of_common_and_of_rare_kinds(amclr: Command, tmp_path: Path) -> None:
    """benchmarks/tail.py against a count by hand, on a set and with runs of a minute."""
    values = yaml.safe_load((ROOT / "experiments" / "scenes-tail.yaml").read_text())
    values["settings"] |= {
        "scenes": {"train": 64, "val": 16, "test": 8, "zeroshot": 80, "size": 32}, "epochs": 1, "batch_size": 16,
        "model": {"image_size": 32, "dim": 16, "image_lr": 0, "text_lr": 0}, "accelerator": "cpu",
    }  # fmt: skip
    values["variants"], values["grid"] = ["sogclr", "amclr"], {"scenes.tail": [0.0, 1.25], "scenes.noise": [0.3]}
    (tmp_path / "scenes-tail.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    done = amclr("compare", "scenes-tail.yaml", "--seeds", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "runs" / "compare-scenes-tail"
    command = [sys.executable, "-m", "benchmarks.tail", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    table = [[c.strip() for c in line.strip("|").split("|")] for line in done.stdout.splitlines()]
    assert table[0] == ["", "scenes.tail", "scenes.noise", "10 commonest", "20 between", "10 rarest"]
    assert [row[:3] for row in table[2:]] == [[v, t, "0.3"] for t in ("0.0", "1.25") for v in ("sogclr", "amclr")]
    ranked = [f"{colour}_{shape}" for colour, shape in ranked_kinds(0)]
    names = sorted(name for name in ranked for _ in range(2))  # two images of each, by folder
    for row, group in itertools.product(table[2:], range(3)):
        label = f"{row[0]},scenes.tail={row[1]},scenes.noise=0.3"
        own = (ranked[:10], ranked[10:30], ranked[30:])[group]
        shares = []
        for seed in (0, 1):
            hits = read_arrays(folder / "runs" / label / f"seed{seed}" / "queries-zeroshot.npz")
            assert hits is not None
            shares.append(
                100 * np.mean([hit for hit, name in zip(hits["top1"][:, 0], names, strict=True) if name in own])
            )
        assert row[3 + group].startswith(f"{np.mean(shares):.1f} ± {np.std(shares, ddof=1):.1f} (")
    most = [int(row[3].split("to ")[1].rstrip(")")) for row in table[2:]]
    assert most[0] == most[1] < 15 and most[2] == most[3] > 20
    done = subprocess.run([*command[:3], "nowhere"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no comparison in 'nowhere'" in done.stderr
