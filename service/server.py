"""Runs the service: binds before it announces, drains before it goes."""

from __future__ import annotations

import asyncio
import functools
import signal
import socket
import ssl
import sys
from types import FrameType
from typing import Any

import structlog
import uvicorn

from lazydp.components.shared.errors import InputError, UnavailableError
from lazydp.components.shared.files import write_bytes
from lazydp.service.app import Service, create_app
from lazydp.service.http.connection import Connection
from lazydp.service.http.connections import raise_file_limit
from lazydp.service.http.logs import configure
from lazydp.service.serving.context import Context
from lazydp.service.settings import Settings

_BACKLOG = 2048
_log = structlog.get_logger("lazydp.service")


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; requests under way are answered first.

    Raises:
        LazyDPError: a bundle is refused, the address cannot be bound, or it is open to others without keys.
    """
    settings.refuse_open_address()
    _check_certificate(settings)
    configure(settings.log_level)
    raise_file_limit(settings.max_connections)
    app = create_app(settings)
    context = app.state.context
    assert isinstance(context, Context)
    context.registry.start()
    listener = _bind(settings.host, settings.port)
    server = _Server(app, settings, context)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()


def _check_certificate(settings: Settings) -> None:
    """Refuse files that are no certificate and its key, before anything is loaded.

    Raises:
        InputError: they cannot be read, or do not belong together.
    """
    if settings.tls_certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except OSError as error:
        raise InputError(
            f"tls_certificate {settings.tls_certificate}, tls_key {settings.tls_key}: expected a PEM certificate and "
            f"its private key ({error.strerror or error})"
        ) from None


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise UnavailableError(f"cannot serve on {host} port {port}: {error.strerror}; choose another --port") from None
    listener.setblocking(False)
    return listener


def protocol(app: Service) -> dict[str, Any]:
    """How uvicorn speaks HTTP for `app`.

    Nothing but HTTP, since the gateway guards nothing else; logs are ours; whom a proxy speaks for is nobody's
    business, as addresses are not read.
    """
    return {
        "http": functools.partial(Connection, shared=app.connections, taker=app.gateway),
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "proxy_headers": False,
    }


class _Server(uvicorn.Server):
    """uvicorn that says where it listens, and that stops being ready before it stops."""

    def __init__(self, app: Service, settings: Settings, context: Context) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                **protocol(app),
                timeout_graceful_shutdown=settings.drain_s,
                ssl_certfile=None if settings.tls_certificate is None else str(settings.tls_certificate),
                ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
            )
        )
        self._settings = settings
        self._context = context

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then announce the address."""
        await super().startup(sockets)
        if not self.started or not sockets:
            return
        host, port = sockets[0].getsockname()[:2]
        scheme = "http" if self._settings.tls_certificate is None else "https"
        shown = f"[{host}]" if ":" in host else host
        sys.stdout.write(f"lazydp serves on {scheme}://{shown}:{port}\n")
        sys.stdout.flush()
        if self._settings.port_file is not None:
            write_bytes(self._settings.port_file, f"{port}\n".encode())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First stop being ready, then, after the delay that load balancers need, stop accepting."""
        first = not self._context.draining
        self._context.draining = True
        delay = self._settings.drain_delay_s
        # Whoever presses Ctrl-C waits for no load balancer.
        if first and delay and sig != signal.SIGINT:
            _log.info("draining", seconds=delay)
            loop = asyncio.get_running_loop()
            loop.call_later(delay, super().handle_exit, sig, frame)
        else:
            super().handle_exit(sig, frame)
