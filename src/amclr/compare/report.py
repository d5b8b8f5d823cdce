"""The files of a comparison that are there to be read: table.csv, table.md, figures, and report.html with all of it.

Functions of what results.json holds.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from amclr.compare.plots import captions, draw
from amclr.compare.tables import (
    EQUAL_COST,
    EQUAL_COST_NOTE,
    as_csv,
    as_markdown,
    equal_cost_table,
    heading,
    main_table,
    notes,
)
from amclr.utils.files import write_text
from amclr.utils.html import image, paragraph, table


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write table.csv, table.md, the figures and report.html."""
    write_text(folder / "table.csv", as_csv(results))
    parts = [f"**{heading(results)}**", as_markdown(main_table(results)), *notes(results)]
    if equal_cost := equal_cost_table(results):
        parts += [f"**{EQUAL_COST}**", as_markdown(equal_cost), EQUAL_COST_NOTE]
    write_text(folder / "table.md", "\n\n".join([*parts, f"Made by `{results['command']}`"]) + "\n")
    write_text(folder / "report.html", _page(results, draw(results, folder), folder))


def notebook(results: Mapping[str, Any], folder: Path) -> str:
    """HTML for a notebook: tables, notes, and the figures that were drawn."""
    title = f"<h3>{html.escape(heading(results))}</h3>"
    return f"<div>{title}\n{_summary(results, folder, captions(results), 'max-width: 100%')}</div>"


def _summary(results: Mapping[str, Any], folder: Path, images: Mapping[str, str], style: str = "") -> str:
    """Tables, notes and figures as HTML. images: captions by file name; style: that of the figures."""
    equal_cost = equal_cost_table(results)
    return "\n".join([
        table(*main_table(results)), *map(paragraph, notes(results)),
        *([f"<h2>{EQUAL_COST}</h2>", table(*equal_cost), paragraph(EQUAL_COST_NOTE)] if equal_cost else []),
        *(image(folder / name, caption, style) for name, caption in images.items()),
    ])  # fmt: skip


CSS = """body{font:16px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;display:block;overflow-x:auto}th,td{padding:.3em .7em;border-bottom:1px solid #ccc;
text-align:left;white-space:nowrap}img{max-width:100%}pre{background:#f5f5f5;padding:1em;overflow-x:auto}
figure{margin:1.5em 0}figcaption{color:#555}"""


def _page(results: Mapping[str, Any], images: Mapping[str, str], folder: Path) -> str:
    """All of it as one page that needs no other file."""
    runs = [
        [row["variant"], ", ".join(map(str, row["grid"].values())), str(run["seed"]),
         *(f"{run[m]:.2f}" if m in run else "–" for m in results["measures"]),
         f"{run['seconds']:.1f}" if "seconds" in run else "–", run["failure"] or run["folder"]]
        for row in results["rows"] for run in row["runs"]
    ]  # fmt: skip
    experiment = {k: list(v) if isinstance(v, tuple) else v for k, v in results["experiment"].items()}
    title = html.escape(heading(results))
    parts = [
        f"<h1>{title}</h1>", _summary(results, folder, images),
        "<h2>Runs</h2>",
        table(["variant", "grid", "seed", *results["measures"].values(), "seconds", "folder"], runs),
        "<h2>Settings</h2>", f"<pre>{html.escape(yaml.safe_dump(experiment, sort_keys=False))}</pre>",
        "<p>config.yaml in the folder of a run has every setting of it.</p>",
        "<h2>Command</h2>", f"<pre>{html.escape(results['command'])}</pre>",
        "<h2>Machine</h2>", f"<pre>{html.escape(yaml.safe_dump(results['machines'], sort_keys=False))}</pre>",
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{CSS}</style>\n'
        + "\n".join(parts) + "\n</html>\n"
    )  # fmt: skip
