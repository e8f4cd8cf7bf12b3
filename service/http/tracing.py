"""OpenTelemetry spans, where they are asked for: one a request, with route, method and status, and nothing of a user.

The framework's own telemetry stays off, because its spans hold paths, and paths hold ids of users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazydp.components.shared.errors import UnavailableError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span


class Tracing:
    """Makes the spans of one service."""

    def __init__(self, provider: TracerProvider | None = None) -> None:
        """Send spans to `provider`, or else where the OTEL_* variables say (OTLP over HTTP).

        Raises:
            UnavailableError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import propagate, trace  # noqa: PLC0415 - an extra

            self._provider = provider or _exporting()
        except ModuleNotFoundError:
            raise UnavailableError(
                "setting tracing: OpenTelemetry is not installed: pip install 'lazydp[otel]'"
            ) from None
        self._tracer = self._provider.get_tracer("lazydp.service")
        self._extract = propagate.extract
        self._server = trace.SpanKind.SERVER
        self._error = trace.StatusCode.ERROR

    def begin(self, headers: dict[bytes, bytes]) -> Span:
        """Begin the span of a request, under the caller's where `traceparent` names one."""
        carrier = {
            name: headers[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in headers
        }
        return self._tracer.start_span("request", self._extract(carrier), kind=self._server)

    def end(self, span: Span, *, route: str, method: str, status: int) -> None:
        """End a span; `route` is a template, not a path."""
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.set_status(self._error)
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _exporting() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
