"""The state in a checkpoint file: nested containers of tensors, numbers and strings, with a digest of the content.

A file is a dict as `torch.save` writes it: the state, the number of its format, and a digest of both.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from torch import Tensor

FORMAT = 2
"""Files without a number have the first format, which has no digest."""
PIECE_BYTES = 1 << 26
"""Tensors that cannot be hashed in place are copied in pieces of this size."""


class Damaged(Exception):
    """The content of a file is not what was written; the message says why."""


def write_state(state: dict[str, Any], handle: IO[bytes]) -> None:
    """Write a state with its format and digest."""
    content = {**state, "format": FORMAT}
    torch.save({**content, "sha256": digest(content)}, handle)


def read_state(file: Path) -> dict[str, Any]:
    """The state in a file, on the CPU. No code in it is executed. Raises Damaged where it is not what was written."""
    try:
        # Not memory-mapped: the file could then change between this check and the use of the state.
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises almost anything
        # torch wraps the reason in advice on how to load the file unsafely.
        inner = error.__context__ if isinstance(error.__context__, UnpicklingError) else None
        reason = re.split(r" was not | whose |\. |\n", str(inner))[0]
        raise Damaged(f"refused: {reason}" if inner else type(error).__name__) from None
    if type(state) is not dict:
        raise Damaged("it contains no state")
    if not {"format", "sha256"} & state.keys():
        return state  # of the first format
    recorded = state.pop("sha256", None)
    try:
        computed = digest(state)
    except TypeError as error:
        raise Damaged(str(error)) from None
    # Two entries mark the format, so that damage to one of them does not make this a file of the first format.
    if recorded != computed or state.pop("format", None) != FORMAT:
        raise Damaged("its content is not what was written")
    return state


def digest(state: Any) -> str:
    """SHA-256 of the content: the path, type and bits of each value. Strides and devices do not count."""
    sha = hashlib.sha256()
    for path, description, tensor in walk(state):
        for text in (path, description):
            encoded = text.encode("utf-8", "surrogatepass")
            sha.update(b"%d:%b" % (len(encoded), encoded))
        for piece in _pieces(tensor) if tensor is not None else ():
            sha.update(piece)
    return sha.hexdigest()


def tensor_bytes(state: Any) -> int:
    """Bytes of the tensors in a state; one that occurs several times counts once."""
    tensors = {_identity(tensor): tensor for _, _, tensor in walk(state) if tensor is not None}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def copy_to_cpu(state: Any) -> Any:
    """A copy of a state with its tensors on the CPU; one that occurs several times is copied once."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        identity = _identity(tensor)
        if identity not in copies:
            copies[identity] = tensor.detach().to("cpu", copy=True).requires_grad_(tensor.requires_grad)
        return copies[identity]

    return _map_tensors(state, copy)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (
        tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad,
    )  # fmt: skip


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = type(value)((k, _map_tensors(v, function)) for k, v in value.items())
        if isinstance(value, OrderedDict):  # a module's state dict has its submodules' versions as an attribute
            vars(mapped).update(_map_tensors(vars(value), function))
        return mapped
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(v, function) for v in value)
    return value


def walk(value: Any, path: str = "") -> Iterator[tuple[str, str, Tensor | None]]:
    """Each value in a state, in order: the path of keys to it, its type and content, and the tensor if it is one.

    Raises TypeError for values that a checkpoint cannot hold.
    """
    kind = type(value)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        yield path, f"{value.dtype} {tuple(value.shape)} {value.requires_grad}", value
    elif kind in (dict, OrderedDict):
        yield path, f"{kind.__name__} {len(value)}", None
        for key, each in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"a checkpoint cannot hold the key {key!r} (at '{path}')")
            yield from walk(each, f"{path}/{key!r}")
        if kind is OrderedDict and vars(value):
            yield from walk(vars(value), f"{path}.")
    elif kind in (list, tuple, torch.Size):
        yield path, f"{kind.__name__} {len(value)}", None
        for index, each in enumerate(value):
            yield from walk(each, f"{path}/{index}")
    elif kind in (type(None), bool, int, str, bytes):
        yield path, f"{kind.__name__} {value!r}", None
    elif kind is float:
        yield path, f"float {struct.pack('<d', value).hex()}", None
    else:
        raise TypeError(f"a checkpoint cannot hold a {kind.__module__}.{kind.__qualname__} (at '{path}')")


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its indices; without a copy where it is contiguous on the CPU."""
    tensor = tensor.detach()
    in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
    total = tensor.numel() * tensor.element_size()
    if in_place or total <= PIECE_BYTES:
        # A dimension of size 1 may have any stride in a contiguous tensor, which `view` rejects.
        flat = tensor.cpu().contiguous().as_strided((tensor.numel(),), (1,))
        yield flat.view(torch.uint8).numpy().data
    elif len(tensor) == 1:
        yield from _pieces(tensor[0])
    else:
        for part in tensor.split(max(1, PIECE_BYTES * len(tensor) // total)):
            yield from _pieces(part)
