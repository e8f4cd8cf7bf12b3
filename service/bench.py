"""Requests a second at saturation: the service, a bare FastAPI route that returns the same bytes, the bare product.

Servers run on one core and the client on another, where there are two. Answers of the service are not cached here,
so that every request is encoded, scored and ranked. `median_s` is seconds a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import httpx
import torch
import uvloop

from lazydp.components.bench.harness import Contestant, Result, measure
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.shared.errors import UnavailableError

UNIT = "items"
_CONNECTIONS = 16
_START_TIMEOUT_S = 60.0
_BARE_ROUTE = """
import sys, uvicorn
from fastapi import FastAPI, Response
body = open(sys.argv[1], 'rb').read()
app = FastAPI()
@app.post('/v1/recommendations')
async def route() -> Response:
    return Response(body, media_type='application/json')
uvicorn.run(app, port=int(sys.argv[2]), access_log=False, log_level='error')
"""


def run(*, items: int = 3_700, k: int = 50, dim: int = 64, requests: int = 1_000, repeats: int = 9) -> list[Result]:
    """Measure `lazydp`, `bare_route` and `bare_matmul`; a repeat is `requests` requests over 16 connections.

    Args:
        items: items of the catalogue.
        k: items asked for.
        dim: length of user and item vectors.
        requests: of one repeat.
        repeats: interleaved rounds.

    Raises:
        UnavailableError: a server did not start.
    """
    users = 1_000
    matrix, vectors = torch.randn(items, dim), torch.randn(users, dim)
    with tempfile.TemporaryDirectory(prefix="lazydp-bench-") as name, _one_core_for_the_client() as server_core:
        folder = Path(name)
        write_untrained(folder / "bundle", num_users=users, num_items=items, dim=dim)
        with (
            _service(folder, server_core) as port,
            _bare_route(folder, port, k=k, core=server_core) as bare_port,
        ):
            asked = [_request({"user_id": str(user), "k": k}) for user in range(users)]
            contestants = [
                Contestant("lazydp", lambda: _ask(port, asked, requests), bytes=matrix.nbytes, flops=2 * items * dim),
                Contestant("bare_route", lambda: _ask(bare_port, asked, requests), bytes=0),
                Contestant(
                    "bare_matmul",
                    lambda: _multiply(matrix, vectors, k, requests),
                    bytes=matrix.nbytes,
                    flops=2 * items * dim,
                ),
            ]
            shape = {UNIT: items, "k": k, "dim": dim, "connections": _CONNECTIONS}
            results = measure("serve", shape=shape, contestants=contestants, repeats=repeats, warm_ups=2)
    return [
        replace(
            result,
            median_s=result.median_s / requests,
            p10_s=result.p10_s / requests,
            p90_s=result.p90_s / requests,
        )
        for result in results
    ]


@contextlib.contextmanager
def _one_core_for_the_client() -> Iterator[int | None]:
    """Keep this process on the last core; yields another one for the servers, None where there is but one."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    cores = sorted(allowed)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {cores[-1]})
    try:
        yield cores[0] if len(cores) > 1 else None
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _server(command: list[str], core: int | None, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    pin = ["taskset", "-c", str(core)] if core is not None else []
    process = subprocess.Popen(  # noqa: S603 - our own command
        [*pin, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def _service(folder: Path, core: int | None) -> Iterator[int]:
    port_file = folder / "port"
    command = [sys.executable, "-m", "lazydp.pipelines.cli", "serve", "--bundle", str(folder / "bundle")]
    command += ["--port", "0", "--port-file", str(port_file), "--allow-non-private", "--allow-test-key"]
    settings = {"LAZYDP_SERVE_CACHE_ENTRIES": "0", "LAZYDP_SERVE_ACCESS_LOG": "false"}
    with _server(command, core, settings) as process:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError("the service did not start: try `lazydp serve` to see why")
            time.sleep(0.05)
        port = int(port_file.read_text())
        _wait(f"http://127.0.0.1:{port}/readyz", process, accept={200})
        yield port


@contextlib.contextmanager
def _bare_route(folder: Path, like: int, *, k: int, core: int | None) -> Iterator[int]:
    """A server whose route returns the bytes that the service at port `like` answers."""
    answer = httpx.post(f"http://127.0.0.1:{like}/v1/recommendations", json={"user_id": "1", "k": k})
    answer.raise_for_status()
    (folder / "answer.json").write_bytes(answer.content)
    port = _free_port()
    command = [sys.executable, "-c", _BARE_ROUTE, str(folder / "answer.json"), str(port)]
    with _server(command, core, {}) as process:
        _wait(f"http://127.0.0.1:{port}/", process, accept={404})
        yield port


def _free_port() -> int:
    import socket  # noqa: PLC0415 - only to ask for a number

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _wait(url: str, process: subprocess.Popen[bytes], *, accept: set[int]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code in accept:
                return
        time.sleep(0.05)
    raise UnavailableError(f"no answer from {url}")


def _request(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/recommendations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class _Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, asked: Iterator[bytes], done: asyncio.Future[None]) -> None:
        self._asked = asked
        self._done = done
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._next()

    def _next(self) -> None:
        request = next(self._asked, None)
        if request is None:
            self._transport.close()
            if not self._done.done():
                self._done.set_result(None)
        else:
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n", 1)[0])
        if len(body) >= length:
            if not head.startswith(b"HTTP/1.1 200") and not self._done.done():
                self._done.set_exception(UnavailableError(f"the server answered {head.splitlines()[0].decode()}"))
            self._buffer = b""
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or UnavailableError("the server closed the connection"))


def _ask(port: int, asked: list[bytes], requests: int) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        left = iter([asked[number % len(asked)] for number in range(requests)])
        ends: list[asyncio.Future[None]] = [loop.create_future() for _ in range(_CONNECTIONS)]
        for end in ends:
            await loop.create_connection(lambda end=end: _Client(left, end), "127.0.0.1", port)  # type: ignore[misc]
        await asyncio.gather(*ends)

    uvloop.run(work())


def _multiply(matrix: torch.Tensor, vectors: torch.Tensor, k: int, requests: int) -> None:
    for number in range(requests):
        torch.topk(matrix @ vectors[number % len(vectors)], k)
