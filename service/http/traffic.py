"""Requests of the last hour, by minute: what the process' own metrics said at the end of each."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lazydp.service.http.auth import OPEN_PATHS
from lazydp.service.http.metrics import LATENCY_BUCKETS, Latencies, Metrics

MINUTES = 60
_MINUTE_S = 60.0
# What a probe, a collector of metrics or a person with the pages asks says nothing of the traffic.
_NOT_TRAFFIC = OPEN_PATHS | {"/metrics", "/", "/try", "/traffic", "/report", "/docs", "/openapi.json"}
_ASSETS = "/assets/"
_NONE: Latencies = (0.0,) * (len(LATENCY_BUCKETS) + 1)
_FAULT = 500


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of some time.

    Attributes:
        requests: how many.
        refused: answered with 4xx.
        failed: answered with 5xx.
        quantiles: seconds within which half, 95 % and 99 % were answered; None where there were no requests.
    """

    requests: int
    refused: int
    failed: int
    quantiles: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class Hour:
    """The last hour, or as much of it as the process has lived.

    Attributes:
        since: POSIX seconds of the beginning.
        until: of the end.
        minutes: beginning and load of each, oldest first; the last one may be shorter.
        total: of all of it.
        routes: likewise of each route, most requests first.
        answers: (model, what the answers rest on, how many), most first.
    """

    since: float
    until: float
    minutes: tuple[tuple[float, Load], ...]
    total: Load
    routes: tuple[tuple[str, Load], ...]
    answers: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    requests: Mapping[tuple[str, int], Latencies]
    answers: Mapping[tuple[str, str], float]


class Traffic:
    """Keeps what the metrics say at the end of each minute, for an hour."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._samples: deque[_Sample] = deque([self._sample(time.time())], maxlen=MINUTES)

    async def keep(self) -> None:
        """Take a sample every minute, for ever."""
        while True:
            await asyncio.sleep(_MINUTE_S)
            self.take(time.time())

    def take(self, at: float) -> None:
        """Take the sample of the time `at`, POSIX seconds."""
        self._samples.append(self._sample(at))

    def hour(self, now: float) -> Hour:
        """The hour before `now`, POSIX seconds."""
        samples = [sample for sample in self._samples if sample.at > now - MINUTES * _MINUTE_S] or [self._samples[-1]]
        samples.append(self._sample(now))
        first, last = samples[0], samples[-1]
        whole = _between(first, last)
        routes = {route: {key: found for key, found in whole.items() if key[0] == route} for route, _ in whole}
        return Hour(
            since=first.at,
            until=now,
            minutes=tuple((before.at, _load(_between(before, after))) for before, after in itertools.pairwise(samples)),
            total=_load(whole),
            routes=tuple(
                sorted(((route, _load(found)) for route, found in routes.items()), key=lambda row: -row[1].requests)
            ),
            answers=_answers(first, last),
        )

    def _sample(self, at: float) -> _Sample:
        requests = {key: seconds for key, seconds in self._metrics.requests().items() if _is_traffic(key[0])}
        return _Sample(at, requests, self._metrics.answers())


def _is_traffic(route: str) -> bool:
    return route not in _NOT_TRAFFIC and not route.startswith(_ASSETS)


def _between(first: _Sample, last: _Sample) -> dict[tuple[str, int], Latencies]:
    """Requests after one sample and up to another, by route and status; what had none is left out."""
    found = {}
    for key, seconds in last.requests.items():
        before = first.requests.get(key, _NONE)
        if seconds[-1] > before[-1]:
            found[key] = tuple(now - then for now, then in zip(seconds, before, strict=True))
    return found


def _load(found: Mapping[tuple[str, int], Latencies]) -> Load:
    by_class: Counter[int] = Counter()
    for (_, status), seconds in found.items():
        by_class[status // 100] += int(seconds[-1])
    together = tuple(map(sum, zip(*found.values(), strict=True)))
    quantiles = (quantile(together, 0.5), quantile(together, 0.95), quantile(together, 0.99)) if found else None
    return Load(by_class.total(), by_class[4], by_class[_FAULT // 100], quantiles)


def quantile(seconds: Latencies, share: float) -> float:
    """Seconds within which this share of the requests was answered, linear within a bucket; at most the last bound."""
    rank = share * seconds[-1]
    below, bound_below = 0.0, 0.0
    for count, bound in zip(seconds, LATENCY_BUCKETS, strict=False):
        if count >= rank:
            inside = (rank - below) / (count - below) if count > below else 1.0
            return bound_below + inside * (bound - bound_below)
        below, bound_below = count, bound
    return bound_below


def _answers(first: _Sample, last: _Sample) -> tuple[tuple[str, str, int], ...]:
    counts: Iterable[tuple[str, str, int]] = (
        (model, source, int(count - first.answers.get((model, source), 0.0)))
        for (model, source), count in last.answers.items()
    )
    return tuple(sorted((found for found in counts if found[2]), key=lambda found: -found[2]))
