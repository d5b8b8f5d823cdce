"""The image and text towers: encoders of timm and transformers, small ones, and the packaged ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from amclr.config.schema import ModelConfig
from amclr.models import packaged
from amclr.models.pretrained import import_transformers, text_source, text_tower_error
from amclr.utils.errors import UserError, first_line

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SMALL_TOWER: tuple[str, dict[str, Any]] = (
    "resnet18", {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "stem_width": 16, "stem_type": "deep"},
)  # fmt: skip
"""The image tower `small`: the name of a timm architecture, and its arguments."""


class ImageTower(nn.Module):
    """An image encoder: uint8 images (B, 3, S, S) -> features (B, F). It normalises the images itself.

    layout: memory format of weights and images; channels last for trunks with convolutions.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        convolutions = any(isinstance(m, nn.Conv2d) for m in trunk.modules())
        self.layout = torch.channels_last if convolutions else torch.contiguous_format
        self.trunk = trunk.to(memory_format=self.layout)
        self.activation_checkpointing = False
        # Measured, since for some timm models `num_features` is not the width of the output.
        with torch.inference_mode():
            self.width = int(trunk.eval()(torch.zeros(1, 3, size, size)).shape[-1])
        # Not saved: they follow from the tower's name.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, S, S) uint8 -> (B, F)."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        out: Tensor = self.trunk(x.contiguous(memory_format=self.layout))
        if self.activation_checkpointing and out.requires_grad:
            out.register_hook(self._restore_statistics)
        return out

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass. Raises UserError where the trunk does not support it."""
        try:
            self.trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise _no_checkpointing("image", self.trunk) from None
        self.activation_checkpointing = True

    def _restore_statistics(self, gradient: Tensor) -> None:
        """Undo the second update of batch norm statistics, which the recomputation makes during backward."""
        norms = [m for m in self.trunk.modules() if isinstance(m, _NormBase) and m.training]
        buffers = [b for m in norms for b in m.buffers(recurse=False)]
        if buffers:
            saved = [b.clone() for b in buffers]
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: torch._foreach_copy_(buffers, saved))


class TextTower(nn.Module):
    """A caption encoder: token tensors (B, L) -> features (B, F), by mean or first-token pooling."""

    def __init__(self, trunk: nn.Module, pooling: str) -> None:
        super().__init__()
        self.trunk = trunk
        self.pooling = pooling
        self.width = int(trunk.config.hidden_size)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (B, L) -> (B, F)."""
        states: Tensor = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "first":
            return states[:, 0]
        weights = attention_mask[..., None].to(states.dtype)
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass. Raises UserError where the trunk does not support it."""
        trunk: Any = self.trunk
        if not getattr(trunk, "supports_gradient_checkpointing", False):
            raise _no_checkpointing("text", trunk)
        # transformers 5 has renamed the method.
        enable = getattr(trunk, "activation_checkpointing_enable", None) or trunk.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _no_checkpointing(kind: str, trunk: nn.Module) -> UserError:
    return UserError(
        f"--model.activation_checkpointing: the {kind} tower ({type(trunk).__name__}) does not support it; leave it out"
    )


def build_image_tower(config: ModelConfig, weights: bool = True) -> ImageTower:
    """The image tower of a configuration. Raises UserError, saying what to give instead, if it cannot be loaded.

    weights: false does not load pretrained weights, where others are loaded afterwards.
    """
    import timm  # slow to import

    name = config.image_tower
    load = config.image_pretrained and weights
    if name == "small":
        architecture, arguments = SMALL_TOWER
        return ImageTower(
            timm.create_model(architecture, num_classes=0, **arguments), config.image_size, CLIP_MEAN, CLIP_STD
        )
    if name == packaged.IMAGE_TOWER:
        lite: Any = timm.create_model(packaged.TIMM_NAME)
        if load:
            lite.load_state_dict(packaged.efficientnet_state(lite.state_dict()))
        lite.reset_classifier(0)
        cfg = lite.pretrained_cfg
        return ImageTower(lite, config.image_size, cfg["mean"], cfg["std"])
    size: dict[str, Any] = {"img_size": config.image_size} if _takes_img_size(name) else {}
    try:
        trunk = timm.create_model(name, pretrained=load, num_classes=0, **size)
    except Exception as error:  # timm and the hub raise many kinds
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        hint = f" (timm has {', '.join(near)})" if near and name not in near else ""
        raise UserError(
            f"cannot load image tower '{name}'{hint}: {first_line(error)}. Offline, give "
            f"local-dir:FOLDER, {packaged.IMAGE_TOWER} (pip install 'amclr[pretrained]'), or small"
        ) from None
    cfg = getattr(trunk, "pretrained_cfg", {}) if config.image_pretrained else {}
    return ImageTower(trunk, config.image_size, cfg.get("mean", CLIP_MEAN), cfg.get("std", CLIP_STD))


def _takes_img_size(name: str) -> bool:
    """Whether an architecture has position embeddings of fixed size, so that timm needs the image size."""
    architecture = name.split(".")[0]
    return architecture.startswith(("vit_", "deit", "eva", "beit"))


def build_text_tower(config: ModelConfig, tokenizer: Any, weights: bool = True) -> TextTower:
    """The text tower of a configuration. Raises UserError, saying what to give instead, if it cannot be loaded.

    weights: false does not load pretrained weights, where others are loaded afterwards.
    """
    transformers = import_transformers()
    if config.text_tower == "small":
        bert = transformers.BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=384,
            max_position_embeddings=max(64, config.max_tokens),
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return TextTower(transformers.BertModel(bert, add_pooling_layer=False), config.text_pooling)
    source = text_source(config)
    try:
        if config.text_pretrained and weights:
            trunk = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
        else:
            configuration = transformers.AutoConfig.from_pretrained(source)
            trunk = transformers.AutoModel.from_config(configuration, dtype=torch.float32)
    except Exception as error:
        raise text_tower_error(config, error) from None
    # The pooler's output is not used, so it would get no gradient.
    if getattr(trunk, "pooler", None) is not None:
        trunk.pooler = None
    return TextTower(trunk, config.text_pooling)
