"""What every request passes first: its id, keys, limits, time, metrics and the log line.

Plain ASGI rather than a stack of middlewares: one wrapper costs a few microseconds, four cost more than the answer.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lazydp.service.http.auth import OPEN_PATHS, KeyCheck
from lazydp.service.http.connection import write_whole
from lazydp.service.http.connections import Connections
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.origins import Origins
from lazydp.service.http.problems import Problem, fault
from lazydp.service.http.tracing import Tracing
from lazydp.service.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
# Takes headers and body of a request without a query string, and returns JSON or raises `Problem`.
Direct: TypeAlias = Callable[[list[tuple[bytes, bytes]], bytes], Awaitable[bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_UNMATCHED = "unmatched"
_SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]
_JSON_HEAD = b"content-length: %d\r\ncontent-type: application/json\r\nx-request-id: %b\r\n" + b"".join(
    b"%b: %b\r\n" % header for header in _SAFE_HEADERS
)
_log = structlog.get_logger("lazydp.service")


def _request_ids() -> Iterator[str]:
    """Random ids of 64 bits, drawn many at a time: asking the system for eight bytes costs as much as ranking."""
    while True:
        block = os.urandom(8 * 512).hex()
        yield from (block[start : start + 16] for start in range(0, len(block), 16))


_REQUEST_IDS = _request_ids()


class Gateway:
    """ASGI middleware around the whole application.

    `direct` answers some of the application's routes, by method and path, without the application: the framework's
    routing and solving of dependencies cost several times what their answer does. The routes stay in the application
    too, where they are described and where a request with a query string goes.
    """

    def __init__(
        self,
        app: App,
        *,
        settings: Settings,
        metrics: Metrics,
        key_check: KeyCheck,
        tracing: Tracing | None,
        connections: Connections,
        direct: Mapping[tuple[str, str], Direct],
    ) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._key_check = key_check
        self._origins = Origins(settings)
        self._page_policy = _page_policy(settings)
        self._tracing = tracing
        self._direct = direct
        self._connections = connections
        self._by_client: Counter[str] = Counter()
        self._in_flight = 0
        metrics.in_flight.set_function(lambda: self._in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or pass on what is none."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # What answers GET answers HEAD (RFC 9110, 9.3.2); the server leaves the body out by its own copy.
            scope = {**scope, "method": "GET"}
        root = self._settings.root_path
        if root and scope["path"].startswith(f"{root}/"):
            # A proxy that passes its prefix on; one that takes it off is no different.
            scope = {**scope, "path": scope["path"][len(root) :], "raw_path": scope["raw_path"][len(root) :]}
        exchange = _Exchange(
            scope, receive, send, max_body_bytes=self._settings.max_body_bytes, page_policy=self._page_policy
        )
        span = None if self._tracing is None else self._tracing.begin(exchange.headers)
        self._in_flight += 1
        try:
            await self._handle(scope, exchange)
        finally:
            self._in_flight -= 1
            self._leave(exchange)
            self._note(scope, exchange, span)

    async def _handle(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            self._check(scope, exchange)
            async with asyncio.timeout(self._settings.request_timeout_s):
                direct = None if scope["query_string"] else self._direct.get((scope["method"], scope["path"]))
                if direct is None:
                    await self._app(scope, exchange.receive, exchange.send)
                else:
                    exchange.route = scope["path"]
                    await exchange.answer(await direct(scope["headers"], await exchange.body()))
        except _GoneError:
            pass
        except Problem as problem:
            await exchange.refuse(problem)
        except TimeoutError:
            limit = f"{self._settings.request_timeout_s:g}"
            detail = f"the request was not answered within {limit} seconds"
            await exchange.refuse(Problem(503, "timeout", detail, headers={"retry-after": "1"}))
        except Exception as error:
            _log.error(
                "request failed",
                request_id=exchange.request_id,
                route=exchange.route or _route(scope),
                error=type(error).__name__,
                where=_frames(error),
            )
            await exchange.refuse(fault())

    def _check(self, scope: Scope, exchange: _Exchange) -> None:
        path = scope["path"]
        if path not in OPEN_PATHS:
            self._refuse_crowd()
            self._origins.check(scope["method"], exchange.headers)
        exchange.key = self._key_check.admit(path, exchange.headers)
        if path not in OPEN_PATHS:
            self._enter(scope, exchange)
        length = exchange.headers.get(b"content-length")
        if length is not None and length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            raise _too_large(self._settings.max_body_bytes)

    def _refuse_crowd(self) -> None:
        """Answers that are not read yet count as requests under way."""
        settings, readers = self._settings, self._connections
        crowded = self._in_flight + readers.slow_readers > settings.max_concurrent
        if crowded or readers.unsent_bytes > settings.max_unsent_bytes:
            raise Problem(429, "busy", "too many requests at once; try again", headers={"retry-after": "1"})

    def _enter(self, scope: Scope, exchange: _Exchange) -> None:
        """Count a request to its key, or else to its address, neither of which may take every place."""
        exchange.client = exchange.key or (scope.get("client") or ("",))[0]
        self._by_client[exchange.client] += 1
        if self._by_client[exchange.client] > self._settings.max_concurrent_per_client:
            detail = "too many requests of one client at once; try again"
            raise Problem(429, "busy", detail, headers={"retry-after": "1"})

    def _leave(self, exchange: _Exchange) -> None:
        if exchange.client is not None:
            self._by_client[exchange.client] -= 1
            if not self._by_client[exchange.client]:
                del self._by_client[exchange.client]

    def _note(self, scope: Scope, exchange: _Exchange, span: Span | None) -> None:
        seconds = time.perf_counter() - exchange.started
        route = exchange.route or _route(scope)
        method = scope["method"] if route != _UNMATCHED else "any"
        self._metrics.observe(route, method, exchange.status, seconds)
        if self._tracing is not None and span is not None:
            self._tracing.end(span, route=route, method=method, status=exchange.status)
        if self._settings.access_log:
            # The route's template, not the path: paths hold ids of users and items.
            _log.info(
                "request",
                request_id=exchange.request_id,
                route=route,
                method=method,
                status=exchange.status,
                ms=round(seconds * 1000, 3),
                key=exchange.key,
            )


class _GoneError(Exception):
    """The client went away while it sent the body."""


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, max_body_bytes: int, page_policy: bytes) -> None:
        self.started = time.perf_counter()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status = 499
        self.key: str | None = None
        self.client: str | None = None
        self.route: str | None = None
        self._path: str = scope["path"]
        self._receive = receive
        self._send = send
        self._left = max_body_bytes
        self._max = max_body_bytes
        self._page_policy = page_policy
        self._begun = False
        given = self.headers.get(b"x-request-id")
        own = given is None or _REQUEST_ID.fullmatch(given) is None
        self.request_id = next(_REQUEST_IDS) if own or given is None else given.decode()
        scope.setdefault("state", {})["request_id"] = self.request_id

    async def receive(self) -> Message:
        """The next part of the body, counted."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise _too_large(self._max)
        return message

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            Problem: 413.
            _GoneError: nobody waits for an answer any more.
        """
        parts = []
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    async def answer(self, body: bytes) -> None:
        """Answer with ready JSON."""
        self._begun = True
        self.status = 200
        head = _JSON_HEAD % (len(body), self.request_id.encode())
        cycle = getattr(self._send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle) and write_whole(cycle, head, body):
            return
        headers = [tuple(line.split(b": ", 1)) for line in head.split(b"\r\n") if line]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self._begun = True
            self.status = message["status"]
            headers = message["headers"]
            headers.append((b"x-request-id", self.request_id.encode()))
            headers.extend(_SAFE_HEADERS)
            if any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers):
                headers.append((b"content-security-policy", self._page_policy))
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem document, where nothing was answered yet."""
        if self._begun:
            return
        accept = self.headers.get(b"accept", b"").decode("latin-1")
        body, media_type = problem.rendered(self.request_id, path=self._path, accept=accept)
        headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
            *((name.encode(), value.encode()) for name, value in problem.headers.items()),
        ]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _page_policy(settings: Settings) -> bytes:
    """What pages may load: a style and pictures of this service, and pictures of the origins that settings name.

    There are no scripts, and nothing may be framed elsewhere.
    """
    pictures = " ".join(("'self'", "data:", *settings.image_origins))
    return (
        f"default-src 'none'; style-src 'self'; img-src {pictures}; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'"
    ).encode()


def _frames(error: Exception) -> list[str]:
    """Where an error was raised, outermost first. Its message is left out: it may quote what a user sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]


def _too_large(limit: int) -> Problem:
    return Problem(413, "too-large", f"a body may have up to {limit} bytes", headers={"connection": "close"})


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path_format", None)
    return path if isinstance(path, str) else _UNMATCHED
