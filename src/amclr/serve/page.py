"""The page that people search with: Gradio, mounted on the API.

It uses no component that takes or gives files: images come as text in an event, results point to /thumbnail. So
Gradio's own routes for files can stay closed (see `amclr.serve.gate`), and nothing is written to disk.
"""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from html import escape
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read where it is imported

import gradio as gr
from fastapi import FastAPI

from amclr.data.sources.rows import printable
from amclr.serve.service import Answer, Busy, Late, NoSuchImage, Query, Service, shown_name
from amclr.utils.errors import UserError

PER_PAGE = 24
CAPTIONS = 2
"""Captions shown of an image."""
ALL = -1.0
"""The threshold that leaves nothing out."""

CSS = """
.gradio-container { width: 100%; max-width: 1200px !important; margin: auto; }
#head > div, #image > div, #hits > div { margin: 0; padding: 0; }
#head h1 { margin: .4rem 0 0; font-size: 1.5rem; } #head p { margin: 0; opacity: .7; }
#again { max-width: 24rem; margin: auto; }
"""

HITS = """
.said { margin: .2rem 0 .8rem; }
.hint { padding: 2.5rem 1rem; text-align: center; opacity: .75; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px;
     grid-template-columns: repeat(auto-fill, minmax(min(160px, 45%), 1fr)); }
li { margin: 0; display: flex; flex-direction: column; border: 1px solid var(--border-color-primary);
     border-radius: 8px; overflow: hidden; background: var(--block-background-fill); }
li img { width: 100%; aspect-ratio: 4 / 3; object-fit: contain; background: var(--background-fill-secondary);
         margin: 0; }
li div { padding: 6px 9px; flex: 1; min-width: 0; font-size: .85rem; line-height: 1.35; overflow-wrap: anywhere; }
.line { display: flex; gap: .6em; margin: 0; }
.line b { flex: none; font-variant-numeric: tabular-nums; }
.line span { opacity: .65; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.said-of { margin: .25rem 0 0; display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical;
           overflow: hidden; }
button { border: 0; border-top: 1px solid var(--border-color-primary); padding: 8px; cursor: pointer;
         background: none; color: var(--link-text-color); font: inherit; font-size: .85rem; }
button:hover, button:focus-visible { background: var(--background-fill-secondary); }
"""

MORE_LIKE = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-row]');
  if (button) trigger('select', {row: Number(button.dataset.row)});
});
"""

DROP = """
<label class="${value ? 'has' : ''}" tabindex="0">
  <input type="file" accept="image/*" aria-label="Image to search by" tabindex="-1">
  ${value ? '<img alt="the image that is searched by" src="' + value + '">'
          : '<span>Drop an image here, paste one, or <u>choose a file</u></span>'}
</label>
${value ? '<button type="button" aria-label="Remove the image">&#10005;</button>' : ''}
"""

DROP_CSS = """
position: relative;
label { display: flex; align-items: center; justify-content: center; min-height: 148px; box-sizing: border-box;
        border: 2px dashed var(--border-color-primary); border-radius: 8px; cursor: pointer; padding: 6px;
        text-align: center; }
@media (max-width: 640px) { label { min-height: 72px; } }
label.over, label:hover, label:focus-visible { border-color: var(--color-accent); }
label.has { border-style: solid; }
input { position: absolute; opacity: 0; width: 1px; height: 1px; }
img { max-height: 140px; max-width: 100%; object-fit: contain; margin: 0; }
button { position: absolute; top: 6px; right: 6px; border-radius: 99px; width: 28px; height: 28px; cursor: pointer;
         border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
         color: var(--body-text-color); }
"""

TAKE_IMAGE = """
const side = 1024;
async function take(file) {
  if (!file) return;
  try {  // photographs are sent as large as the model needs them, and no larger
    const image = await createImageBitmap(file);
    const scale = Math.min(1, side / Math.max(image.width, image.height));
    const canvas = document.createElement('canvas');
    canvas.width = Math.max(1, Math.round(image.width * scale));
    canvas.height = Math.max(1, Math.round(image.height * scale));
    const brush = canvas.getContext('2d');
    brush.fillStyle = 'white';
    brush.fillRect(0, 0, canvas.width, canvas.height);
    brush.drawImage(image, 0, 0, canvas.width, canvas.height);
    props.value = canvas.toDataURL('image/jpeg', 0.92);
  } catch {  // what the browser cannot read, the server may, or says why not
    props.value = await new Promise(done => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.readAsDataURL(file);
    });
  }
  trigger('upload');
}
element.addEventListener('change', event => {
  if (event.target.type === 'file') take(event.target.files[0]);
});
element.addEventListener('click', event => {
  if (event.target.closest('button')) { event.preventDefault(); props.value = ''; trigger('clear'); }
});
element.addEventListener('keydown', event => {
  if (event.target.tagName === 'LABEL' && (event.key === 'Enter' || event.key === ' ')) {
    event.preventDefault();
    element.querySelector('input').click();
  }
});
for (const kind of ['dragover', 'dragleave', 'drop']) element.addEventListener(kind, event => {
  event.preventDefault();
  element.querySelector('label').classList.toggle('over', kind === 'dragover');
  if (kind === 'drop') take([...event.dataTransfer.files].find(f => f.type.startsWith('image/')));
});
document.addEventListener('paste', event => {
  const file = [...event.clipboardData.files].find(f => f.type.startsWith('image/'));
  if (file) { event.preventDefault(); take(file); }
});
"""


@dataclass(frozen=True)
class Asked:
    """A search that was made, as the page remembers it to turn its pages."""

    query: Query
    what: str
    text: str
    """What the text field held."""


def mount(app: FastAPI, service: Service) -> int:
    """Put the page at the root of an application; returns how many events it has."""
    page = blocks(service)
    # System fonts: Gradio's own come from Google.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    gr.mount_gradio_app(
        app, page, "/", allowed_paths=[], show_error=False, max_file_size=1, ssr_mode=False, pwa=False,
        run_history=False, enable_monitoring=False, mcp_server=False, footer_links=[], theme=theme, css=CSS,
    )  # fmt: skip
    return len(page.fns)


def blocks(service: Service) -> gr.Blocks:
    """The page."""
    count, examples = len(service.index), _examples(service)
    empty = _hint("Type what is to be seen in an image, and press Enter. Or drop an image, to find others like it.")
    with gr.Blocks(title="Search images", analytics_enabled=False) as page:
        gr.HTML(f"<h1>Search images</h1><p>{count:,} images</p>", elem_id="head")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                text = gr.Textbox(label="What is to be seen? A minus leaves out: a beach -people", max_lines=1,
                                  placeholder=examples[0], autofocus=True, elem_id="text")  # fmt: skip
                go = gr.Button("Search", variant="primary", elem_id="go")
            with gr.Column(scale=2, min_width=280):
                image = gr.HTML("", html_template=DROP, css_template=DROP_CSS, js_on_load=TAKE_IMAGE,
                                  apply_default_css=False, elem_id="image")  # fmt: skip
        with gr.Accordion("Narrow down", open=False, elem_id="narrow"), gr.Row():
            only = gr.Textbox(label="Names or captions contain", elem_id="only", min_width=200)
            threshold = gr.Slider(ALL, 1, ALL, step=0.01, label="Least score (-1 leaves nothing out)", min_width=200)
            share = gr.Slider(0, 1, 0.5, step=0.05, label="Weight of the image beside a text", min_width=200)
        # gr.Examples would go past the queue, by a route that is closed.
        tries = gr.Dataset(components=[text], samples=[[e] for e in examples], type="index", label="For example",
                           elem_id="examples")  # fmt: skip
        hits = gr.HTML(empty, css_template=HITS, js_on_load=MORE_LIKE, apply_default_css=False, elem_id="hits")
        with gr.Row(visible=False, elem_id="again") as pages:
            back = gr.Button("Previous", elem_id="back", min_width=100)
            on = gr.Button("Next", elem_id="on", min_width=100)
        asked = gr.State(None, time_to_live=3600)

        shown = [hits, pages, back, on, asked, tries]

        def blank(message: str) -> list[Any]:
            return [_hint(message), gr.Row(visible=False), gr.Button(), gr.Button(), None, gr.Dataset(visible=True)]

        async def show(what: Asked) -> list[Any]:
            try:
                found = await service.ask(what.query)
            except NoSuchImage:
                return blank("There is no such image.")
            except Busy:
                return blank("Very many are searching just now. Try again in a moment.")
            except Late:
                return blank("That took too long. Try again in a moment.")
            except UserError as error:
                return blank(_sentence(str(error)))
            query = replace(what.query, text="", image=None, vector=found.vector)
            return [
                _cards(found, what, service.has_thumbnails), gr.Row(visible=query.skip > 0 or found.more),
                gr.Button(interactive=query.skip > 0), gr.Button(interactive=found.more), replace(what, query=query),
                gr.Dataset(visible=not found.hits),
            ]  # fmt: skip

        def query_of(only: Any, threshold: Any, **what: Any) -> Query:
            return Query(k=PER_PAGE, only=_text(only), threshold=_number(threshold, ALL), **what)

        async def search(text: Any, image: Any, only: Any, threshold: Any, share: Any) -> list[Any]:
            text, image = _text(text).strip(), _text(image)
            if not text and not image:
                return blank("Nothing to look for yet: type what is to be seen in an image, or drop one above.")
            if text and not any(c.isalnum() for c in text):
                return blank("There is no word in that. Say what is to be seen in an image: a dog on a beach.")
            try:
                content = _bytes(image)
            except UserError as error:
                return blank(_sentence(str(error)))
            query = query_of(only, threshold, text=text, image=content, image_share=_number(share, 0.5))
            what = " and ".join([f"“{text}”"] * bool(text) + ["your image"] * bool(content))
            return await show(Asked(query, what, text))

        async def narrow(asked: Asked | None, *values: Any) -> list[Any]:
            text, _, only, threshold, _ = values
            if asked is None or asked.text != _text(text).strip():
                return await search(*values)
            query = replace(asked.query, skip=0, only=_text(only), threshold=_number(threshold, ALL))
            return await show(replace(asked, query=query))

        async def like(text: Any, only: Any, threshold: Any, event: gr.EventData) -> list[Any]:
            row = getattr(event, "row", None)
            if not isinstance(row, int) or not 0 <= row < count:
                return blank("There is no such image.")
            name = shown_name(service.index.row(row).name)
            return await show(Asked(query_of(only, threshold, row=row), f"the image {name}", _text(text).strip()))

        def turn(by: int) -> Callable[[Asked | None], Awaitable[list[Any]]]:
            async def turned(asked: Asked | None) -> list[Any]:
                if asked is None:
                    return blank("That search was too long ago: make it again.")
                query = replace(asked.query, skip=max(0, asked.query.skip + by))
                return await show(replace(asked, query=query))

            return turned

        # Nothing of this is an API: that is amclr.serve.api.
        how: Any = {"api_visibility": "private", "show_progress": "minimal", "concurrency_limit": None}
        fields = [text, image, only, threshold, share]
        for happens in (text.submit, go.click, image.upload, share.release):
            happens(search, fields, shown, trigger_mode="always_last", **how)
        for happens in (only.submit, threshold.release):
            happens(narrow, [asked, *fields], shown, trigger_mode="always_last", **how)
        tries.click(lambda chosen: examples[chosen], tries, text, **how).then(search, fields, shown, **how)
        up = "() => document.querySelector('#hits').scrollIntoView({behavior: 'smooth'})"
        hits.select(like, [text, only, threshold], shown, **how).then(None, js=up)
        back.click(turn(-PER_PAGE), asked, shown, **how).then(None, js=up)
        on.click(turn(PER_PAGE), asked, shown, **how).then(None, js=up)
    page.queue(default_concurrency_limit=None, max_size=service.config.waiting)
    return page


def _text(value: Any) -> str:
    """What a text field holds: None before anybody has typed in it, and anything that a client sends."""
    return value if isinstance(value, str) else ""


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default


def _bytes(image: str) -> bytes | None:
    """An image out of a data URL. Raises UserError for what is none."""
    if not image:
        return None
    head, _, content = image.partition(",")
    try:
        if not head.startswith("data:") or not head.endswith(";base64"):
            raise ValueError
        return b64decode(content, validate=True)
    except ValueError:
        raise UserError("that is no image") from None


def _examples(service: Service) -> list[str]:
    """Some queries: short captions of images here and there in the index."""
    found = []
    for row in range(0, len(service.index), max(1, len(service.index) // 64)):
        captions = [printable(c).strip(" .") for c in service.index.row(row).captions]
        found += [c for c in captions if 8 <= len(c) <= 45][:1]
    few = list(dict.fromkeys(found))
    return few[:: max(1, len(few) // 4)][:4] or ["a dog on the beach", "people at a table", "a red car"]


def _cards(found: Answer, asked: Asked, thumbnails: bool) -> str:
    """Results as HTML. Names and captions are others' texts: nothing of them is markup."""
    skip = asked.query.skip
    if not found.hits:
        advice = "lower the least score, or clear the filter, under “Narrow down”"
        return _hint(f"Nothing {'more ' if skip else ''}found for {asked.what}: {advice}.")
    cards = []
    for hit in found.hits:
        captions = [printable(c) for c in hit.captions]
        image = f'<img src="thumbnail/{hit.row}" alt="{escape((*captions, "")[0])}" decoding="async">' * thumbnails
        name = escape(printable(shown_name(hit.name)))
        said = "".join(f'<p class="said-of">{escape(c)}</p>' for c in captions[:CAPTIONS])
        cards.append(
            f'<li>{image}<div><p class="line"><b title="cosine to what was asked for">{hit.score:.3f}</b>'
            f'<span title="{name}">{name}</span></p>{said}</div>'
            f'<button type="button" data-row="{hit.row}" aria-label="More like {name}">More like this</button></li>'
        )
    span = f"{found.hits[0].place} to {found.hits[-1].place}"
    line = f"Results {span} for {escape(printable(_short(asked.what)))}"
    return f'<p class="said" role="status">{line}</p><ol>{"".join(cards)}</ol>'


def _hint(message: str) -> str:
    return f'<p class="hint" role="status">{escape(printable(_short(message)))}</p>'


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
