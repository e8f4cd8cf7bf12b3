"""Spans name routes and statuses, and nobody."""

import sys
from pathlib import Path
from typing import Any

import pytest

from lazydp.components.shared.errors import UnavailableError
from lazydp.service.app import create_app
from lazydp.service.http.tracing import Tracing
from lazydp.service.settings import load_settings

pytest.importorskip("opentelemetry.sdk", reason="the extra lazydp[otel] is not installed")

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def spans(start: Any, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The spans of four requests, in an environment that asks the framework for spans of its own."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with start(bundles["towers"], tracing=Tracing(provider)) as client:
        client.post("/v1/recommendations", json={"user_id": "kilroy", "history": ["kilroy"]})
        client.get("/v1/users/kilroy/recommendations", params={"k": "kilroy"})
        client.get("/kilroy")
        client.get("/v1/models", headers={"traceparent": f"00-{CALLER}-00f067aa0ba902b7-01", "x-api-key": "kilroy"})
    return list(exporter.get_finished_spans())


def test_one_span_a_request_and_nothing_of_a_user(spans: list[Any]) -> None:
    assert [span.name for span in spans] == [
        "POST /v1/recommendations",
        "GET /v1/users/{user_id}/recommendations",
        "any unmatched",
        "GET /v1/models",
    ]
    assert [span.attributes["http.response.status_code"] for span in spans] == [404, 422, 404, 200]
    assert "kilroy" not in "".join(span.to_json() for span in spans)


def test_a_span_continues_the_callers_trace(spans: list[Any]) -> None:
    assert f"{spans[-1].context.trace_id:032x}" == CALLER
    assert f"{spans[0].context.trace_id:032x}" != CALLER


def test_without_the_library_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch, bundles: dict[str, Path]) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UnavailableError, match=r"lazydp\[otel\]"):
        create_app(load_settings(bundles=(bundles["towers"],), tracing=True))
