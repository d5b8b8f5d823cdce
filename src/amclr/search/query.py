"""Search in an index, by texts and images; labels for images; near-duplicates among them."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from amclr.config.schema import SourceConfig
from amclr.data.images.decode import BadImage, ImageSource, read_image
from amclr.data.images.duplicates import alone_unnumbered, as_rows, joined, largest, near_duplicates
from amclr.data.sources.rows import printable
from amclr.data.sources.tables import read_lines
from amclr.evaluation import metrics as evaluate
from amclr.evaluation.classes import read_prompts
from amclr.evaluation.evaluator import draw_look_alikes
from amclr.models.dual_encoder import DualEncoder
from amclr.runs.loading import load
from amclr.search.index import CHUNK, Index, read_samples
from amclr.utils import figures
from amclr.utils.errors import UserError
from amclr.utils.files import written

NEGATIVE = 0.5
"""Share of each unwanted text's embedding that is taken off the wanted one's."""
MAX_TEXT = 2000
"""Characters of a query."""
DEEPEST = 10_000
"""Results of a query that can be paged through."""
AT_ONCE = 64
"""Classes that a labelled image can be shown with."""


@dataclass(frozen=True)
class Hit:
    """An image that was found: its place (from 1 on), its cosine to the query, its row in the index."""

    place: int
    score: float
    row: int
    name: str
    file: str
    captions: tuple[str, ...]


def parse(query: str) -> tuple[str, list[str]]:
    """What a query asks for, and what it does not want: words or "quoted texts" with a minus before them.

    Raises UserError where nothing is asked for, or it is too long.
    """
    if len(query) > MAX_TEXT:
        raise UserError(f"a query must have {MAX_TEXT} characters at the most, got {len(query)}")
    unwanted = [m[1] or m[2] or "" for m in re.finditer(MINUS, query)]
    wanted = " ".join(re.sub(MINUS, " ", query).replace('"', " ").split())
    return wanted, [u for u in (" ".join(u.split()) for u in unwanted) if u]


MINUS = r'(?:^|(?<=\s))-(?:"([^"]*)"|([^\W\d_][^\s"]*))'


def embed(
    model: DualEncoder, texts: Sequence[str] = (), images: Sequence[ImageSource] = (), unwanted: Sequence[str] = (),
    image_share: float = 0.5,
) -> np.ndarray:  # fmt: skip
    """One query of several: a unit vector (D,) float32.

    It is the mean of the texts' embeddings and that of the images', with `image_share` for the latter where there
    are both, less `NEGATIVE` times the mean of the unwanted texts'. Raises UserError where nothing is asked for, and
    BadImage for an image that cannot be decoded.
    """
    empty = torch.empty(0, model.config.dim)
    return combined(
        model.encode_text(texts) if texts else empty, model.encode_image(images) if images else empty,
        model.encode_text(unwanted) if unwanted else empty, image_share,
    )  # fmt: skip


def combined(texts: Tensor, images: Tensor, unwanted: Tensor, image_share: float = 0.5) -> np.ndarray:
    """What `embed` makes of texts, images and unwanted texts, given their embeddings, (n, D) each."""
    if not len(texts) and not len(images) and not len(unwanted):
        raise UserError("nothing is asked for: give a text, an image, or both")
    if not 0 <= image_share <= 1:
        raise UserError(f"the image's share must lie between 0 and 1, got {image_share}")
    shares = (1 - image_share, image_share) if len(texts) and len(images) else (1.0, 1.0)
    query = torch.zeros(texts.shape[1])
    if len(texts):
        query += shares[0] * texts.mean(0)
    if len(images):
        query += shares[1] * images.mean(0)
    if len(unwanted):
        query -= (NEGATIVE if len(texts) or len(images) else 1.0) * unwanted.mean(0)
    return torch.nn.functional.normalize(query, dim=0).numpy()


def find(
    index: Index, query: np.ndarray, k: int = 10, skip: int = 0, threshold: float = -1.0,
    among: np.ndarray | None = None, without: int = -1,
) -> list[Hit]:  # fmt: skip
    """The k images nearest to a query (D,), after the first `skip`, with at least a cosine of `threshold`.

    among (N,) bool: rows that may be found, see `matching`; without: a row that is left out.
    """
    if k < 1 or skip < 0 or k + skip > DEEPEST:
        raise UserError(f"results must be 1 to {DEEPEST:,} in all, got {k} after {skip}")
    scores, rows = index.search(query, k + skip + (without >= 0), among)
    return read_hits(index, scores[0], rows[0], k, skip, threshold, without)


def read_hits(
    index: Index, scores: np.ndarray, rows: np.ndarray, k: int, skip: int = 0, threshold: float = -1.0,
    without: int = -1,
) -> list[Hit]:  # fmt: skip
    """What `find` makes of the cosines and rows that `Index.search` found for a query."""
    found = [(float(s), int(r)) for s, r in zip(scores, rows, strict=True) if r >= 0 and r != without]
    some = [(place, s, r) for place, (s, r) in enumerate(found, 1) if s >= threshold][skip : skip + k]
    known = [index.row(r) for _, _, r in some]
    return [Hit(p, s, r, of.name, of.file, of.captions) for (p, s, r), of in zip(some, known, strict=True)]


def matching(index: Index, text: str) -> np.ndarray | None:
    """Rows (N,) bool whose name or one of whose captions holds a text, in any case; None for an empty text."""
    if not text.strip():
        return None
    import pyarrow.compute as pc

    named = pc.match_substring(index.table["name"], text.strip(), ignore_case=True)
    found = np.array(named.to_numpy(zero_copy_only=False), dtype=bool)
    captions = index.table["captions"].combine_chunks()
    said = pc.match_substring(pc.list_flatten(captions), text.strip(), ignore_case=True)
    rows = pc.list_parent_indices(captions).to_numpy()
    found[rows[np.array(said.to_numpy(zero_copy_only=False), dtype=bool)]] = True
    return found


def search(
    folder: Path, query: str = "", image: str = "", k: int = 12, threshold: float = -1.0, only: str = "",
    image_share: float = 0.5,
) -> tuple[Index, list[Hit]]:  # fmt: skip
    """An index, and what it has for a text, an image, or both. only: a text that names or captions must hold."""
    index = Index(folder)
    wanted, unwanted = parse(query)
    if image and not Path(image).is_file():
        raise UserError(f"there is no image '{image}'")
    try:
        vector = embed(index.model, [wanted] if wanted else [], [image] if image else [], unwanted, image_share)
    except BadImage as error:
        raise UserError(f"'{image}': {error}") from None
    return index, find(index, vector, k, threshold=threshold, among=matching(index, only))


def table(hits: Sequence[Hit]) -> str:
    """Results as lines of text: place, cosine, name, the first caption."""
    if not hits:
        return "nothing found: lower --threshold, or leave out --only"
    width = min(48, max(len(h.name) for h in hits))
    return "\n".join(
        f"{h.place:4d}  {h.score:6.3f}  {printable(h.name):{width}}  {printable(h.captions[0]) if h.captions else ''}"
        .rstrip() for h in hits
    )  # fmt: skip


def as_json(hits: Sequence[Hit]) -> str:
    """Results as JSON, an object each."""
    return json.dumps([asdict(h) for h in hits], ensure_ascii=False, indent=1)


def draw(index: Index, hits: Sequence[Hit], file: Path, title: str) -> None:
    """Draw results as a contact sheet: thumbnails, best first, with cosines and names. Raises UserError without any."""
    shown = []
    for h in hits:
        with suppress(BadImage):
            shown.append((read_image(index.thumbnail(h.row), 512), f"{h.score:.2f}  {Path(h.name).name}"))
    if hits and not shown:
        raise UserError(f"'{index.folder}' has no thumbnails to draw: make it with amclr index ... --thumbnails 256")
    figures.results(shown, file, title)


# -- labels ---------------------------------------------------------------------------------------


def read_labels(classes: str) -> list[str]:
    """Class names: those in a file, one a line, or in a text with commas. Raises UserError for fewer than two."""
    listed = read_lines(Path(classes)) if Path(classes).is_file() else classes.split(",")
    names = list(dict.fromkeys(" ".join(name.split()) for name in listed if name.strip()))
    if len(names) < 2:
        raise UserError(f"--classes must name two classes at least, with commas or in a file, got '{classes}'")
    return names


def label(
    run: str | Path, data: str, classes: str, out: Path, templates: str = "amclr", top: int = 1,
    source: SourceConfig | None = None, cache: str = "", progress: bool = True,
) -> dict[str, int]:  # fmt: skip
    """Name the class of every image of a folder, archive or data set, and write a CSV; returns how many of each.

    classes: as `read_labels` reads them; run: what `amclr.load` takes, or an index. Columns: image, label, cosine
    and, for top > 1, the next best ones. Images that cannot be decoded have an empty label, and the reason.
    """
    names = read_labels(classes)
    if not 1 <= top <= min(AT_ONCE, len(names)):
        raise UserError(f"--top must be 1 to {min(AT_ONCE, len(names))}, got {top}")
    samples = read_samples(data, source, cache, progress)
    model = load(Path(run) / "model" if (Path(run) / "index.json").is_file() else run)
    rows = evaluate.class_embeddings(model, names, read_prompts(templates)[0])
    counts = dict.fromkeys(names, 0)
    with written(out) as binary, tqdm(total=len(samples), desc="Labels", unit="image", disable=not progress) as bar:
        binary.write(_csv([["image", *_columns(top), "fault"]]).encode())
        for some in (samples[k : k + CHUNK] for k in range(0, len(samples), CHUNK)):
            good, faults = [], {}
            for s in some:
                try:
                    good.append((s, model.prepare(s.image)))
                except BadImage as error:
                    faults[s.name] = str(error)
            scores = model.encode_image([p for _, p in good]) @ rows.T
            best = scores.topk(top, dim=1)
            named = {s.name: k for k, (s, _) in enumerate(good)}
            lines = []
            for s in some:
                cells: list[Any] = [""] * (2 * top)
                if (at := named.get(s.name)) is not None:
                    values, places = best.values[at].tolist(), best.indices[at].tolist()
                    cells = [c for v, p in zip(values, places, strict=True) for c in (names[p], f"{v:.4f}")]
                    counts[names[places[0]]] += 1
                lines.append([_cell(s.name), *cells, faults.get(s.name, "")])
            binary.write(_csv(lines).encode("utf-8", "backslashreplace"))
            bar.update(len(some))
    return counts


def _columns(top: int) -> Iterator[str]:
    for k in range(1, top + 1):
        yield from (f"label{k if k > 1 else ''}", f"cosine{k if k > 1 else ''}")


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _cell(name: str) -> str:
    """A name that a spreadsheet takes for no formula."""
    return f"'{name}" if name.startswith(("=", "+", "-", "@", "\t", "\r")) else name


# -- near-duplicates ------------------------------------------------------------------------------


def dedup(
    folder: Path, out: Path, threshold: float | None = None, progress: bool = True
) -> tuple[Index, list[np.ndarray]]:
    """Groups of images of an index that look the same, the largest first, and a CSV of them.

    Without a threshold they are those whose perceptual hashes are alike: the same image saved anew, resized, made
    brighter (`amclr.data.images.duplicates`). With one, those whose embeddings have at least that cosine, and what is
    joined by such: images of the same thing. Columns: group, image, file, cosine to the group's first.
    """
    index = Index(folder)
    if threshold is None:
        groups = near_duplicates(as_rows(index.table["looks"].to_pylist()))
    elif not 0 < threshold <= 1:
        raise UserError(f"--threshold must lie between 0 and 1, got {threshold:g}")
    else:
        groups = _alike(index, threshold, progress)
    found = largest(groups)
    lines: list[list[Any]] = [["group", "image", "file", "cosine"]]
    for number, members in enumerate(found, 1):
        first = index.vector(int(members[0]))
        for row in members.tolist():
            of = index.row(row)
            lines.append([number, _cell(of.name), _cell(of.file), f"{float(first @ index.vector(row)):.4f}"])
    with written(out) as handle:
        handle.write(_csv(lines).encode("utf-8", "backslashreplace"))
    return index, found


def _alike(index: Index, threshold: float, progress: bool) -> np.ndarray:
    """Groups (N,), the least row of each or -1, joined by pairs of embeddings with such a cosine: exact, O(N^2)."""
    vectors = torch.from_numpy(np.concatenate([*index.vectors(), np.zeros((0, index.dim), np.float32)]))
    groups = np.arange(len(vectors))
    starts = range(0, len(vectors), 1024)
    for start in tqdm(starts, "Comparing images", unit="block", leave=False, disable=not progress):
        block = vectors[start : start + 1024]
        for after in range(start, len(vectors), 1 << 16):
            i, j = torch.nonzero(block @ vectors[after : after + (1 << 16)].T >= threshold, as_tuple=True)
            one, other = (start + i).numpy(), (after + j).numpy()
            groups = joined(groups, one[one < other], other[one < other])
    return alone_unnumbered(groups)


def draw_groups(index: Index, groups: Sequence[np.ndarray], file: Path) -> bool:
    """Draw some members of the largest groups, with the captions of the first two; whether there were any."""

    def look(row: int) -> tuple[str, Tensor, str] | None:
        of = index.row(row)
        try:
            return of.name, read_image(index.thumbnail(row), 96), (*of.captions, "")[0]
        except BadImage:
            return None

    return draw_look_alikes(groups, look, file)


def told(query: str, image: str) -> str:
    """A query as a title."""
    return " and ".join(filter(None, [query, image and f"like {shlex.quote(Path(image).name)}"]))
