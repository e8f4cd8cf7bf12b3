"""What every request passes first: its id, keys, limits, time, metrics and the log line.

Plain ASGI rather than a stack of middlewares: one wrapper costs a few microseconds, four cost more than the answer.
"""

from __future__ import annotations

import asyncio
import functools
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import structlog
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lazydp.service.http.auth import OPEN_PATHS, KeyCheck
from lazydp.service.http.connections import Connections
from lazydp.service.http.exchange import App, Exchange, GoneError, Receive, Scope, Send, too_large
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.origins import Origins
from lazydp.service.http.problems import Problem, fault
from lazydp.service.http.tracing import Tracing
from lazydp.service.settings import Settings

Headers: TypeAlias = list[tuple[bytes, bytes]]
# Takes JSON, or what kept it from being made.
Reply: TypeAlias = Callable[[bytes | Exception], None]
# Starts a task for a request, which an ASGI application answers.
Start: TypeAlias = Callable[[App], None]

_UNMATCHED = "unmatched"
_log = structlog.get_logger("lazydp.service")


@dataclass(frozen=True, slots=True)
class Direct:
    """What answers a route without the framework. Both take headers and body of a request without a query string.

    Attributes:
        answer: returns JSON, or raises `Problem`.
        at_once: begins to answer in the callback that read the request. Returns whether it does: then it calls
            `Reply` once, now or some rounds of the event loop later, and waits for nothing that may take long.
            Otherwise `answer` has to. It may raise `Problem` too.
    """

    answer: Callable[[Headers, bytes], Awaitable[bytes]]
    at_once: Callable[[Headers, bytes, Reply], bool]


class Gateway:
    """ASGI middleware around the whole application.

    `direct` answers some of the application's routes, by method and path, without the application: the framework's
    routing and solving of dependencies cost several times what their answer does. The routes stay in the application
    too, where they are described and where a request with a query string goes.

    A request to one of these routes whose body came with its head is handed over by `take` instead of as ASGI does it:
    a task, its timer, and the messages of ASGI cost as much as all else that such a request needs.

    Attributes:
        in_flight: requests under way.
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
        self._by_client: dict[str, int] = {}
        self.in_flight = 0
        metrics.in_flight.set_function(lambda: self.in_flight)

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
        exchange = self._begin(scope, receive, send)
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        await self._handle(scope, exchange, self._answer(scope, exchange))

    def is_direct(self, scope: Scope) -> bool:
        """Whether `take` may answer a request."""
        return (scope["method"], scope["path"]) in self._direct and not scope["query_string"]

    def take(self, cycle: RequestResponseCycle, start: Start) -> None:
        """Answer a request for which `is_direct` holds and whose body is there.

        Args:
            cycle: the request.
            start: starts a task for it, where it needs one.
        """
        scope = cast(Scope, cycle.scope)
        exchange = self._begin(scope, cast(Receive, cycle.receive), cast(Send, cycle.send))
        exchange.route = scope["path"]
        direct = self._direct[scope["method"], scope["path"]]
        reply = functools.partial(self._reply, cycle, exchange, start)
        body = bytes(cycle.body)
        try:
            self._check(scope, exchange)
            self._check_length(len(body))
            begun = direct.at_once(scope["headers"], body, reply)
        except Exception as error:
            reply(error)
            return
        if not begun:
            start(functools.partial(self._resumed, exchange, functools.partial(direct.answer, scope["headers"], body)))

    def _reply(self, cycle: RequestResponseCycle, exchange: Exchange, start: Start, found: bytes | Exception) -> None:
        """Write an answer, or have a task do what takes more than a write."""
        if isinstance(found, bytes) and exchange.answer_at_once(cycle, found):
            self._end(cast(Scope, cycle.scope), exchange)
            return

        async def ready() -> bytes:
            if isinstance(found, Exception):
                raise found
            return found

        start(functools.partial(self._resumed, exchange, ready))

    async def _resumed(
        self, exchange: Exchange, found: Callable[[], Awaitable[bytes]], scope: Scope, _: Receive, __: Send
    ) -> None:
        """Answer what passed `_check` by what `found` returns."""

        async def answer() -> None:
            await exchange.answer(await found())

        await self._handle(scope, exchange, answer())

    def _begin(self, scope: Scope, receive: Receive, send: Send) -> Exchange:
        exchange = Exchange(
            scope, receive, send, max_body_bytes=self._settings.max_body_bytes, page_policy=self._page_policy
        )
        if self._tracing is not None:
            exchange.span = self._tracing.begin(exchange.headers)
        self.in_flight += 1
        return exchange

    def _end(self, scope: Scope, exchange: Exchange) -> None:
        self.in_flight -= 1
        self._leave(exchange)
        self._note(scope, exchange)

    async def _handle(self, scope: Scope, exchange: Exchange, answer: Awaitable[None]) -> None:
        """Await `answer` within the time of a request, and answer with what became of it otherwise."""
        try:
            async with asyncio.timeout(self._settings.request_timeout_s):
                await answer
        except GoneError:
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
        finally:
            self._end(scope, exchange)

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        self._check(scope, exchange)
        if not self.is_direct(scope):
            await self._app(scope, exchange.receive, exchange.send)
            return
        exchange.route = scope["path"]
        direct = self._direct[scope["method"], scope["path"]]
        await exchange.answer(await direct.answer(scope["headers"], await exchange.body()))

    def _check(self, scope: Scope, exchange: Exchange) -> None:
        path = scope["path"]
        if path not in OPEN_PATHS:
            self._refuse_crowd()
            self._origins.check(scope["method"], exchange.headers)
        exchange.key = self._key_check.admit(path, exchange.headers)
        if path not in OPEN_PATHS:
            self._enter(scope, exchange)
        length = exchange.headers.get(b"content-length", b"")
        if length.isdigit():
            self._check_length(int(length[:20]))

    def _check_length(self, length: int) -> None:
        if length > self._settings.max_body_bytes:
            raise too_large(self._settings.max_body_bytes)

    def _refuse_crowd(self) -> None:
        """Answers that are not read yet count as requests under way."""
        settings, readers = self._settings, self._connections
        slow = readers.slow_readers
        crowded = self.in_flight + slow > settings.max_concurrent
        if crowded or (slow and readers.unsent_bytes > settings.max_unsent_bytes):
            raise Problem(429, "busy", "too many requests at once; try again", headers={"retry-after": "1"})

    def _enter(self, scope: Scope, exchange: Exchange) -> None:
        """Count a request to its key, or else to its address, neither of which may take every place."""
        exchange.client = client = exchange.key or (scope.get("client") or ("",))[0]
        self._by_client[client] = count = self._by_client.get(client, 0) + 1
        if count > self._settings.max_concurrent_per_client:
            detail = "too many requests of one client at once; try again"
            raise Problem(429, "busy", detail, headers={"retry-after": "1"})

    def _leave(self, exchange: Exchange) -> None:
        client = exchange.client
        if client is None:
            return
        left = self._by_client[client] - 1
        if left:
            self._by_client[client] = left
        else:
            del self._by_client[client]

    def _note(self, scope: Scope, exchange: Exchange) -> None:
        seconds = time.perf_counter() - exchange.started
        route = exchange.route or _route(scope)
        method = scope["method"] if route != _UNMATCHED else "any"
        self._metrics.observe(route, method, exchange.status, seconds)
        if self._tracing is not None and exchange.span is not None:
            self._tracing.end(exchange.span, route=route, method=method, status=exchange.status)
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


def _route(scope: Scope) -> str:
    path = getattr(scope.get("route"), "path_format", None)
    return path if isinstance(path, str) else _UNMATCHED
