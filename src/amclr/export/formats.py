"""A trained model in the formats of others: open_clip, ONNX, a Hugging Face folder.

Each export is loaded again by the software that it is for, and compared with the model on the run's own data, before
it is kept. A new format is a `Format` in `FORMATS`: what writes it, and what loads it again.
"""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from amclr.config.schema import Config, SourceConfig
from amclr.data import manifest as manifests
from amclr.data.images.decode import BadImage, Location
from amclr.evaluation.evaluator import measured_on
from amclr.models.dual_encoder import DualEncoder
from amclr.models.towers import SMALL_TOWER
from amclr.objectives.methods import METHODS
from amclr.runs.folder import Run
from amclr.utils.errors import UserError, first_line, require
from amclr.utils.files import write_text, written

if TYPE_CHECKING:
    from transformers import BertConfig

PAIRS = 256
"""Images of the run's own data, with a caption of each, on which an export is compared."""

TOP = 10
TIE = 1e-6
"""Similarities that differ by less are a tie: rounding alone moves them so far."""


@dataclass(frozen=True)
class Exported:
    """An export, loaded by the software that it is for. What embeds gives unit rows (B, D).

    images: uint8 images (B, 3, S, S), as the model prepares them. texts: token tensors, as it makes them.
    own_images: places of images, by the other software's reading. own_texts: captions, likewise.
    """

    images: Callable[[Tensor], Tensor]
    texts: Callable[[dict[str, Tensor]], Tensor]
    own_images: Callable[[Sequence[Location]], Tensor]
    own_texts: Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Format:
    """How a format is written and read.

    write(model, folder, temperature, precision); load(folder). limits: the largest difference of one number of an
    embedding, by precision. needs: packages. settle(folder, home): what is left to do before the folder gets the name
    `home`. usage: what to type with it.
    """

    write: Callable[[DualEncoder, Path, float, str], None]
    load: Callable[[Path], Exported]
    limits: dict[str, float]
    needs: tuple[str, ...] = ()
    settle: Callable[[Path, Path], None] = lambda folder, home: None
    usage: str = ""


@dataclass(frozen=True)
class Parity:
    """How far embeddings of the same images and captions differ.

    difference: the largest of one number of an embedding. cosine: the least between two embeddings of the same thing.
    same: queries, of images by captions and the other way round, whose top ten are the same, ties aside. overlap:
    the share of the top tens that both find. queries: how many.
    """

    difference: float
    cosine: float
    same: int
    overlap: float
    queries: int


def export(
    run: Path, to: str, *, out: str = "", precision: str = "fp32", data: str = "", progress: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Write a run's best weights in another format, compare the result with the model, and keep it if it is the same.

    Args:
        run: the run folder.
        to: a name of `FORMATS`.
        out: the folder to write; empty is `exports/FORMAT` in the run folder.
        precision: fp32 or, for ONNX, fp16 or int8.
        data: a data set to compare on instead of the run's own; its validation split counts.
        progress: show how far it is.

    Returns the folder and what its `parity.json` says. Raises UserError, leaving nothing behind, for a run or data
    that are not there, a folder in use, packages that are missing, a model that the format cannot express, and where
    the export differs from the model by more than the format's limit.
    """
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got '{to}'")
    form = FORMATS[to]
    if precision not in form.limits:
        raise UserError(f"--to {to} has --precision {' or '.join(form.limits)}, got '{precision}'")
    require(f"--to {to}", "export", *form.needs)
    opened = Run.open(run)
    name = to if precision == "fp32" else f"{to}-{precision}"
    home = Path(out).expanduser().resolve() if out else (run / "exports" / name).resolve()
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise UserError(f"'{home}' is in use: choose another --out, or remove it")
    model = opened.load_model()
    images, captions = pairs_of(model, measured_on(opened.config, data, SourceConfig()), progress)
    with _beside(home) as folder:
        form.write(model, folder, temperature_of(opened), precision)
        exported = form.load(folder)
        found = compare(model, exported, images, captions, progress)
        parity = found["parity"]
        limit = form.limits[precision]
        # NaN is above any limit.
        if not parity.difference <= limit or (precision == "fp32" and parity.same < parity.queries):
            raise UserError(
                f"the export differs from the model: by up to {parity.difference:.1e} (limit {limit:g}), and "
                f"{parity.same} of {parity.queries} queries have the same top {TOP}; nothing was kept"
            )
        record = {
            "format": to, "precision": precision, "pairs": len(images), "limit": limit,
            **{kind: asdict(p) for kind, p in found.items()},
        }  # fmt: skip
        write_text(folder / "parity.json", json.dumps(record, indent=2) + "\n")
        form.settle(folder, home)
    return home, record


def report(home: Path, record: dict[str, Any]) -> str:
    """What `export` found, in a few lines, and how to load the folder."""
    parity, own, to = record["parity"], record["own_reading"], record["format"]

    def top(found: dict[str, Any]) -> str:
        return f"top {TOP} the same for {found['same']} of {found['queries']} queries, {found['overlap']:.1%} overlap"

    return "\n".join([
        f"{to}, {record['precision']}: {record['pairs']} images and a caption of each, embedded by the export and "
        "by the model",
        f"  same tensors     largest difference {parity['difference']:.1e} (limit {record['limit']:g}), least cosine "
        f"{parity['cosine']:.7f}; {top(parity)}",
        f"  its own reading  largest difference {own['difference']:.1e}, least cosine {own['cosine']:.7f}; {top(own)}",
        f"folder: {home}",
        f"use it: {FORMATS[to].usage.format(home=home)}",
    ])  # fmt: skip


@contextmanager
def _beside(home: Path) -> Iterator[Path]:
    """A folder to write, which gets its name once it is whole; where that fails, nothing is left."""
    part = home.with_name(f"{home.name}.part")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)  # of an export that was killed
        part.mkdir()
    except OSError as error:
        raise UserError(f"cannot make the folder '{home}': {error.strerror}: choose another --out") from None
    try:
        yield part
        if home.is_dir():
            home.rmdir()  # empty, as was found before
        part.rename(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def pairs_of(model: DualEncoder, config: Config, progress: bool = True) -> tuple[list[Location], list[str]]:
    """The places of up to `PAIRS` validation images that can be decoded, and the first caption of each.

    config: its data set and where to look. Raises UserError where there is none.
    """
    manifest = manifests.prepare(config, manifests.cache_folder(config), progress, only="val")
    images, captions = [], []
    for sample in manifest.samples:
        try:
            model.prepare(sample.image)
        except BadImage:
            continue
        images.append(sample.image)
        captions.append(sample.captions[0])
        if len(images) == PAIRS:
            break
    if not images:
        raise UserError(f"no validation image of '{config.data}' can be decoded: give another --data")
    return images, captions


def temperature_of(run: Run) -> float:
    """The temperature that a run ended with: what it learned, or else was given."""
    learned = run.load_best().get("objective", {}).get("log_temperature")
    if learned is not None:
        return math.exp(float(learned))
    given = run.config.loss.temperature
    return METHODS[run.config.objective].default_temperature if given is None else given


# -- parity -------------------------------------------------------------------------------------------


def compare(
    model: DualEncoder, exported: Exported, images: Sequence[Location], captions: Sequence[str], progress: bool = True
) -> dict[str, Parity]:
    """How far an export differs from the model: `parity` on the same tensors, `own_reading` on the same files.

    images, captions: pairs. The second tells what the other software's decoding, resizing and cleaning of text
    changes, which is no fault of the weights, and has no limit.
    """

    def tensors(some: Sequence[Location]) -> Tensor:
        return torch.stack([model.prepare(p) for p in some])

    ours = model.encode_image(images, progress=progress), model.encode_text(captions, progress=progress)
    rows = []
    passes: list[tuple[Callable[[Any], Tensor], Sequence[Any], str]] = [
        (lambda some: exported.images(tensors(some)), images, "images, exported"),
        (lambda some: exported.texts(model.tokenize(list(some))), captions, "captions, exported"),
        (exported.own_images, images, "images, its own reading"),
        (exported.own_texts, captions, "captions, its own reading"),
    ]
    for embed, items, what in passes:
        with tqdm(total=len(items), desc=f"Embedding {what}", disable=not progress, leave=False) as bar:
            chunks = []
            for k in range(0, len(items), model.images_at_once):
                with torch.inference_mode():
                    chunks.append(embed(items[k : k + model.images_at_once]).float().cpu())
                bar.update(len(chunks[-1]))
        rows.append(torch.cat(chunks))
    return {"parity": parity(ours, (rows[0], rows[1])), "own_reading": parity(ours, (rows[2], rows[3]))}


def parity(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> Parity:
    """How far two pairs of embeddings, of the same images (N, D) and captions (N, D), differ."""
    both = list(zip(ours, theirs, strict=True))
    # By torch, whose largest of numbers with NaN is NaN; Python's is any of them.
    difference = float(torch.stack([(a - b).abs().max() for a, b in both]).max())
    cosine = min(float(F.cosine_similarity(a.double(), b.double()).min()) for a, b in both)
    if not math.isfinite(difference):
        return Parity(math.nan, math.nan, 0, 0.0, 2 * len(ours[0]))
    same, common, queries = 0, 0, 0
    mine, other = (image.double() @ text.double().T for image, text in (ours, theirs))
    for scores, found in ((mine, other), (mine.T, other.T)):
        k = min(TOP, scores.shape[1])
        best, theirs_best = scores.topk(k), found.topk(k).indices
        # What the export puts at each place, by our own scores: another thing may stand there if it is as good.
        gaps = (scores.gather(1, theirs_best) - best.values).abs().amax(dim=1)
        same += int((gaps < TIE).sum())
        common += int((theirs_best[:, :, None] == best.indices[:, None, :]).sum())
        queries += len(scores)
    return Parity(difference, cosine, same, common / (k * queries), queries)


# -- open_clip ----------------------------------------------------------------------------------------

OPEN_CLIP_TEXTS = ("bert", "distilbert", "roberta", "xlm-roberta")
"""Kinds of text towers that open_clip builds, and that end in a layer norm, which takes up a head's bias."""

_ELSE = "give --to onnx or --to hf instead"


def write_open_clip(model: DualEncoder, folder: Path, temperature: float, precision: str) -> None:
    """Write a folder that open_clip loads as `local-dir:FOLDER`, with nothing of ours installed.

    Raises UserError for towers and heads that open_clip has no counterpart for.
    """
    if model.config.head != "linear":
        raise UserError(
            f"open_clip has no head like the run's (--model.head {model.config.head}): {_ELSE}, or train with "
            "--model.head linear"
        )
    from safetensors.torch import save

    vision, image_state = _open_clip_image(model, folder)
    text_state = _open_clip_text(model, folder)
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


def settle_open_clip(folder: Path, home: Path) -> None:
    """Let the configuration name the folder where it will be: open_clip wants to be told it in full."""
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
    text["hf_model_name"] = text["hf_tokenizer_name"] = str(home)
    if vision["timm_model_name"].startswith("local-dir:"):
        vision["timm_model_name"] = f"local-dir:{home / 'image_tower'}"
    write_text(file, json.dumps(config, indent=2) + "\n")


def _open_clip_image(model: DualEncoder, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's settings and weights of the image tower; arguments for timm go into a folder."""
    trunk: Any = model.image_tower.trunk
    if model.config.image_tower == "small":
        name, arguments = SMALL_TOWER
    else:
        name = trunk.pretrained_cfg["architecture"]
        arguments = {k: v for k, v in getattr(trunk, "_model_args", {}).items() if k != "num_classes"}
    source = name
    if arguments:  # open_clip hands timm a name alone; timm reads arguments from a folder that is named
        (folder / "image_tower").mkdir()
        saved = {"architecture": name, "num_classes": 0, "model_args": arguments, "pretrained_cfg": {}}
        write_text(folder / "image_tower" / "config.json", json.dumps(saved, indent=2) + "\n")
        source = f"local-dir:{folder / 'image_tower'}"
    vision = {"timm_model_name": source, "timm_model_pretrained": False, "timm_pool": ""}
    state = {f"visual.trunk.{k}": v for k, v in trunk.state_dict().items()}
    head: Any = model.image_head
    if trunk.num_features == model.image_tower.width:
        vision |= {"timm_proj": "linear", "timm_proj_bias": True}
        place = "visual.head.proj"
    else:  # open_clip would take `num_features` for the width: the trunk's own classifier does not
        vision |= {"timm_proj": "", "timm_pool": trunk.global_pool.pool_type}
        place = f"visual.trunk.{trunk.pretrained_cfg['classifier']}"
    return vision, state | {f"{place}.weight": head.weight, f"{place}.bias": head.bias}


def _open_clip_text(model: DualEncoder, folder: Path) -> dict[str, Tensor]:
    """open_clip's weights of the text tower, and its configuration in the folder."""
    trunk: Any = model.text_tower.trunk
    config, kind = trunk.config, trunk.config.model_type
    if kind not in OPEN_CLIP_TEXTS:
        raise UserError(
            f"open_clip cannot build the text tower '{model.config.text_tower}' (it is a {kind}; the export knows "
            f"{', '.join(OPEN_CLIP_TEXTS)}): {_ELSE}"
        )
    state = trunk.state_dict()
    if kind == "distilbert":
        config, state = bert_of_distilbert(config, state)
    pad = model.tokenizer.pad_token_id
    if config.pad_token_id != pad:
        if kind != "bert":  # positions follow from it
            raise UserError(f"the tokenizer pads with {pad}, its tower with {config.pad_token_id}: {_ELSE}")
        config = type(config)(**{**config.to_dict(), "pad_token_id": pad})
    config.save_pretrained(folder)
    norm = f"encoder.layer.{config.num_hidden_layers - 1}.output.LayerNorm"
    head: Any = model.text_head
    bias, weight = with_bias_in_norm(state[f"{norm}.weight"], state[f"{norm}.bias"], head.weight, head.bias)
    state = {**state, f"{norm}.bias": bias}
    return {**{f"text.transformer.{k}": v for k, v in state.items()}, "text.proj.weight": weight}


def with_bias_in_norm(gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Make a linear map of a layer norm's output do without its bias, whatever the sizes.

    gain, shift: (F,), of the norm. weight, bias: (D, F) and (D,), of the map. Returns another shift and another weight
    that together give the same.

    A norm gives y = gain * n + shift, where the numbers n of a row sum to zero; so do those of a mean of rows.
    So c (1/gain) . (y - shift) = 0 for any c in R^D, and weight + c (1/gain)^T maps y as weight does but for a
    constant, which is freely chosen by c. With shift = gain that constant is F c.
    """
    g, s, w, b = (x.detach().double() for x in (gain, shift, weight, bias))
    c = (w @ (s - g) + b) / len(g)
    return g.to(shift), (w + c[:, None] / g).to(weight)


def bert_of_distilbert(config: Any, state: dict[str, Tensor]) -> tuple[BertConfig, dict[str, Tensor]]:
    """A DistilBERT as the BERT that it is: other names, and token types whose embeddings are zero."""
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
    from transformers import BertConfig  # slow to import

    bert = BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, intermediate_size=config.hidden_dim, hidden_act=config.activation,
        max_position_embeddings=config.max_position_embeddings, type_vocab_size=1, pad_token_id=config.pad_token_id,
    )  # fmt: skip
    return bert, renamed


def load_open_clip(folder: Path) -> Exported:
    """Load the folder by open_clip itself. Raises UserError where it cannot."""
    import open_clip
    from PIL import Image

    try:
        loaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    except Exception as error:  # open_clip, timm and torch raise many kinds
        raise UserError(f"open_clip cannot build these towers ({first_line(error)}): {_ELSE}") from None
    loaded.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    mean, std = (torch.tensor(loaded.visual.preprocess_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    pad = loaded.text.config.pad_token_id

    def images(pixels: Tensor) -> Tensor:
        rows: Tensor = loaded.encode_image((pixels / 255 - mean) / std, normalize=True)
        return rows

    def texts(tokens: dict[str, Tensor]) -> Tensor:
        # It knows padding by its number alone.
        ids = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, pad)
        rows: Tensor = loaded.encode_text(ids, normalize=True)
        return rows

    def own_images(places: Sequence[Location]) -> Tensor:
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(p.read()))) for p in places])
        rows: Tensor = loaded.encode_image(pixels, normalize=True)
        return rows

    def own_texts(captions: Sequence[str]) -> Tensor:
        rows: Tensor = loaded.encode_text(tokenizer(list(captions)), normalize=True)
        return rows

    return Exported(images, texts, own_images, own_texts)


# -- ONNX ---------------------------------------------------------------------------------------------


MESSAGE_BYTES = 1_900_000_000
"""A file of ONNX ends at 2 GB: larger weights lie in a file beside it."""


class _Embeds(nn.Module):
    """One modality of a model, from what is fed to it to unit rows (B, D)."""

    def __init__(self, tower: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.normalize(self.head(self.tower(*inputs)).float(), dim=-1)


def write_onnx(model: DualEncoder, folder: Path, temperature: float, precision: str) -> None:
    """Write image.onnx, text.onnx, tokenizer.json, preprocess.json, and example.py, which needs nothing of ours.

    precision: fp16 stores weights in half the room and computes in float32; int8 also multiplies matrices in int8.
    Raises UserError where a tower cannot be expressed.
    """
    from tokenizers import Tokenizer

    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"the tokenizer of '{model.config.text_tower}' has no tokenizer.json: give --to hf instead")
    tokenizer = Tokenizer.from_str(backend.to_str())
    tokenizer.enable_truncation(model.config.max_tokens)
    tokenizer.enable_padding(pad_id=model.tokenizer.pad_token_id, pad_token=model.tokenizer.pad_token)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = model.config.image_size
    about = {
        "image_size": size, "max_tokens": model.config.max_tokens, "dim": model.config.dim, "precision": precision,
        "temperature": temperature, "images": "uint8 RGB (B, 3, S, S), shorter side resized (bicubic), centre crop",
    }  # fmt: skip
    write_text(folder / "preprocess.json", json.dumps(about, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name("onnx_example.py"), folder / "example.py")
    model.eval()
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    tokens = model.tokenize(["two captions", "of another length"])
    batch, length = "batch", "length"
    for kind, tower, head, inputs, shapes in (
        ("image", model.image_tower, model.image_head, {"images": images}, {0: batch}),
        ("text", model.text_tower, model.text_head, tokens, {0: batch, 1: length}),
    ):
        module = _Embeds(tower, head).eval()
        large = sum(p.numel() * p.element_size() for p in module.parameters()) > MESSAGE_BYTES
        if large and precision != "fp32":
            raise UserError(f"the {kind} tower is too large for --precision {precision} (2 GB): leave it out")
        _to_onnx(module, folder / f"{kind}.onnx", inputs, shapes, kind, large)
        if precision == "int8":
            _to_int8(folder / f"{kind}.onnx")
        if precision != "fp32":
            _to_fp16_weights(folder / f"{kind}.onnx")


def _to_onnx(
    module: nn.Module, file: Path, inputs: dict[str, Tensor], shapes: dict[int, str], kind: str, large: bool
) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, tuple(inputs.values()), dynamo=True, verbose=False, input_names=list(inputs),
                output_names=["embeddings"], dynamic_shapes=(tuple(shapes for _ in inputs),),
            )  # fmt: skip
            assert program is not None
            for node in program.model.graph.all_nodes():
                node.metadata_props.clear()  # where in the code each came from, with the paths of this machine
            program.save(file, external_data=large)
    except Exception as error:  # the tracer raises many kinds
        # Its own message says what to send to its makers; what it met is the cause.
        line = first_line(error.__cause__ or error)
        raise UserError(f"the {kind} tower cannot be written as ONNX ({line}): give --to hf instead") from None


def _to_fp16_weights(file: Path) -> None:
    """Store matrices and kernels in float16, each made float32 again where it is used.

    Processors multiply float32 faster; onnxruntime makes them float32 once, as it loads the file.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = (found := onnx.load(file)).graph
    casts = []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight) if weight.data_type == TensorProto.FLOAT else None
        if values is None or values.ndim < 2 or abs(values).max(initial=0) > 65504:
            continue
        name, stored = weight.name, f"{weight.name}.fp16"
        weight.CopyFrom(numpy_helper.from_array(values.astype("float16"), stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(found, file)


def _to_int8(file: Path) -> None:
    """Multiply matrices in int8, and store tables of tokens so: onnxruntime's dynamic quantisation.

    Convolutions stay as they are: onnxruntime's in int8 took EfficientNet-Lite0 twice the time, to a cosine of 0.67.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends another pass beforehand; the comparison tells how good this is
    quantised = file.with_suffix(".int8")
    # In 7 bits, or sums would overflow on processors without instructions for them (VNNI).
    quantize_dynamic(
        file, quantised, op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True, reduce_range=True,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)
    quantised.replace(file)


def load_onnx(folder: Path) -> Exported:
    """Load the folder by onnxruntime, as its example.py does. Raises UserError where it cannot."""
    from amclr.export.onnx_example import Model  # imports onnxruntime

    try:
        loaded = Model(folder, torch.get_num_threads())
    except Exception as error:  # onnxruntime raises kinds of its own
        raise UserError(f"onnxruntime cannot run these towers ({first_line(error)}): give --to hf instead") from None

    def images(pixels: Tensor) -> Tensor:
        return torch.from_numpy(loaded.run(loaded.image, images=pixels.numpy()))

    def texts(tokens: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(loaded.run(loaded.text, **{k: v.numpy() for k, v in tokens.items()}))

    def own_images(places: Sequence[Location]) -> Tensor:
        return torch.from_numpy(loaded.embed_images([io.BytesIO(p.read()) for p in places]))

    return Exported(images, texts, own_images, lambda captions: torch.from_numpy(loaded.embed_texts(captions)))


# -- Hugging Face ---------------------------------------------------------------------------------------


def write_hf(model: DualEncoder, folder: Path, temperature: float, precision: str) -> None:
    """Write the folder that `amclr.load` reads, and that can be pushed to a hub."""
    model.save_pretrained(folder)


def load_hf(folder: Path) -> Exported:
    """Load the folder as `amclr.load` does."""
    loaded = DualEncoder.from_folder(folder)

    def images(pixels: Tensor) -> Tensor:
        rows, _ = loaded(pixels, None)
        assert rows is not None
        return rows

    def texts(tokens: dict[str, Tensor]) -> Tensor:
        _, rows = loaded(None, tokens)
        assert rows is not None
        return rows

    return Exported(images, texts, lambda p: loaded.encode_image(p), lambda c: loaded.encode_text(c))


FORMATS = {
    "open_clip": Format(
        write_open_clip, load_open_clip, {"fp32": 1e-5}, ("open_clip", "safetensors"), settle_open_clip,
        "open_clip.create_model_and_transforms('local-dir:{home}')",
    ),
    "onnx": Format(
        write_onnx, load_onnx, {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.1}, ("onnx", "onnxscript", "onnxruntime"),
        usage="python {home}/example.py IMAGE ... --captions 'a dog on the beach'",
    ),
    "hf": Format(write_hf, load_hf, {"fp32": 1e-6}, usage="amclr.load('{home}')"),
}  # fmt: skip
"""Every format by name."""
