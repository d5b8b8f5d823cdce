"""How the terms of an objective are laid out as grids of similarity blocks.

Two directed terms share one block: the rows of <x_i, y_j> are the anchors of X -> Y, its columns those of Y -> X.
Blocks of the same row and column views make one grid, so that AmCLR's four blocks are one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from amclr.objectives.methods import Term, modality


@dataclass(frozen=True)
class Layout:
    """The blocks of one grid: ranges of the stacked views, and their terms.

    The terms of the row anchors, row view by row view, then those of the column anchors in the same order.
    """

    rows: range
    columns: range
    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """R row views, C column views."""
        return len(self.rows), len(self.columns)


@cache
def layouts(terms: tuple[Term, ...], views: tuple[str, ...], joined: bool) -> tuple[Layout, ...]:
    """Terms as grids over `views`, in stacking order. joined: all image-text pairs as one grid if they fill it."""
    by_views = {(t.anchor, t.candidate): t for t in terms}
    images, texts = ([v for v in views if modality(v) == of] for of in ("image", "text"))
    cross = [(i, t) for i in images for t in texts if (i, t) in by_views]
    grids: list[tuple[list[str], list[str]]]
    if not cross or len(cross) < len(images) * len(texts):
        grids = [([i], [t]) for i, t in cross]
    else:
        grids = [(images, texts)] if joined else [([i], texts) for i in images]
    grids += [([v[0]], [v[1]]) for v in (images, texts) if len(v) == 2 and tuple(v) in by_views]
    place = {view: k for k, view in enumerate(views)}
    return tuple(
        Layout(
            range(place[rows[0]], place[rows[-1]] + 1),
            range(place[columns[0]], place[columns[-1]] + 1),
            (*(by_views[r, c] for r in rows for c in columns), *(by_views[c, r] for r in rows for c in columns)),
        )
        for rows, columns in grids
    )
