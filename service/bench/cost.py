"""CPU time of a request, part by part, in one process without sockets: the service, a bare route, the bare product.

Requests are handed to the protocol as uvloop would hand them, over connections whose transport counts what is written.
So no system call is in the figures, and none of the client's work. What is measured is the CPU time of this process
rather than the time that passes, and contestants take turns; so ratios hold on a machine that has other things to do.

`bare_route` is that of `serve`. `bare_protocol` is uvicorn with an ASGI function that writes ready bytes: what a bare
route pays before any of FastAPI. Of the parts of `lazydp`, each is a call that the service makes, made alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
import uvicorn
import uvloop
from fastapi import FastAPI, Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from lazydp.components.bundle.query import Query
from lazydp.components.bundle.topk import top_k_rows
from lazydp.components.bundle.untrained import write_untrained
from lazydp.components.shared.bench_harness import Contestant, Result, measure
from lazydp.service import schemas
from lazydp.service.app import Service, create_app
from lazydp.service.bench.serve import CONNECTIONS, multiply, per_request, request_bytes
from lazydp.service.routes.recommendations import parse
from lazydp.service.server import protocol
from lazydp.service.serving.served_version import ServedVersion
from lazydp.service.settings import load_settings

UNIT = "items"
_USERS = 1_000


def run(*, items: int = 3_700, k: int = 50, dim: int = 64, requests: int = 800, repeats: int = 9) -> list[Result]:
    """CPU seconds of one request by each contestant, and of each part of it.

    Args:
        items: items of the catalogue.
        k: items asked for.
        dim: length of user and item vectors.
        requests: of one repeat.
        repeats: interleaved rounds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="lazydp-bench-") as folder:
            write_untrained(Path(folder), num_users=_USERS, num_items=items, dim=dim)
            return _measured(Path(folder), items=items, k=k, dim=dim, requests=requests, repeats=repeats)
    finally:
        torch.set_num_threads(threads)


def _measured(bundle: Path, *, items: int, k: int, dim: int, requests: int, repeats: int) -> list[Result]:
    loop = uvloop.new_event_loop()
    asked = [request_bytes({"user_id": str(user), "k": k}) for user in range(_USERS)]
    matrix, vectors = torch.randn(items, dim), torch.randn(_USERS, dim)
    with contextlib.closing(loop), _service(bundle, cache_entries=0) as uncached, _service(bundle) as cached:
        served = uncached.state.context.served()
        ready = _answer(served, k)
        works: dict[str, Callable[[], object]] = {
            name: functools.partial(_Load(loop, *what).ask, asked, requests)
            for name, what in {
                "lazydp": (uncached, protocol(uncached)),
                "lazydp_cached": (cached, protocol(cached)),
                "bare_route": (_bare_route(ready), _PLAIN),
                "bare_protocol": (_bare_application(ready), _PLAIN),
            }.items()
        }
        works["bare_matmul"] = functools.partial(multiply, matrix, vectors, k, requests, 1)
        works |= _parts(served, k, requests)
        contestants = [Contestant(name, work, bytes=0) for name, work in works.items()]
        shape = {UNIT: items, "k": k, "dim": dim, "connections": CONNECTIONS}
        results = measure(
            "serve_cpu",
            shape=shape,
            contestants=contestants,
            repeats=repeats,
            warm_ups=2,
            clock=time.process_time,
        )
    return [per_request(result, requests) for result in results]


# Connections are kept while the other contestants have their turn.
_KEPT_S = 3_600
_PLAIN = {"http": "httptools", "ws": "none", "log_config": None, "access_log": False, "timeout_keep_alive": _KEPT_S}


@contextlib.contextmanager
def _service(bundle: Path, **settings: Any) -> Iterator[Service]:
    """The service as `serve` starts it, without a line of log a request."""
    given: dict[str, Any] = {"bundles": [bundle], "access_log": False, "idle_timeout_s": _KEPT_S}
    app = create_app(load_settings(allow_non_private=True, allow_test_key=True, **given, **settings))
    registry = app.state.context.registry
    registry.start()
    try:
        yield app
    finally:
        registry.close()


def _answer(served: ServedVersion, k: int) -> bytes:
    query = Query(user_id="1", k=k)
    return served.answer(query, served.scorer.rank([query])[0])


def _bare_route(ready: bytes) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/recommendations")
    async def route() -> Response:
        return Response(ready, media_type="application/json")

    return app


def _bare_application(ready: bytes) -> Callable[..., Any]:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ready))]

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": ready})

    return application


def _parts(served: ServedVersion, k: int, requests: int) -> dict[str, Callable[[], object]]:
    """What the service does for so many requests, call by call, as many together as there are connections."""
    bodies = [request_bytes({"user_id": str(user), "k": k}).partition(b"\r\n\r\n")[2] for user in range(CONNECTIONS)]
    queries = [_query(body) for body in bodies]
    scorer = served.scorer
    with torch.inference_mode():
        scores = scorer.scores(queries)
    rankings = scorer.rank(queries)
    rounds = range(-(-requests // CONNECTIONS))
    return {
        "part: JSON to query": lambda: [_query(body) for _ in rounds for body in bodies],
        "part: scores": lambda: [scorer.scores(queries) for _ in rounds],
        "part: best of scores": lambda: [top_k_rows(scores, k + 1) for _ in rounds],
        "part: scores, best and pages": lambda: [scorer.rank(queries) for _ in rounds],
        "part: answer as JSON": lambda: [
            served.answer(query, ranking) for _ in rounds for query, ranking in zip(queries, rankings, strict=True)
        ],
    }


def _query(body: bytes) -> Query:
    parsed = parse(body)
    assert isinstance(parsed, schemas.RecommendationQuery)
    return parsed.query()


class _Load:
    """Connections to one application that all ask, and ask again once all are answered."""

    def __init__(self, loop: asyncio.AbstractEventLoop, app: Any, options: dict[str, Any]) -> None:
        self._loop = loop
        config = uvicorn.Config(app, **options)
        config.load()
        state = ServerState()
        # uvicorn's own class or a subclass, of which only the options of a caller are known to the type checker.
        make = cast(Callable[..., HttpToolsProtocol], config.http_protocol_class)
        self._connections = []
        for _ in range(CONNECTIONS):
            connection = make(config=config, server_state=state, app_state={}, _loop=loop)
            connection.connection_made(_Transport(self._answered))
            self._connections.append(connection)
        self._left = 0
        self._done: asyncio.Future[None] = loop.create_future()

    def ask(self, asked: list[bytes], requests: int) -> None:
        """Send `requests` of `asked`, over all connections in each round."""
        self._loop.run_until_complete(self._ask(asked, requests))

    async def _ask(self, asked: list[bytes], requests: int) -> None:
        for start in range(0, requests, CONNECTIONS):
            self._left, self._done = CONNECTIONS, self._loop.create_future()
            for number, connection in enumerate(self._connections, start=start):
                self._loop.call_soon(connection.data_received, asked[number % len(asked)])
            await self._done

    def _answered(self) -> None:
        self._left -= 1
        if not self._left:
            self._done.set_result(None)


class _Transport(asyncio.Transport):
    """Counts answers by their ends, and keeps none."""

    def __init__(self, answered: Callable[[], None]) -> None:
        super().__init__()
        self._answered = answered

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if bytes(data[-1:]) == b"}":
            self._answered()

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass
