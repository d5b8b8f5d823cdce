"""How far exports differ from the model on pairs of a data set, as a table.

    python -m benchmarks.parity --data FLICKR8K [--runs RUN ...] [--towers NAME ...] [--formats onnx] [--precisions fp32]

Default towers: the demo's, the packaged pretrained ones, ResNet-50 with DistilBERT, and ViT-S/16 with BERT. All have their
full size, and random weights if none are packaged; batch norms get the statistics of some images first, as in training.
"same tensors" compares the networks; "its own reading" starts from the files, and includes the decoding and resizing of
open_clip or of the example.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.objectives import machine
from torch import nn
from transformers import BertConfig, DistilBertConfig

from amclr.config.recipes import frozen, paper, scenes
from amclr.config.schema import Config, ModelConfig, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.images.decode import Location
from amclr.export.base import get_format
from amclr.export.exporter import parity_pairs
from amclr.export.parity import Parity, compare
from amclr.models.dual_encoder import DualEncoder
from amclr.models.packaged import minilm_folder
from amclr.models.tokenizer import build_tokenizer
from amclr.runs.folder import Run


def towers(text_folder: Path) -> dict[str, ModelConfig]:
    """Model settings by name. text_folder: folder for the configurations of text towers."""
    for name, config in (("distilbert", DistilBertConfig()), ("bert", BertConfig())):
        config.save_pretrained(text_folder / name)
        build_tokenizer(ModelConfig(text_tower="minilm"), []).save_pretrained(text_folder / name)
    scratch: dict[str, Any] = {"image_pretrained": False, "text_pretrained": False}
    return {
        "demo's own": scenes().model,
        "packaged, linear": replace(frozen().model, head="linear"),
        "packaged, residual": frozen().model,
        "ResNet-50 + DistilBERT": replace(paper().model, text_tower=str(text_folder / "distilbert"), **scratch),
        "ViT-S/16 + BERT": ModelConfig(
            image_tower="vit_small_patch16_224", image_size=224, text_tower=str(text_folder / "bert"), **scratch
        ),
    }


def settle_norms(model: DualEncoder, images: list[Location]) -> None:
    """Set the statistics of batch norms with random weights from some images."""
    norms = [m for m in model.image_tower.modules() if isinstance(m, nn.BatchNorm2d)]
    if norms and model.config.image_lr:
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            model.train()(torch.stack([model.prepare(p) for p in images[:64]]), None)


def row(name: str, to: str, precision: str, parities: dict[str, Parity], limit: float) -> str:
    p, own = parities["parity"], parities["own_reading"]
    return (
        f"| {name} | {to}, {precision} | {p.difference:.1e} | {limit:g} | {p.same} of {p.queries} | {p.overlap:.1%} | "
        f"{own.difference:.1e} | {own.cosine:.6f} | {own.overlap:.1%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", nargs="*", default=[])
    parser.add_argument("--towers", nargs="*", default=[], help="words in the names of towers; default: all")
    parser.add_argument("--formats", nargs="*", default=["open_clip", "onnx"])
    parser.add_argument("--precisions", nargs="*", default=["fp32", "fp16", "int8"])
    options = parser.parse_args()
    torch.manual_seed(0)
    assert minilm_folder().is_dir()
    config = Config(data=options.data, source=SourceConfig(paraphrases="none"))
    captions = [
        c
        for s in manifests.load(config, manifests.cache_folder(config)).split("train")
        for c in s.captions
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as text_folder:
        models = {run: Run.open(Path(run)).load_model for run in options.runs} or {
            name: lambda c=settings: DualEncoder(c, build_tokenizer(c, captions))  # type: ignore[misc]
            for name, settings in towers(Path(text_folder)).items()
            if not options.towers or any(word in name for word in options.towers)
        }
        print(f"{options.data}; {machine('cpu', torch.get_num_threads())}", flush=True)
        print("| towers | export | largest difference | limit | queries with the same top 10 | shared of the top 10 "
              "| its own reading: largest difference | least cosine | shared of the top 10 |")  # fmt: skip
        print("|---" * 9 + "|", flush=True)
        for name, build in models.items():
            model = build()
            images, texts = parity_pairs(model, config)
            if not options.runs:
                settle_norms(model, images)
            model.eval()
            for to in options.formats:
                exporter = get_format(to)
                for precision, limit in exporter.limits.items():
                    if precision not in options.precisions or (to == "open_clip" and model.config.head != "linear"):
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        exporter.write(model, Path(folder), 0.05, precision)
                        exported = exporter.load(Path(folder))
                        print(row(name, to, precision, compare(model, exported, images, texts), limit), flush=True)


if __name__ == "__main__":
    main()
