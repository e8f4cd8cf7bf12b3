"""Starts the service on a bundle, asks it what a person would ask, and stops it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from lazydp.components.shared.errors import UnavailableError
from lazydp.components.shared.files import PRIVATE_FILE, write_bytes

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_K = 5
_BUDGET = "GET /v1/privacy/budget"


@contextlib.contextmanager
def running_service(bundle: Path, ledger_url: str) -> Iterator[str]:
    """Run `lazydp serve` on a free loopback port; yields its base URL once it is ready.

    Raises:
        UnavailableError: the service ended or was not ready within a minute; its log is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="lazydp-serve-") as folder:
        port_file = Path(folder) / "port"
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "lazydp.pipelines.cli", "serve", "--bundle", str(bundle)]
        command += [*(["--ledger", ledger_url] if ledger_url else []), "--port", "0", "--port-file", str(port_file)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)  # noqa: S603 - our own command
        try:
            yield _wait_until_ready(process, port_file, log)
        finally:
            # No load balancer stands before it, so it need not go on accepting for a while.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port_file: Path, log: Path) -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if port_file.exists() and (port := port_file.read_text().strip()):
            url = f"http://127.0.0.1:{port}"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", timeout=5).status_code == httpx.codes.OK:
                    return url
        time.sleep(0.05)
    tail = log.read_text(errors="replace")[-2000:]
    state = "ended" if process.poll() is not None else f"was not ready within {_START_TIMEOUT_S:.0f} s"
    raise UnavailableError(f"the service {state}; its log ends with:\n{tail}")


@dataclass(frozen=True, slots=True)
class Answers:
    """What the service said.

    Attributes:
        user_id: of the user who was asked about.
        questions: request -> answer, of all that was asked.
    """

    user_id: str
    questions: Mapping[str, dict[str, Any]]

    @property
    def recommendations(self) -> dict[str, Any]:
        """Those of the user: the first that was asked for."""
        return next(iter(self.questions.values()))

    @property
    def budget(self) -> dict[str, Any]:
        """Budget and spending by dataset, and the statement of the served model."""
        return self.questions[_BUDGET]

    def save(self, path: Path) -> None:
        """Write all of them as JSON, for the owner alone: a question holds a person's history."""
        text = json.dumps(self.questions, indent=2, ensure_ascii=False) + "\n"
        write_bytes(path, text.encode(), mode=PRIVATE_FILE)


def ask_service(bundle: Path, ledger_url: str, *, user_id: str, history: list[str]) -> Answers:
    """What a user gets, with the history and without it, and, where counts were released, an unknown user; the budget.

    Where the model reads histories, the user who gives one is asked about first.
    """
    manifest = json.loads((bundle / "manifest.json").read_text())
    queries: list[dict[str, Any]] = [{"user_id": user_id, "history": history, "k": _K, "exclude_seen": True}]
    if manifest["privacy"].get("popularity"):
        queries.append({"k": _K})
    bodies: dict[str, dict[str, Any] | None] = {f"POST /v1/recommendations {json.dumps(one)}": one for one in queries}
    alone: dict[str, dict[str, Any] | None] = {f"GET /v1/users/{quote(user_id, safe='')}/recommendations?k={_K}": None}
    bodies = bodies | alone if manifest["features"].get("history") else alone | bodies
    bodies[_BUDGET] = None
    answers = {}
    with running_service(bundle, ledger_url) as url, httpx.Client(base_url=url, timeout=30) as client:
        for question, body in bodies.items():
            method, path = question.split(" ")[:2]
            answer = client.request(method, path, json=body)
            answer.raise_for_status()
            answers[question] = answer.json()
    return Answers(user_id, answers)
