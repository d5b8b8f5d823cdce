"""Tables of numbers per sample (estimates, temperatures), wherever they fit: on the device, in memory, on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amclr.utils.files import free_memory, write_text, written

STORAGES = ("auto", "device", "host", "disk")
PIECE_BYTES = 1 << 28
"""A table is filled, saved and loaded in pieces of about this size."""


def choose_storage(size: int) -> str:
    """Where tables of `size` bytes go: the device if they take at most an eighth of it, else memory, else disk."""
    if torch.cuda.is_available() and size > torch.cuda.get_device_properties(0).total_memory // 8:
        return "host" if size <= free_memory() // 2 else "disk"
    if not torch.cuda.is_available() and size > free_memory() // 2:
        return "disk"
    return "device"


class Table(nn.Module):
    """Float32 numbers (N, C), N samples by C columns, read and written by sample.

    storage: "device", a buffer that moves with the module; "host", in memory, pinned where there is a
    GPU; "disk", a memory-mapped file in `folder` (a temporary one that goes with the process where that
    is None). A read or write costs what its rows cost, whatever N is. Off the device, a step waits for
    its ids unless they are on the CPU.
    """

    values: Tensor

    def __init__(
        self, rows: int, columns: int, fill: float, storage: str = "device", folder: Path | None = None
    ) -> None:
        super().__init__()
        self.storage = storage
        if storage == "device":
            self.register_buffer("values", torch.full((rows, columns), fill))
            return
        if storage == "host":
            self.values = torch.empty(rows, columns, pin_memory=torch.cuda.is_available())
        else:
            self.values = _mapped(rows, columns, folder)
        for piece in self._pieces():
            piece.fill_(fill)

    def read(self, ids: Tensor, first: int, last: int, like: Tensor) -> Tensor:
        """Columns first to last - 1 of the samples `ids` (B,): (last - first, B), in the type and place of `like`."""
        found = self._columns(first, last).index_select(0, self._here(ids)).T
        return found if (found.device, found.dtype) == (like.device, like.dtype) else found.to(like)

    def write(self, ids: Tensor, first: int, last: int, numbers: Tensor) -> None:
        """Put numbers (last - first, B) there. Equal ids must come with equal numbers."""
        if (numbers.device, numbers.dtype) != (self.values.device, self.values.dtype):
            numbers = numbers.to(self.values)
        self._columns(first, last).index_copy_(0, self._here(ids), numbers.T)

    def _columns(self, first: int, last: int) -> Tensor:
        return self.values if last - first == self.values.shape[1] else self.values[:, first:last]

    def _here(self, ids: Tensor) -> Tensor:
        return ids if ids.device == self.values.device else ids.to(self.values.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Table:
        """Follow the module to a device, and to float64, but not to half precision: there, averages stand still."""
        if self.storage == "device":
            wanted = fn(torch.empty(0, device=self.values.device))
            if wanted.dtype in (torch.float16, torch.bfloat16):
                self.values = self.values.to(wanted.device)
                return self
        return super()._apply(fn, recurse)

    def _pieces(self) -> Iterator[Tensor]:
        rows, columns = self.values.shape
        step = max(1, PIECE_BYTES // (columns * self.values.element_size()))
        for start in range(0, rows, step):
            yield self.values[start : start + step]

    def save(self, folder: Path, name: str) -> None:
        """Write the table into a folder as pieces, each complete or absent, with an index that comes last."""
        folder.mkdir(parents=True, exist_ok=True)
        listed = []
        for number, piece in enumerate(self._pieces()):
            file = folder / f"{name}-{number:05d}.npy"
            array = piece.detach().cpu().numpy()
            with written(file) as handle:
                np.save(handle, array)
            listed.append({"file": file.name, "rows": len(array), "sha256": _digest(array)})
        index = {"shape": list(self.values.shape), "pieces": listed}
        write_text(folder / f"{name}.json", json.dumps(index, indent=1))

    def load(self, folder: Path, name: str) -> None:
        """Take up what `save` wrote, wherever this table is kept.

        Raises ValueError for a folder without it, a table of another shape, or a damaged piece.
        """
        try:
            index = json.loads((folder / f"{name}.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"'{folder}' holds no table '{name}'") from None
        if list(self.values.shape) != index["shape"]:
            raise ValueError(
                f"table '{name}' in '{folder}' has shape {index['shape']}, wanted {list(self.values.shape)}"
            )
        if sum(piece["rows"] for piece in index["pieces"]) != len(self.values):
            raise ValueError(f"the index of table '{name}' in '{folder}' does not list all of its rows")

        def array(piece: dict[str, Any]) -> np.ndarray:
            file = folder / piece["file"]
            try:
                found: np.ndarray = np.load(file, allow_pickle=False)
                sound = len(found) == piece["rows"] and _digest(found) == piece["sha256"]
            except (OSError, ValueError, EOFError):
                sound = False
            if not sound:
                raise ValueError(f"'{file}' is damaged: go back to an earlier checkpoint")
            return found

        for piece in index["pieces"]:  # all of them are looked at before any is taken up
            array(piece)
        start = 0
        for piece in index["pieces"]:
            rows = torch.from_numpy(array(piece))
            self.values[start : start + len(rows)] = rows.to(self.values.device)
            start += len(rows)

    # -- the same key in a state dict, whatever the storage ------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}values"] = self.values if keep_vars else self.values.detach()

    def _load_from_state_dict(
        self, state: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], unexpected: list[str],
        errors: list[str],
    ) -> None:  # fmt: skip
        key = f"{prefix}values"
        if key not in state:
            missing.append(key)
        elif state[key].shape != self.values.shape:
            errors.append(f"table {key} has shape {tuple(state[key].shape)}, wanted {tuple(self.values.shape)}")
        else:
            with torch.no_grad():
                self.values.copy_(state[key])

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{tuple(self.values.shape)}, {self.storage}"


def _mapped(rows: int, columns: int, folder: Path | None) -> Tensor:
    """A float32 matrix in a file. The file has no name any more: it goes with the process, however that ends."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix="amclr-table-", dir=folder)
    try:
        # A full disk should show here, and not as a crash at some later write.
        getattr(os, "posix_fallocate", lambda handle, _, size: os.truncate(handle, size))(handle, 0, rows * columns * 4)
        return torch.from_file(name, shared=True, size=rows * columns).view(rows, columns)
    finally:
        os.close(handle)
        os.unlink(name)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()
