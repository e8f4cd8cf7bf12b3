"""Moto's S3 on a real socket, with faults that a test asks for."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"


@dataclass
class Store:
    """The store, and what is wrong with it.

    Attributes:
        port: of the socket.
        failures: so many of the next requests are answered by an error 500.
        expires_after: credentials expire after so many requests; None: never.
        delay_s: what every answer waits for, and every block of an object again.
        truncated: bodies of objects end at half of their length.
        before: called with method and path before a request is answered; what it raises ends the request.
    """

    port: int = 0
    failures: int = 0
    expires_after: int | None = None
    delay_s: float = 0.0
    truncated: bool = False
    before: Callable[[str, str], None] = lambda _method, _path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def uri(self, path: str) -> str:
        """Where an object or a folder of the bucket is, with key and secret."""
        options = f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"
        return f"s3://key:secret@{BUCKET}/{path}?{options}"

    @functools.cached_property
    def client(self) -> Any:
        """A client of boto3, one for all: each that is made reads the description of the service."""
        known = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **known)

    def names(self, prefix: str = "") -> set[str]:
        """Objects whose names begin so; empty ones in the place of folders are left out."""
        listed = self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return {entry["Key"] for entry in listed if not entry["Key"].endswith("/")}

    def put(self, name: str, content: bytes) -> None:
        """Write an object."""
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def heal(self) -> None:
        """Nothing is wrong any more."""
        self.failures, self.expires_after, self.delay_s, self.truncated = 0, None, 0.0, False
        self.before = lambda _method, _path: None

    def fault(self) -> tuple[str, str] | None:
        """Status and code of the error that the next request gets, if any."""
        with self._lock:
            if self.expires_after is not None:
                self.expires_after -= 1
                if self.expires_after < 0:
                    return "403 Forbidden", "ExpiredToken"
            if self.failures > 0:
                self.failures -= 1
                return "500 Internal Server Error", "InternalError"
        return None


@contextlib.contextmanager
def running_store() -> Iterator[Store]:
    """Run the store with an empty bucket."""
    store = Store()
    backend = DomainDispatcherApplication(create_backend_app)

    def faulty(environ: dict[str, Any], start_response: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        store.requests.append((method, path))
        store.before(method, path)
        time.sleep(store.delay_s)
        fault = store.fault()
        if fault is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<Error><Code>{fault[1]}</Code><Message>no</Message></Error>".encode()
            start_response(fault[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [b"" if method == "HEAD" else body]
        answer = backend(environ, start_response)
        of_object = method == "GET" and path.count("/") > 1
        return _spoiled(store, answer) if of_object and (store.truncated or store.delay_s) else answer

    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    store.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        store.client.create_bucket(Bucket=BUCKET)
        yield store
    finally:
        store.client.close()
        server.shutdown()
        thread.join()
        server.server_close()


def _spoiled(store: Store, answer: Any) -> Iterator[bytes]:
    body = b"".join(answer)
    if store.truncated:
        # The length in the header is that of the whole; the connection ends before.
        body = body[: len(body) // 2]
    for begin in range(0, len(body), 256):
        time.sleep(store.delay_s)
        yield body[begin : begin + 256]
