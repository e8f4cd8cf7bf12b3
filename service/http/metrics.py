"""Prometheus metrics of one service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

_PLACES = {bound: place for place, bound in enumerate((*LATENCY_BUCKETS, float("inf")))}

Latencies: TypeAlias = tuple[float, ...]
"""How many requests took at most as long as each bound of LATENCY_BUCKETS, and how many there were."""


class Metrics:
    """Counters and gauges of one service, in a registry of their own (several apps may live in one process)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._latency = Histogram(
            "lazydp_request_seconds",
            "Seconds from the request's head to the answer's end.",
            ["route", "method", "status"],
            registry=self.registry,
            buckets=LATENCY_BUCKETS,
        )
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
        self._answers = Counter(
            "lazydp_recommendations", "Answers by what they rest on.", ["model", "source"], registry=self.registry
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
        self._bound: dict[tuple[str, str, int], Histogram] = {}
        self._bound_answers: dict[tuple[str, str], Counter] = {}

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        key = (route, method, status)
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._latency.labels(route, method, str(status))
        bound.observe(seconds)

    def answered(self, model: str, source: str) -> None:
        """Count one answer."""
        key = (model, source)
        bound = self._bound_answers.get(key)
        if bound is None:
            bound = self._bound_answers[key] = self._answers.labels(model, source)
        bound.inc()

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
        found: dict[tuple[str, int], list[float]] = {}
        for metric in self._latency.collect():
            for sample in metric.samples:
                if sample.name.endswith("_bucket"):
                    key = (sample.labels["route"], int(sample.labels["status"]))
                    counts = found.setdefault(key, [0.0] * (len(LATENCY_BUCKETS) + 1))
                    counts[_PLACES[float(sample.labels["le"])]] += sample.value
        return {key: tuple(counts) for key, counts in found.items()}

    def answers(self) -> dict[tuple[str, str], float]:
        """Answers so far, by model and what they rest on."""
        samples = (sample for metric in self._answers.collect() for sample in metric.samples)
        return {
            (sample.labels["model"], sample.labels["source"]): sample.value
            for sample in samples
            if sample.name.endswith("_total")
        }

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
