"""Search in an index by texts and images: from a query's words to results, as a table, JSON or a contact sheet."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from amclr.data.images.decode import BadImage, ImageSource, read_image
from amclr.data.sources.rows import printable
from amclr.search.index import Index
from amclr.utils.errors import UserError

if TYPE_CHECKING:
    from amclr.models.dual_encoder import DualEncoder

NEGATIVE_WEIGHT = 0.5
"""Weight of the mean embedding of the negative texts, which is subtracted from the query."""
MAX_TEXT = 2000
"""Maximum characters of a query."""
MAX_DEPTH = 10_000
"""Maximum number of results of a query, over all its pages."""
NEGATIVE = r'(?:^|(?<=\s))-(?:"([^"]*)"|([^\W\d_][^\s"]*))'
"""A word or "quoted text" with a minus before it."""


@dataclass(frozen=True)
class Hit:
    """A result: its rank (from 1 on), its cosine to the query, its row in the index, and what is stored about it."""

    place: int
    score: float
    row: int
    name: str
    file: str
    captions: tuple[str, ...]


def parse(query: str) -> tuple[str, list[str]]:
    """Split a query into its positive text and its negatives, words or "quoted texts" with a minus before them.

    Raises UserError if the query is too long.
    """
    if len(query) > MAX_TEXT:
        raise UserError(f"a query must have at most {MAX_TEXT} characters, got {len(query)}")
    negatives = [m[1] or m[2] or "" for m in re.finditer(NEGATIVE, query)]
    positive = " ".join(re.sub(NEGATIVE, " ", query).replace('"', " ").split())
    return positive, [n for n in (" ".join(n.split()) for n in negatives) if n]


def embed(
    model: DualEncoder, texts: Sequence[str] = (), images: Sequence[ImageSource] = (), negatives: Sequence[str] = (),
    image_share: float = 0.5,
) -> np.ndarray:  # fmt: skip
    """Embed a query of texts and images as one unit vector (D,) float32.

    It is the mean of the texts' embeddings and the mean of the images', weighted 1 - `image_share` to `image_share` if
    there are both, minus `NEGATIVE_WEIGHT` times the mean of the negative texts'. Raises UserError for an empty query,
    and BadImage for an image that cannot be decoded.
    """
    empty = torch.empty(0, model.config.dim)
    return combine(
        model.encode_text(texts) if texts else empty, model.encode_image(images) if images else empty,
        model.encode_text(negatives) if negatives else empty, image_share,
    )  # fmt: skip


def combine(texts: Tensor, images: Tensor, negatives: Tensor, image_share: float = 0.5) -> np.ndarray:
    """Compute the query vector of `embed` from the embeddings of texts, images and negatives, (n, D) each."""
    if not len(texts) and not len(images) and not len(negatives):
        raise UserError("the query is empty: give a text, an image, or both")
    if not 0 <= image_share <= 1:
        raise UserError(f"the image's share must lie between 0 and 1, got {image_share}")
    shares = (1 - image_share, image_share) if len(texts) and len(images) else (1.0, 1.0)
    query = torch.zeros(texts.shape[1])
    if len(texts):
        query += shares[0] * texts.mean(0)
    if len(images):
        query += shares[1] * images.mean(0)
    if len(negatives):
        query -= (NEGATIVE_WEIGHT if len(texts) or len(images) else 1.0) * negatives.mean(0)
    return torch.nn.functional.normalize(query, dim=0).numpy()


def find(
    index: Index, query: np.ndarray, k: int = 10, skip: int = 0, threshold: float = -1.0,
    mask: np.ndarray | None = None, exclude: int = -1,
) -> list[Hit]:  # fmt: skip
    """Find the k images nearest to a query vector (D,), after the first `skip`, with a cosine of at least `threshold`.

    mask (N,) bool: rows that may be returned, see `text_mask`. exclude: a row that is left out.
    """
    if k < 1 or skip < 0 or k + skip > MAX_DEPTH:
        raise UserError(f"results must be 1 to {MAX_DEPTH:,} in all, got {k} after {skip}")
    scores, rows = index.search(query, k + skip + (exclude >= 0), mask)
    return read_hits(index, scores[0], rows[0], k, skip, threshold, exclude)


def read_hits(
    index: Index, scores: np.ndarray, rows: np.ndarray, k: int, skip: int = 0, threshold: float = -1.0,
    exclude: int = -1,
) -> list[Hit]:  # fmt: skip
    """Read the images of the cosines and rows that `Index.search` returned for a query, selected as in `find`."""
    ranked = [(float(s), int(r)) for s, r in zip(scores, rows, strict=True) if r >= 0 and r != exclude]
    page = [(rank, s, r) for rank, (s, r) in enumerate(ranked, 1) if s >= threshold][skip : skip + k]
    images = [index.image(r) for _, _, r in page]
    return [Hit(p, s, r, i.name, i.file, i.captions) for (p, s, r), i in zip(page, images, strict=True)]


def text_mask(index: Index, text: str) -> np.ndarray | None:
    """Rows (N,) bool whose name or one of whose captions contains a text, ignoring case; None for an empty text."""
    if not text.strip():
        return None
    import pyarrow.compute as pc

    in_name = pc.match_substring(index.table["name"], text.strip(), ignore_case=True)
    mask = np.array(in_name.to_numpy(zero_copy_only=False), dtype=bool)
    captions = index.table["captions"].combine_chunks()
    in_caption = pc.match_substring(pc.list_flatten(captions), text.strip(), ignore_case=True)
    rows = pc.list_parent_indices(captions).to_numpy()
    mask[rows[np.array(in_caption.to_numpy(zero_copy_only=False), dtype=bool)]] = True
    return mask


def search(
    folder: Path | str, query: str = "", image: str = "", k: int = 12, threshold: float = -1.0, only: str = "",
    image_share: float = 0.5,
) -> tuple[Index, list[Hit]]:  # fmt: skip
    """Search an index by a text, an image file, or both; return the index and the results.

    only: a text that names or captions must contain. Raises UserError, saying what to type.
    """
    index = Index(folder)
    positive, negatives = parse(query)
    if image and not Path(image).is_file():
        raise UserError(f"there is no image '{image}'")
    try:
        model = index.model if image else index.text_encoder
        vector = embed(model, [positive] if positive else [], [image] if image else [], negatives, image_share)
    except BadImage as error:
        raise UserError(f"'{image}': {error}") from None
    return index, find(index, vector, k, threshold=threshold, mask=text_mask(index, only))


def format_table(hits: Sequence[Hit]) -> str:
    """Format results as lines of text: rank, cosine, name, first caption."""
    if not hits:
        return "nothing found: lower --threshold, or leave out --only"
    width = min(48, max(len(h.name) for h in hits))
    return "\n".join(
        f"{h.place:4d}  {h.score:6.3f}  {printable(h.name):{width}}  {printable(h.captions[0]) if h.captions else ''}"
        .rstrip() for h in hits
    )  # fmt: skip


def to_json(hits: Sequence[Hit]) -> str:
    """Format results as a JSON list with an object for each."""
    return json.dumps([asdict(h) for h in hits], ensure_ascii=False, indent=1)


def draw_hits(index: Index, hits: Sequence[Hit], file: Path, title: str) -> None:
    """Draw results as a contact sheet: thumbnails, best first, with cosines and names.

    Raises UserError if the index has no thumbnails.
    """
    from amclr.utils import figures

    cells = []
    for h in hits:
        with suppress(BadImage):
            cells.append((read_image(index.thumbnail(h.row), 512), f"{h.score:.2f}  {Path(h.name).name}"))
    if hits and not cells:
        raise UserError(f"'{index.folder}' has no thumbnails to draw: build it with amclr index ... --thumbnails 256")
    figures.results(cells, file, title)


def title(query: str, image: str) -> str:
    """A query as the title of its contact sheet."""
    return " and ".join(filter(None, [query, image and f"like {shlex.quote(Path(image).name)}"]))
