"""Requests a second at saturation: the service, a bare FastAPI route that returns the same bytes, the bare product.

The bare route is what a good engineer would write who had the answer already: one `async def` handler that reads no
body and returns a `Response` of ready bytes, on uvicorn with uvloop and httptools, without a log line a request.
`bare_matmul` is the product and top-k of one query after another, `bare_matmul_together` of as many at once as there
are connections, which is the most that the service could rank together.

Servers run on one core and the client on another, where there are two. `lazydp` keeps no answers, so that every request
is parsed, encoded, scored, ranked and written; `lazydp_cached` has the settings as shipped, and every user asks again.
Neither writes a log line a request, nor does the bare route. `median_s` is seconds a request, `p99_s` the latency that
99 of 100 requests stay below while all connections are busy, `rss_bytes` the resident memory of the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import httpx
import torch
import uvloop

from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.components.shared.errors import UnavailableError

UNIT = "items"
CONNECTIONS = 16
_LATENCIES_KEPT = 20_000
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


@dataclass(frozen=True, slots=True)
class ServeResult(Result):
    """A result with what a server's users feel and its owner pays; None for what is no server."""

    p99_s: float | None = None
    rss_bytes: int | None = None


def run(
    *, items: int = 3_700, k: int = 50, dim: int = 64, requests: int = 1_000, repeats: int = 9
) -> list[ServeResult]:
    """Measure the service, a bare route and the bare product; a repeat is `requests` requests over 16 connections.

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
            _service(folder, server_core, name="uncached", cache_entries=0) as uncached,
            _service(folder, server_core, name="cached") as cached,
            _bare_route(folder, uncached.port, k=k, core=server_core) as bare,
        ):
            asked = [request_bytes({"user_id": str(user), "k": k}) for user in range(users)]
            servers = {"lazydp": uncached, "lazydp_cached": cached, "bare_route": bare}
            contestants = [
                Contestant(name, functools.partial(server.ask, asked, requests), bytes=0)
                for name, server in servers.items()
            ]
            for product_name, together in (("bare_matmul", 1), ("bare_matmul_together", CONNECTIONS)):
                product = functools.partial(multiply, matrix, vectors, k, requests, together)
                contestants.append(Contestant(product_name, product, bytes=matrix.nbytes, flops=2 * items * dim))
            shape = {UNIT: items, "k": k, "dim": dim, "connections": CONNECTIONS}
            results = measure("serve", shape=shape, contestants=contestants, repeats=repeats, warm_ups=2)
            return [_of_server(per_request(result, requests), servers.get(result.contestant)) for result in results]


def per_request(result: Result, requests: int) -> Result:
    """The times of one request, from a result whose run made `requests`."""
    times = {name: getattr(result, name) / requests for name in ("median_s", "p10_s", "p90_s")}
    return dataclasses.replace(result, **times)


def _of_server(result: Result, server: _Server | None) -> ServeResult:
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(Result)}
    if server is None:
        return ServeResult(**fields)
    return ServeResult(**fields, p99_s=server.p99(), rss_bytes=server.rss())


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


@dataclass(slots=True)
class _Server:
    """A server under load.

    Attributes:
        port: where it listens.
        process: its process.
        latencies: seconds of the latest requests.
    """

    port: int
    process: subprocess.Popen[bytes]
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES_KEPT))

    def ask(self, asked: list[bytes], requests: int) -> None:
        """Send `requests` of `asked` over all connections, each as soon as the one before is answered."""

        async def work() -> None:
            loop = asyncio.get_running_loop()
            left = iter([asked[number % len(asked)] for number in range(requests)])
            ends: list[asyncio.Future[None]] = [loop.create_future() for _ in range(CONNECTIONS)]
            for end in ends:
                make = functools.partial(_Client, left, end, self.latencies)
                await loop.create_connection(make, "127.0.0.1", self.port)
            await asyncio.gather(*ends)

        uvloop.run(work())

    def p99(self) -> float:
        """Seconds that 99 of 100 requests stayed below."""
        return statistics.quantiles(self.latencies, n=100)[98]

    def rss(self) -> int:
        """Resident bytes of the process."""
        resident = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(resident) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _started(command: list[str], core: int | None, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
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
def _service(folder: Path, core: int | None, *, name: str, **settings: object) -> Iterator[_Server]:
    port_file = folder / f"port-{name}"
    command = [sys.executable, "-m", "lazydp.pipelines.cli", "serve", "--bundle", str(folder / "bundle")]
    command += ["--port", "0", "--port-file", str(port_file), "--allow-non-private", "--allow-test-key"]
    environment = {f"LAZYDP_SERVE_{key.upper()}": str(value) for key, value in settings.items()}
    with _started(command, core, environment | {"LAZYDP_SERVE_ACCESS_LOG": "false"}) as process:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not port_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError("the service did not start: try `lazydp serve` to see why")
            time.sleep(0.05)
        port = int(port_file.read_text())
        _wait(f"http://127.0.0.1:{port}/readyz", process, accept={200})
        yield _Server(port, process)


@contextlib.contextmanager
def _bare_route(folder: Path, like: int, *, k: int, core: int | None) -> Iterator[_Server]:
    """A server whose route returns the bytes that the service at port `like` answers."""
    answer = httpx.post(f"http://127.0.0.1:{like}/v1/recommendations", json={"user_id": "1", "k": k})
    answer.raise_for_status()
    (folder / "answer.json").write_bytes(answer.content)
    port = _free_port()
    command = [sys.executable, "-c", _BARE_ROUTE, str(folder / "answer.json"), str(port)]
    with _started(command, core, {}) as process:
        _wait(f"http://127.0.0.1:{port}/", process, accept={404})
        yield _Server(port, process)


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


def request_bytes(body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/recommendations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class _Client(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, asked: Iterator[bytes], done: asyncio.Future[None], latencies: deque[float]) -> None:
        self._asked = asked
        self._latencies = latencies
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
            self._sent = time.perf_counter()
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n", 1)[0])
        if len(body) >= length:
            self._latencies.append(time.perf_counter() - self._sent)
            if not head.startswith(b"HTTP/1.1 200") and not self._done.done():
                self._done.set_exception(UnavailableError(f"the server answered {head.splitlines()[0].decode()}"))
            self._buffer = b""
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or UnavailableError("the server closed the connection"))


def multiply(matrix: torch.Tensor, vectors: torch.Tensor, k: int, requests: int, together: int) -> None:
    for start in range(0, requests, together):
        numbers = [number % len(vectors) for number in range(start, min(start + together, requests))]
        if together == 1:
            torch.topk(matrix @ vectors[numbers[0]], k)
        else:
            torch.topk(vectors[numbers] @ matrix.T, k)
