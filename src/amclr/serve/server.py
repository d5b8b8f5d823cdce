"""`amclr serve`: from the socket to a clean shutdown."""

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
"""Maximum open connections; others are refused. An open page holds one or two."""
SHUTDOWN_SECONDS = 15
"""Time that requests in progress get to finish on shutdown."""


def serve(folder: Path, config: ServeConfig) -> None:
    """Serve an index until Ctrl-C or SIGTERM. Raises UserError, saying what to type, if that is not possible."""
    require("amclr serve", "serve", "gradio", "fastapi", "uvicorn", "prometheus_client", "python_multipart")
    config = replace(config, token=config.token or os.environ.get("AMCLR_TOKEN", ""))
    if wrong := problems(config):
        raise UserError("; ".join(wrong))
    listener = listen(config)
    try:
        from amclr.serve.service import Service

        service = Service(folder, config)
        try:
            _run(service, listener)
        finally:
            service.close()
    finally:
        listener.close()
        gc.freeze()  # otherwise the interpreter spends seconds collecting garbage among all imported modules at exit


def listen(config: ServeConfig) -> socket.socket:
    """Open a socket at the address. Raises UserError if it is in use, is not this machine's, or requires a token."""
    try:
        family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise _foreign_host(config.host) from None
    if not ipaddress.ip_address(address[0]).is_loopback and not config.token:
        raise UserError(f"--host {config.host} accepts connections from other machines, which requires a token: add "
                        f"--token {secrets.token_hex(16)}")  # fmt: skip
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {config.port} is in use: give another, --port {config.port + 1}, or --port 0 for "
                            "any free one") from None  # fmt: skip
        if error.errno == errno.EACCES:
            raise UserError(f"port {config.port} needs privileges that you do not have: give one from 1024 on, "
                            "--port 7860") from None  # fmt: skip
        if error.errno == errno.EADDRNOTAVAIL:
            raise _foreign_host(config.host) from None
        raise
    return listener


def _foreign_host(host: str) -> UserError:
    return UserError(f"--host '{host}' is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all of them")


def _run(service: Any, listener: socket.socket) -> None:
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
            self.force_exit = self.should_exit  # a second signal stops at once
            self.should_exit = True
            app.closing.set()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            address = f"[{host}]" if ":" in host else host
            print(
                f"{len(service.index):,} images at http://{address}:{port}  (API: /docs; Ctrl-C stops it)", flush=True
            )

    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    Server(uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="on",
        proxy_headers=bool(config.proxy), forwarded_allow_ips=config.proxy or None, limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS, h11_max_incomplete_event_size=64 * 1024,
    )).run(sockets=[listener])  # fmt: skip
    print("stopped", flush=True)
