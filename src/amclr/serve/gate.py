"""ASGI middleware in front of the API and the page: access, rate limits and size limits."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import ipaddress
import json
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amclr.config.schema import ServeConfig
from amclr.serve.metrics import Metrics

MAX_SMALL_BODY = 64 * 1024
"""Maximum bytes of a request without an image."""
BODY_SECONDS = 60.0
"""Time in which a request must arrive completely."""
MAX_PATH = 256
MAX_SESSION = 64
"""Maximum characters of the session name that a page chooses for itself, a key of Gradio's state."""
MAX_CLIENTS = 10_000
"""Maximum clients that are rate-limited separately; beyond, the one seen longest ago is forgotten."""

JOIN = "/gradio_api/queue/join"
METHODS = {
    **dict.fromkeys(("/health", "/metrics", "/docs", "/openapi.json"), ("GET",)),
    "/search": ("GET", "POST"), "/search/image": ("POST",), "/login": ("GET", "POST"),
    **dict.fromkeys(("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt",
                     "/gradio_api/startup-events", "/gradio_api/queue/data"), ("GET", "HEAD")),
    JOIN: ("POST",),
}  # fmt: skip
"""Allowed paths and their methods."""
FOLDERS = {"/similar/": ("GET",), "/thumbnail/": ("GET",), "/gradio_api/heartbeat/": ("GET",),
           "/assets/": ("GET", "HEAD"), "/static/": ("GET", "HEAD")}  # fmt: skip
TAKES_PARAMETERS = ("/search", "/search/image", "/gradio_api/queue/data")
"""Paths that take parameters in the URL."""
COSTLY = ("/search", "/search/image", "/similar/", "/login", JOIN)
"""Paths that count as a search in rate limits."""

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    # The page's framework needs inline scripts and eval; nothing may be loaded from or sent to other hosts.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; "
    "base-uri 'self'; frame-ancestors 'none'; object-src 'none'",
}


class Gate:
    """An ASGI application in front of another one.

    It passes on only the paths of the API and those of Gradio that the page needs; Gradio's other routes, which serve
    files, take uploads or fetch URLs, do not exist behind it. Setting `closing` ends connections that would otherwise
    stay open for ever. events: number of the page's event handlers.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, events: int) -> None:
        self.app, self.config, self.metrics, self.events = app, config, metrics, events
        self.closing = asyncio.Event()
        self.rates = RateLimiter(config.rate, config.burst)
        self._session = hmac.new(config.token.encode(), b"amclr session", hashlib.sha256).hexdigest()
        self._cookie = f"amclr_{self._session[:8]}"  # cookies ignore ports, and another server's must not collide

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        start, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = dict(message["headers"])
                added = HEADERS | ({} if b"cache-control" in headers else {"cache-control": "no-store"})
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in added.items())]
            await send(message)

        route = "page"
        try:
            refusal = self._refusal(scope)
            if refusal is None and scope["path"] == "/login":
                refusal = await self._login(scope, _LimitedBody(receive, MAX_SMALL_BODY))
            if refusal is not None:
                return await refusal(scope, receive, sending)
            await self._pass_on(scope, receive, sending)
            route = getattr(scope.get("route"), "path", route)
        finally:
            self.metrics.requests.labels(route, str(status)).inc()
            if route != "page" and status < 400:
                self.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    def _refusal(self, scope: Scope) -> Response | None:
        path, method = scope["path"], scope["method"]
        client = scope["client"][0] if scope.get("client") else ""
        headers = dict(scope["headers"])
        if not self.config.token and not _is_local(headers.get(b"host", b"")):
            # A page of another site must not reach this server under its own host name (DNS rebinding).
            return error_response(421, "this server answers only to localhost and 127.0.0.1, unless it has a --token")
        methods = _methods(path)
        if not methods:
            return error_response(404, "not found: see /docs")
        if method not in methods:
            return error_response(405, f"use {' or '.join(methods)} here", {"allow": ", ".join(methods)})
        if path.startswith(COSTLY) and (wait := self.rates.take(client)):
            return self._rate_limited(wait)
        if self.config.token and path not in ("/login", "/health") and not self._is_authorised(headers):
            if not path.startswith(COSTLY) and (wait := self.rates.take(client)):  # against guessing tokens
                return self._rate_limited(wait)
            self.metrics.refused.labels("token").inc()
            if path == "/" and method == "GET":
                return HTMLResponse(_login_page(""), 401)
            return error_response(401, "a token is required: send the header 'Authorization: Bearer TOKEN'",
                           {"www-authenticate": "Bearer"})  # fmt: skip
        return None

    def _rate_limited(self, wait: float) -> Response:
        self.metrics.refused.labels("rate").inc()
        seconds = max(1, round(wait + 0.5))
        return error_response(429, f"too many searches: try again in {seconds} s", {"retry-after": str(seconds)})

    def _is_authorised(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.config.token.encode()):
            return True
        cookies = (c.strip().partition(b"=") for c in headers.get(b"cookie", b"").split(b";"))
        return any(
            name == self._cookie.encode() and hmac.compare_digest(value, self._session.encode())
            for name, _, value in cookies
        )

    async def _login(self, scope: Scope, receive: Receive) -> Response:
        if scope["method"] != "POST" or not self.config.token:
            return RedirectResponse("./", 303)
        try:
            body = await _read_body(receive)
        except _BodyError as error:
            return error.response
        token = parse_qs(body.decode("latin-1"), max_num_fields=4).get("token", [""])[0]
        if not hmac.compare_digest(token.encode(), self.config.token.encode()):
            self.metrics.refused.labels("token").inc()
            return HTMLResponse(_login_page("Wrong token."), 401)
        response = RedirectResponse("./", 303)
        secure = scope.get("scheme") == "https"
        response.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", secure=secure)
        return response

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, limiting the size and time of its body."""
        path, headers = scope["path"], dict(scope["headers"])
        upload = round(self.config.upload * 2**20)
        # The page sends images in Base64, which takes a third more.
        limit = MAX_SMALL_BODY + {"/search/image": upload, JOIN: upload * 4 // 3}.get(path, 0)
        started, limited = False, _LimitedBody(receive, limit)

        async def sending(message: Message) -> None:
            nonlocal started
            if limited.error is None or started:
                started = True
                await send(message)

        try:
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > limit:
                limited.error = (
                    _too_large(limit) if length.isdigit() else _BodyError(400, "content-length must be a number")
                )
                raise limited.error
            if path == JOIN:
                body = await _read_body(limited)
                if fault := _event_fault(body, self.events):
                    return await error_response(422, fault)(scope, receive, send)
                unread: Message | None = {"type": "http.request", "body": body, "more_body": False}

                async def replay() -> Message:
                    nonlocal unread
                    message, unread = unread, None
                    return message or await receive()

                return await self.app(scope, replay, send)
            if path.startswith("/gradio_api/heartbeat/"):
                return await self._until_closing(scope, receive, send)
            if path in METHODS and path not in TAKES_PARAMETERS:
                scope["query_string"] = b""  # parameters of Gradio's pages can name files
            await self.app(scope, limited, sending)
        except _BodyError:
            pass
        if limited.error and not started:
            self.metrics.refused.labels("size").inc()
            await limited.error.response(scope, receive, send)

    async def _until_closing(self, scope: Scope, receive: Receive, send: Send) -> None:
        work, end = asyncio.ensure_future(self.app(scope, receive, send)), asyncio.ensure_future(self.closing.wait())
        try:
            await asyncio.wait([work, end], return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            end.cancel()
            await asyncio.gather(work, end, return_exceptions=True)


class RateLimiter:
    """A token bucket per client: `rate` requests a second, `burst` at once. A rate of 0 disables it."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Take a token from a client's bucket. Returns 0, or if it is empty the seconds to wait."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        key = _network(client)
        tokens, last = self._clients.pop(key, (float(self.burst), now))
        tokens = min(self.burst, tokens + (now - last) * self.rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.rate
        self._clients[key] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        return wait


def error_response(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The JSON of every error: {"error": message}."""
    return JSONResponse({"error": message}, status, headers)


class _BodyError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        # The unread rest of the body must not be taken for the next request.
        self.response = error_response(status, message, {"connection": "close"})


def _too_large(limit: int) -> _BodyError:
    return _BodyError(413, f"the request is too large: at most {limit / 2**20:.2g} MB are accepted here")


class _LimitedBody:
    """Receives a body of at most `limit` bytes within `BODY_SECONDS`, and raises _BodyError beyond that."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self.receive, self.limit = receive, limit
        self.deadline = time.monotonic() + BODY_SECONDS
        self.received, self.more = 0, True
        self.error: _BodyError | None = None

    async def __call__(self) -> Message:
        if not self.more:
            return await self.receive()
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                message = await self.receive()
        except TimeoutError:
            self.error = _BodyError(408, "the request arrived too slowly")
            raise self.error from None
        self.received += len(message.get("body", b""))
        self.more = message.get("more_body", False)
        if self.received > self.limit:
            self.error = _too_large(self.limit)
            raise self.error
        return message


async def _read_body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _event_fault(body: bytes, events: int) -> str:
    """Why a request to the page's event queue is refused; empty if it is not.

    The page's events take only strings and numbers. Gradio would also accept a file's path or URL in any field, and
    read it.
    """
    try:
        event: Any = json.loads(body)
    except (ValueError, RecursionError):
        return "the body must be JSON"
    if not isinstance(event, dict) or not isinstance(event.get("data"), list):
        return "data must be a list"
    if event.get("fn_index") not in range(events):
        return "the page has no such event"
    if not isinstance(event.get("session_hash"), str) or len(event["session_hash"]) > MAX_SESSION:
        return f"session_hash must be a string of at most {MAX_SESSION} characters"
    event_data = event.get("event_data")
    values = [*event["data"], *(event_data.values() if isinstance(event_data, dict) else [event_data])]
    if not all(value is None or isinstance(value, (str, int, float, bool)) for value in values):
        return "data must be strings and numbers"
    return ""


def _methods(path: str) -> tuple[str, ...]:
    """The allowed methods of a path; none if it does not exist or could leave its folder."""
    if len(path) > MAX_PATH or ".." in path or "//" in path or "\\" in path or "\0" in path:
        return ()
    folder = next((f for f in FOLDERS if path.startswith(f)), "")
    return METHODS.get(path) or FOLDERS.get(folder, ())


def _is_local(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    name = name if name.endswith("]") else name.rpartition(":")[0] or name
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost"


def _network(client: str) -> str:
    """A client's address, or for IPv6 its /64 network, all of which one client usually owns."""
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    return client if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _login_page(fault: str) -> str:
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>amclr</title>
<meta name="viewport" content="width=device-width">
<style>body {{ font: 16px system-ui, sans-serif; max-width: 22rem; margin: 15vh auto; padding: 0 1rem; }}
input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; margin: .3rem 0; }}
p {{ color: #b00020; }}</style>
<h1>Search images</h1><form method="post" action="login">
<label>Token <input type="password" name="token" autocomplete="current-password" required autofocus></label>
<p role="alert">{html.escape(fault)}</p><button>Log in</button></form></html>"""
