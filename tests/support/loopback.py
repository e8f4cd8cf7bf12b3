"""A server on loopback that answers JSON, for stand-ins of services that check what they are asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit


class LoopbackServer:
    """Use it as a context; `url` is where it listens."""

    url: str

    def answer(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], raw: bytes
    ) -> tuple[int, Any]:
        """Status and document (text is sent as it is) of one request; ValueError is status 400."""
        raise NotImplementedError

    def refused(self, message: str) -> Any:
        """The document that goes with a ValueError."""
        return {"error": message}

    def __enter__(self) -> Self:
        owner = self

        class Handler(_Handler):
            server_of = owner  # type: ignore[assignment]

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_of: LoopbackServer

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            status, document = self.server_of.answer(self.command, url.path, query, self.headers, raw)  # type: ignore[arg-type]
        except ValueError as error:
            status, document = 400, self.server_of.refused(str(error))
        body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _answer
