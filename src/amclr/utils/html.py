"""HTML for reports and notebooks. All text is escaped, and images are embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table of text."""
    lines = [("th", header), *(("td", line) for line in body)]
    return "<table>" + "".join(
        "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in line) + "</tr>" for tag, line in lines
    ) + "</table>"  # fmt: skip


def paragraph(text: str) -> str:
    """A paragraph with its line breaks."""
    return f"<p>{escape(text)}</p>".replace("\n", "<br>")


def image(file: Path, caption: str, style: str = "") -> str:
    """A PNG with a caption; empty if the file cannot be read."""
    try:
        data = base64.b64encode(file.read_bytes()).decode()
    except OSError:
        return ""
    text = escape(caption)
    styled = f' style="{style}"' if style else ""
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}"{styled}><figcaption>{text}</figcaption></figure>'
    )
