"""The HTTP API: search by text, by an image, by a row; thumbnails; metrics. Its description is at /docs."""

from __future__ import annotations

import hashlib
import html
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from amclr import serve
from amclr.config.schema import ServeConfig
from amclr.search import query as search
from amclr.serve import page, service
from amclr.serve.gate import Gate, refused
from amclr.serve.service import MAX_FILTER, MAX_K, Answer, Busy, Late, NoSuchImage, Service
from amclr.utils.errors import UserError


class Page(BaseModel):
    """Which results are wanted."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    k: int = Field(12, ge=1, le=MAX_K, description="Results, at most.")
    skip: int = Field(0, ge=0, le=search.DEEPEST - MAX_K, description="Results to leave out before the first.")
    threshold: float = Field(-1.0, ge=-1, le=1, description="Leave out images whose cosine is below.")
    only: str = Field("", max_length=MAX_FILTER, description="A text that names or captions must hold, in any case.")


class TextSearch(Page):
    """A text to search for."""

    query: str = Field(
        max_length=search.MAX_TEXT,
        description='A text; words or "quoted texts" with a minus before them are not wanted: a beach -people',
    )


class Result(BaseModel):
    """An image that was found."""

    place: int = Field(description="From 1 on.")
    score: float = Field(description="Cosine to the query.")
    row: int = Field(description="The image's row in the index: /similar/{row} and /thumbnail/{row} take it.")
    name: str
    captions: list[str]
    thumbnail: str | None = Field(description="Where its thumbnail is; null where the index has none.")


class Results(BaseModel):
    """Images that were found, best first."""

    results: list[Result]
    more: bool = Field(description="Whether there are more after these.")


class Health(BaseModel):
    """Whether the server answers."""

    status: str


class Error(BaseModel):
    """Why a request was refused."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The query cannot be answered."},
    401: {"model": Error, "description": "A token is needed."},
    404: {"model": Error, "description": "There is no such image."},
    413: {"model": Error, "description": "The request is too large."},
    422: {"model": Error, "description": "A parameter is of another type, or out of range."},
    429: {"model": Error, "description": "Too many searches; Retry-After says for how long."},
    503: {"model": Error, "description": "Too many searches wait; Retry-After says for how long."},
    504: {"model": Error, "description": "The search took too long."},
}
KEEP = "private, max-age=3600"


def create_app(searching: Service, config: ServeConfig | None = None) -> Gate:
    """The API and the page, behind their gate: an ASGI application."""
    config = config or searching.config
    app = FastAPI(title="amclr serve", version="1", description=serve.__doc__ or "", docs_url=None, redoc_url=None)
    index = searching.index
    # Thumbnails of an index that has changed are others.
    edition = hashlib.sha256("".join(p.sha256 for p in index.parts).encode()).hexdigest()[:16]

    async def answer(query: service.Query) -> Results:
        found = await searching.ask(query)
        return results(found, searching.has_thumbnails)

    @app.get("/health", summary="Whether the server answers")
    def health() -> Health:
        if not searching.alive:
            raise HTTPException(503, "the search has ended")
        return Health(status="ok")

    @app.get("/search", responses=REFUSALS, summary="Search by a text")
    async def search_get(asked: Annotated[TextSearch, Query()]) -> Results:
        return await answer(_query(asked, text=asked.query))

    @app.post("/search", responses=REFUSALS, summary="Search by a text")
    async def search_post(asked: TextSearch) -> Results:
        return await answer(_query(asked, text=asked.query))

    @app.post("/search/image", responses=REFUSALS, summary="Search by an image, and a text if one is given")
    async def search_image(
        image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.")],
        which: Annotated[Page, Query()],
        text: Annotated[str, Form(max_length=search.MAX_TEXT)] = "",
        image_share: Annotated[float, Form(ge=0, le=1, description="The image's weight beside the text.")] = 0.5,
    ) -> Results:
        return await answer(_query(which, text=text, image=await image.read(), image_share=image_share))

    @app.get("/similar/{row}", responses=REFUSALS, summary="Images like one of the index")
    async def similar(row: int, which: Annotated[Page, Query()]) -> Results:
        if row < 0:
            raise NoSuchImage
        return await answer(_query(which, row=row))

    @app.get("/thumbnail/{row}", responses=REFUSALS, response_class=Response, summary="A JPEG thumbnail")
    def thumbnail(row: int, request: Request) -> Response:
        try:
            content = index.thumbnail(row)
        except (IndexError, OSError):  # no such row, or the index is another by now
            content = b""
        if not content:
            raise HTTPException(404, "there is no such thumbnail")
        headers = {"cache-control": KEEP, "etag": f'"{edition}-{row}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="image/jpeg", headers=headers)

    @app.get("/metrics", response_class=Response, summary="Counts and times, for Prometheus")
    def metrics() -> Response:
        return Response(generate_latest(searching.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(_docs(app.openapi()))

    _explain_errors(app)
    return Gate(app, config, searching.metrics, page.mount(app, searching))


def results(found: Answer, thumbnails: bool = True) -> Results:
    """What is told of an answer: not where on this machine the images lie."""
    return Results(
        results=[
            Result(place=h.place, score=h.score, row=h.row, name=service.shown_name(h.name), captions=list(h.captions),
                   thumbnail=f"/thumbnail/{h.row}" if thumbnails else None)
            for h in found.hits
        ],
        more=found.more,
    )  # fmt: skip


def _query(which: Page, **what: Any) -> service.Query:
    return service.Query(k=which.k, skip=which.skip, threshold=which.threshold, only=which.only, **what)


def _explain_errors(app: FastAPI) -> None:
    """Every error is JSON with a message, and tells nothing of the machine."""

    @app.exception_handler(UserError)
    def cannot(_: Request, error: UserError) -> JSONResponse:
        return refused(400, str(error))

    @app.exception_handler(NoSuchImage)
    def no_row(_: Request, __: NoSuchImage) -> JSONResponse:
        return refused(404, "there is no such image")

    @app.exception_handler(Busy)
    def busy(_: Request, __: Busy) -> JSONResponse:
        return refused(503, "too many searches wait: try again in a moment", {"retry-after": "1"})

    @app.exception_handler(Late)
    def late(_: Request, __: Late) -> JSONResponse:
        return refused(504, "the search took too long: try again in a moment")

    @app.exception_handler(RequestValidationError)
    def unfit(_: Request, error: RequestValidationError) -> JSONResponse:
        told = ("{}: {}".format(".".join(map(str, e["loc"][1:])) or "body", e["msg"]) for e in error.errors())
        return refused(422, "; ".join(told))

    @app.exception_handler(HTTPException)
    def other(_: Request, error: HTTPException) -> JSONResponse:
        return refused(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    def failed(_: Request, __: Exception) -> JSONResponse:
        return refused(500, "something went wrong here; the server's log says what")


def _docs(schema: dict[str, Any]) -> str:
    """The OpenAPI description as a page that needs no script, and nothing from another place."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, told in methods.items():
            fields = list(told.get("parameters", []))
            for content in told.get("requestBody", {}).get("content", {}).values():
                of = schema["components"]["schemas"][content["schema"]["$ref"].rsplit("/", 1)[1]]
                fields += [{"name": n, "in": "body", "required": n in of.get("required", ()), "schema": s,
                            "description": s.get("description", "")} for n, s in of["properties"].items()]  # fmt: skip
            rows = "".join(
                f"<tr><td><code>{html.escape(f['name'])}</code><td>{f['in']}<td>{_kind(f)}"
                f"<td>{html.escape(f.get('description', ''))}" for f in fields
            )  # fmt: skip
            codes = ", ".join(f"{code} {html.escape(r['description'])}" for code, r in told["responses"].items())
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(told['summary'])}."
                         f"<table>{rows}</table><p class='codes'>{codes}")  # fmt: skip
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{schema["info"]["title"]}</title>
<meta name="viewport" content="width=device-width"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ margin-top: 2.2rem; font-size: 1.1rem; }} .codes {{ color: #666; font-size: .85rem; }}
td {{ padding: .15rem 1rem .15rem 0; vertical-align: top; }} pre {{ background: #eee; padding: .6rem; overflow: auto; }}
</style><h1>{schema["info"]["title"]}</h1>
<p>The API, as <a href="openapi.json">OpenAPI</a> too. With a token, send it: <code>Authorization: Bearer TOKEN</code>.
<pre>curl 'http://127.0.0.1:7860/search?query=a+dog+-people&amp;k=5'
curl -F image=@photo.jpg -F text='at night' http://127.0.0.1:7860/search/image</pre>
{"".join(parts)}</html>"""


def _kind(told: dict[str, Any]) -> str:
    of = told["schema"]
    bounds = " to ".join(str(of[b]) for b in ("minimum", "maximum") if b in of)
    default = "needed" if told.get("required") else f"default {of['default']}" if of.get("default") != "" else ""
    return html.escape(", ".join(filter(None, [of.get("type", ""), bounds, default])))
