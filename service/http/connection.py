"""One connection: uvicorn's, with a bound on bytes and time in every state, which it leaves without."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from lazydp.service.http.auth import OPEN_PATHS
from lazydp.service.http.connections import Connections
from lazydp.service.http.problems import MEDIA_TYPE, Problem

# Requests that may wait behind the one being answered.
_PIPELINED = 16


_OK = b"HTTP/1.1 200 OK\r\n"
_CLOSE = b"connection: close\r\n"


def write_whole(cycle: RequestResponseCycle, head: bytes, body: bytes) -> bool:
    """Write a whole answer in one piece, as `cycle.send` does it in two.

    Every name and value of our own heads is known to be well-formed, so that none need be looked at again.

    Args:
        cycle: the request being answered, of which nothing is answered yet.
        head: headers but for those that uvicorn adds, each with its line end; the length of `body` among them.
        body: of the answer.

    Returns:
        Whether it was written: not where the reader is slow or gone.
    """
    if cycle.flow.write_paused or cycle.disconnected or cycle.response_started:
        return False
    end = b"\r\n" if cycle.keep_alive else _CLOSE + b"\r\n"
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(b"".join((_begin(cycle.default_headers), head, end, body)))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    # As uvicorn does at the end of a task: the connection holds the request, which would hold the connection.
    cycle.on_response = _nothing
    return True


class _Begin:
    """Status and uvicorn's own headers (the date) of the latest answer: they are the same for a second."""

    def __init__(self) -> None:
        self._of: list[tuple[bytes, bytes]] | None = None
        self._made = b""

    def __call__(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        if headers is not self._of:
            # The list is kept, so that no other can be at its place; uvicorn makes a new one for each date.
            self._of = headers
            self._made = _OK + b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._made


_begin = _Begin()


def _nothing() -> None:
    return None


class Taker(Protocol):
    """What answers some requests without a task of their own (`gateway.Gateway`)."""

    def is_direct(self, scope: Any, /) -> bool:
        """Whether `take` may answer a request."""

    def take(self, cycle: RequestResponseCycle, start: Callable[[Any], None], /) -> None:
        """Answer a request for which `is_direct` holds and whose body is there; `start` starts a task for it."""


class _CutError(Exception):
    """Stops the parser where nothing more is to be read."""


class Connection(HttpToolsProtocol):
    """Bounds what a client can make the service hold, in memory and in time.

    - Before and within a head: `max_head_bytes` (431) and `request_timeout_s` (408, or closed where nothing came).
    - Within a body: bytes that are not delivered (sizes and extensions of chunks, trailers) up to `max_head_bytes`
      between two that are. Those that are delivered, and their time, are the gateway's to bound.
    - After an answer, while its request's body goes on: `max_body_bytes`, and `linger_timeout_s`.
    - While an answer waits to be read: `write_timeout_s`; the same once the connection is to be closed.
    - Requests sent ahead: a handful.
    - Between requests: `idle_timeout_s`.
    """

    def __init__(self, *given: Any, shared: Connections, taker: Taker, **named: Any) -> None:
        super().__init__(*given, **named)
        self._shared = shared
        self._taker = taker
        self._application = self.app
        # Whether a piece is being read, and the request in it that `taker` may answer.
        self._reading = False
        self._held: RequestResponseCycle | None = None
        self._max_head_bytes = shared.settings.max_head_bytes
        self._head_timeout_s = shared.settings.request_timeout_s
        self._idle_timeout_s = shared.settings.idle_timeout_s
        # Whether a head is what comes next, and whether any of it came; whether a body does.
        self._in_head = True
        self._begun = False
        self._in_body = False
        self._piece_bytes = 0
        # Of the pieces before the latest that hold nothing but an incomplete head.
        self._head_bytes = 0
        # Since the latest byte of a body that was delivered; and of a body whose request is answered.
        self._undelivered_bytes = 0
        self._delivered = False
        self._discarded_bytes = 0
        self._health_only = False
        self._counted = False
        self._lost = False
        # The request being answered, where it is not the latest one.
        self._answering: RequestResponseCycle | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None
        # When the latest request was answered, while none has come since.
        self._idle_since: float | None = None
        self._idle_timer: asyncio.TimerHandle | None = None

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that wait for the reader."""
        return self.transport.get_write_buffer_size()

    # What the transport says.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Wait for the first head, where there is room for one more connection."""
        super().connection_made(transport)
        admission = self._shared.opened(self, self.client[0] if self.client else "", self.loop)
        self._counted = admission != "none"
        if admission == "none":
            transport.abort()
            return
        self._health_only = admission == "health"
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        for timer in (self._head_timer, self._write_timer, self._end_timer, self._idle_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._write_timer = self._end_timer = self._idle_timer = None
        if self._counted:
            self._shared.closed(self)
        self._disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and count what is not delivered."""
        if self.transport.is_closing():
            # What comes after the answer that ends a connection is for nobody.
            return
        head_before, body_before = self._in_head, self._in_body
        self._piece_bytes = len(data)
        self._delivered = False
        self._reading = True
        super().data_received(data)
        self._reading = False
        if self._held is not None:
            self._begin_held()
        if self.transport.is_closing():
            return
        if self._in_body:
            self._undelivered_bytes = (
                0 if self._delivered else self._undelivered_bytes + (len(data) if body_before else 0)
            )
            if self._undelivered_bytes > self._max_head_bytes:
                self._cut("framing")
            return
        if not self._in_head:
            return
        if head_before:
            self._head_bytes += len(data)
        if self._head_bytes > self._max_head_bytes:
            self._refuse(_too_long(self._max_head_bytes))
        elif self._head_timer is None:
            self._wait_for_head()

    def pause_writing(self) -> None:
        """The reader is slow: give it some time."""
        super().pause_writing()
        self._shared.paused(self)
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(
                self._shared.settings.write_timeout_s, functools.partial(self._cut, "slow reader")
            )

    def resume_writing(self) -> None:
        """The reader has caught up."""
        super().resume_writing()
        self._shared.resumed(self)
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # What the parser says.

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = self._begun = True
        self._in_body = False
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the head; trailers, which nobody asked for, are let go."""
        if self._in_body:
            return
        # What uvicorn does, without a call of it for each header.
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is complete: hand it on, or refuse it where its last piece made it too long."""
        self._in_head = self._begun = False
        self._in_body = True
        self._undelivered_bytes = self._discarded_bytes = 0
        self._stop_waiting()
        if len(self.pipeline) >= _PIPELINED:
            self._cut("pipelined")
            raise _CutError
        at_most, self._head_bytes = self._head_bytes + self._piece_bytes, 0
        app = self.app
        # The exact length is counted only where it may matter: the last piece may hold a body too.
        if at_most > self._max_head_bytes and self._length_of_head() > self._max_head_bytes:
            self.app = functools.partial(_refused, _too_long(self._max_head_bytes))
        elif self._health_only:
            self.app = functools.partial(_health_only, app)
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def on_body(self, body: bytes) -> None:
        """A piece of the body; what comes after the answer is counted and let go."""
        self._delivered = True
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > self._shared.settings.max_body_bytes:
                self._cut("body after its answer")
                raise _CutError
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete."""
        self._in_body = False
        if self.cycle.response_complete:
            self._stop_end_timer()
            if not self.transport.is_closing():
                self._wait_for_request()
        super().on_message_complete()

    # What uvicorn says.

    def on_response_complete(self) -> None:
        """An answer is complete: its request may still be coming, or the connection may have to end.

        Instead of uvicorn's, which makes a timer for each answer and cancels it with the next request.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._end_within(self._shared.settings.write_timeout_s, "slow reader")
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._wait_for_request()
        if self._in_body and self.cycle.response_complete:
            self._end_within(self._shared.settings.linger_timeout_s, "body after its answer")

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        if self._reading and app is self._application and self._taker.is_direct(cycle.scope):
            # Its body may be in this very piece.
            self._held = cycle
        else:
            super()._start_asgi_task(cycle, app)

    def _begin_held(self) -> None:
        """Begin the request that came with the latest piece, unless that ended the connection."""
        cycle, self._held = self._held, None
        if cycle is None or self.transport.is_closing():
            return
        start = functools.partial(super()._start_asgi_task, cycle)
        if cycle.more_body or cycle.flow.write_paused:
            start(self._application)
        else:
            self._taker.take(cycle, start)

    def shutdown(self) -> None:
        """The server stops."""
        super().shutdown()
        if self.transport.is_closing():
            self._end_within(self._shared.settings.linger_timeout_s, "slow reader")

    def send_400_response(self, msg: str) -> None:
        """What cannot be parsed is a problem like any other; after a cut there is nobody to tell."""
        if not self.transport.is_closing():
            self._refuse(Problem(400, None, msg.rstrip(".").lower(), headers={"connection": "close"}))

    def _length_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _wait_for_request(self) -> None:
        """Note that nothing is under way; the one timer of the connection looks whether that has lasted too long."""
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self._idle_timeout_s, self._look_whether_idle)

    def _look_whether_idle(self) -> None:
        self._idle_timer = None
        since = self._idle_since
        if since is None or self.transport.is_closing():
            return
        left = since + self._idle_timeout_s - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._look_whether_idle)
            return
        # Whether the reader has read or not.
        self.transport.close()
        self._end_within(self._shared.settings.linger_timeout_s, "slow reader")

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._head_is_late)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_end_timer(self) -> None:
        if self._end_timer is not None:
            self._end_timer.cancel()
            self._end_timer = None

    def _head_is_late(self) -> None:
        if self._begun:
            self._refuse(Problem(408, None, f"the request's head took longer than {self._head_timeout_s:g} seconds"))
        else:
            self.transport.close()

    def _end_within(self, seconds: float, reason: str) -> None:
        self._stop_end_timer()
        self._end_timer = self.loop.call_later(seconds, functools.partial(self._cut, reason))

    def _cut(self, reason: str) -> None:
        """End the connection at once, whatever it still holds."""
        if self._lost:
            return
        self._shared.refused(reason, self.loop)
        self._disconnect()
        self.transport.abort()

    def _disconnect(self) -> None:
        """Tell whatever still answers that nobody is there: uvicorn tells the latest request only."""
        self._lost = True
        waiting = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        for cycle in (*waiting, self._answering):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _refuse(self, problem: Problem) -> None:
        """Answer outside the application, since there is no request yet, and close."""
        self._stop_waiting()
        body = problem.body(None)
        head = f"HTTP/1.1 {problem.status} {problem.title}\r\ncontent-type: {MEDIA_TYPE}\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()
        self._end_within(self._shared.settings.linger_timeout_s, "slow reader")


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


async def _health_only(
    app: Callable[..., Awaitable[None]],
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """The application, for connections beyond those that may ask for anything."""
    if scope["path"] in OPEN_PATHS:
        await app(scope, receive, send)
        return
    headers = {"connection": "close", "retry-after": "1"}
    problem = Problem(503, "crowded", "too many connections; use fewer, or come again", headers=headers)
    await problem.response(None, path=scope["path"])(scope, receive, send)
