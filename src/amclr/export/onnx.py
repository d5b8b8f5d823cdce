"""Export to ONNX: both towers, the tokenizer, and an example that needs nothing of ours."""

from __future__ import annotations

import io
import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amclr.data.images.decode import Location
from amclr.export.base import Exported, Format
from amclr.models.dual_encoder import DualEncoder
from amclr.utils.errors import UserError, first_line
from amclr.utils.files import write_text

MAX_FILE_BYTES = 1_900_000_000
"""An ONNX file is limited to 2 GB: larger weights go into a separate file."""


class _Encoder(nn.Module):
    """One modality of a model, from its inputs to unit rows (B, D)."""

    def __init__(self, tower: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tower, self.head = tower, head

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.normalize(self.head(self.tower(*inputs)).float(), dim=-1)


def write(model: DualEncoder, folder: Path, temperature: float, precision: str) -> None:
    """Write image.onnx, text.onnx, tokenizer.json, preprocess.json and example.py.

    precision: fp16 stores weights in float16 and computes in float32; int8 also multiplies matrices in int8. Raises
    UserError if a tower cannot be expressed.
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
    metadata = {
        "image_size": size, "max_tokens": model.config.max_tokens, "dim": model.config.dim, "precision": precision,
        "temperature": temperature, "images": "uint8 RGB (B, 3, S, S), shorter side resized (bicubic), centre crop",
    }  # fmt: skip
    write_text(folder / "preprocess.json", json.dumps(metadata, indent=2) + "\n")
    shutil.copyfile(Path(__file__).with_name("onnx_example.py"), folder / "example.py")
    model.eval()
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    tokens = model.tokenize(["two captions", "of another length"])
    batch, length = "batch", "length"
    for kind, tower, head, inputs, shapes in (
        ("image", model.image_tower, model.image_head, {"images": images}, {0: batch}),
        ("text", model.text_tower, model.text_head, tokens, {0: batch, 1: length}),
    ):
        module = _Encoder(tower, head).eval()
        large = sum(p.numel() * p.element_size() for p in module.parameters()) > MAX_FILE_BYTES
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
                node.metadata_props.clear()  # source locations, with paths of this machine
            program.save(file, external_data=large)
    except Exception as error:  # the tracer raises many kinds
        # Its own message asks for a bug report; the cause says what went wrong.
        line = first_line(error.__cause__ or error)
        raise UserError(f"the {kind} tower cannot be written as ONNX ({line}): give --to hf instead") from None


def _to_fp16_weights(file: Path) -> None:
    """Store matrices and kernels in float16, each cast to float32 where it is used.

    CPUs multiply float32 faster; onnxruntime casts only once, when it loads the file.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = (model := onnx.load(file)).graph
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
    onnx.save(model, file)


def _to_int8(file: Path) -> None:
    """Quantise matrix products and token tables to int8: onnxruntime's dynamic quantisation.

    Convolutions stay in float: in int8 EfficientNet-Lite0 took twice the time, at a cosine of 0.67.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends a pre-processing pass; the parity check measures the result anyway
    quantised = file.with_suffix(".int8")
    # In 7 bits (reduce_range), because 8-bit sums overflow on CPUs without VNNI.
    quantize_dynamic(
        file, quantised, op_types_to_quantize=["MatMul", "Gemm", "Gather"], per_channel=True, reduce_range=True,
        weight_type=QuantType.QInt8,
    )  # fmt: skip
    logging.disable(logging.NOTSET)
    quantised.replace(file)


def load(folder: Path) -> Exported:
    """Load the folder with onnxruntime, as its example.py does. Raises UserError if it cannot."""
    from amclr.export.onnx_example import Model  # imports onnxruntime

    try:
        loaded = Model(folder, torch.get_num_threads())
    except Exception as error:  # onnxruntime raises kinds of its own
        raise UserError(f"onnxruntime cannot run these towers ({first_line(error)}): give --to hf instead") from None

    def images(pixels: Tensor) -> Tensor:
        return torch.from_numpy(loaded.run(loaded.image, images=pixels.numpy()))

    def texts(tokens: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(loaded.run(loaded.text, **{k: v.numpy() for k, v in tokens.items()}))

    def own_images(locations: Sequence[Location]) -> Tensor:
        return torch.from_numpy(loaded.embed_images([io.BytesIO(p.read()) for p in locations]))

    return Exported(images, texts, own_images, lambda captions: torch.from_numpy(loaded.embed_texts(captions)))


FORMAT = Format(
    write, load, {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.1}, ("onnx", "onnxscript", "onnxruntime"),
    usage="python {home}/example.py IMAGE ... --captions 'a dog on the beach'",
)  # fmt: skip
