"""A request whose body comes with its head is answered without a task, and as any other."""

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from lazydp.service.app import Service
from lazydp.service.http.gateway import Gateway, Start
from support.service import running_app
from support.service_load import eventually

KEY = "a" * 43
SHA256 = "66d34fba71f8f450f7e45598853e53bfc23bbd129027cbb131a2f4ffd7878cd0"
CHANGES = re.compile(rb"date: [^\r]*\r\n|x-request-id: \w+\r\n|urn:request:\w+")


@pytest.fixture(scope="module")
def service(bundles: dict[str, Path]) -> Iterator[tuple[httpx.Client, Service]]:
    with running_app(bundles["towers"], max_body_bytes=4096, cache_entries=0) as running:
        yield running


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of each request that was taken without a task: whether it was given one after all."""
    found: list[str] = []
    take = Gateway.take

    def noted(self: Gateway, cycle: object, start: Start) -> None:
        def started(app: object) -> None:
            found[-1] = "task"
            start(app)  # type: ignore[arg-type]

        found.append("no task")
        take(self, cycle, started)  # type: ignore[arg-type]

    monkeypatch.setattr(Gateway, "take", noted)
    return found


def asked(client: httpx.Client, body: bytes, *, apart: bool, headers: bytes = b"", path: bytes = b"") -> bytes:
    """The answer on the wire, without what differs between two equal requests."""
    head = b"POST /v1/recommendations" + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += headers or b"Content-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30) as connection:
        if apart:
            connection.sendall(head)
            time.sleep(0.05)
            connection.sendall(body)
        else:
            connection.sendall(head + body)
        parts = iter(lambda: connection.recv(65536), b"")
        return CHANGES.sub(b"", b"".join(parts))


QUERIES = {
    "a user": (b'{"user_id": "7", "k": 3}', b"200"),
    "a history": (b'{"history": ["1", "2"], "k": 3, "explain": true, "filters": {"genre": ["Drama"]}}', b"200"),
    "a first page": (b'{"user_id": "7", "k": 3, "cursor": ""}', b"200"),
    "similar items": (b'{"similar_to": ["3"], "k": 2}', b"200"),
    "nobody": (b'{"k": 3}', b"404"),
    "no JSON": (b"{", b"400"),
    "a feature that is not": (b'{"features": {"nose": 1}}', b"422"),
    "weights that do not fit": (b'{"history": ["1"], "history_weights": [1, 2]}', b"422"),
    "too long": (b" " * 5000, b"413"),
}


@pytest.mark.parametrize("case", QUERIES)
def test_the_answer_is_the_same_as_of_a_task(
    service: tuple[httpx.Client, Service], taken: list[str], case: str
) -> None:
    client, _ = service
    body, status = QUERIES[case]
    at_once = asked(client, body, apart=False)
    assert taken == ["no task" if status == b"200" else "task"]
    by_task = asked(client, body, apart=True)
    assert len(taken) == 1
    assert at_once == by_task
    assert at_once.startswith(b"HTTP/1.1 " + status)


def test_a_batch_is_left_to_a_task(service: tuple[httpx.Client, Service], taken: list[str]) -> None:
    client, _ = service
    assert asked(client, b'{"queries": [{"user_id": "7", "k": 3}]}', apart=False).startswith(b"HTTP/1.1 200")
    assert taken == ["task"]


def test_a_query_string_is_left_to_the_framework(service: tuple[httpx.Client, Service], taken: list[str]) -> None:
    client, _ = service
    assert asked(client, b'{"user_id": "7"}', apart=False, path=b"?model=other").startswith(b"HTTP/1.1 404")
    assert taken == []


def test_keys_are_asked_for(bundles: dict[str, Path], taken: list[str]) -> None:
    key = {"name": "web", "sha256": SHA256, "scopes": ["recommend"]}
    with running_app(bundles["towers"], api_keys=[key]) as (client, _):
        body = b'{"user_id": "7"}'
        assert asked(client, body, apart=False).startswith(b"HTTP/1.1 401")
        given = b"Content-Type: application/json\r\nX-API-Key: %b\r\n" % KEY.encode()
        for _ in range(2):  # computed, then kept
            assert asked(client, body, apart=False, headers=given).startswith(b"HTTP/1.1 200")
    assert taken == ["task", "no task", "no task"]


def test_requests_are_counted_and_nothing_stays_in_flight(
    service: tuple[httpx.Client, Service], taken: list[str]
) -> None:
    client, app = service
    metrics = app.state.context.metrics
    before = metrics.requests().get(("/v1/recommendations", 200), (0.0,))[-1]
    answers = metrics.answers().get(("untrained", "user"), 0.0)
    for _ in range(5):
        asked(client, b'{"user_id": "7", "k": 3}', apart=False)
    eventually(lambda: metrics.requests()["/v1/recommendations", 200][-1] == before + 5)
    assert taken == ["no task"] * 5
    assert metrics.answers()["untrained", "user"] == answers + 5
    assert app.gateway.in_flight == 0


def test_requests_sent_ahead_are_answered_in_order(service: tuple[httpx.Client, Service], taken: list[str]) -> None:
    client, _ = service
    body = b'{"user_id": "%d", "k": 1}'
    head = b"POST /v1/recommendations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    alone = [
        client.post("/v1/recommendations", json={"user_id": str(n), "k": 1}).json()["items"][0]["id"] for n in range(8)
    ]
    sent = [head + b"Content-Length: %d\r\n\r\n" % len(body % n) + body % n for n in range(8)]
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30) as connection:
        connection.sendall(b"".join(sent))
        got = b""
        while got.count(b'"notice"') < 8:
            got += connection.recv(65536)
    assert [found.decode() for found in re.findall(rb'"items":\[\{"id":"(\d+)"', got)] == alone
    assert taken[0] == "no task"


def test_a_fault_is_answered_and_logged(
    service: tuple[httpx.Client, Service], taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, app = service

    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(type(app.state.context.served()), "answer", broken)
    assert asked(client, b'{"user_id": "7", "k": 3}', apart=False).startswith(b"HTTP/1.1 500")
    assert taken == ["task"]
    assert app.gateway.in_flight == 0
