"""The file format of an index: `index.json`, parts of rows, and the list of images that cannot be used.

index.json             the parts with their checksums, the data set, the model's digest
model/                 the model, as `save_pretrained` writes it: an index needs nothing outside its folder
parts/NAME.npy         embeddings, unit rows, (n, D) float32
parts/NAME.thumbs      JPEG thumbnails, one after the other
parts/NAME.parquet     name, location and captions of every row; written last, so a part that has it is complete
lists/                 inverted lists of a large index (see `amclr.search.inverted_lists`)
rejects.jsonl          images that cannot be used, and why

A part is written once and never changed. So a killed build loses only the part it was writing, nothing is embedded
twice, and when images are added, changed or removed, the rows of all other images stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np

from amclr.utils.errors import UserError, first_line, require
from amclr.utils.files import write_text, written

FORMAT = 1
PART_ROWS = 1 << 16
"""Maximum rows of a part in a finished index."""


@dataclass(frozen=True)
class Part:
    """Some rows of an index, in files of their own."""

    name: str
    rows: int
    sha256: str
    """Checksum of the embeddings' file."""


@dataclass(frozen=True)
class IndexedImage:
    """What an index stores about an image besides its embedding and thumbnail."""

    name: str
    file: str
    offset: int
    size: int
    """Bytes from the offset on; -1 is the whole file."""
    stamp: str
    """Changes whenever the image does: `Location.stamp`."""
    captions: tuple[str, ...]
    perceptual_hash: bytes
    """`amclr.data.images.duplicates.image_hash`."""


COLUMNS = {field: field for field in IndexedImage.__dataclass_fields__} | {"perceptual_hash": "looks"}
"""The Parquet column of each field of `IndexedImage`."""


# -- index.json ---------------------------------------------------------------------------------------


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read index.json. Raises UserError, saying what to type, if it is missing, damaged, or of another format."""
    try:
        metadata: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if metadata["amclr index"] != FORMAT:
            raise UserError(f"'{folder}' is of format {metadata['amclr index']}, but this version of amclr reads "
                            f"format {FORMAT}: rebuild it with amclr index")  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"'{folder}' is not an index (it has no index.json): build one with amclr index RUN IMAGES "
                        f"--out {folder}") from None  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder, f"index.json: {error!r}") from None
    return metadata


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write index.json."""
    write_text(folder / "index.json", json.dumps(metadata, indent=1) + "\n")


# -- parts --------------------------------------------------------------------------------------------


def write_part(
    folder: Path, vectors: np.ndarray, images: Sequence[IndexedImage], thumbnails: Sequence[bytes], model: str
) -> Part:
    """Write rows as a part of the index in `folder`: embeddings (n, D), their images and thumbnails.

    model: the model's digest, as in index.json.
    """
    pa, _ = arrow()
    columns: dict[str, list[Any]] = {c: [getattr(image, field) for image in images] for field, c in COLUMNS.items()}
    sizes = [len(t) for t in thumbnails]
    columns |= {"thumb_at": list(accumulate(sizes, initial=0))[:-1], "thumb_size": sizes}
    return _write(folder, [vectors], pa.table(columns, schema=schema()), thumbnails, model)


def merge_parts(folder: Path, rows: Sequence[tuple[Part, int]], model: str) -> Part:
    """Write a new part from rows of other parts, in the given order. rows: (part, row in that part) each."""
    pa, _ = arrow()
    vectors, tables = [], []
    for part, members in groupby(rows, key=lambda row: row[0]):
        positions = [position for _, position in members]
        vectors.append(np.load(part_file(folder, part, "npy"), mmap_mode="r", allow_pickle=False)[positions])
        tables.append(read_table(folder, part).take(positions))

    def thumbnails() -> Iterator[bytes]:
        for (part, _), table in zip(groupby(rows, key=lambda row: row[0]), tables, strict=True):
            with part_file(folder, part, "thumbs").open("rb") as handle:
                for offset, size in zip(table["thumb_at"].to_pylist(), table["thumb_size"].to_pylist(), strict=True):
                    yield os.pread(handle.fileno(), size, offset)

    table = pa.concat_tables(tables)
    starts = np.cumsum([0, *table["thumb_size"].to_pylist()])[:-1]
    table = table.set_column(table.schema.get_field_index("thumb_at"), "thumb_at", pa.array(starts, pa.int64()))
    return _write(folder, vectors, table, thumbnails(), model)


def _write(folder: Path, vectors: Sequence[np.ndarray], table: Any, thumbnails: Iterable[bytes], model: str) -> Part:
    _, parquet = arrow()
    identity = hashlib.sha256()
    for column in ("name", "stamp"):
        for text in table[column].to_pylist():
            identity.update(f"{text}\n".encode("utf-8", "surrogatepass"))
    name = identity.hexdigest()[:16]
    file = folder / "parts" / name
    with written(file.with_suffix(".npy")) as handle:
        np.save(handle, np.concatenate(vectors).astype(np.float32, copy=False), allow_pickle=False)
    with file.with_suffix(".npy").open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    with written(file.with_suffix(".thumbs")) as handle:
        for content in thumbnails:
            handle.write(content)
    metadata = {"amclr": json.dumps({"model": model, "sha256": sha256, "rows": table.num_rows})}
    with written(file.with_suffix(".parquet")) as handle:
        parquet.write_table(table.replace_schema_metadata(metadata), handle, compression="zstd")
    return Part(name, table.num_rows, sha256)


def complete_parts(folder: Path, model: str) -> list[Part]:
    """Return the complete parts of an index: those listed in index.json, then those of an interrupted build."""
    _, parquet = arrow()
    listed = [Part(**p) for p in read_metadata(folder)["parts"]]
    unlisted = []
    for file in sorted((folder / "parts").glob("*.parquet")):
        if file.stem in {p.name for p in listed}:
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):  # damaged, or not ours
            metadata = json.loads(parquet.read_schema(file).metadata[b"amclr"])
            if metadata.pop("model") == model:
                unlisted.append(Part(name=file.stem, **metadata))
    return listed + unlisted


def read_table(folder: Path, part: Part, columns: list[str] | None = None) -> Any:
    """Read a part's images as a pyarrow Table of `schema`. Raises UserError if it is damaged."""
    pa, parquet = arrow()
    try:
        with parquet.ParquetFile(part_file(folder, part, "parquet")) as file:  # unlike read_table, imports no pandas
            table = file.read(columns).replace_schema_metadata()
    except (OSError, pa.ArrowException) as error:
        raise damaged(folder, error) from None
    if table.num_rows != part.rows:
        raise damaged(folder, f"part {part.name} has {table.num_rows} rows instead of {part.rows}")
    return table


def part_file(folder: Path, part: Part, kind: str) -> Path:
    """A file of a part. kind: npy, thumbs or parquet."""
    return folder / "parts" / f"{part.name}.{kind}"


# -- rejects.jsonl ------------------------------------------------------------------------------------


def read_rejects(folder: Path) -> dict[str, dict[str, str]]:
    """Images that cannot be used, by name: name, file, stamp, reason. Skips a line that a kill cut off."""
    rejects = {}
    with suppress(OSError):
        for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                reject = json.loads(line)
                rejects[reject["name"]] = reject
    return rejects


def append_rejects(folder: Path, rejects: Sequence[Mapping[str, str]]) -> None:
    """Append images that cannot be used to rejects.jsonl."""
    if rejects:
        with (folder / "rejects.jsonl").open("a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(reject) + "\n" for reject in rejects))


# -- shared -------------------------------------------------------------------------------------------


def damaged(folder: Path, cause: BaseException | str) -> UserError:
    """The error to raise for an index that is damaged."""
    reason = cause if isinstance(cause, str) else first_line(cause)
    return UserError(f"the index '{folder}' is damaged ({reason}): remove it, and rebuild it with amclr index")


def arrow() -> tuple[Any, Any]:
    """Apache Arrow and its Parquet module. Raises UserError if the packages of an index are not installed."""
    require("an index", "search", "faiss", "pyarrow")
    import pyarrow
    from pyarrow import parquet

    return pyarrow, parquet


def schema() -> Any:
    """The pyarrow schema of a part's table: `COLUMNS`, and where each thumbnail lies in the .thumbs file."""
    pa, _ = arrow()
    return pa.schema([
        ("name", pa.string()), ("file", pa.string()), ("offset", pa.int64()), ("size", pa.int64()),
        ("stamp", pa.string()), ("captions", pa.list_(pa.string())), ("looks", pa.binary()),
        ("thumb_at", pa.int64()), ("thumb_size", pa.int32()),
    ])  # fmt: skip
