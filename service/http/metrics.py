"""Prometheus metrics of one service."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

Latencies: TypeAlias = tuple[float, ...]
"""How many requests took at most as long as each bound of LATENCY_BUCKETS, and how many there were."""


class _Requests(Collector):
    """Seconds of requests by route, method and status, as a histogram.

    Written on the event loop only, so that no lock is needed: those of prometheus_client and its search for a bucket
    cost several times what counting does.
    """

    _SUM = len(LATENCY_BUCKETS) + 1

    def __init__(self) -> None:
        # How many requests fell in each bucket, the last of which has no bound; then the sum of their seconds.
        self._found: dict[tuple[str, str, int], list[float]] = {}

    def observe(self, key: tuple[str, str, int], seconds: float) -> None:
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = [0.0] * (self._SUM + 1)
        found[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        found[self._SUM] += seconds

    def by_route(self) -> dict[tuple[str, int], Latencies]:
        """Requests of every method, by route and status."""
        together: dict[tuple[str, int], Latencies] = {}
        for (route, _, status), found in list(self._found.items()):
            counts = tuple(accumulate(found[: self._SUM]))
            before = together.get((route, status), (0.0,) * self._SUM)
            together[route, status] = tuple(map(sum, zip(before, counts, strict=True)))
        return together

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(
            "lazydp_request_seconds",
            "Seconds from the request's head to the answer's end.",
            labels=["route", "method", "status"],
        )
        bounds = [*(str(bound) for bound in LATENCY_BUCKETS), "+Inf"]
        for (route, method, status), found in list(self._found.items()):
            counts = accumulate(found[: self._SUM])
            buckets = list(zip(bounds, counts, strict=True))
            family.add_metric([route, method, str(status)], buckets, found[self._SUM])
        yield family


class _Answers(Collector):
    """How many answers there were, by model and what they rest on; written on the event loop only."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], float] = {}

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "lazydp_recommendations", "Answers by what they rest on.", labels=["model", "source"]
        )
        for key, count in list(self.found.items()):
            family.add_metric(key, count)
        yield family


class Metrics:
    """Counters and gauges of one service, in a registry of their own (several apps may live in one process)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = _Requests()
        self.registry.register(self._requests)
        self._answers = _Answers()
        self.registry.register(self._answers)
        self.in_flight = Gauge("lazydp_requests_in_flight", "Requests under way.", registry=self.registry)
        self.connections = Gauge("lazydp_connections", "Open connections.", registry=self.registry)
        self.cut = Counter(
            "lazydp_connections_cut", "Connections that were refused or cut off.", ["reason"], registry=self.registry
        )
        self.background = Counter(
            "lazydp_background_restarts",
            "Background tasks that ended and were started again.",
            ["task"],
            registry=self.registry,
        )
        self._model = Gauge(
            "lazydp_model_info",
            "1 for the version of a model that is served.",
            ["model", "version"],
            registry=self.registry,
        )
        self._epsilon = Gauge(
            "lazydp_model_epsilon",
            "Epsilon of the served model's privacy statement (NaN: no privacy is claimed).",
            ["model"],
            registry=self.registry,
        )
        self._spent = Gauge(
            "lazydp_dataset_epsilon_spent",
            "Epsilon spent on a dataset, by the ledger when it last answered.",
            ["dataset"],
            registry=self.registry,
        )
        self._ledger = Gauge(
            "lazydp_ledger_up", "Whether the ledger answers; 0 without one as well.", registry=self.registry
        )
        self.swaps = Counter(
            "lazydp_model_swaps", "Versions brought in or refused.", ["model", "outcome"], registry=self.registry
        )
        self.shadow = Counter(
            "lazydp_shadow", "Copies of requests for a shadow version.", ["model", "outcome"], registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.observe((route, method, status), seconds)

    def answered(self, model: str, source: str) -> None:
        """Count one answer."""
        found = self._answers.found
        found[model, source] = found.get((model, source), 0.0) + 1.0

    def serving(self, model: str, version: str, epsilon: float | None, *, before: str | None) -> None:
        """Note which version of a model is served."""
        if before is not None and before != version:
            self._model.remove(model, before)
        self._model.labels(model, version).set(1)
        self._epsilon.labels(model).set(float("nan") if epsilon is None else epsilon)

    def spending(self, spent: Mapping[str, float | None] | None) -> None:
        """Note epsilon spent by dataset, None where no privacy is claimed; None altogether: the ledger is silent."""
        self._ledger.set(spent is not None)
        for dataset, epsilon in (spent or {}).items():
            self._spent.labels(dataset).set(float("nan") if epsilon is None else epsilon)

    def gone(self, model: str, version: str) -> None:
        """Note that a model is served no more."""
        self._model.remove(model, version)
        self._epsilon.remove(model)

    def requests(self) -> dict[tuple[str, int], Latencies]:
        """Seconds of all requests so far, by route and status."""
        return self._requests.by_route()

    def answers(self) -> dict[tuple[str, str], float]:
        """Answers so far, by model and what they rest on."""
        return dict(self._answers.found)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
