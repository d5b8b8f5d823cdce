"""The reader of an index: embeddings, what is stored about each image, thumbnails, and search by vectors."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from amclr.search.inverted_lists import InvertedLists, faiss_index
from amclr.search.parts import COLUMNS, IndexedImage, Part, arrow, damaged, part_file, read_metadata, read_table, schema

if TYPE_CHECKING:
    from torch import Tensor

    from amclr.models.dual_encoder import DualEncoder


class Index:
    """An index on disk. `search` finds rows by vectors; `image` and `thumbnail` return what is stored about a row.

    Raises UserError, saying what to type, if the folder is not an index or is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.metadata = read_metadata(self.folder)
        self.parts = [Part(**p) for p in self.metadata["parts"]]
        self.starts = np.cumsum([0, *(p.rows for p in self.parts)])
        self.dim = int(self.metadata["dim"])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __repr__(self) -> str:
        return f"<amclr index '{self.folder}': {len(self):,} images, {self.dim} dimensions>"

    @cached_property
    def model(self) -> DualEncoder:
        """The model that embedded the images."""
        from amclr.runs.loading import load

        return load(self.folder / "model")

    @cached_property
    def text_encoder(self) -> DualEncoder:
        """The model, or until that is loaded the part of it that embeds texts, which loads in half the time."""
        from amclr.models.dual_encoder import DualEncoder

        return self.model if "model" in vars(self) else DualEncoder.from_folder(self.folder / "model", text_only=True)

    @cached_property
    def table(self) -> Any:
        """What is stored about all rows: a pyarrow Table with the columns of `amclr.search.parts.schema`."""
        pa, _ = arrow()
        tables = [read_table(self.folder, p) for p in self.parts]
        return pa.concat_tables(tables) if tables else schema().empty_table()

    @cached_property
    def _arrays(self) -> list[np.ndarray]:
        arrays = []
        for part in self.parts:
            try:
                array = np.load(part_file(self.folder, part, "npy"), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise damaged(self.folder, error) from None
            if array.shape != (part.rows, self.dim) or array.dtype != np.float32:
                raise damaged(self.folder, f"part {part.name} holds {array.shape} of {array.dtype}")
            arrays.append(array)
        return arrays

    def vectors(self) -> Iterator[np.ndarray]:
        """Yield the embeddings part by part, (n, D) float32, after verifying each part's checksum."""
        for part, array in zip(self.parts, self._arrays, strict=True):
            with part_file(self.folder, part, "npy").open("rb") as handle:
                if hashlib.file_digest(handle, "sha256").hexdigest() != part.sha256:
                    raise damaged(self.folder, f"the embeddings of part {part.name} do not match their checksum")
            yield array

    def vector(self, row: int) -> np.ndarray:
        """The embedding of a row, (D,) float32."""
        part, position = self._locate(row)
        return np.array(self._arrays[part][position])

    def image(self, row: int) -> IndexedImage:
        """What is stored about the image of a row."""
        self._locate(row)
        values = self.table.slice(row, 1).to_pylist()[0]
        fields = {field: values[column] for field, column in COLUMNS.items()}
        return IndexedImage(**{**fields, "captions": tuple(fields["captions"])})

    def thumbnail(self, row: int) -> bytes:
        """The thumbnail of a row as a JPEG; empty if the index has no thumbnails."""
        part, _ = self._locate(row)
        offset, size = (int(self.table[name][row].as_py()) for name in ("thumb_at", "thumb_size"))
        with part_file(self.folder, self.parts[part], "thumbs").open("rb") as handle:
            return os.pread(handle.fileno(), size, offset)

    def search(
        self, queries: np.ndarray | Tensor, k: int = 10, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the k best rows for each query, best first: cosines (Q, k) float32 and rows (Q, k) int64.

        queries: unit rows (Q, D). mask (N,) bool: rows that may be returned. If fewer than k rows qualify, the last
        entries are row -1.
        """
        import faiss

        batch = np.ascontiguousarray(np.asarray(queries, dtype=np.float32).reshape(-1, self.dim))
        k = min(k, len(self))
        if not k or not len(batch):
            return np.zeros((len(batch), 0), np.float32), np.zeros((len(batch), 0), np.int64)
        selector = None
        if mask is not None:
            bits = np.packbits(np.asarray(mask, dtype=bool), bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
        searcher, probes = self._searcher
        if probes:
            # With few allowed rows, the probed lists may hold none of them: then all lists are searched.
            is_rare = mask is not None and np.count_nonzero(mask) < len(self) // 10
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=searcher.nlist if is_rare else probes)
        else:
            parameters = faiss.SearchParameters(sel=selector)
        scores, rows = searcher.search(batch, k, params=parameters)
        return scores, rows

    @cached_property
    def _searcher(self) -> tuple[Any, int]:
        """A FAISS index and the lists to probe. Built from our own files: FAISS trusts its own without checking."""
        lists = InvertedLists.read(self.folder / "lists", self.metadata.get("lists"), len(self))
        return faiss_index(self.vectors(), self.dim, lists), lists.probes if lists else 0

    def _locate(self, row: int) -> tuple[int, int]:
        """The number of a row's part, and the row's position in it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of an index of {len(self)} images")
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, row - int(self.starts[part])
