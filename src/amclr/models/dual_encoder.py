"""`DualEncoder`: an image tower and a text tower, each with a projection into one space of unit vectors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from tqdm import tqdm

from amclr.config.schema import ModelConfig
from amclr.data.images.decode import ImageSource, read_image
from amclr.data.images.views import whole
from amclr.models.adapters import add_adapters
from amclr.models.hub import OnHub
from amclr.models.towers import build_image_tower, build_text_tower
from amclr.utils.errors import UserError


class ResidualHead(nn.Module):
    """LayerNorm, then a linear map plus a two-layer GELU network: (B, F) -> (B, D)."""

    def __init__(self, width: int, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, dim)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, dim), nn.Dropout(dropout)
        )

    def forward(self, features: Tensor) -> Tensor:
        """features: (B, F) -> (B, D), not yet unit rows."""
        x = self.norm(features)
        out: Tensor = self.linear(x) + self.mlp(x)
        return out


class DualEncoder(nn.Module, OnHub):
    """Two towers and two projections; `forward` embeds stacked views as unit rows.

    A tower with learning-rate factor 0 is frozen: it has no gradient, keeps no activations, and stays in evaluation
    mode whatever `train()` says. A tower with adapters (LoRA, arXiv 2106.09685) trains those alone. Batch norms of a
    tower with adapters, and with `freeze_norms` those of the image tower, keep their statistics.

    from_checkpoint: `load_saved` follows, so the pretrained weights of trained towers are not loaded, and nothing is
    compiled. complete: all weights will be loaded, so no pretrained weights are loaded at all. text_only: without the
    image tower, whose libraries take seconds to import; such a model embeds texts alone.

    about: facts about its training that `save_pretrained` writes, by name: strings, numbers, and under "measured" a
    table of numbers.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Any, from_checkpoint: bool = False, complete: bool = False,
        text_only: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.about: dict[str, Any] = {}
        c, fresh = config, not from_checkpoint
        # Towers whose base weights are those of a published file, and are not stored.
        self.published = {
            name
            for name, tower, loaded, lr, rank in (
                ("image_tower", c.image_tower, c.image_pretrained, c.image_lr, c.image_adapters),
                ("text_tower", c.text_tower, c.text_pretrained, c.text_lr, c.text_adapters),
            )
            if tower != "small" and loaded and (lr == 0 or rank) and not complete
        }
        self.image_tower: Any = nn.Identity()
        if not text_only:
            self.image_tower = build_image_tower(config, weights=fresh or "image_tower" in self.published)
        self.text_tower = build_text_tower(config, tokenizer, weights=fresh or "text_tower" in self.published)
        self.image_head = nn.Identity() if text_only else self._head(self.image_tower.width)
        self.text_head = self._head(self.text_tower.width)
        for tower in self.frozen_towers:
            tower.requires_grad_(False)
        self._adapters: list[Any] = []
        for kind, tower, rank in self._adapter_ranks():
            if rank:
                self._adapters.append(add_adapters(tower.trunk, rank, kind))  # type: ignore[arg-type]
        if fresh:
            self._prepare_training()
        self.train()

    def _adapter_ranks(self) -> list[tuple[str, nn.Module, int]]:
        c = self.config
        return [("image", self.image_tower, c.image_adapters), ("text", self.text_tower, c.text_adapters)]

    def _prepare_training(self) -> None:
        """Set up activation checkpointing and compilation as configured."""
        frozen = self.frozen_towers
        for tower in (self.image_tower, self.text_tower):
            if self.config.activation_checkpointing and tower not in frozen:
                tower.checkpoint_activations()
        if self.config.compile:
            if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++"))):
                raise UserError("--model.compile needs a C++ compiler: install g++, or leave it out")
            # In place, so that names in the state dict stay. Captions vary in length, so their tower is compiled with
            # dynamic shapes; images have one size, and a second batch size makes torch compile for any.
            self.image_tower.compile()
            self.text_tower.compile(dynamic=True)

    def _head(self, width: int) -> nn.Module:
        c = self.config
        if c.head == "linear":
            return nn.Linear(width, c.dim)
        return ResidualHead(width, c.dim, c.hidden, c.dropout)

    @property
    def frozen_towers(self) -> list[nn.Module]:
        """The towers that are not trained."""
        factors = (self.image_tower, self.config.image_lr), (self.text_tower, self.config.text_lr)
        return [tower for tower, factor in factors if factor == 0]

    def train(self, mode: bool = True) -> DualEncoder:
        """Switch to training mode, except for frozen towers and batch norms that keep their statistics."""
        super().train(mode)
        for tower in self.frozen_towers:
            tower.eval()
        adapted = [tower for _, tower, rank in self._adapter_ranks() if rank]
        for tower in [*adapted, *([self.image_tower] if self.config.freeze_norms else [])]:
            for module in tower.modules():
                if isinstance(module, _NormBase):
                    module.eval()
        return self

    def forward(
        self, images: Tensor | None, tokens: Mapping[str, Tensor] | Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embed images and captions, each in one pass.

        images: (M, 3, S, S) uint8, or cached tower features (M, F). tokens: input_ids and
        attention_mask (K, L), or cached features (K, F). Returns unit rows (M, D) and (K, D);
        None stays None.
        """
        image = text = None
        if images is not None:
            features = self._features(self.image_tower, images) if images.dtype == torch.uint8 else images
            image = F.normalize(self.image_head(features).float(), dim=-1)
        if tokens is not None:
            features = tokens if isinstance(tokens, Tensor) else self._features(self.text_tower, **tokens)
            text = F.normalize(self.text_head(features).float(), dim=-1)
        return image, text

    def _features(self, tower: nn.Module, *args: Tensor, **tokens: Tensor) -> Tensor:
        """The features of a tower; of a frozen one without a graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and tower not in self.frozen_towers):
            out: Tensor = tower(*args, **tokens)
        return out

    def state_to_save(self) -> dict[str, Tensor]:
        """The weights to store: all but those that equal a published file.

        Pretrained towers that are frozen have none to store; those with adapters have the adapters alone.
        """
        return {k: v for k, v in self.state_dict().items() if not self._is_published(k)}

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_to_save` returned. Raises UserError where the weights belong to another model."""
        own = self.state_dict()
        if self._adapters:  # weights of a tower without adapters become the base
            base_names = {k.replace(".base_layer.", "."): k for k in own}
            state = {base_names.get(k, k): v for k, v in state.items()}
        self.published -= {k.partition(".")[0] for k in state if self._is_published(k)}
        resized = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
        if resized:
            raise UserError(f"these weights belong to another model: {', '.join(resized[:3])} have another shape")
        missing, unexpected = self.load_state_dict(state, strict=False)
        mismatched = [k for k in missing if not self._is_published(k)] + unexpected
        if mismatched:
            raise UserError(f"these weights belong to another model: {', '.join(mismatched[:3])} do not fit")

    @property
    def has_adapters(self) -> bool:
        """Whether the model has low-rank adapters that are not merged."""
        return bool(self._adapters)

    def trained_names(self) -> list[str]:
        """Names in the state dict of what training changes: all but frozen towers and the base of adapted ones."""
        frozen, adapted = self.frozen_towers, {f"{kind}_tower" for kind, _, rank in self._adapter_ranks() if rank}
        fixed = {name for name, module in self.named_children() if module in frozen}
        part_of = {k: k.partition(".")[0] for k in self.state_dict()}
        return [k for k, part in part_of.items() if part not in fixed and (part not in adapted or ".lora_" in k)]

    def init_from(self, state: Mapping[str, Tensor]) -> None:
        """Start from the `state_to_save` of a model without adapters. Raises UserError where the weights do not fit.

        Fresh adapters of this model stay as they are: without effect.
        """
        self.load_saved({**self.state_to_save(), **state})

    def _is_published(self, key: str) -> bool:
        return key.partition(".")[0] in self.published and ".lora_" not in key

    def merge_adapters(self) -> DualEncoder:
        """Merge the adapters into the weights; the model then has none."""
        for adapters in self._adapters:
            adapters.merge_and_unload()
        self.published -= {f"{kind}_tower" for kind, _, rank in self._adapter_ranks() if rank}
        self._adapters = []
        self.config = replace(self.config, image_adapters=0, text_adapters=0)
        return self

    # -- use --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def images_at_once(self) -> int:
        """Images per forward pass without gradients.

        On a CPU, memory for the activations of larger batches is returned to the system and faulted in again at every
        layer: 512 images at once took five times as long as 32 at a time.
        """
        return 32 if self.device.type == "cpu" else 256

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token tensors (B, L) of captions, truncated to `max_tokens` and padded to the longest."""
        out = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        )
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def prepare(self, image: ImageSource) -> Tensor:
        """An image (path, bytes, PIL or decoded) preprocessed for evaluation: (3, S, S) uint8."""
        size = self.config.image_size
        return whole(read_image(image, size), size)

    def encode_image(
        self, images: Iterable[ImageSource], batch_size: int | None = None, progress: bool = False
    ) -> Tensor:
        """Embed images (PIL images, paths or encoded bytes) as unit rows (n, D), float32 on the CPU.

        batch_size: images per forward pass; None chooses by device. Raises BadImage, with the reason, for an image that
        cannot be decoded.
        """
        size = batch_size or self.images_at_once
        return self._encode(list(images), size, progress, "images", self._embed_images)

    def encode_text(self, texts: Iterable[str], batch_size: int = 256, progress: bool = False) -> Tensor:
        """Embed captions as unit rows (n, D), float32 on the CPU."""
        if isinstance(texts, str):
            raise TypeError("encode_text takes a list of captions: pass [text]")
        return self._encode(list(texts), batch_size, progress, "captions", self._embed_captions)

    @torch.inference_mode()
    def project(self, image_features: Tensor | None, text_features: Tensor | None) -> Tensor:
        """Unit rows (n, D), float32 on the CPU, of tower features (n, F) of one modality; the other is None."""
        was_training = self.training
        self.eval()
        image, text = (None if f is None else f.to(self.device) for f in (image_features, text_features))
        rows = [r for r in self(image, text) if r is not None]
        self.train(was_training)
        return rows[0].float().cpu()

    def _embed_images(self, chunk: list[ImageSource]) -> Tensor:
        out: Tensor
        out, _ = self(torch.stack([self.prepare(p) for p in chunk]).to(self.device), None)
        return out

    def _embed_captions(self, chunk: list[str]) -> Tensor:
        out: Tensor
        _, out = self(None, {k: v.to(self.device) for k, v in self.tokenize(chunk).items()})
        return out

    @torch.inference_mode()
    def _encode(
        self, items: list[Any], batch_size: int, progress: bool, what: str, embed: Callable[[list[Any]], Tensor]
    ) -> Tensor:
        was_training = self.training
        self.eval()
        try:
            with tqdm(total=len(items), desc=f"Embedding {what}", disable=not progress, leave=False) as bar:
                rows = []
                for chunk in (items[k : k + batch_size] for k in range(0, len(items), batch_size)):
                    rows.append(embed(chunk).float().cpu())
                    bar.update(len(chunk))
        finally:
            self.train(was_training)
        return torch.cat(rows) if rows else torch.empty(0, self.config.dim)
