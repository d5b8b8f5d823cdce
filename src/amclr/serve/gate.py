"""What stands in front of the API and the page, an ASGI middleware: who is let in, how often, and with how much."""

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
from amclr.serve.service import Metrics

SMALL = 64 * 1024
"""Bytes of a request that uploads no image."""
BODY_SECONDS = 60.0
"""Time in which all of a request must have come."""
PATH = 256
"""Characters of a path."""
SESSION = 64
"""Characters of a page's name for itself, under which Gradio keeps its state."""
CLIENTS = 10_000
"""Addresses whose searches are counted at a time."""

JOIN = "/gradio_api/queue/join"
METHODS = {
    **dict.fromkeys(("/health", "/metrics", "/docs", "/openapi.json"), ("GET",)),
    "/search": ("GET", "POST"), "/search/image": ("POST",), "/login": ("GET", "POST"),
    **dict.fromkeys(("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt",
                     "/gradio_api/startup-events", "/gradio_api/queue/data"), ("GET", "HEAD")),
    JOIN: ("POST",),
}  # fmt: skip
"""Paths that there are, and their methods."""
FOLDERS = {"/similar/": ("GET",), "/thumbnail/": ("GET",), "/gradio_api/heartbeat/": ("GET",),
           "/assets/": ("GET", "HEAD"), "/static/": ("GET", "HEAD")}  # fmt: skip
QUERIES = ("/search", "/search/image", "/gradio_api/queue/data")
"""Which of them take parameters in the URL."""
COSTLY = ("/search", "/search/image", "/similar/", "/login", JOIN)
"""What counts as a search."""

HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    # The page's framework needs inline scripts and eval; nothing may come from, or go to, another place.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; "
    "base-uri 'self'; frame-ancestors 'none'; object-src 'none'",
}


class Gate:
    """An ASGI application in front of another one.

    It lets through the paths of the API and those of Gradio that the page needs: its other ones, which give out
    files, take uploads or fetch URLs, are not there. `closing`, once set, ends what would stay open for ever.
    events: how many the page has.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, events: int) -> None:
        self.app, self.config, self.metrics, self.events = app, config, metrics, events
        self.closing = asyncio.Event()
        self.rates = Rates(config.rate, config.burst)
        self._session = hmac.new(config.token.encode(), b"amclr session", hashlib.sha256).hexdigest()
        self._cookie = f"amclr_{self._session[:8]}"  # cookies know no ports: another server's must not be in the way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
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
                refusal = await self._login(scope, _Limited(receive, SMALL))
            if refusal is not None:
                return await refusal(scope, receive, sending)
            await self._hand_on(scope, receive, sending)
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
            # A page of another site must not reach this server under a name of its own (DNS rebinding).
            return refused(421, "this server answers to localhost and 127.0.0.1 alone, unless it is given a --token")
        methods = _methods(path)
        if not methods:
            return refused(404, "there is nothing here: /docs says what there is")
        if method not in methods:
            return refused(405, f"use {' or '.join(methods)} here", {"allow": ", ".join(methods)})
        if path.startswith(COSTLY) and (wait := self.rates.take(client)):
            return self._too_often(wait)
        if self.config.token and path not in ("/login", "/health") and not self._is_known(headers):
            if not path.startswith(COSTLY) and (wait := self.rates.take(client)):  # so that nobody tries them all
                return self._too_often(wait)
            self.metrics.refused.labels("token").inc()
            if path == "/" and method == "GET":
                return HTMLResponse(_login_page(""), 401)
            return refused(401, "a token is needed: send the header 'Authorization: Bearer TOKEN'",
                           {"www-authenticate": "Bearer"})  # fmt: skip
        return None

    def _too_often(self, wait: float) -> Response:
        self.metrics.refused.labels("rate").inc()
        seconds = max(1, round(wait + 0.5))
        return refused(429, f"too many searches: try again in {seconds} s", {"retry-after": str(seconds)})

    def _is_known(self, headers: dict[bytes, bytes]) -> bool:
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
            body = await _whole(receive)
        except _TooMuchError as error:
            return error.response
        token = parse_qs(body.decode("latin-1"), max_num_fields=4).get("token", [""])[0]
        if not hmac.compare_digest(token.encode(), self.config.token.encode()):
            self.metrics.refused.labels("token").inc()
            return HTMLResponse(_login_page("That is not the token."), 401)
        response = RedirectResponse("./", 303)
        secure = scope.get("scheme") == "https"
        response.set_cookie(self._cookie, self._session, httponly=True, samesite="strict", secure=secure)
        return response

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, its body bounded in length and time."""
        path, headers = scope["path"], dict(scope["headers"])
        upload = round(self.config.upload * 2**20)
        # Base64, on the page's way, takes a third more.
        most = {"/search/image": upload + SMALL, JOIN: upload * 4 // 3 + SMALL}.get(path, SMALL)
        begun, limited = False, _Limited(receive, most)

        async def sending(message: Message) -> None:
            nonlocal begun
            if limited.error is None or begun:
                begun = True
                await send(message)

        try:
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > most:
                limited.error = (
                    _too_much(most) if length.isdigit() else _TooMuchError(400, "content-length is no number")
                )
                raise limited.error
            if path == JOIN:
                body = await _whole(limited)
                if fault := _fault(body, self.events):
                    return await refused(422, fault)(scope, receive, send)
                given: Message | None = {"type": "http.request", "body": body, "more_body": False}

                async def again() -> Message:
                    nonlocal given
                    message, given = given, None
                    return message or await receive()

                return await self.app(scope, again, send)
            if path.startswith("/gradio_api/heartbeat/"):
                return await self._until_closing(scope, receive, send)
            if path in METHODS and path not in QUERIES:
                scope["query_string"] = b""  # Gradio's pages have parameters that name files
            await self.app(scope, limited, sending)
        except _TooMuchError:
            pass
        if limited.error and not begun:
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


class Rates:
    """A token bucket for each client: `rate` a second, up to `burst` at once. A rate of 0 lets all through."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Take one from a client's bucket: 0 where there was one, or seconds until there will be."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        key = _network(client)
        left, then = self._clients.pop(key, (float(self.burst), now))
        left = min(self.burst, left + (now - then) * self.rate)
        wait = 0.0 if left >= 1 else (1 - left) / self.rate
        self._clients[key] = (left - 1 if left >= 1 else left, now)
        if len(self._clients) > CLIENTS:
            self._clients.popitem(last=False)
        return wait


def refused(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as all of them look: {"error": message}."""
    return JSONResponse({"error": message}, status, headers)


class _TooMuchError(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        # What has not been read of the body must not be taken for the next request.
        self.response = refused(status, message, {"connection": "close"})


def _too_much(most: int) -> _TooMuchError:
    return _TooMuchError(413, f"the request is too large: at most {most / 2**20:.2g} MB are taken here")


class _Limited:
    """Receives a body of so many bytes, in so much time, and raises _TooMuchError beyond."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.most = receive, most
        self.until = time.monotonic() + BODY_SECONDS
        self.had, self.more = 0, True
        self.error: _TooMuchError | None = None

    async def __call__(self) -> Message:
        if not self.more:
            return await self.receive()
        try:
            async with asyncio.timeout(max(0.0, self.until - time.monotonic())):
                message = await self.receive()
        except TimeoutError:
            self.error = _TooMuchError(408, "the request came too slowly")
            raise self.error from None
        self.had += len(message.get("body", b""))
        self.more = message.get("more_body", False)
        if self.had > self.most:
            self.error = _too_much(self.most)
            raise self.error
        return message


async def _whole(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


def _fault(body: bytes, events: int) -> str:
    """Why a request to the page's queue is not handed on.

    Its events take texts and numbers alone; in any field Gradio would also take a file's name or URL, and read it.
    """
    try:
        asked: Any = json.loads(body)
    except (ValueError, RecursionError):
        return "this is no JSON"
    if not isinstance(asked, dict) or not isinstance(asked.get("data"), list):
        return "data must be a list"
    if asked.get("fn_index") not in range(events):
        return "the page has no such event"
    if not isinstance(asked.get("session_hash"), str) or len(asked["session_hash"]) > SESSION:
        return f"session_hash must be a text of {SESSION} characters at the most"
    told = asked.get("event_data")
    values = [*asked["data"], *(told.values() if isinstance(told, dict) else [told])]
    if not all(value is None or isinstance(value, (str, int, float, bool)) for value in values):
        return "data must be texts and numbers"
    return ""


def _methods(path: str) -> tuple[str, ...]:
    """What may be asked of a path; nothing of one that is not there, or leads elsewhere."""
    if len(path) > PATH or ".." in path or "//" in path or "\\" in path or "\0" in path:
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
    """An address; of IPv6 the network, since a client has all of one to itself."""
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
