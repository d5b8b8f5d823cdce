"""How a run is displayed at the end of a notebook's cell: its data, metrics, curves and gallery, as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from amclr.config.schema import Config
from amclr.utils import html

TABLES = (
    ({"text retrieval": ("txt_r1", "txt_r5", "txt_r10", "txt_r_mean"),
      "image retrieval": ("img_r1", "img_r5", "img_r10", "img_r_mean")}, ("R@1", "R@5", "R@10", "mean")),
    ({"zero-shot": ("zeroshot_top1", "zeroshot_top3", "zeroshot_top5", "zeroshot_top10")},
     ("top-1", "top-3", "top-5", "top-10")),
)  # fmt: skip
"""The tables: metric names by row, and the headers of the columns."""

FIGURES = {"curves.png": "Loss and recall", "gallery.png": "Validation captions and the images retrieved for them"}


def run_html(folder: Path, config: Config, epochs: str, metrics: Mapping[str, float]) -> str:
    """A run as HTML. epochs: how many are done; metrics: in percent, by name."""
    name = html.escape(folder.resolve().name)
    facts = (("data", config.data), ("objective", config.objective), ("epochs", epochs))
    parts = [f"<h3>{name}</h3>", html.table(["run", str(folder)], facts)]
    for rows, headers in TABLES:
        body = [
            [row, *(f"{metrics[key]:.1f}" if key in metrics else "–" for key in keys)]
            for row, keys in rows.items() if any(key in metrics for key in keys)
        ]  # fmt: skip
        if body:
            parts.append(html.table(["%", *headers], body))
    parts += [html.image(folder / file, about, "max-width: 100%") for file, about in FIGURES.items()]
    return "<div>" + "\n".join(parts) + "</div>"
