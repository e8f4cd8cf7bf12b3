"""Clients that ask a service all the time, and what they see while its versions are swapped or it starts anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx
import pytest


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds; within a minute it must."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def point(link: Path, target: str | Path) -> None:
    """Make `link` point at `target` in one step."""
    fresh = link.with_name(link.name + ".new")
    fresh.symlink_to(target)
    fresh.replace(link)


class Load:
    """Clients in threads of their own; a context.

    They check that each answer comes from one whole version: each version answers a user alike, every time.

    Args:
        url: of the service.
        retrying: ask again when a connection fails, as any client behind a load balancer does; otherwise that is a
            failure.
        clients: how many.

    Attributes:
        answers: items and scores by version and user.
        count: right answers.
        retried: connections that failed, of clients that retry.
        failures: what was wrong.
    """

    def __init__(self, url: str, *, retrying: bool = False, clients: int = 3) -> None:
        self.answers: dict[tuple[str, str], Any] = {}
        self.count = 0
        self.retried = 0
        self.failures: list[str] = []
        self._url = url
        self._retrying = retrying
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def until(self, count: int) -> None:
        """Wait for so many answers."""
        eventually(lambda: self.count >= count)

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            user = 0
            while not self._stop.is_set():
                user = (user + 1) % 20
                try:
                    response = client.post("/v1/recommendations", json={"user_id": user, "k": 5})
                except httpx.TransportError as error:
                    if self._retrying:
                        self.retried += 1
                        time.sleep(0.05)
                    else:
                        self.failures.append(repr(error))
                    continue
                self._check(str(user), response)

    def _check(self, user: str, response: httpx.Response) -> None:
        if response.status_code != httpx.codes.OK or len(response.json()["items"]) != 5:
            self.failures.append(response.text)
            return
        answer = response.json()
        key = (answer["model"]["version"], user)
        # Queries that share a matrix product differ from lone ones in the last bit of a score.
        items = [(item["id"], pytest.approx(item["score"], rel=1e-5)) for item in answer["items"]]
        with self._lock:
            self.count += 1
            plain = [(item["id"], item["score"]) for item in answer["items"]]
            if self.answers.setdefault(key, plain) != items:
                self.failures.append(f"two answers of {key}")
