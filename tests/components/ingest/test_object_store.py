"""A log in an object store: read like a folder, and what goes wrong there is told in one line."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.ingest.ingest import ingest
from lazydp.components.shared.errors import InputError, LazyDPError, UnavailableError

LOG = pa.table({"u": [1, 1, 2, 2, 2], "i": [0, 1, 2, 0, 1]})
SPEC = "name: a\nlabel: {kind: implicit}\nuser: {column: u, embed: false}\n"
SPEC += "item: {column: i, vocabulary: {kind: integer, size: 3}}\n"


class _Store(BaseHTTPRequestHandler):
    """As much of S3's protocol as reading needs: HEAD, ranged GET, ListObjectsV2; with faults that a test asks for."""

    objects: dict[str, bytes]
    failures: int = 0
    truncated: bool = False
    denied: bool = False
    # After so many answers credentials have expired.
    expires_after: int | None = None
    delay_s: float = 0.0

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def _answer(self, *, head: bool) -> None:
        store = type(self)
        time.sleep(store.delay_s)
        if store.expires_after is not None:
            store.expires_after -= 1
        if store.denied or (store.expires_after is not None and store.expires_after < 0):
            self._error(403, "ExpiredToken", head=head)
        elif store.failures > 0:
            store.failures -= 1
            self._error(500, "InternalError", head=head)
        elif "list-type=2" in self.path or self.path.split("?")[0].strip("/") == "bucket":
            self._list(head=head)
        else:
            self._object(self.path.split("?")[0].removeprefix("/bucket/"), head=head)

    def _error(self, status: int, code: str, *, head: bool) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
        self._send(status, b"" if head else body)

    def _send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _list(self, *, head: bool) -> None:
        from urllib.parse import parse_qs, urlsplit

        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(body)}</Size><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
            "</Contents>"
            for key, body in self.objects.items()
            if key.startswith(prefix)
        )
        count = entries.count("<Key>")
        inside = f"<IsTruncated>false</IsTruncated><KeyCount>{count}</KeyCount>{entries}"
        text = f"<ListBucketResult>{inside}</ListBucketResult>"
        self._send(200, b"" if head else text.encode(), content_type="application/xml")

    def _object(self, key: str, *, head: bool) -> None:
        body = self.objects.get(key)
        if body is None:
            self._error(404, "NoSuchKey", head=head)
            return
        headers = {"Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "ETag": '"x"', "Accept_Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if head or wanted is None:
            self._send(200, b"" if head else body, length=len(body), **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last) + 1 if last else len(body), len(body))
        part = body[int(first) : end]
        headers["Content_Range"] = f"bytes {first}-{end - 1}/{len(body)}"
        if type(self).truncated:
            self._send(206, part[: len(part) // 2], length=len(part), **headers)
            self.close_connection = True
        else:
            self._send(206, part, **headers)  # type: ignore[arg-type]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[_Store], str]]:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    objects = {}
    for number, part in enumerate((LOG.slice(0, 2), LOG.slice(2))):
        sink = io.BytesIO()
        pq.write_table(part, sink)
        objects[f"log/{number}.parquet"] = sink.getvalue()
    kind = type("Store", (_Store,), {"objects": objects})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    options = f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
    yield kind, options
    server.shutdown()
    thread.join()
    server.server_close()


def location(path: str, options: str) -> str:
    return f"s3://key:secret@bucket/{path}?{options}"


def test_a_log_in_a_store_is_the_log_in_a_folder(store: tuple[type[_Store], str], tmp_path: Path) -> None:
    pq.write_table(LOG, tmp_path / "log.parquet")
    here = ingest([str(tmp_path / "log.parquet")], SPEC, tmp_path / "here")
    there = ingest([location("log", store[1])], SPEC, tmp_path / "there")
    assert there.fingerprint == here.fingerprint
    assert "secret" not in (tmp_path / "there" / "dataset.json").read_text()


def test_a_store_that_fails_now_and_then_is_asked_again(store: tuple[type[_Store], str], tmp_path: Path) -> None:
    store[0].failures = 2
    assert ingest([location("log", store[1])], SPEC, tmp_path / "out").source.rows == 5
    assert store[0].failures == 0


def test_a_slow_store_is_waited_for(store: tuple[type[_Store], str], tmp_path: Path) -> None:
    store[0].delay_s = 0.02
    assert ingest([location("log", store[1])], SPEC, tmp_path / "out").source.rows == 5


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"denied": True}, UnavailableError),
        # When the schemas have been read, before or while the rows are.
        *(({"expires_after": answers}, UnavailableError) for answers in (8, 10, 12, 16, 20)),
        ({"truncated": True}, LazyDPError),
        ({"failures": 1000}, UnavailableError),
    ],
    ids=["expired", *(f"expired-after-{answers}" for answers in (8, 10, 12, 16, 20)), "torn", "down"],
)
def test_what_goes_wrong_there_is_one_line(
    store: tuple[type[_Store], str], tmp_path: Path, fault: dict[str, int], kind: type[LazyDPError]
) -> None:
    for name, value in fault.items():
        setattr(store[0], name, value)
    with pytest.raises(kind) as caught:
        ingest([location("log", store[1])], SPEC, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_told(store: tuple[type[_Store], str], tmp_path: Path) -> None:
    for place in ([location("nowhere", store[1])], [location("nowhere/*.parquet", store[1])]):
        with pytest.raises(InputError, match=r"does not exist|no file matches") as caught:
            ingest(place, SPEC, tmp_path / "out")
        assert "secret" not in str(caught.value)
