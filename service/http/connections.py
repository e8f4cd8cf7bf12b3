"""All connections of a service: how many there may be, whose they are, and what they have not delivered yet."""

from __future__ import annotations

import resource
from asyncio import AbstractEventLoop
from collections import Counter
from typing import Literal, Protocol, TypeAlias

import structlog

from lazydp.service.http.metrics import Metrics
from lazydp.service.settings import Settings

# Connections beyond the limits that may ask for nothing but health; one address gets half of them.
_RESERVE = 16
# File descriptors that bundles, ledgers and logs need.
_OTHER_FILES = 64
_LEAST = 8
# Seconds between two log lines on connections that were refused.
_LOG_EVERY_S = 10.0
_log = structlog.get_logger("lazydp.service")

Admission: TypeAlias = Literal["all", "health", "none"]


class Held(Protocol):
    """What is counted here."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that wait for the reader."""


class Connections:
    """What the connections of one service share. Lives on its event loop.

    Attributes:
        most: connections that may ask for anything.
        most_of_one: as many of one address.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.most = max(_LEAST, min(settings.max_connections, _file_limit() - _OTHER_FILES - _RESERVE))
        self.most_of_one = min(self.most, settings.max_connections_per_address or max(1, self.most // 2))
        self._metrics = metrics
        # By address: those that may ask for anything, and those that may ask for health only.
        self._places: Counter[str] = Counter()
        self._reserve: Counter[str] = Counter()
        self._open: dict[Held, tuple[Counter[str], str]] = {}
        self._paused: set[Held] = set()
        self._refused = 0
        self._next_log = 0.0
        metrics.connections.set_function(lambda: len(self._open))

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that wait for slow readers."""
        return sum(connection.unsent_bytes for connection in self._paused)

    @property
    def slow_readers(self) -> int:
        """Connections whose answer waits to be read."""
        return len(self._paused)

    def opened(self, connection: Held, address: str, loop: AbstractEventLoop) -> Admission:
        """Count a connection in, and say what it may ask for; where that is nothing, it is not counted."""
        places = self._places
        if places.total() < self.most and places[address] < self.most_of_one:
            admission: Admission = "all"
        elif self._reserve.total() < _RESERVE and self._reserve[address] < _RESERVE // 2:
            admission, places = "health", self._reserve
        else:
            self.refused("crowded", loop)
            return "none"
        places[address] += 1
        self._open[connection] = (places, address)
        return admission

    def closed(self, connection: Held) -> None:
        """Count a connection out."""
        places, address = self._open.pop(connection)
        places[address] -= 1
        if not places[address]:
            del places[address]
        self._paused.discard(connection)

    def paused(self, connection: Held) -> None:
        """The answer of a connection waits for its reader."""
        self._paused.add(connection)

    def resumed(self, connection: Held) -> None:
        """The reader has caught up."""
        self._paused.discard(connection)

    def refused(self, reason: str, loop: AbstractEventLoop) -> None:
        """Count a connection that was refused or cut, and log it now and then."""
        self._metrics.cut.labels(reason).inc()
        self._refused += 1
        if loop.time() >= self._next_log:
            _log.warning("connections refused or cut", count=self._refused, latest=reason, open=len(self._open))
            self._next_log = loop.time() + _LOG_EVERY_S
            self._refused = 0


def _file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_file_limit(wanted: int) -> None:
    """Allow as many open files as `wanted` connections need, where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVE + _OTHER_FILES
    if soft < needed:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
