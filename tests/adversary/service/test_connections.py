"""Clients on raw sockets that send without end, read nothing, or take every place. A case is one row of a table."""

import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.floods import CHUNKED, FLOODS, POST
from support.service import running
from support.service_load import eventually

KEYED = {"name": "web", "sha256": "0" * 64, "scopes": ["recommend"]}
# What a client may send at most before it is cut off: far above every limit of the settings below.
MUCH = 32 * 2**20
MORE_MEMORY = 48 * 2**20


def memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def connect(client: httpx.Client) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30)
    connection.settimeout(15)
    return connection


def sent_until_cut(connection: socket.socket, head: bytes, piece: bytes) -> int:
    """Bytes that could be sent, answers unread, until the service closed the connection."""
    sent = 0
    try:
        for part in itertools.chain([head], itertools.repeat(piece)):
            connection.sendall(part)
            sent += len(part)
            if sent > MUCH:
                break
    except (ConnectionResetError, BrokenPipeError):
        return sent
    raise AssertionError(f"{sent} bytes were taken and nothing happened")


@pytest.fixture(scope="module")
def services(bundles: dict[str, Path]) -> Iterator[dict[bool, httpx.Client]]:
    """A service without keys and one with, that wait for nothing long."""
    options: dict[str, Any] = {"request_timeout_s": 3, "write_timeout_s": 2}
    with (
        running(bundles["towers"], **options) as plain,
        running(bundles["towers"], api_keys=[KEYED], **options) as keyed,
    ):
        yield {False: plain, True: keyed}


@pytest.fixture(scope="module")
def impatient(bundles: dict[str, Path]) -> Iterator[dict[bool, httpx.Client]]:
    """The same, for clients of whom nothing is expected but silence: they wait a fraction of a second."""
    names = ("request_timeout_s", "write_timeout_s", "linger_timeout_s", "idle_timeout_s")
    options: dict[str, Any] = dict.fromkeys(names, 0.3)
    with (
        running(bundles["towers"], **options) as plain,
        running(bundles["towers"], api_keys=[KEYED], **options) as keyed,
    ):
        yield {False: plain, True: keyed}


@pytest.mark.parametrize("case", FLOODS)
def test_a_flood_ends(services: dict[bool, httpx.Client], case: str) -> None:
    flood = FLOODS[case]
    client = services[flood.keys]
    before = memory()
    with connect(client) as connection:
        sent_until_cut(connection, flood.head, flood.piece)
    assert memory() - before < MORE_MEMORY
    assert client.get("/healthz").status_code == 200


# What a client sends before it goes silent, and never reads.
SILENCES = {
    "nothing": b"",
    "a piece of a head": b"GET / HT",
    "a piece of a body": POST + b"Content-Length: 100\r\n\r\n{",
    "a piece of a chunk": CHUNKED + b"64\r\n{",
    "no end of the trailers": CHUNKED + b"2\r\n{}\r\n0\r\na: b\r\n",
    "a whole request": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an answer that closes": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("case", SILENCES)
def test_silence_ends(impatient: dict[bool, httpx.Client], case: str, keys: bool) -> None:
    with connect(impatient[keys]) as connection:
        connection.sendall(SILENCES[case])
        while connection.recv(65536):
            pass


def trickled_until_cut(connection: socket.socket) -> int:
    for sent in range(100):
        try:
            connection.sendall(b"x")
        except (ConnectionResetError, BrokenPipeError):
            return sent
        time.sleep(0.1)
    return 100


def test_a_body_that_trickles_after_its_answer_ends(impatient: dict[bool, httpx.Client]) -> None:
    # Each byte used to put the end off, and nothing was logged.
    with connect(impatient[True]) as connection:
        connection.sendall(POST + b"Content-Length: 100000\r\n\r\n")
        assert trickled_until_cut(connection) < 100


def test_whoever_finishes_the_body_after_its_answer_may_go_on(services: dict[bool, httpx.Client]) -> None:
    with connect(services[True]) as connection:
        connection.sendall(POST + b"Content-Length: 10\r\n\r\n")
        assert b"401" in connection.recv(65536)
        connection.sendall(b"x" * 10 + b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200 OK" in connection.recv(65536)


def large_question() -> bytes:
    queries = b",".join([b'{"user_id":"7","k":60}'] * 100)
    body = b'{"queries":[' + queries + b"]}"
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def test_slow_readers_are_bounded_and_end(bundles: dict[str, Path]) -> None:
    with (
        running(bundles["towers"], write_timeout_s=2, max_unsent_bytes=2**16) as client,
        contextlib.ExitStack() as open_,
    ):
        before = memory()
        for _ in range(3):
            reader = open_.enter_context(socket.socket())
            # Before it connects, so that the system holds little of what is not read.
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            reader.connect((client.base_url.host, client.base_url.port))
            reader.sendall(large_question() * 16)
        deadline = time.monotonic() + 120
        refused = False
        while not refused and time.monotonic() < deadline:
            refused = client.get("/v1/models").status_code == 429
        assert refused
        assert client.get("/healthz").status_code == 200
        assert memory() - before < MORE_MEMORY
        while client.get("/v1/models").status_code == 429:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert 'lazydp_connections_cut_total{reason="slow reader"}' in client.get("/metrics").text


def hold(client: httpx.Client, data: bytes, count: int, open_: contextlib.ExitStack) -> list[socket.socket]:
    held = []
    for _ in range(count):
        connection = open_.enter_context(connect(client))
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
        held.append(connection)
    return held


def test_one_client_does_not_take_every_place(bundles: dict[str, Path]) -> None:
    options: dict[str, Any] = {"max_concurrent": 8, "max_concurrent_per_client": 4, "request_timeout_s": 5}
    with running(bundles["towers"], **options) as client, contextlib.ExitStack() as open_:
        hold(client, POST + b"Content-Length: 100\r\n\r\n{", 12, open_)
        time.sleep(0.5)
        assert client.get("/v1/models").status_code == 429
        assert client.get("/healthz").status_code == 200
        # Another address of the same machine is another client.
        other = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=client.base_url, transport=other) as neighbour:
            assert neighbour.get("/v1/models").status_code == 200


def test_connections_are_capped_with_a_reserve_for_health(bundles: dict[str, Path]) -> None:
    options: dict[str, Any] = {"max_connections": 20, "max_connections_per_address": 10}
    with running(bundles["towers"], **options) as client, contextlib.ExitStack() as open_:
        hold(client, b"", 15, open_)
        with httpx.Client(base_url=client.base_url) as late:
            assert late.get("/healthz").status_code == 200
            refused = late.get("/v1/models")
            assert refused.status_code == 503
            assert refused.json()["type"].endswith("crowded")
        other = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(base_url=client.base_url, transport=other) as neighbour:
            assert neighbour.get("/v1/models").status_code == 200
        hold(client, b"", 60, open_)
        assert 'lazydp_connections_cut_total{reason="crowded"}' in neighbour_metrics(client)


# What a client sent, and whether it reads a byte of its answer, before it is gone without a word.
DESERTERS = {
    "in a head": (POST, False),
    "in a body": (POST + b"Content-Length: 100\r\n\r\n{", False),
    "before its answer": (large_question(), False),
    "in its answer": (large_question(), True),
    "before several answers": (large_question() * 8, False),
}


@pytest.mark.parametrize("case", DESERTERS)
def test_clients_that_are_gone_leave_nothing_behind(services: dict[bool, httpx.Client], case: str) -> None:
    sent, reads = DESERTERS[case]
    client = services[False]
    for _ in range(5):
        connection = connect(client)
        connection.sendall(sent)
        if reads:
            connection.recv(1)
        # A reset instead of an orderly end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    eventually(lambda: in_flight(client) == 1)  # the one that asks
    assert client.get("/v1/users/7/recommendations").status_code == 200


def in_flight(client: httpx.Client) -> float:
    [line] = [
        line for line in client.get("/metrics").text.splitlines() if line.startswith("lazydp_requests_in_flight ")
    ]
    return float(line.partition(" ")[2])


def neighbour_metrics(client: httpx.Client) -> str:
    other = httpx.HTTPTransport(local_address="127.0.0.3")
    with httpx.Client(base_url=client.base_url, transport=other) as neighbour:
        return neighbour.get("/metrics").text


LOAD = "/v2/repository/models/untrained/load"
# Headers of a request, and the status that a keyless service on loopback gives it.
BROWSERS: dict[str, tuple[str, str, dict[str, str], int]] = {
    "a name that was bound anew": ("GET", "/v1/models", {"host": "evil.example:8000"}, 421),
    "an address that was bound anew": ("GET", "/v1/models", {"host": "10.0.0.1"}, 421),
    "localhost": ("GET", "/v1/models", {"host": "localhost:1"}, 200),
    "IPv6": ("GET", "/v1/models", {"host": "[::1]:8000"}, 200),
    "a name that is listed": ("GET", "/v1/models", {"host": "recs.test:80"}, 200),
    "a page of elsewhere loads": (
        "POST",
        LOAD,
        {"host": "localhost", "origin": "https://evil.example"},
        403,
    ),
    "a page of nowhere loads": (
        "POST",
        LOAD,
        {"host": "localhost", "origin": "null"},
        403,
    ),
    "another port loads": (
        "POST",
        LOAD,
        {"host": "localhost:1", "origin": "http://localhost:2"},
        403,
    ),
    "our own page tries": ("POST", "/try", {"host": "localhost:1", "origin": "http://localhost:1"}, 200),
    "our own page says so": (
        "POST",
        "/try",
        {"host": "localhost:1", "origin": "null", "sec-fetch-site": "same-origin"},
        200,
    ),
    "health is for everybody": ("GET", "/healthz", {"host": "evil.example"}, 200),
}


@pytest.mark.parametrize("case", BROWSERS)
def test_browsers_are_no_way_in(local: httpx.Client, case: str) -> None:
    method, path, headers, status = BROWSERS[case]
    assert local.request(method, path, headers=headers).status_code == status


@pytest.fixture(scope="module")
def local(bundles: dict[str, Path]) -> Iterator[httpx.Client]:
    with running(bundles["towers"], allowed_hosts=["recs.test"]) as client:
        yield client


WORDS = ["queries", "user_id", "history", '"queries"', "k", "model", "null", "__proto__", "../..", "é" * 100, "a" * 256]


@pytest.mark.parametrize("word", WORDS)
def test_an_id_may_be_any_word_of_the_protocol(client: httpx.Client, word: str) -> None:
    asked = {"user_id": "7", "history": [word], "exclude": [word], "candidates": ["1", word], "k": 1}
    one = client.post("/v1/recommendations", json=asked)
    assert one.status_code == 200, one.text
    several = client.post("/v1/recommendations", json={"queries": [asked]})
    assert several.json()["results"][0]["items"] == one.json()["items"]
    escaped = b'{"\\u0071ueries": [{"user_id": "7"}]}'
    assert client.post("/v1/recommendations", content=escaped, headers={"content-type": "application/json"}).json()[
        "results"
    ]


GARBAGE: dict[str, Callable[[], bytes]] = {
    "ids of the wrong kind": lambda: b'{"history": [' + b",".join([b"{}"] * 200_000) + b"]}",
    "unknown members": lambda: b"{" + b",".join(b'"%d":{}' % n for n in range(80_000)) + b"}",
    "unknown features": lambda: b'{"features": {' + b",".join(b'"%d":[{}]' % n for n in range(60_000)) + b"}}",
    "queries of nothing": lambda: b'{"queries": [' + b",".join([b"1"] * 300_000) + b"]}",
    "depth": lambda: b'{"history": ' + b"[" * 500_000,
}


@pytest.mark.parametrize("path", ["/v1/recommendations", "/v2/models/untrained/infer"])
@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_one_error(client: httpx.Client, case: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.service.http import problems

    # As many errors as were collected: each costs as much as an answer.
    collected: list[int] = []
    plain = problems._part

    def counted(*given: Any) -> tuple[str, str]:
        collected.append(1)
        return plain(*given)

    monkeypatch.setattr(problems, "_part", counted)
    body = GARBAGE[case]()[:1_000_000]
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert len(collected) <= 20
