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
    """Training images."""
    val: int = setting(500, low=1, high=1e9)
    """Validation images."""
    test: int = setting(500, low=0, high=1e9)
    """Test images."""
    zeroshot: int = setting(800, low=0, high=1e9)
    """Single-object images for zero-shot classification, over all classes together."""
    size: int = setting(64, low=16, high=1024)
    """Side of an image in pixels."""
    captions: int = setting(5, low=1, high=32)
    """Captions per image, paraphrases of each other."""
    tail: float = setting(0.0, low=0, high=1.25)
    """How unequally often training images show the 40 kinds of things (colour and shape): the kind of rank k as
    k ** -tail. 0 is all alike; 1.25, the most there can be, the commonest a hundred times as often as the rarest.
    The seed says which are rare. Validation, test and zero-shot images stay balanced."""
    noise: float = setting(0.0, low=0, high=1)
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
    val_fraction: float = setting(0.05, above=0, high=0.99)
    """Share of the images held out for validation where the folder has no val.txt."""
    fold: str = ""
    """K/N, such as 1/6, for cross-validation: the training images are cut into N equal parts by a hash of their
    names; the K-th is what is validated on, the others are trained on, and the usual validation images rest."""
    duplicates: Literal["positives", "captions", "negatives"] = "positives"
    """positives: near-duplicate images, and captions that stand under several images, are positives of each
    other rather than negatives. captions: identical captions alone, for drawings or studio images, which differ
    in what is small. negatives: neither. Images are compared where they are decoded beforehand (scan_up_to)."""
    max_bad: float = setting(0.02, low=0, high=1, resumable=True)
    """Abort if more than this share of rows or images cannot be used."""
    scan_up_to: int = setting(200_000, resumable=True)
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
    where: Literal["auto", "workers", "device"] = setting("auto", resumable=True)
    """Where colours are changed, of whole batches: in the processes that prepare them, or on the device; the
    images are the same. auto: on a GPU where there is one."""
    flip: bool = True
    """Let the views mirror images. Turn off where captions say left and right."""
    word_noise: float = setting(0.1, low=0, high=1)
    """Chance per word of a deletion or swap where the second text view is the caption with word noise."""
    word_synonyms: float = setting(0.0, low=0, high=1)
    """Chance per word of a synonym there, for words that the (English) lexicon has one for."""
    paraphrases: float = setting(0.0, low=0, high=1e9)
    """Weight of a paraphrase of the caption as its second text view. Views are drawn in proportion to the weights
    of those that there are; with all three weights 0, it is another caption of the image where there is one, else
    a paraphrase, else word noise."""
    other_captions: float = setting(0.0, low=0, high=1e9)
    """Weight of another caption of the image as second text view."""
    words: float = setting(0.0, low=0, high=1e9)
    """Weight of the caption with word noise as second text view."""
    cached: int = setting(4, low=1, high=1024)
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
    image_size: int = setting(64, low=8, high=4096)
    """Side in pixels of the images that the image tower sees."""
    image_lr: float = setting(1.0, low=0, high=1e3)
    """Learning-rate factor of the image tower; 0 freezes it."""
    image_adapters: int = setting(0, low=0, high=65536)
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
    text_lr: float = setting(1.0, low=0, high=1e3)
    """Learning-rate factor of the text tower; 0 freezes it."""
    text_adapters: int = setting(0, low=0, high=65536)
    """Rank of low-rank adapters (LoRA) through which alone the text tower is trained; 0 trains all its weights.
    Needs amclr[adapters]."""
    max_tokens: int = setting(32, low=3, high=512)
    """Captions are cut to this many tokens."""
    head: Literal["linear", "residual"] = "linear"
    """Projection: linear (the paper), or LayerNorm, then linear plus a two-layer GELU network."""
    hidden: int = setting(1024, low=1, high=65536)
    """Hidden width of the residual head."""
    dropout: float = setting(0.2, low=0, high=0.99)
    """Dropout in the residual head."""
    dim: int = setting(256, low=1, high=65536)
    """Dimension of the shared space."""
    compile: bool = setting(False, resumable=True)
    """Compile the towers (torch.compile): minutes at the start of a run, for faster steps."""
    activation_checkpointing: bool = setting(False, resumable=True)
    """Keep few activations of the towers that are trained, and compute the others again in the backward pass: less
    memory, for about a third more time. The gradient is the same."""


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
    of the batch and the age of the estimates. Mean recall with adaptive against gamma 1: -0.1 at batches of 128, and
    +0.4 at 16, where a queue gains 1.8 (docs/results.md)."""
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
    """Optimiser and schedule."""

    name: str = "adamw"
    """adamw, adamp, adam, sgd, sgdp, radam, nadam, lamb, lion or novograd."""
    lr: float = setting(1e-3, low=1e-12, high=1e3)
    """Peak learning rate."""
    weight_decay: float = setting(0.02, low=0, high=1e3)
    """Decoupled weight decay; norms, biases and temperatures are exempt."""
    warmup: float = setting(0.1, low=0, high=1)
    """Share of all steps spent warming up."""
    warmup_lr: float = 1e-5
    """Learning rate of the first step."""
    min_lr: float = 1e-6
    """Learning rate of the last step."""
    clip: float = setting(1.0, low=0, high=1e9)
    """Largest gradient norm; 0 does not clip."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    data: str = "scenes"
    """A folder of captioned images; a CSV, TSV, JSON, JSON lines or Parquet file; WebDataset tars
    ('shards/{00..12}.tar'); a saved Hugging Face dataset, or hf:NAME from the Hub; a folder of images by class;
    a URL; a YAML file that mixes several; or `scenes`, the built-in generated set."""
    out: str = setting("", resumable=True)
    """Run folder; empty makes runs/DATA-OBJECTIVE-seedN."""
    objective: str = "amclr"
    """clip, cyclip, siglip, simclr, sogclr, isogclr, amclr, xamclr, xamclr-image, xamclr-text, iamclr
    or ixamclr."""
    epochs: int = setting(10, low=1, high=1e9, resumable=True)
    """Passes over the training images."""
    batch_size: int = setting(128, low=2, high=1e9)
    """Images per step, over all processes: more of them share the batch, and learn the same."""
    micro_batch: int = setting(0, low=0, high=1e9, resumable=True)
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
    deterministic: bool = setting(True, resumable=True)
    """On a GPU, use deterministic algorithms, so that a run that is gone on with ends with the same bits."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", resumable=True)
    """auto, cpu, cuda or mps."""
    devices: int = setting(0, low=0, high=4096, resumable=True)
    """Processes on this machine, one per GPU; 0 is as many as torchrun or SLURM started, else one."""
    strategy: Literal["auto", "ddp", "fsdp"] = setting("auto", resumable=True)
    """How several processes hold the model: ddp, each the whole; fsdp, each a part. auto is ddp."""
    sync_batchnorm: bool = False
    """On GPUs, let batch norms take their statistics over all processes; else each takes those of its share."""
    watchdog_timeout: float = setting(45.0, low=3, high=1e9, resumable=True)
    """Seconds that one of several processes may be silent or stuck before all stop, and say so."""
    on_nan: Literal["stop", "skip", "rollback"] = setting("stop", resumable=True)
    """Where loss or gradient is NaN or infinite: stop; skip the step and count it; or roll back to the last
    checkpoint and leave the step out. The samples and the batch are saved under faults/ in the run folder."""
    nan_limit: int = setting(10, low=0, high=1e9, resumable=True)
    """Steps that may be skipped or rolled back before the run stops."""
    workers: int = setting(0, low=0, high=1024, resumable=True)
    """Processes that prepare batches; 0 prepares them in the training process."""
    init_from: str = ""
    """A run folder whose best weights, heads and tokenizer included, this run begins with."""
    ema: float = setting(0.0, low=0, below=1)
    """Decay per step of an exponential moving average of the weights, which is then what is evaluated and kept;
    0 keeps none. It starts small: min(ema, (1 + step) / (10 + step))."""
    wise: float = setting(1.0, low=0, high=1)
    """Evaluate and keep (1 - wise) * start + wise * trained weights (WiSE-FT). Start: pretrained towers; with
    --init_from, all of that run."""
    monitor: str = setting("", resumable=True)
    """A folder of images by class: zero-shot accuracy on (at most 2000 of) them at every evaluation, beside that
    of the model at the start."""
    eval_every: int = setting(1, low=1, high=1e9, resumable=True)
    """Epochs between evaluations and checkpoints."""
    keep: int = setting(2, low=1, high=1e9, resumable=True)
    """Checkpoints kept besides last and best."""
    checkpoint_minutes: float = setting(0.0, low=0, high=1e9, resumable=True)
    """Also write a checkpoint this often; 0 is as often as costs little: every 10 seconds for small models."""
    decoded: Literal["auto", "ram", "disk", "none"] = setting("auto", resumable=True)
    """Where decoded images are kept: ram; disk, in a file that later runs find; none, decoded at each visit.
    auto: the file where it is there already, else memory where they fit, else disk where they fit."""
    ram_cache: float = setting(4.0, low=0, high=1e9, resumable=True)
    """GB of memory that decoded images may take."""
    disk_cache: float = setting(32.0, low=0, high=1e9, resumable=True)
    """GB of disk that decoded images of all data sets may take, in the cache folder."""
    cache: str = setting("", resumable=True)
    """Folder of generated data and cached features; empty is $AMCLR_CACHE or ~/.cache/amclr."""
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
    """How paraphrases of a data set's captions are made, and which are kept."""

    model: str = "humarin/chatgpt_paraphraser_on_T5_base"
    """A seq2seq or causal transformers model, by name or folder; or `rules` (experimental), which rewords English
    without a model. As second text views, rewordings by rules gain nothing: +0.2 mean recall where images have one
    caption (p > 0.1), and 0.2 to 1 point below other captions where they have several (docs/results.md)."""
    k: int = setting(3, low=1, high=64)
    """Paraphrases kept per caption, at most."""
    candidates: int = setting(0, low=0, high=256)
    """Candidates made per caption, of which the first k that pass the filters are kept; 0 is k + 2, and
    k for rules."""
    out: str = ""
    """Folder of the store; empty is DATA/paraphrases."""
    seed: int = 0
    """Seed of the sampling."""
    prompt: str = ""
    """What the model is given, with {} for the caption; empty is `paraphrase: {}` for seq2seq models, and a request
    in a sentence for causal ones."""
    top_k: int = setting(120, low=1, high=1e9)
    """Sampling: only the most probable tokens, this many."""
    top_p: float = setting(0.95, above=0, high=1)
    """Sampling: only the most probable tokens that make up this probability."""
    temperature: float = setting(1.0, low=1e-6, high=1e3)
    """Sampling: temperature."""
    max_tokens: int = setting(64, low=1, high=4096)
    """Tokens made at most; a candidate that does not end by then is rejected."""
    batch_size: int = setting(32, low=1, high=65536)
    """Captions per batch."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the model; the two halves are for GPUs."""
    revision: str = "main"
    """Revision of a model from the hub."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda."""
    shortest: float = setting(0.5, low=0, high=1)
    """Filter: words of a paraphrase at least, as a share of its caption's."""
    longest: float = setting(2.0, low=1, high=1e3)
    """Filter: words of a paraphrase at most, as a share of its caption's; four more are always allowed."""
    keep_facts: bool = True
    """Filter: reject what changes numbers, colours, negation, or left and right (English)."""
    similarity: float | None = setting(None, low=0, high=1)
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
    port: int = setting(7860, low=0, high=65535)
    """Port to listen at; 0 takes a free one."""
    token: str = ""
    """What is asked of everybody, 16 characters or more; empty is the environment's AMCLR_TOKEN."""
    proxy: str = ""
    """Address of a proxy in front, whose X-Forwarded-For is believed."""
    rate: float = setting(10.0, low=0, high=1e6)
    """Searches a second that an address may make over time; 0 sets no limit."""
    burst: int = setting(50, low=1, high=1e6)
    """Searches that an address may make at once."""
    waiting: int = setting(256, low=1, high=1e5)
    """Searches that may wait; further ones are refused."""
    batch: int = setting(64, low=1, high=1024)
    """Searches that are made together, at most."""
    deadline: float = setting(10.0, low=0.1, high=3600)
    """Seconds after which a search that still waits is given up."""
    upload: float = setting(10.0, low=0.01, high=512)
    """Largest image that may be uploaded, in MB."""
