"""One connection: uvicorn's, with limits on the head of a request, which it takes at any length and for any time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lazydp.service.http.problems import MEDIA_TYPE, Problem
from lazydp.service.settings import Settings


class Connection(HttpToolsProtocol):
    """Refuses a head that is too long (431) or too long in coming (408), and closes what never begins.

    From its first byte to its last a head may take `head_timeout_s` seconds, and so may a connection until its first
    head; between requests uvicorn's own limit for idle connections holds.
    """

    def __init__(self, *given: Any, max_head_bytes: int, head_timeout_s: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._max_head_bytes = max_head_bytes
        self._head_timeout_s = head_timeout_s
        # Whether a head is what comes next, and whether any of it came.
        self._in_head = True
        self._begun = False
        self._piece_bytes = 0
        # Of the pieces before the latest that hold nothing but an incomplete head.
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Wait for the first head."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and count what belongs to an incomplete head."""
        wholly = self._in_head
        self._piece_bytes = len(data)
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        if wholly:
            self._head_bytes += len(data)
        if self._head_bytes > self._max_head_bytes:
            self._refuse(_too_long(self._max_head_bytes))
        elif self._head_timer is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = self._begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete: hand it on, or refuse it where its last piece made it too long."""
        self._in_head = self._begun = False
        self._stop_waiting()
        at_most, self._head_bytes = self._head_bytes + self._piece_bytes, 0
        # The exact length is counted only where it may matter: the last piece may hold a body too.
        if at_most <= self._max_head_bytes or self._length_of_head() <= self._max_head_bytes:
            super().on_headers_complete()
            return
        app = self.app
        self.app = functools.partial(_refused, _too_long(self._max_head_bytes))
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def _length_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._begun:
            self._refuse(Problem(408, None, f"the request's head took longer than {self._head_timeout_s:g} seconds"))
        else:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answer outside the application, since there is no request yet, and close."""
        self._stop_waiting()
        body = problem.body(None)
        head = f"HTTP/1.1 {problem.status} {problem.title}\r\ncontent-type: {MEDIA_TYPE}\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


def connections(settings: Settings) -> Callable[..., Connection]:
    """What makes a connection, for uvicorn."""
    return functools.partial(
        Connection, max_head_bytes=settings.max_head_bytes, head_timeout_s=settings.request_timeout_s
    )


def _too_long(limit: int) -> Problem:
    return Problem(431, None, f"a request's head may have up to {limit} bytes", headers={"connection": "close"})


async def _refused(
    problem: Problem,
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """The application, for a request that is not to reach it."""
    await problem.response(None, path=scope["path"])(scope, receive, send)
