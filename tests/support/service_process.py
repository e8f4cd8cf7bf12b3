"""`lazydp serve` as a process of its own, that can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import httpx

from support.forks import LAZYDP, NOWHERE, Fork
from support.service_load import eventually


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


class Process:
    """`lazydp serve` as a process of its own, always on the same port."""

    def __init__(self, bundle: Path, **settings: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._command = ["serve", "--bundle", str(bundle), "--port", str(self.port), "--allow-test-key"]
        named = {f"LAZYDP_SERVE_{name.upper()}": str(value) for name, value in {"drain_delay_s": 0, **settings}.items()}
        self._environment = {**os.environ, "LAZYDP_SERVE_ACCESS_LOG": "false", **named}
        self.start()

    def start(self) -> None:
        self.process = Fork(LAZYDP, *self._command, environment=self._environment, output=(NOWHERE, NOWHERE))

    def wait_until_ready(self) -> None:
        eventually(self.is_ready)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the service did not start"
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def version(self) -> str:
        found: str = httpx.get(f"{self.url}/v1/models").json()["models"][0]["version"]
        return found
