"""A service over bundles of untrained models, on a real socket in a thread of its own."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from lazydp.components.bundle.untrained import write_untrained
from lazydp.service.app import create_app
from lazydp.service.http.tracing import Tracing
from lazydp.service.server import protocol
from lazydp.service.settings import load_settings

Start = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@contextlib.contextmanager
def running(*paths: Path, tracing: Tracing | None = None, **options: Any) -> Iterator[httpx.Client]:
    """A client of a running service; settings as keywords."""
    settings = load_settings(**{"bundles": paths, "allow_test_key": True, "access_log": False, **options})
    app = create_app(settings, tracing=tracing)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, **protocol(settings)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles by kind: a two-tower, one with popularity, a DLRM, and another version of the first."""
    folder = tmp_path_factory.mktemp("bundles")
    write_untrained(folder / "towers", num_items=60)
    write_untrained(folder / "popular", num_items=60, popularity=True, name="popular")
    write_untrained(folder / "dlrm", kind="dlrm", num_items=60, name="dlrm")
    write_untrained(folder / "newer", num_items=60, seed=1)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def start() -> Start:
    """Start a service."""
    return running


@pytest.fixture(scope="session")
def client(bundles: dict[str, Path]) -> Iterator[httpx.Client]:
    """One service for tests that change nothing."""
    with running(bundles["towers"], bundles["popular"], bundles["dlrm"]) as client:
        yield client
