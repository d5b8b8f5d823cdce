"""Export for open_clip: a folder that it loads as `local-dir:FOLDER`, without amclr."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from amclr.data.images.decode import Location
from amclr.export.base import Exported, Format
from amclr.models.dual_encoder import DualEncoder
from amclr.models.towers import SMALL_TOWER
from amclr.utils.errors import UserError, first_line
from amclr.utils.files import write_text, written

if TYPE_CHECKING:
    from transformers import BertConfig

TEXT_TOWERS = ("bert", "distilbert", "roberta", "xlm-roberta")
"""Text towers that open_clip can build, and that end in a layer norm, which can absorb a head's bias."""

ALTERNATIVE = "give --to onnx or --to hf instead"


def write(model: DualEncoder, folder: Path, temperature: float, precision: str) -> None:
    """Write a folder that open_clip loads as `local-dir:FOLDER`.

    Raises UserError for towers and heads that open_clip cannot express.
    """
    if model.config.head != "linear":
        raise UserError(
            f"open_clip has no head like the run's (--model.head {model.config.head}): {ALTERNATIVE}, or train with "
            "--model.head linear"
        )
    from safetensors.torch import save

    vision, image_state = _image_tower(model, folder)
    text_state = _text_tower(model, folder)
    state = {**image_state, **text_state, "logit_scale": torch.tensor(-math.log(temperature))}
    tower: Any = model.image_tower
    pooler = {"mean": "mean_pooler", "first": "cls_last_hidden_state_pooler"}[model.config.text_pooling]
    config = {
        "model_cfg": {
            "embed_dim": model.config.dim,
            "custom_text": True,
            "vision_cfg": {"image_size": model.config.image_size, **vision},
            "text_cfg": {
                "hf_model_name": str(folder),
                "hf_tokenizer_name": str(folder),
                "hf_model_pretrained": False,
                "hf_proj_type": "linear",
                "hf_pooler_type": pooler,
                "context_length": model.config.max_tokens,
            },
        },
        "preprocess_cfg": {
            "size": model.config.image_size, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest",
            "mean": (tower.mean.flatten() / 255).tolist(), "std": (tower.std.flatten() / 255).tolist(),
        },
    }  # fmt: skip
    model.tokenizer.save_pretrained(folder)
    write_text(folder / "open_clip_config.json", json.dumps(config, indent=2) + "\n")
    with written(folder / "open_clip_model.safetensors") as handle:
        handle.write(save({k: v.detach().contiguous() for k, v in state.items()}))


def relocate(folder: Path, home: Path) -> None:
    """Put the folder's final path into its configuration: open_clip needs absolute paths."""
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    text["hf_model_name"] = text["hf_tokenizer_name"] = str(home)
    if vision["timm_model_name"].startswith("local-dir:"):
        vision["timm_model_name"] = f"local-dir:{home / 'image_tower'}"
    write_text(file, json.dumps(config, indent=2) + "\n")


def _image_tower(model: DualEncoder, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's vision_cfg and weights of the image tower; writes timm's arguments, if any, to a folder."""
    trunk: Any = model.image_tower.trunk
    if model.config.image_tower == "small":
        name, arguments = SMALL_TOWER
    else:
        name = trunk.pretrained_cfg["architecture"]
        arguments = {k: v for k, v in getattr(trunk, "_model_args", {}).items() if k != "num_classes"}
    source = name
    if arguments:  # open_clip passes timm only a name, but timm reads arguments from a folder of that name
        (folder / "image_tower").mkdir()
        timm_config = {"architecture": name, "num_classes": 0, "model_args": arguments, "pretrained_cfg": {}}
        write_text(folder / "image_tower" / "config.json", json.dumps(timm_config, indent=2) + "\n")
        source = f"local-dir:{folder / 'image_tower'}"
    vision = {"timm_model_name": source, "timm_model_pretrained": False, "timm_pool": ""}
    state = {f"visual.trunk.{k}": v for k, v in trunk.state_dict().items()}
    head: Any = model.image_head
    if trunk.num_features == model.image_tower.width:
        vision |= {"timm_proj": "linear", "timm_proj_bias": True}
        prefix = "visual.head.proj"
    else:  # open_clip takes `num_features` for the width, which is wrong here: use the trunk's own classifier
        vision |= {"timm_proj": "", "timm_pool": trunk.global_pool.pool_type}
        prefix = f"visual.trunk.{trunk.pretrained_cfg['classifier']}"
    return vision, state | {f"{prefix}.weight": head.weight, f"{prefix}.bias": head.bias}


def _text_tower(model: DualEncoder, folder: Path) -> dict[str, Tensor]:
    """open_clip's weights of the text tower; writes its configuration to the folder."""
    trunk: Any = model.text_tower.trunk
    config, kind = trunk.config, trunk.config.model_type
    if kind not in TEXT_TOWERS:
        raise UserError(
            f"open_clip cannot build the text tower '{model.config.text_tower}' (its type is {kind}; supported are "
            f"{', '.join(TEXT_TOWERS)}): {ALTERNATIVE}"
        )
    state = trunk.state_dict()
    if kind == "distilbert":
        config, state = bert_of_distilbert(config, state)
    pad = model.tokenizer.pad_token_id
    if config.pad_token_id != pad:
        if kind != "bert":  # positions are counted from it
            raise UserError(f"the tokenizer pads with {pad}, but its tower with {config.pad_token_id}: {ALTERNATIVE}")
        config = type(config)(**{**config.to_dict(), "pad_token_id": pad})
    config.save_pretrained(folder)
    norm = f"encoder.layer.{config.num_hidden_layers - 1}.output.LayerNorm"
    head: Any = model.text_head
    bias, weight = absorb_bias(state[f"{norm}.weight"], state[f"{norm}.bias"], head.weight, head.bias)
    state = {**state, f"{norm}.bias": bias}
    return {**{f"text.transformer.{k}": v for k, v in state.items()}, "text.proj.weight": weight}


def absorb_bias(gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the bias of a linear map of a layer norm's output, exactly and for any sizes.

    gain, shift: (F,), of the norm. weight (D, F), bias (D,): of the map. Returns a new shift and a new weight that
    compute the same without a bias.

    A norm outputs y = gain * n + shift, where each row of n sums to zero; so does a mean of rows. So
    c (1/gain) . (y - shift) = 0 for any c in R^D, and weight + c (1/gain)^T maps y as weight does, up to a constant
    that c determines. With shift = gain that constant is F c.
    """
    g, s, w, b = (x.detach().double() for x in (gain, shift, weight, bias))
    c = (w @ (s - g) + b) / len(g)
    return g.to(shift), (w + c[:, None] / g).to(weight)


def bert_of_distilbert(config: Any, state: dict[str, Tensor]) -> tuple[BertConfig, dict[str, Tensor]]:
    """Convert a DistilBERT to the equivalent BERT: other names, and token-type embeddings of zero."""
    from transformers import BertConfig

    names = {
        "transformer.layer": "encoder.layer", "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key", "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense", "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense", "ffn.lin2": "output.dense", "output_layer_norm": "output.LayerNorm",
    }  # fmt: skip
    renamed = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value
    renamed["embeddings.token_type_embeddings.weight"] = torch.zeros(1, config.dim)
    bert = BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, intermediate_size=config.hidden_dim, hidden_act=config.activation,
        max_position_embeddings=config.max_position_embeddings, type_vocab_size=1, pad_token_id=config.pad_token_id,
    )  # fmt: skip
    return bert, renamed


def load(folder: Path) -> Exported:
    """Load the folder with open_clip. Raises UserError if it cannot."""
    import open_clip
    from PIL import Image

    try:
        loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    except Exception as error:  # open_clip, timm and torch raise many kinds
        raise UserError(f"open_clip cannot build these towers ({first_line(error)}): {ALTERNATIVE}") from None
    loaded.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    mean, std = (torch.tensor(loaded.visual.preprocess_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    pad = loaded.text.config.pad_token_id

    def images(pixels: Tensor) -> Tensor:
        rows: Tensor = loaded.encode_image((pixels / 255 - mean) / std, normalize=True)
        return rows

    def texts(tokens: dict[str, Tensor]) -> Tensor:
        # open_clip recognises padding only by its id.
        ids = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, pad)
        rows: Tensor = loaded.encode_text(ids, normalize=True)
        return rows

    def own_images(locations: Sequence[Location]) -> Tensor:
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(p.read()))) for p in locations])
        rows: Tensor = loaded.encode_image(pixels, normalize=True)
        return rows

    def own_texts(captions: Sequence[str]) -> Tensor:
        rows: Tensor = loaded.encode_text(tokenizer(list(captions)), normalize=True)
        return rows

    return Exported(images, texts, own_images, own_texts)


FORMAT = Format(
    write, load, {"fp32": 1e-5}, ("open_clip", "safetensors"), relocate,
    "open_clip.create_model_and_transforms('local-dir:{home}')",
)  # fmt: skip
