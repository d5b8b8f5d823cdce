"""Every setting of a run, typed and frozen. The docstring under a field is its help text.

Imports no torch, so that `amclr --help` is quick. Names on the command line are the field names:
`amclr train --data photos --loss.temperature 0.05`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class ScenesConfig:
    """The built-in generated data set (`--data scenes`)."""

    train: int = 3000
    """Training images."""
    val: int = 500
    """Validation images."""
    test: int = 500
    """Test images."""
    zeroshot: int = 800
    """Single-object images for zero-shot classification, over all classes together."""
    size: int = 64
    """Side of an image in pixels."""
    captions: int = 5
    """Captions per image, paraphrases of each other."""
    tail: float = 0.0
    """How unequally often training images show the 40 kinds of things (colour and shape): the kind of rank k as
    k ** -tail. 0 is all alike; 1.25, the most there can be, the commonest a hundred times as often as the rarest.
    The seed says which are rare. Validation, test and zero-shot images stay balanced."""
    noise: float = 0.0
    """Share of the training images whose captions describe another image. The seed says which; more noise adds
    others to them."""
    seed: int = 0
    """Seed of the scenes; the set is a function of it."""


@dataclass(frozen=True)
class SourceConfig:
    """Where images and captions are, and which of them are used."""

    captions_file: str = ""
    """Captions file inside the data folder; empty finds captions.txt, .csv, .jsonl, metadata.csv and the like."""
    images: str = ""
    """Folder of the images that a captions file names, from the data folder on or absolute; nothing outside
    it is opened. Empty finds Images, images or the data folder."""
    image_column: str = ""
    """Column or key with the image; empty finds `image`, `file_name`, `path` and the like."""
    caption_column: str = ""
    """Column or key with the caption or a list of them; empty finds `caption`, `text`, `title` and the like."""
    encoding: str = "utf-8"
    """Text encoding of a CSV or TSV file."""
    class_caption: str = "a photo of a {}"
    """Caption of the images in a folder by class, {} standing for the class."""
    captions: Literal["all", "one"] = "all"
    """all: every visit draws one of the image's captions. one: the first is the caption, the others
    serve only as paraphrases for methods with a second text view."""
    paraphrases: str = ""
    """Paraphrases of the captions: a folder that `amclr paraphrase` wrote, the name of one of its versions, or a
    CSV, TSV or JSONL file of caption, paraphrase. Empty finds DATA/paraphrases; `none` uses none."""
    val_fraction: float = 0.05
    """Share of the images held out for validation where the folder has no val.txt."""
    fold: str = ""
    """K/N, such as 1/6, for cross-validation: the training images are cut into N equal parts by a hash of their
    names; the K-th is what is validated on, the others are trained on, and the usual validation images rest."""
    duplicates: Literal["positives", "captions", "negatives"] = "positives"
    """positives: near-duplicate images, and captions that stand under several images, are positives of each
    other rather than negatives. captions: identical captions alone, for drawings or studio images, which differ
    in what is small. negatives: neither. Images are compared where they are decoded beforehand (scan_up_to)."""
    max_bad: float = 0.02
    """Abort if more than this share of rows or images cannot be used."""
    scan_up_to: int = 200_000
    """Decode every image once before training where there are at most so many; of more, bad ones are passed
    over in training, unless `amclr inspect --scan` has found them."""


@dataclass(frozen=True)
class ViewsConfig:
    """How an image and its caption are rendered at each visit."""

    image: Literal["paper", "strong", "weak", "none"] | list[Any] = "paper"
    """First image view. paper: crop, flip, RandAugment. strong: SimCLR's crop, flip, colour, grey, blur.
    weak: mild crop, flip. none: as in evaluation. Or a list of torchvision's v2 transforms, such as
    '[{RandomResizedCrop: {size: 64, scale: [0.5, 1]}}, {ColorJitter: {brightness: 0.4}}]'."""
    image_aug: Literal["single", "paper", "strong", "weak", "none"] | list[Any] = "single"
    """Second image view (image_aug). single: one operation drawn per sample from blur, flip, noise,
    brightness, contrast, sharpen and crop, as in the paper; or anything that the first view can be."""
    where: Literal["auto", "workers", "device"] = "auto"
    """Where colours are changed, of whole batches: in the processes that prepare them, or on the device; the
    images are the same. auto: on a GPU where there is one."""
    flip: bool = True
    """Let the views mirror images. Turn off where captions say left and right."""
    word_noise: float = 0.1
    """Chance per word of a deletion or swap where the second text view is the caption with word noise."""
    word_synonyms: float = 0.0
    """Chance per word of a synonym there, for words that the (English) lexicon has one for."""
    paraphrases: float = 0.0
    """Weight of a paraphrase of the caption as its second text view. Views are drawn in proportion to the weights
    of those that there are; with all three weights 0, it is another caption of the image where there is one, else
    a paraphrase, else word noise."""
    other_captions: float = 0.0
    """Weight of another caption of the image as second text view."""
    words: float = 0.0
    """Weight of the caption with word noise as second text view."""
    cached: int = 4
    """Cached views per image and policy where both towers are frozen."""
    cached_seed: int = 0
    """Seed of the cached views; apart from --seed, so that runs with other seeds share them."""


@dataclass(frozen=True)
class ModelConfig:
    """The two towers and their projections."""

    image_tower: str = "small"
    """`small` (from scratch), `efficientnet-lite0` (needs amclr[pretrained]), a timm model name or
    `local-dir:FOLDER`."""
    image_pretrained: bool = True
    """Load pretrained weights into a timm model; false starts it from scratch."""
    image_size: int = 64
    """Side in pixels of the images that the image tower sees."""
    image_lr: float = 1.0
    """Learning-rate factor of the image tower; 0 freezes it."""
    image_adapters: int = 0
    """Rank of low-rank adapters (LoRA) through which alone the image tower is trained; 0 trains all its weights.
    Needs amclr[adapters]."""
    freeze_norms: bool = False
    """Let the batch norms of a pretrained image tower keep the statistics that it came with, and normalise by them;
    the rest is trained. For small data, whose statistics would replace those of millions of images."""
    text_tower: str = "small"
    """`small` (from scratch, own tokenizer), `minilm` (needs amclr[pretrained]), a transformers model
    name or a folder."""
    text_pretrained: bool = True
    """Load pretrained weights into a transformers model; false starts it from scratch."""
    text_pooling: Literal["mean", "first"] = "mean"
    """How token states become one vector: their mean, or the first token."""
    text_lr: float = 1.0
    """Learning-rate factor of the text tower; 0 freezes it."""
    text_adapters: int = 0
    """Rank of low-rank adapters (LoRA) through which alone the text tower is trained; 0 trains all its weights.
    Needs amclr[adapters]."""
    max_tokens: int = 32
    """Captions are cut to this many tokens."""
    head: Literal["linear", "residual"] = "linear"
    """Projection: linear (the paper), or LayerNorm, then linear plus a two-layer GELU network."""
    hidden: int = 1024
    """Hidden width of the residual head."""
    dropout: float = 0.2
    """Dropout in the residual head."""
    dim: int = 256
    """Dimension of the shared space."""
    compile: bool = False
    """Compile the towers (torch.compile): minutes at the start of a run, for faster steps."""
    activation_checkpointing: bool = False
    """Keep few activations of the towers that are trained, and compute the others again in the backward pass: less
    memory, for about a third more time. The gradient is the same."""


@dataclass(frozen=True)
class LossConfig:
    """Settings of the objective; empty ones follow the method."""

    temperature: float | None = None
    """Temperature tau, or its start where it is learned."""
    temperature_mode: Literal["fixed", "learnable", "individual"] | None = None
    """fixed, one learnable, or one per sample and term (global objectives)."""
    gamma: float = 0.8
    """Weight of the batch in the running estimate; 1 keeps no memory. With cosine: its final value; with adaptive: its
    least."""
    gamma_schedule: Literal["constant", "cosine", "adaptive"] = "constant"
    """constant; cosine from 1 to gamma over the epochs; or adaptive, between gamma and 1 as the batch's noise and
    the estimates' age ask for."""
    rho: float = 2.5
    """Divergence from uniform weights at which learned temperatures of global objectives settle."""
    temperature_lr: float = 1e-3
    """Step size of individual temperatures."""
    pairs: Literal["first", "aligned", "all"] | None = None
    """Image-text pairs to align: first (x, t); aligned (x, t) and (x', t'); all four. Gives baselines the
    same views as AmCLR."""
    cross_weight: float = 1.0
    """Weight of image-text terms."""
    image_weight: float = 1.0
    """Weight of image-image terms."""
    text_weight: float = 1.0
    """Weight of text-text terms."""
    cyclic_weight: float | None = None
    """Weight of each of CyCLIP's two consistency penalties; empty is the method's own: 0.25 for cyclip, 0 for
    the others."""
    queue: int = 0
    """Samples of the last batches that stay as further negatives: 112, say, with gamma 1, for batches of less than 100
    on frozen towers; 0 is none. Not for towers from scratch, whose embeddings move too fast."""
    estimator: Literal["per-term", "reference"] = "per-term"
    """per-term: an estimate per sample and term. reference: one per sample, as the public AmCLR code."""
    storage: Literal["auto", "device", "host", "disk"] = "auto"
    """Where the estimators are: on the device, in memory, or memory-mapped on disk; auto: the first that they fit."""
    matmul_dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = "auto"
    """Type of the embeddings in the objective's matrix products; auto is exact. tf32 on a GPU alone."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule."""

    name: str = "adamw"
    """adamw, adamp, adam, sgd, sgdp, radam, nadam, lamb, lion or novograd."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.02
    """Decoupled weight decay; norms, biases and temperatures are exempt."""
    warmup: float = 0.1
    """Share of all steps spent warming up."""
    warmup_lr: float = 1e-5
    """Learning rate of the first step."""
    min_lr: float = 1e-6
    """Learning rate of the last step."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: str = "scenes"
    """A folder of captioned images; a CSV, TSV, JSON, JSON lines or Parquet file; WebDataset tars
    ('shards/{00..12}.tar'); a saved Hugging Face dataset, or hf:NAME from the Hub; a folder of images by class;
    a URL; a YAML file that mixes several; or `scenes`, the built-in generated set."""
    out: str = ""
    """Run folder; empty makes runs/DATA-OBJECTIVE-seedN."""
    objective: str = "amclr"
    """clip, cyclip, siglip, simclr, sogclr, isogclr, amclr, xamclr, xamclr-image, xamclr-text, iamclr
    or ixamclr."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step, over all processes: more of them share the batch, and learn the same."""
    micro_batch: int = 0
    """Images embedded at a time by each process; 0 is all of them, halved where memory does not suffice. The
    gradient is that of the whole batch all the same, for one more forward pass: a batch of thousands trains in
    the memory of a small one."""
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Arithmetic of the towers; the objective is always in float32. auto: bf16-mixed on a GPU that has it, else
    32-true."""
    tf32: bool = True
    """On a GPU, let float32 matrix products of the towers round their factors to TF32."""
    deterministic: bool = True
    """On a GPU, use deterministic algorithms, so that a run that is gone on with ends with the same bits."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto, cpu, cuda or mps."""
    devices: int = 0
    """Processes on this machine, one per GPU; 0 is as many as torchrun or SLURM started, else one."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes hold the model: ddp, each the whole; fsdp, each a part. auto is ddp."""
    sync_batchnorm: bool = False
    """On GPUs, let batch norms take their statistics over all processes; else each takes those of its share."""
    watchdog_timeout: float = 45.0
    """Seconds that one of several processes may be silent or stuck before all stop, and say so."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """Where loss or gradient is NaN or infinite: stop; skip the step and count it; or roll back to the last
    checkpoint and leave the step out. The samples and the batch are saved under faults/ in the run folder."""
    nan_limit: int = 10
    """Steps that may be skipped or rolled back before the run stops."""
    workers: int = 0
    """Processes that prepare batches; 0 prepares them in the training process."""
    init_from: str = ""
    """A run folder whose best weights, heads and tokenizer included, this run begins with."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated and kept;
    0 keeps none. It starts small: min(ema, (1 + step) / (10 + step))."""
    wise: float = 1.0
    """Evaluate and keep (1 - wise) * start + wise * trained weights (WiSE-FT). Start: pretrained towers; with
    --init_from, all of that run."""
    monitor: str = ""
    """A folder of images by class: zero-shot accuracy on (at most 2000 of) them at every evaluation, beside that
    of the model at the start."""
    eval_every: int = 1
    """Epochs between evaluations and checkpoints."""
    keep: int = 2
    """Checkpoints kept besides last and best."""
    checkpoint_minutes: float = 0.0
    """Also write a checkpoint this often; 0 is as often as costs little: every 10 seconds for small models."""
    decoded: Literal["auto", "ram", "disk", "none"] = "auto"
    """Where decoded images are kept: ram; disk, in a file that later runs find; none, decoded at each visit.
    auto: the file where it is there already, else memory where they fit, else disk where they fit."""
    ram_cache: float = 4.0
    """GB of memory that decoded images may take."""
    disk_cache: float = 32.0
    """GB of disk that decoded images of all data sets may take, in the cache folder."""
    cache: str = ""
    """Folder of generated data and cached features; empty is $AMCLR_CACHE or ~/.cache/amclr."""
    wandb: bool = False
    """Also log to Weights & Biases (needs amclr[wandb])."""
    source: SourceConfig = field(default_factory=SourceConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class ParaphraseConfig:
    """How paraphrases of a data set's captions are made, and which are kept."""

    model: str = "humarin/chatgpt_paraphraser_on_T5_base"
    """A seq2seq or causal transformers model, by name or folder; or `rules`, for English, which needs no model."""
    k: int = 3
    """Paraphrases kept per caption, at most."""
    candidates: int = 0
    """Candidates made per caption, of which the first k that pass the filters are kept; 0 is k + 2, and
    k for rules."""
    out: str = ""
    """Folder of the store; empty is DATA/paraphrases."""
    seed: int = 0
    """Seed of the sampling."""
    prompt: str = ""
    """What the model is given, with {} for the caption; empty is `paraphrase: {}` for seq2seq models, and a request
    in a sentence for causal ones."""
    top_k: int = 120
    """Sampling: only the most probable tokens, this many."""
    top_p: float = 0.95
    """Sampling: only the most probable tokens that make up this probability."""
    temperature: float = 1.0
    """Sampling: temperature."""
    max_tokens: int = 64
    """Tokens made at most; a candidate that does not end by then is rejected."""
    batch_size: int = 32
    """Captions per batch."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model; the two halves are for GPUs."""
    revision: str = "main"
    """Revision of a model from the hub."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    shortest: float = 0.5
    """Filter: words of a paraphrase at least, as a share of its caption's."""
    longest: float = 2.0
    """Filter: words of a paraphrase at most, as a share of its caption's; four more are always allowed."""
    keep_facts: bool = True
    """Filter: reject what changes numbers, colours, negation, or left and right (English)."""
    similarity: float | None = None
    """Filter: cosine of the embeddings of caption and paraphrase at least; 0 asks no encoder. Empty is 0.5 for
    models and 0 for rules."""
    encoder: str = "minilm"
    """Text encoder of that filter: `minilm` (needs amclr[pretrained]), or a transformers model by name or folder."""
    progress: bool = True
    """Show how far it is, with captions per second and the time left."""


@dataclass(frozen=True)
class ServeConfig:
    """Who may search in an index over HTTP, and how much."""

    host: str = "127.0.0.1"
    """Address to listen at. Another one than this machine's own (127.0.0.1) lets others in, and needs a token."""
    port: int = 7860
    """Port to listen at; 0 takes a free one."""
    token: str = ""
    """What is asked of everybody, 16 characters or more; empty is the environment's AMCLR_TOKEN."""
    proxy: str = ""
    """Address of a proxy in front, whose X-Forwarded-For is believed."""
    rate: float = 10.0
    """Searches a second that an address may make over time; 0 sets no limit."""
    burst: int = 50
    """Searches that an address may make at once."""
    waiting: int = 256
    """Searches that may wait; further ones are refused."""
    batch: int = 64
    """Searches that are made together, at most."""
    deadline: float = 10.0
    """Seconds after which a search that still waits is given up."""
    upload: float = 10.0
    """Largest image that may be uploaded, in MB."""


MAY_CHANGE = frozenset((
    "out", "epochs", "micro_batch", "deterministic", "accelerator", "devices", "strategy", "watchdog_timeout", "on_nan",
    "nan_limit", "workers", "eval_every", "keep", "checkpoint_minutes", "decoded", "ram_cache", "disk_cache", "cache",
    "wandb", "source.max_bad", "source.scan_up_to", "views.where", "loss.storage", "monitor", "model.compile",
    "model.activation_checkpointing",
))  # fmt: skip
"""Settings that a run may be gone on with otherwise: they change how it runs, or how long, and not what it learns."""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names, as on the command line, whether they were nested or dotted already."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def fixed_differences(before: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ and may not, by their names on the command line: what they were, what they are."""
    then, since = flat(asdict(before)), flat(asdict(now))
    return {name: (then[name], since[name]) for name in then if name not in MAY_CHANGE and then[name] != since[name]}


def fold_of(text: str) -> tuple[int, int] | None:
    """(K, N) of `source.fold` "K/N"; None where it is empty. Raises ValueError where it is no such thing."""
    if not text:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    k, n = map(int, found.groups()) if found else (0, 0)
    if not (1 <= k <= n and n > 1):
        raise ValueError(f"--source.fold is K/N, such as 1/6 for the first of six, got {text!r}")
    return k, n


def problems(config: Config) -> list[str]:
    """What is out of range in the settings, each as a sentence that names the option."""
    o, m, v = config.optim, config.model, config.views
    bounds: list[tuple[str, float, float, float]] = [
        ("epochs", config.epochs, 1, 1e9),
        ("batch_size", config.batch_size, 2, 1e9),
        ("micro_batch", config.micro_batch, 0, 1e9),
        ("workers", config.workers, 0, 1024),
        ("eval_every", config.eval_every, 1, 1e9),
        ("keep", config.keep, 1, 1e9),
        ("devices", config.devices, 0, 4096),
        ("watchdog_timeout", config.watchdog_timeout, 3, 1e9),
        ("nan_limit", config.nan_limit, 0, 1e9),
        ("checkpoint_minutes", config.checkpoint_minutes, 0, 1e9),
        ("source.val_fraction", config.source.val_fraction, 1e-9, 0.99),
        ("source.max_bad", config.source.max_bad, 0, 1),
        ("ram_cache", config.ram_cache, 0, 1e9),
        ("disk_cache", config.disk_cache, 0, 1e9),
        ("views.word_noise", v.word_noise, 0, 1),
        ("views.word_synonyms", v.word_synonyms, 0, 1),
        ("views.paraphrases", v.paraphrases, 0, 1e9),
        ("views.other_captions", v.other_captions, 0, 1e9),
        ("views.words", v.words, 0, 1e9),
        ("views.cached", v.cached, 1, 1024),
        ("loss.queue", config.loss.queue, 0, 1e6),
        ("model.image_size", m.image_size, 8, 4096),
        ("model.max_tokens", m.max_tokens, 3, 512),
        ("model.dim", m.dim, 1, 65536),
        ("model.hidden", m.hidden, 1, 65536),
        ("model.dropout", m.dropout, 0, 0.99),
        ("model.image_lr", m.image_lr, 0, 1e3),
        ("model.text_lr", m.text_lr, 0, 1e3),
        ("model.image_adapters", m.image_adapters, 0, 65536),
        ("model.text_adapters", m.text_adapters, 0, 65536),
        ("ema", config.ema, 0, 1 - 1e-9),
        ("wise", config.wise, 0, 1),
        ("optim.lr", o.lr, 1e-12, 1e3),
        ("optim.warmup", o.warmup, 0, 1),
        ("optim.weight_decay", o.weight_decay, 0, 1e3),
        ("optim.clip", o.clip, 0, 1e9),
        ("scenes.train", config.scenes.train, 1, 1e9),
        ("scenes.val", config.scenes.val, 1, 1e9),
        ("scenes.test", config.scenes.test, 0, 1e9),
        ("scenes.zeroshot", config.scenes.zeroshot, 0, 1e9),
        ("scenes.size", config.scenes.size, 16, 1024),
        ("scenes.captions", config.scenes.captions, 1, 32),
        ("scenes.tail", config.scenes.tail, 0, 1.25),
        ("scenes.noise", config.scenes.noise, 0, 1),
    ]
    found = _outside(bounds)
    try:
        fold_of(config.source.fold)
    except ValueError as error:
        found.append(str(error))
    for tower, lr, rank in (("image", m.image_lr, m.image_adapters), ("text", m.text_lr, m.text_adapters)):
        if rank and not lr:
            found.append(
                f"--model.{tower}_adapters {rank} trains the {tower} tower, and --model.{tower}_lr 0 does not: "
                f"give --model.{tower}_lr 1"
            )
    if m.freeze_norms and not config.init_from and (m.image_tower == "small" or not m.image_pretrained):
        found.append(
            "--model.freeze_norms keeps the statistics of pretrained norms, and this image tower begins at random: "
            "give --model.freeze_norms false, a pretrained --model.image_tower, or --init_from RUN"
        )
    if m.compile and m.activation_checkpointing:
        found.append(
            "--model.compile plans by itself what to compute again: leave out --model.activation_checkpointing"
        )
    return found


def paraphrase_problems(config: ParaphraseConfig) -> list[str]:
    """What is out of range in the settings of `amclr paraphrase`, each as a sentence that names the option."""
    bounds: list[tuple[str, float, float, float]] = [
        ("k", config.k, 1, 64),
        ("candidates", config.candidates, 0, 256),
        ("top_k", config.top_k, 1, 1e9),
        ("top_p", config.top_p, 1e-9, 1),
        ("temperature", config.temperature, 1e-6, 1e3),
        ("max_tokens", config.max_tokens, 1, 4096),
        ("batch_size", config.batch_size, 1, 65536),
        ("shortest", config.shortest, 0, 1),
        ("longest", config.longest, 1, 1e3),
        ("similarity", config.similarity or 0, 0, 1),
    ]
    found = _outside(bounds)
    if 0 < config.candidates < config.k:
        found.append(f"--candidates must be at least k, which is {config.k}, got {config.candidates}")
    if config.prompt and "{}" not in config.prompt:
        found.append("--prompt must hold {} where the caption goes")
    return found


def serve_problems(config: ServeConfig) -> list[str]:
    """What is out of range in the settings of `amclr serve`, each as a sentence that names the option."""
    found = _outside([
        ("port", config.port, 0, 65535),
        ("rate", config.rate, 0, 1e6),
        ("burst", config.burst, 1, 1e6),
        ("waiting", config.waiting, 1, 1e5),
        ("batch", config.batch, 1, 1024),
        ("deadline", config.deadline, 0.1, 3600),
        ("upload", config.upload, 0.01, 512),
    ])  # fmt: skip
    if config.token and (len(config.token) < 16 or not config.token.isascii() or not config.token.isprintable()):
        found.append("--token must have 16 characters or more, of ASCII")
    return found


def _outside(bounds: list[tuple[str, float, float, float]]) -> list[str]:
    return [
        f"--{name} must lie between {low:g} and {high:g}, got {value:g}"
        for name, value, low, high in bounds
        if not low <= value <= high
    ]


def from_dict(values: Mapping[str, Any], cls: type[Any] = Config) -> Any:
    """The settings that `dataclasses.asdict` wrote; what is missing keeps its default.

    Raises ValueError, naming the setting, for one that does not exist or is of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{cls.__name__} must be a mapping of settings, got {values!r}")
    hints = get_type_hints(cls)
    unknown = [str(name) for name in values if name not in hints]
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}")
    made: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint):
            made[name] = from_dict(value, hint)  # type: ignore[arg-type]
        elif _fits(value, hint):
            made[name] = value
        else:
            kind = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{name} must be {kind}, got {value!r}")
    return cls(**made)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type. A whole number does where a float is meant."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is NoneType:
        return value is None
    if hint is Any:
        return True
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if isinstance(value, bool) or hint is bool:
        return hint is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)
