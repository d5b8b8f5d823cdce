"""The HTTP API: search by text, by image or by row; thumbnails; metrics. /docs describes it."""

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

from amclr.config.schema import ServeConfig
from amclr.search.query import MAX_DEPTH, MAX_TEXT
from amclr.serve import page
from amclr.serve.gate import Gate, error_response
from amclr.serve.service import MAX_FILTER, MAX_K, Answer, Busy, DeadlineExceeded, NoSuchImage, Service, display_name
from amclr.serve.service import Query as ServiceQuery
from amclr.utils.errors import UserError


class Paging(BaseModel):
    """Which results to return."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    k: int = Field(12, ge=1, le=MAX_K, description="Maximum number of results.")
    skip: int = Field(0, ge=0, le=MAX_DEPTH - MAX_K, description="Number of results to skip.")
    threshold: float = Field(-1.0, ge=-1, le=1, description="Minimum cosine.")
    only: str = Field(
        "", max_length=MAX_FILTER, description="A text that names or captions must contain, ignoring case."
    )


class TextSearch(Paging):
    """A search by text."""

    query: str = Field(
        max_length=MAX_TEXT,
        description='A text; a minus before a word or "quoted text" excludes it: a beach -people',
    )


class Result(BaseModel):
    """One result."""

    place: int = Field(description="Rank, from 1 on.")
    score: float = Field(description="Cosine to the query.")
    row: int = Field(description="The image's row in the index: /similar/{row} and /thumbnail/{row} take it.")
    name: str
    captions: list[str]
    thumbnail: str | None = Field(description="Path of its thumbnail; null if the index has none.")


class Results(BaseModel):
    """Results, best first."""

    results: list[Result]
    more: bool = Field(description="Whether more results follow.")


class Health(BaseModel):
    """Whether the server answers queries."""

    status: str


class Error(BaseModel):
    """Why a request was refused."""

    error: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The query is invalid."},
    401: {"model": Error, "description": "A token is required."},
    404: {"model": Error, "description": "There is no such image."},
    413: {"model": Error, "description": "The request is too large."},
    422: {"model": Error, "description": "A parameter has the wrong type or is out of range."},
    429: {"model": Error, "description": "Too many searches from this client; see Retry-After."},
    503: {"model": Error, "description": "Too many searches are waiting; see Retry-After."},
    504: {"model": Error, "description": "The search took too long."},
}
CACHE_CONTROL = "private, max-age=3600"


def create_app(service: Service, config: ServeConfig | None = None) -> Gate:
    """Create the ASGI application: the API and the page, behind the gate."""
    config = config or service.config
    app = FastAPI(
        title="amclr serve", version="1", description="Search in an index of images.", docs_url=None, redoc_url=None
    )
    index = service.index
    # The thumbnails of another version of the index differ.
    version = hashlib.sha256("".join(p.sha256 for p in index.parts).encode()).hexdigest()[:16]

    async def answer(query: ServiceQuery) -> Results:
        return results(await service.ask(query), service.has_thumbnails)

    @app.get("/health", summary="Whether the server answers queries")
    def health() -> Health:
        if not service.alive:
            raise HTTPException(503, "the search service has stopped")
        return Health(status="ok")

    @app.get("/search", responses=REFUSALS, summary="Search by text")
    async def search_get(request: Annotated[TextSearch, Query()]) -> Results:
        return await answer(_query(request, text=request.query))

    @app.post("/search", responses=REFUSALS, summary="Search by text")
    async def search_post(request: TextSearch) -> Results:
        return await answer(_query(request, text=request.query))

    @app.post("/search/image", responses=REFUSALS, summary="Search by image, or by image and text")
    async def search_image(
        image: Annotated[UploadFile, File(description="JPEG, PNG, WebP, GIF, BMP, TIFF or PPM.")],
        paging: Annotated[Paging, Query()],
        text: Annotated[str, Form(max_length=MAX_TEXT)] = "",
        image_share: Annotated[float, Form(ge=0, le=1, description="Weight of the image relative to the text.")] = 0.5,
    ) -> Results:
        return await answer(_query(paging, text=text, image=await image.read(), image_share=image_share))

    @app.get("/similar/{row}", responses=REFUSALS, summary="Images similar to one of the index")
    async def similar(row: int, paging: Annotated[Paging, Query()]) -> Results:
        if row < 0:
            raise NoSuchImage
        return await answer(_query(paging, row=row))

    @app.get("/thumbnail/{row}", responses=REFUSALS, response_class=Response, summary="A JPEG thumbnail")
    def thumbnail(row: int, request: Request) -> Response:
        try:
            content = index.thumbnail(row)
        except (IndexError, OSError):  # no such row, or the index was replaced
            content = b""
        if not content:
            raise HTTPException(404, "there is no such thumbnail")
        headers = {"cache-control": CACHE_CONTROL, "etag": f'"{version}-{row}"'}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="image/jpeg", headers=headers)

    @app.get("/metrics", response_class=Response, summary="Metrics for Prometheus")
    def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(_docs(app.openapi()))

    _handle_errors(app)
    return Gate(app, config, service.metrics, page.mount(app, service))


def results(answer: Answer, thumbnails: bool = True) -> Results:
    """The response to a query; does not reveal where on this machine the images are."""
    return Results(
        results=[
            Result(place=h.place, score=h.score, row=h.row, name=display_name(h.name), captions=list(h.captions),
                   thumbnail=f"/thumbnail/{h.row}" if thumbnails else None)
            for h in answer.hits
        ],
        more=answer.more,
    )  # fmt: skip


def _query(paging: Paging, **query: Any) -> ServiceQuery:
    return ServiceQuery(k=paging.k, skip=paging.skip, threshold=paging.threshold, only=paging.only, **query)


def _handle_errors(app: FastAPI) -> None:
    """Answer every error with a JSON message that reveals nothing about the machine."""

    @app.exception_handler(UserError)
    def invalid(_: Request, error: UserError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(NoSuchImage)
    def not_found(_: Request, __: NoSuchImage) -> JSONResponse:
        return error_response(404, "there is no such image")

    @app.exception_handler(Busy)
    def busy(_: Request, __: Busy) -> JSONResponse:
        return error_response(503, "too many searches are waiting: try again in a moment", {"retry-after": "1"})

    @app.exception_handler(DeadlineExceeded)
    def too_late(_: Request, __: DeadlineExceeded) -> JSONResponse:
        return error_response(504, "the search took too long: try again in a moment")

    @app.exception_handler(RequestValidationError)
    def validation(_: Request, error: RequestValidationError) -> JSONResponse:
        problems = ("{}: {}".format(".".join(map(str, e["loc"][1:])) or "body", e["msg"]) for e in error.errors())
        return error_response(422, "; ".join(problems))

    @app.exception_handler(HTTPException)
    def http(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    def internal(_: Request, __: Exception) -> JSONResponse:
        return error_response(500, "internal error: see the server's log")


def _docs(schema: dict[str, Any]) -> str:
    """Format the OpenAPI description as a page without scripts or external resources."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            fields = list(operation.get("parameters", []))
            for content in operation.get("requestBody", {}).get("content", {}).values():
                body = schema["components"]["schemas"][content["schema"]["$ref"].rsplit("/", 1)[1]]
                required = body.get("required", ())
                fields += [
                    {
                        "name": n,
                        "in": "body",
                        "required": n in required,
                        "schema": s,
                        "description": s.get("description", ""),
                    }
                    for n, s in body["properties"].items()
                ]  # fmt: skip
            rows = "".join(
                f"<tr><td><code>{html.escape(f['name'])}</code><td>{f['in']}<td>{_type(f)}"
                f"<td>{html.escape(f.get('description', ''))}" for f in fields
            )  # fmt: skip
            codes = ", ".join(f"{code} {html.escape(r['description'])}" for code, r in operation["responses"].items())
            summary = html.escape(operation["summary"])
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{summary}."
                         f"<table>{rows}</table><p class='codes'>{codes}")  # fmt: skip
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{schema["info"]["title"]}</title>
<meta name="viewport" content="width=device-width"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ margin-top: 2.2rem; font-size: 1.1rem; }} .codes {{ color: #666; font-size: .85rem; }}
td {{ padding: .15rem 1rem .15rem 0; vertical-align: top; }} pre {{ background: #eee; padding: .6rem; overflow: auto; }}
</style><h1>{schema["info"]["title"]}</h1>
<p>The API; also as <a href="openapi.json">OpenAPI</a>. If the server has a token, send it:
<code>Authorization: Bearer TOKEN</code>.
<pre>curl 'http://127.0.0.1:7860/search?query=a+dog+-people&amp;k=5'
curl -F image=@photo.jpg -F text='at night' http://127.0.0.1:7860/search/image</pre>
{"".join(parts)}</html>"""


def _type(field: dict[str, Any]) -> str:
    schema = field["schema"]
    bounds = " to ".join(str(schema[b]) for b in ("minimum", "maximum") if b in schema)
    if field.get("required"):
        presence = "required"
    else:
        presence = f"default {schema['default']}" if schema.get("default") != "" else ""
    return html.escape(", ".join(filter(None, [schema.get("type", ""), bounds, presence])))
