"""The page that people search with: Gradio, mounted on the API.

It uses no component that takes or returns files: images arrive as text in an event, and results point to /thumbnail.
So Gradio's own routes for files can stay closed (see `amclr.serve.gate`), and nothing is written to disk.
"""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
from fastapi import FastAPI

from amclr.data.sources.rows import printable
from amclr.serve.page_assets import CSS, DROP, DROP_CSS, HITS, MORE_LIKE, TAKE_IMAGE
from amclr.serve.service import Answer, Busy, DeadlineExceeded, NoSuchImage, Query, Service, display_name
from amclr.utils.errors import UserError

PER_PAGE = 24
MAX_CAPTIONS = 2
"""Maximum captions shown for an image."""
NO_THRESHOLD = -1.0
"""The lowest cosine: excludes nothing."""


@dataclass(frozen=True)
class PastSearch:
    """A search as the page remembers it, to turn its pages and to narrow it down."""

    query: Query
    description: str
    text: str
    """The content of the text field."""


def mount(app: FastAPI, service: Service) -> int:
    """Mount the page at the root of an application; return how many event handlers it has."""
    page = build_page(service)
    # System fonts: Gradio would load its own from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(
        app, page, "/", allowed_paths=[], show_error=False, max_file_size=1, ssr_mode=False, pwa=False,
        run_history=False, enable_monitoring=False, mcp_server=False, footer_links=[], theme=theme, css=CSS,
    )  # fmt: skip
    return len(page.fns)


def build_page(service: Service) -> gr.Blocks:
    """Lay out the page, and connect its components to their handlers."""
    examples, handlers = _examples(service), Handlers(service)
    intro = _hint("Describe what the image shows, and press Enter. Or drop an image, to find similar ones.")
    with gr.Blocks(title="Search images", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Search images</h1><p>{len(service.index):,} images</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                text = gr.Textbox(label="What does the image show? A minus excludes: a beach -people", max_lines=1,
                                  placeholder=examples[0], autofocus=True, elem_id="text")  # fmt: skip
                go = gr.Button("Search", variant="primary", elem_id="go")
            with gr.Column(scale=2, min_width=280):
                image = gr.HTML("", html_template=DROP, css_template=DROP_CSS, js_on_load=TAKE_IMAGE,
                                apply_default_css=False, elem_id="image")  # fmt: skip
        with gr.Accordion("Narrow down", open=False, elem_id="narrow"), gr.Row():
            only = gr.Textbox(label="Names or captions contain", elem_id="only", min_width=200)
            threshold = gr.Slider(NO_THRESHOLD, 1, NO_THRESHOLD, step=0.01,
                                  label="Minimum score (-1 excludes nothing)", min_width=200)  # fmt: skip
            share = gr.Slider(0, 1, 0.5, step=0.05, label="Weight of the image relative to the text", min_width=200)
        # gr.Examples would bypass the queue, by a route that is closed.
        tries = gr.Dataset(components=[text], samples=[[e] for e in examples], type="index", label="For example",
                           elem_id="examples")  # fmt: skip
        hits = gr.HTML(intro, css_template=HITS, js_on_load=MORE_LIKE, apply_default_css=False, elem_id="hits")
        with gr.Row(visible=False, elem_id="again") as pages:
            back = gr.Button("Previous", elem_id="back", min_width=100)
            on = gr.Button("Next", elem_id="on", min_width=100)
        past = gr.State(None, time_to_live=3600)

        # None of these is an API: that is amclr.serve.api.
        options: Any = {"api_visibility": "private", "show_progress": "minimal", "concurrency_limit": None}
        fields, outputs = [text, image, only, threshold, share], [hits, pages, back, on, past, tries]
        for event in (text.submit, go.click, image.upload, share.release):
            event(handlers.search, fields, outputs, trigger_mode="always_last", **options)
        for event in (only.submit, threshold.release):
            event(handlers.narrow, [past, *fields], outputs, trigger_mode="always_last", **options)
        tries.click(lambda n: examples[n], tries, text, **options).then(handlers.search, fields, outputs, **options)
        scroll = "() => document.querySelector('#hits').scrollIntoView({behavior: 'smooth'})"
        hits.select(handlers.like, [text, only, threshold], outputs, **options).then(None, js=scroll)
        back.click(handlers.turn(-PER_PAGE), past, outputs, **options).then(None, js=scroll)
        on.click(handlers.turn(PER_PAGE), past, outputs, **options).then(None, js=scroll)
    page.queue(default_concurrency_limit=None, max_size=service.config.waiting)
    return page


class Handlers:
    """The event handlers of the page. Each returns the new state of: hits, pages, back, on, past, tries."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def search(self, text: Any, image: Any, only: Any, threshold: Any, share: Any) -> list[Any]:
        """Search by the fields of the page."""
        text, image = _text(text).strip(), _text(image)
        if not text and not image:
            return _message("The search is empty: describe what the image shows, or drop an image above.")
        if text and not any(c.isalnum() for c in text):
            return _message("There is no word in that. Describe what the image shows: a dog on a beach.")
        try:
            content = _bytes(image)
        except UserError as error:
            return _message(_sentence(str(error)))
        query = _query(only, threshold, text=text, image=content, image_share=_number(share, 0.5))
        description = " and ".join([f"“{text}”"] * bool(text) + ["your image"] * bool(content))
        return await self._show(PastSearch(query, description, text))

    async def narrow(self, past: PastSearch | None, *values: Any) -> list[Any]:
        """Repeat a search with another filter or threshold; search anew if the text has changed."""
        text, _, only, threshold, _ = values
        if past is None or past.text != _text(text).strip():
            return await self.search(*values)
        query = replace(past.query, skip=0, only=_text(only), threshold=_number(threshold, NO_THRESHOLD))
        return await self._show(replace(past, query=query))

    async def like(self, text: Any, only: Any, threshold: Any, event: gr.EventData) -> list[Any]:
        """Search for images like one of the results."""
        row = getattr(event, "row", None)
        if not isinstance(row, int) or not 0 <= row < len(self.service.index):
            return _message("There is no such image.")
        name = display_name(self.service.index.image(row).name)
        query = _query(only, threshold, row=row)
        return await self._show(PastSearch(query, f"the image {name}", _text(text).strip()))

    def turn(self, step: int) -> Callable[[PastSearch | None], Awaitable[list[Any]]]:
        """A handler that goes `step` results forward, or back."""

        async def turn(past: PastSearch | None) -> list[Any]:
            if past is None:
                return _message("That search has expired: repeat it.")
            query = replace(past.query, skip=max(0, past.query.skip + step))
            return await self._show(replace(past, query=query))

        return turn

    async def _show(self, past: PastSearch) -> list[Any]:
        try:
            answer = await self.service.ask(past.query)
        except NoSuchImage:
            return _message("There is no such image.")
        except Busy:
            return _message("Too many people are searching right now. Try again in a moment.")
        except DeadlineExceeded:
            return _message("That took too long. Try again in a moment.")
        except UserError as error:
            return _message(_sentence(str(error)))
        query = replace(past.query, text="", image=None, vector=answer.vector)
        return [
            _cards(answer, past, self.service.has_thumbnails), gr.Row(visible=query.skip > 0 or answer.more),
            gr.Button(interactive=query.skip > 0), gr.Button(interactive=answer.more), replace(past, query=query),
            gr.Dataset(visible=not answer.hits),
        ]  # fmt: skip


def _message(message: str) -> list[Any]:
    """The outputs of a handler that has no results to show."""
    return [_hint(message), gr.Row(visible=False), gr.Button(), gr.Button(), None, gr.Dataset(visible=True)]


def _query(only: Any, threshold: Any, **query: Any) -> Query:
    return Query(k=PER_PAGE, only=_text(only), threshold=_number(threshold, NO_THRESHOLD), **query)


def _text(value: Any) -> str:
    """The content of a text field. It is None before anybody types in it, and clients may send anything."""
    return value if isinstance(value, str) else ""


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


def _bytes(image: str) -> bytes | None:
    """Decode an image from a data URL. Raises UserError if it is not one."""
    if not image:
        return None
    head, _, content = image.partition(",")
    try:
        if not head.startswith("data:") or not head.endswith(";base64"):
            raise ValueError
        return b64decode(content, validate=True)
    except ValueError:
        raise UserError("that is not an image") from None


def _examples(service: Service) -> list[str]:
    """Some example queries: short captions of images spread over the index."""
    queries: list[str] = []
    for row in range(0, len(service.index), max(1, len(service.index) // 64)):
        captions = [printable(c).strip(" .") for c in service.index.image(row).captions]
        queries += [c for c in captions if 8 <= len(c) <= 45][:1]
    queries = list(dict.fromkeys(queries))
    return queries[:: max(1, len(queries) // 4)][:4] or ["a dog on the beach", "people at a table", "a red car"]


def _cards(answer: Answer, past: PastSearch, thumbnails: bool) -> str:
    """Format results as HTML. Names and captions are untrusted, and escaped."""
    if not answer.hits:
        advice = "lower the minimum score, or clear the filter, under “Narrow down”"
        return _hint(f"Nothing {'more ' if past.query.skip else ''}found for {past.description}: {advice}.")
    cards = []
    for hit in answer.hits:
        captions = [printable(c) for c in hit.captions]
        image = f'<img src="thumbnail/{hit.row}" alt="{escape((*captions, "")[0])}" decoding="async">' * thumbnails
        name = escape(printable(display_name(hit.name)))
        paragraphs = "".join(f'<p class="said-of">{escape(c)}</p>' for c in captions[:MAX_CAPTIONS])
        cards.append(
            f'<li>{image}<div><p class="line"><b title="cosine to the query">{hit.score:.3f}</b>'
            f'<span title="{name}">{name}</span></p>{paragraphs}</div>'
            f'<button type="button" data-row="{hit.row}" aria-label="More like {name}">More like this</button></li>'
        )
    span = f"{answer.hits[0].place} to {answer.hits[-1].place}"
    line = f"Results {span} for {escape(printable(_short(past.description)))}"
    return f'<p class="said" role="status">{line}</p><ol>{"".join(cards)}</ol>'


def _hint(message: str) -> str:
    return f'<p class="hint" role="status">{escape(printable(_short(message)))}</p>'


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
