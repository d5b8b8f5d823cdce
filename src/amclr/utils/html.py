"""Pieces of HTML that reports and notebooks show: all text is escaped, images are in the page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of texts."""
    lines = [("th", header), *(("td", line) for line in body)]
    return "<table>" + "".join(
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>" for tag, line in lines
    ) + "</table>"  # fmt: skip


def paragraph(text: str) -> str:
    """A text, with its line breaks."""
    return f"<p>{escape(text)}</p>".replace("\n", "<br>")


def image(file: Path, about: str, style: str = "") -> str:
    """A PNG and what is told of it below; nothing where the file cannot be read."""
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except OSError:
        return ""
    told = escape(about)
    styled = f' style="{style}"' if style else ""
    return (
        f'<figure><img alt="{told}" src="data:image/png;base64,{data}"{styled}><figcaption>{told}</figcaption></figure>'
    )
