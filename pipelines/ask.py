"""Starts the service on a bundle, asks it what a person would ask, shows the answers, and stops it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from lazydp.components.shared.errors import UnavailableError

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0


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


def ask_service(bundle: Path, ledger_url: str, *, user_id: str, history: list[str], console: Console) -> None:
    """Ask what a user, a history and (where counts were released) an unknown user gets, and for the budget."""
    with running_service(bundle, ledger_url) as url, httpx.Client(base_url=url, timeout=30) as client:
        console.rule("the service answers")
        questions: list[tuple[str, str, dict[str, Any] | None]] = [
            (f"GET /v1/users/{user_id}/recommendations?k=5", f"/v1/users/{user_id}/recommendations?k=5", None),
            (
                f"POST /v1/recommendations {json.dumps({'history': history, 'k': 5, 'exclude_seen': True})}",
                "/v1/recommendations",
                {"history": history, "k": 5, "exclude_seen": True},
            ),
        ]
        if json.loads((bundle / "manifest.json").read_text())["privacy"].get("popularity"):
            questions.append(
                (f"POST /v1/recommendations {json.dumps({'k': 5})} (the most popular)", "/v1/recommendations", {"k": 5})
            )
        for title, path, body in questions:
            answer = client.get(path) if body is None else client.post(path, json=body)
            answer.raise_for_status()
            console.print(_recommendations(title, answer.json()))
        budget = client.get("/v1/privacy/budget")
        budget.raise_for_status()
        console.print("[bold]GET /v1/privacy/budget[/bold]")
        console.print_json(budget.text)


def _recommendations(title: str, answer: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("rank", "item", "title", "score"):
        table.add_column(column, justify="right" if column in {"rank", "score"} else "left")
    for rank, item in enumerate(answer["items"], start=1):
        table.add_row(str(rank), str(item["id"]), str(item.get("title") or ""), f"{item['score']:.4f}")
    return table
