"""A service on a real socket, in a thread of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from lazydp.service.app import Service, create_app
from lazydp.service.http.tracing import Tracing
from lazydp.service.server import protocol
from lazydp.service.settings import load_settings

Start = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@contextlib.contextmanager
def running(*paths: Path, tracing: Tracing | None = None, **options: Any) -> Iterator[httpx.Client]:
    """A client of a running service; settings as keywords."""
    with running_app(*paths, tracing=tracing, **options) as (client, _):
        yield client


@contextlib.contextmanager
def running_app(*paths: Path, tracing: Tracing | None = None, **options: Any) -> Iterator[tuple[httpx.Client, Service]]:
    """Likewise, with the application."""
    settings = load_settings(**{"bundles": paths, "allow_test_key": True, "access_log": False, **options})
    app = create_app(settings, tracing=tracing)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, **protocol(app)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client, app
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
