"""`amclr serve`: the server's beginning and end."""

from __future__ import annotations

import asyncio
import errno
import gc
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from amclr.config.checks import problems
from amclr.config.schema import ServeConfig
from amclr.utils.errors import UserError, require

CONNECTIONS = 512
"""Open at a time; further ones are refused. An open page holds one or two."""
GRACE = 15
"""Seconds that requests in progress get once the server is to end."""


def serve(folder: Path, config: ServeConfig) -> None:
    """Serve an index until Ctrl-C or SIGTERM. Raises UserError, saying what to type, where that is not possible."""
    require("amclr serve", "serve", "gradio", "fastapi", "uvicorn", "prometheus_client", "python_multipart")
    config = replace(config, token=config.token or os.environ.get("AMCLR_TOKEN", ""))
    if wrong := problems(config):
        raise UserError("; ".join(wrong))
    bound = listen(config)
    try:
        from amclr.serve.service import Service

        service = Service(folder, config)
        try:
            _run(service, bound)
        finally:
            service.close()
    finally:
        bound.close()
        gc.freeze()  # or the interpreter looks for garbage among all that was imported, for seconds, before it ends


def listen(config: ServeConfig) -> socket.socket:
    """A socket at the address. Raises UserError where it is in use, is not this machine's, or needs a token."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UserError(f"--host '{config.host}' is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all "
                        "of them") from None  # fmt: skip
    if not ipaddress.ip_address(address[0]).is_loopback and not config.token:
        raise UserError(f"--host {config.host} lets others in, who then need a token: add for instance "
                        f"--token {secrets.token_hex(16)}")  # fmt: skip
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {config.port} is in use: give another one, --port {config.port + 1}, or "
                            "--port 0 for a free one") from None  # fmt: skip
        if error.errno == errno.EACCES:
            raise UserError(f"port {config.port} needs rights that you do not have: give one from 1024 on, "
                            "--port 7860") from None  # fmt: skip
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {config.host} is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all "
                            "of them") from None  # fmt: skip
        raise
    return bound


def _run(service: Any, bound: socket.socket) -> None:
    import uvicorn

    from amclr.serve.api import create_app

    config = service.config
    app = create_app(service)

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._stop)
            try:
                yield
            finally:
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.remove_signal_handler(number)

        def _stop(self) -> None:
            self.force_exit = self.should_exit  # a second one waits for nothing
            self.should_exit = True
            app.closing.set()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = bound.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            print(f"{len(service.index):,} images at http://{shown}:{port}  (API: /docs; Ctrl-C ends it)", flush=True)

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    Server(uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="on",
        proxy_headers=bool(config.proxy), forwarded_allow_ips=config.proxy or None, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=GRACE, h11_max_incomplete_event_size=64 * 1024,
    )).run(sockets=[bound])  # fmt: skip
    print("stopped", flush=True)
