"""Whatever is wrong with a request, the answer is a problem document of the right status."""

import gzip
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lazydp.service.serving.served_version import ServedVersion

RECOMMEND = "/v1/recommendations"
JSON = {"content-type": "application/json"}
GZIPPED = gzip.compress(b"{}", mtime=0)


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    document: dict[str, Any] = response.json()
    # Clients of the Open Inference Protocol read the member `error` of a plain JSON document.
    protocol = response.request.url.path.startswith("/v2")
    assert response.headers["content-type"] == ("application/json" if protocol else "application/problem+json")
    assert ("error" in document) == protocol
    assert document["status"] == status
    assert {"type", "title", "instance"} <= document.keys()
    assert document["instance"] == f"urn:request:{response.headers['x-request-id']}"
    return document


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        ("GET", "/nothing", None, {}, 404),
        ("GET", "/v1/", None, {}, 404),
        ("PUT", RECOMMEND, b"{}", JSON, 405),
        ("DELETE", "/", None, {}, 405),
        ("GET", RECOMMEND, None, {}, 405),
        ("POST", RECOMMEND, b"{", JSON, 400),
        ("POST", RECOMMEND, b"", JSON, 400),
        ("POST", RECOMMEND, b"\xff\xfe{}", JSON, 400),
        ("POST", RECOMMEND, b"[" * 100_000, JSON, 400),
        ("POST", RECOMMEND, b"[]", JSON, 422),
        ("POST", RECOMMEND, b'"text"', JSON, 422),
        ("POST", RECOMMEND, b"null", JSON, 422),
        ("POST", RECOMMEND, b'{"k": NaN}', JSON, 422),
        ("POST", RECOMMEND, b'{"k": 1e400}', JSON, 422),
        ("POST", RECOMMEND, b'{"k": ' + b"9" * 5000 + b"}", JSON, 400),
        ("POST", RECOMMEND, b'{"user_id": "\\ud800"}', JSON, 400),
        ("POST", RECOMMEND, b"{}", {}, 415),
        ("POST", RECOMMEND, b"user_id=7", {"content-type": "application/x-www-form-urlencoded"}, 415),
        ("POST", RECOMMEND, b"{}", {"content-type": "application/json; charset=utf-16"}, 415),
        ("POST", RECOMMEND, b"{}", {**JSON, "content-encoding": "br"}, 415),
        ("POST", RECOMMEND, b"{}", {**JSON, "content-encoding": "gzip"}, 400),
        ("POST", RECOMMEND, GZIPPED[:-3], {**JSON, "content-encoding": "gzip"}, 400),
        ("POST", RECOMMEND, GZIPPED + b"x", {**JSON, "content-encoding": "gzip"}, 400),
        ("POST", RECOMMEND, GZIPPED, {**JSON, "content-encoding": "gzip"}, 404),
        ("POST", RECOMMEND, gzip.compress(b" " * 2_000_000, mtime=0), {**JSON, "content-encoding": "gzip"}, 413),
        ("POST", RECOMMEND, b'{"features": {' + b",".join(b'"%d":1' % n for n in range(3000)) + b"}}", JSON, 422),
        ("POST", RECOMMEND, b" " * 1_100_000, JSON, 413),
        ("GET", "/v1/users/7/recommendations?k=0", None, {}, 422),
        ("GET", "/v1/users/7/recommendations?k=many", None, {}, 422),
        ("GET", f"/v1/users/{'7' * 300}/recommendations", None, {}, 422),
        ("GET", "/v1/users/7/recommendations?model=other", None, {}, 404),
        ("GET", "/v2/models/..%2f..%2fetc", None, {}, 404),
        ("POST", "/v2/models/untrained/infer", b'{"inputs": []}', JSON, 422),
        ("POST", "/v2/repository/models/other/load", None, {}, 404),
        ("POST", "/v2/repository/models/untrained/unload", None, {}, 409),
    ],
)
def test_statuses(
    *, client: httpx.Client, method: str, path: str, content: bytes | None, headers: dict[str, str], status: int
) -> None:
    assert_problem(client.request(method, path, content=content, headers=headers), status)


def test_a_body_in_chunks_is_counted_too(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(1200):
            yield b" " * 1024

    assert_problem(client.post(RECOMMEND, content=chunks(), headers=JSON), 413)


def test_problems_never_echo_what_was_sent(client: httpx.Client) -> None:
    secret = "kilroy"
    for body in (
        {"user_id": secret},
        {"surprise": secret},
        {"k": secret},
        {"user_id": "7", "features": {"age": secret}},
        {"history": [{"x": secret}]},
    ):
        assert secret not in client.post(RECOMMEND, json=body).text


def test_request_ids(client: httpx.Client) -> None:
    assert client.get("/healthz", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
    own = client.get("/healthz", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert own != "a b\tc"
    assert client.get("/healthz").headers["x-request-id"] != client.get("/healthz").headers["x-request-id"]


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=15,
)
FIELDS = st.sampled_from(
    [
        "user_id",
        "history",
        "features",
        "k",
        "offset",
        "exclude",
        "candidates",
        "filters",
        "boosts",
        "cursor",
        "candidate_lists",
        "exclude_lists",
        "history_weights",
        "half_life",
        "similar_to",
        "similar_weights",
        "diversity",
        "explain",
        "queries",
    ]
)
BODIES = st.one_of(
    st.binary(max_size=200),
    ANY_JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(FIELDS, ANY_JSON, max_size=4).map(lambda value: json.dumps(value).encode()),
)
ENCODINGS = st.sampled_from([None, "gzip", "br", "identity", "nonsense"])
TYPES = st.sampled_from(
    ["application/json", "application/json; charset=latin-1", "text/plain", "application/x+json", ""]
)


@given(
    body=BODIES, encoding=ENCODINGS, media_type=TYPES, path=st.sampled_from([RECOMMEND, "/v2/models/untrained/infer"])
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_makes_the_service_fail(
    client: httpx.Client, body: bytes, encoding: str | None, media_type: str, path: str
) -> None:
    headers = {"content-type": media_type} | ({} if encoding is None else {"content-encoding": encoding})
    response = client.post(path, content=body, headers=headers)
    assert response.status_code < 500, body
    if response.status_code >= 400:
        assert_problem(response, response.status_code)


@given(st.text(max_size=40), st.text(max_size=10))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_path_makes_the_service_fail(client: httpx.Client, part: str, k: str) -> None:
    from urllib.parse import quote

    for path in (
        f"/v1/users/{quote(part, safe='')}/recommendations",
        f"/v1/items/{quote(part)}/similar",
        f"/{quote(part)}",
    ):
        assert client.get(path, params={"k": k}).status_code < 500


POST = b"POST /v1/recommendations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def raw(client: httpx.Client, data: bytes) -> bytes:
    """Bytes of the answer to bytes that need not be HTTP."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while part := connection.recv(65536):
            answer += part
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100,
        b"GET / HTTP/1.1\r\n\r\n",
        POST + b"content-length: -5\r\n\r\n{}",
        POST + b"content-length: 999999999999999999999\r\n\r\n{}",
        POST + b"content-length: 50\r\n\r\n{}",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 2000 + b"\r\n",
    ],
)
def test_what_is_hardly_http_does_no_harm(client: httpx.Client, data: bytes) -> None:
    answer = raw(client, data)
    assert b" 500 " not in answer.split(b"\r\n")[0]
    assert client.get("/healthz").status_code == 200


def head_in_pieces(client: httpx.Client, pieces: Iterator[bytes]) -> bytes:
    """What comes back for a head that is sent piece by piece until the service closes the connection."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=60) as connection:
        connection.settimeout(0.05)
        answer = b""
        for piece in pieces:
            try:
                connection.sendall(piece)
                part = connection.recv(65536)
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
            answer += part
            if not part:
                break
        return answer


def problem_in(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    document: dict[str, Any] = json.loads(body)
    assert head.startswith(b"HTTP/1.1 %d " % document["status"])
    return document


def forever(piece: bytes) -> Iterator[bytes]:
    deadline = time.monotonic() + 30
    yield b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
    while time.monotonic() < deadline:
        yield piece


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 1000, b"a" * 5000], ids=["many headers", "a name without an end"])
def test_a_head_without_end_is_refused(start: Any, bundles: dict[str, Path], piece: bytes) -> None:
    with start(bundles["towers"], max_head_bytes=20_000) as client:
        document = problem_in(head_in_pieces(client, forever(piece)))
        assert document["status"] == 431
        assert "20000 bytes" in document["detail"]
        assert client.get("/healthz").status_code == 200


def test_a_long_head_in_one_piece_is_refused_and_a_shorter_one_is_not(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"], max_head_bytes=20_000) as client:
        for _ in range(2):
            refused = client.get("/healthz", headers={"x-long": "a" * 21_000})
            assert refused.status_code == 431
            assert refused.json()["title"] == "Request Header Fields Too Large"
            assert client.get("/healthz", headers={"x-long": "a" * 19_000}).status_code == 200
        # A body is not of the head, wherever it arrives with it.
        assert client.post(RECOMMEND, json={"user_id": "7", "exclude": ["x" * 200] * 300}).status_code == 200


def test_a_head_that_comes_too_slowly_is_refused_and_silence_is_closed(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"], request_timeout_s=0.3) as client:
        assert problem_in(head_in_pieces(client, forever(b"a")))["status"] == 408
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30) as silent:
            assert silent.recv(1) == b""
        # A connection that has answered may rest, and begin again slowly.
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=30)
        for _ in range(2):
            connection.request("GET", "/healthz")
            assert connection.getresponse().read()
            time.sleep(0.5)
        connection.sock.sendall(b"GET /healthz")
        answer = connection.sock.recv(65536)
        connection.close()
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_slow_bodies_time_out(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"], request_timeout_s=0.3) as client:
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)
        connection.putrequest("POST", RECOMMEND)
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", "100")
        connection.endheaders(b"{")
        answer = connection.getresponse()
        assert answer.status == 503
        assert answer.getheader("retry-after") == "1"
        connection.close()


def test_too_many_at_once_are_told_to_come_back(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"], max_concurrent=1) as client:
        held = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=10)
        held.putrequest("POST", RECOMMEND)
        held.putheader("content-type", "application/json")
        held.putheader("content-length", "15")
        held.endheaders(b"{")
        deadline = time.monotonic() + 5
        while (response := client.get("/v1/models")).status_code != 429:
            assert time.monotonic() < deadline
        assert response.headers["retry-after"] == "1"
        assert_problem(response, 429)
        assert client.get("/healthz").status_code == 200
        held.send(b'"user_id":"7"}')
        assert held.getresponse().status == 200
        held.close()
        assert client.get("/v1/models").status_code == 200


def test_logs_hold_no_user_data(start: Any, bundles: dict[str, Path]) -> None:
    with structlog.testing.capture_logs() as logs, start(bundles["towers"], access_log=True) as client:
        client.get("/v1/users/kilroy/recommendations")
        client.post(RECOMMEND, json={"user_id": "kilroy", "history": ["kilroy"]})
        client.get("/kilroy")
        client.get("/", params={"user_id": "kilroy"})
    assert [log["route"] for log in logs if log["event"] == "request"] == [
        "/v1/users/{user_id}/recommendations",
        RECOMMEND,
        "unmatched",
        "/",
    ]
    assert "kilroy" not in repr(logs)


def test_a_fault_is_logged_with_its_place_and_without_its_words(
    start: Any, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: ServedVersion, query: Any, *_: Any, **__: Any) -> bytes:
        raise ValueError(f"cannot answer {query.user_id}")

    monkeypatch.setattr(ServedVersion, "answer", broken)
    with structlog.testing.capture_logs() as logs, start(bundles["popular"]) as client:
        for response in (
            client.post(RECOMMEND, json={"user_id": "kilroy"}),
            client.get("/v1/users/kilroy/recommendations"),
        ):
            assert "kilroy" not in json.dumps(assert_problem(response, 500))
    faults = [log for log in logs if log["event"] == "request failed"]
    assert [fault["error"] for fault in faults] == ["ValueError", "ValueError"]
    assert all(fault["where"][-1].endswith(" broken") for fault in faults)
    assert "kilroy" not in repr(logs)
