"""The traffic of the last hour is what the metrics counted in it, no more and no less."""

import re
from itertools import pairwise

import httpx
import pytest

from lazydp.service.console.traffic import _latency, _requests
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.traffic import Traffic, quantile

NOW = 1_800_000_000.0
ROUTE = "/v1/recommendations"


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def traffic(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> Traffic:
    monkeypatch.setattr("lazydp.service.http.traffic.time.time", lambda: NOW)
    return Traffic(metrics)


def test_minutes_hold_what_was_asked_in_them(metrics: Metrics, traffic: Traffic) -> None:
    for minute in range(3):
        for _ in range(minute + 1):
            metrics.observe(ROUTE, "POST", 200, 0.003)
        traffic.take(NOW + 60 * (minute + 1))
    metrics.observe(ROUTE, "POST", 503, 0.3)
    metrics.observe("/v1/items/{item_id}/similar", "GET", 404, 0.003)
    metrics.answered("films", "user")
    hour = traffic.hour(NOW + 200)
    assert [(at - NOW, load.requests) for at, load in hour.minutes] == [(0, 1), (60, 2), (120, 3), (180, 2)]
    assert (hour.total.requests, hour.total.refused, hour.total.failed) == (8, 1, 1)
    assert [(route, load.requests) for route, load in hour.routes] == [(ROUTE, 7), ("/v1/items/{item_id}/similar", 1)]
    assert hour.answers == (("films", "user", 1),)


def test_what_was_before_the_hour_is_left_out(metrics: Metrics, traffic: Traffic) -> None:
    for minute in range(200):
        metrics.observe(ROUTE, "POST", 200, 0.003)
        traffic.take(NOW + 60 * (minute + 1))
    hour = traffic.hour(NOW + 60 * 200 + 30)
    assert hour.total.requests == 59
    assert hour.until - hour.since <= 3600
    assert all(after - before == 60 for (before, _), (after, _) in pairwise(hour.minutes))


def test_probes_and_the_pages_themselves_are_no_traffic(metrics: Metrics, traffic: Traffic) -> None:
    for route in ("/readyz", "/metrics", "/", "/try", "/traffic", "/assets/page.css"):
        metrics.observe(route, "GET", 200, 0.1)
    hour = traffic.hour(NOW + 10)
    assert hour.total.requests == 0
    assert hour.total.quantiles is None
    assert hour.routes == ()


def test_quantiles_lie_in_their_bucket(metrics: Metrics, traffic: Traffic) -> None:
    for seconds in [0.0015] * 90 + [0.2] * 10:
        metrics.observe(ROUTE, "POST", 200, seconds)
    found = traffic.hour(NOW + 10).total.quantiles
    assert found is not None
    half, most, nearly_all = found
    assert 0.001 < half < 0.0025
    assert 0.1 < most < nearly_all < 0.25
    assert quantile((0.0,) * 13 + (5.0,), 0.5) == 10.0, "beyond the last bound"


def test_pictures_have_axes_with_names_units_and_ticks(metrics: Metrics, traffic: Traffic) -> None:
    metrics.observe(ROUTE, "POST", 200, 0.003)
    metrics.observe(ROUTE, "POST", 500, 0.003)
    hour = traffic.hour(NOW + 90)
    for drawn, unit in ((_requests(hour), "requests per minute"), (_latency(hour), "milliseconds")):
        assert f">{unit}</text>" in drawn
        assert ">time (UTC)</text>" in drawn
        assert len(re.findall(r'text-anchor="middle">\d\d:\d\d<', drawn)) == 6
    assert "2 together, 2 at most in one minute, 1 that failed" in _requests(hour)


def test_the_page_shows_what_clients_asked(client: httpx.Client) -> None:
    client.post(ROUTE, json={"user_id": "7"})
    page = client.get("/traffic").text
    assert f"<code>{ROUTE}</code>" in page
    assert ">untrained</th>" in page
