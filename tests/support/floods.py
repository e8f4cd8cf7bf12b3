"""Clients without manners: what they send first, and what they go on to send without end. A case is one row."""

from __future__ import annotations

from dataclasses import dataclass

POST = b"POST /v1/recommendations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Flood:
    """A head, and what follows it without end."""

    head: bytes
    piece: bytes
    keys: bool = False


FLOODS = {
    "trailers": Flood(CHUNKED + b"2\r\n{}\r\n0\r\n", b"a:b\r\n" * 4096),
    "trailers without a key": Flood(CHUNKED + b"2\r\n{}\r\n0\r\n", b"a:b\r\n" * 4096, keys=True),
    "one endless trailer": Flood(CHUNKED + b"2\r\n{}\r\n0\r\na: ", b"b" * 16384),
    "one endless name of a trailer": Flood(CHUNKED + b"2\r\n{}\r\n0\r\n", b"a" * 16384),
    "an endless extension of a chunk": Flood(CHUNKED + b"2;a=", b"b" * 16384),
    "an endless size of a chunk": Flood(CHUNKED, b"0" * 16384),
    "headers": Flood(POST, b"a: b\r\n" * 4096),
    "an endless header": Flood(POST + b"a: ", b"b" * 16384),
    "an endless path": Flood(b"GET /", b"a" * 16384),
    "a body after 401": Flood(POST + b"Content-Length: 999999999999\r\n\r\n", b"x" * 16384, keys=True),
    "a body after 413": Flood(POST + b"Content-Length: 999999999999\r\n\r\n", b"x" * 16384),
    "chunks after 401": Flood(CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n", keys=True),
    "chunks after 413": Flood(CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    "requests sent ahead": Flood(b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000),
    "no HTTP at all": Flood(b"\x16\x03\x01", b"\x00" * 16384),
}
