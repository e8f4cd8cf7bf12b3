"""One request and its answer, as the gateway sees them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lazydp.service.http.connection import write_whole
from lazydp.service.http.problems import Problem

if TYPE_CHECKING:
    from opentelemetry.trace import Span

Message: TypeAlias = MutableMapping[str, Any]
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_SAFE_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]
_JSON_HEAD = b"content-length: %d\r\ncontent-type: application/json\r\nx-request-id: %b\r\n" + b"".join(
    b"%b: %b\r\n" % header for header in _SAFE_HEADERS
)
_GONE_STATUS = 499


def _request_ids() -> Iterator[bytes]:
    """Random ids of 64 bits, drawn many at a time: asking the system for eight bytes costs as much as ranking."""
    while True:
        block = os.urandom(8 * 512).hex().encode()
        yield from (block[start : start + 16] for start in range(0, len(block), 16))


_REQUEST_IDS = _request_ids()


class GoneError(Exception):
    """The client went away while it sent the body."""


def too_large(limit: int) -> Problem:
    """The problem of a body of more than `limit` bytes."""
    return Problem(413, "too-large", f"a body may have up to {limit} bytes", headers={"connection": "close"})


class Exchange:
    """One request and its answer.

    Attributes:
        started: when its head was there, by `time.perf_counter`.
        headers: of the request, lower-case names.
        status: of the answer; 499 while there is none.
        key: name of the API key.
        client: who is counted for it: the key, or else the address.
        route: template of its path, where the framework does not know it.
        span: of the trace.
    """

    __slots__ = (
        "_begun",
        "_id",
        "_left",
        "_max",
        "_page_policy",
        "_path",
        "_receive",
        "_send",
        "client",
        "headers",
        "key",
        "route",
        "span",
        "started",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, max_body_bytes: int, page_policy: bytes) -> None:
        self.started = time.perf_counter()
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status = _GONE_STATUS
        self.key: str | None = None
        self.client: str | None = None
        self.route: str | None = None
        self.span: Span | None = None
        self._path: str = scope["path"]
        self._receive = receive
        self._send = send
        self._left = self._max = max_body_bytes
        self._page_policy = page_policy
        self._begun = False
        given = self.headers.get(b"x-request-id")
        self._id = next(_REQUEST_IDS) if given is None or _REQUEST_ID.fullmatch(given) is None else given

    @property
    def request_id(self) -> str:
        """The caller's id of the request, or one of ours."""
        return self._id.decode()

    async def receive(self) -> Message:
        """The next part of the body, counted."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise too_large(self._max)
        return message

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            Problem: 413.
            GoneError: nobody waits for an answer any more.
        """
        parts = []
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

    def answer_at_once(self, cycle: RequestResponseCycle, body: bytes) -> bool:
        """Write ready JSON in one piece as the answer to `cycle`; whether that could be done (see `write_whole`)."""
        if not write_whole(cycle, _JSON_HEAD % (len(body), self._id), body):
            return False
        self._begun = True
        self.status = 200
        return True

    async def answer(self, body: bytes) -> None:
        """Answer with ready JSON."""
        cycle = getattr(self._send, "__self__", None)
        if isinstance(cycle, RequestResponseCycle) and self.answer_at_once(cycle, body):
            return
        self._begun = True
        self.status = 200
        head = _JSON_HEAD % (len(body), self._id)
        headers = [tuple(line.split(b": ", 1)) for line in head.split(b"\r\n") if line]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def send(self, message: Message) -> None:
        """The next part of the answer."""
        if message["type"] == "http.response.start":
            self._begun = True
            self.status = message["status"]
            headers = message["headers"]
            headers.append((b"x-request-id", self._id))
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
