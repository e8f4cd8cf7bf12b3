"""Whether the service lives, takes requests, and how it fares."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from lazydp.service import schemas
from lazydp.service.routes.deps import InContext, json_response
from lazydp.service.routes.privacy import ledger_overview, ledger_problems
from lazydp.service.serving.context import Context

router = APIRouter(tags=["operations"])

_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": schemas.Health, "description": "No model is loaded, or the service is about to stop."}
}


@router.get("/healthz", response_model=schemas.Health, summary="Whether the process lives")
async def healthz() -> Response:
    """Always 200: a process that answers lives."""
    return json_response(b'{"status":"ok","models":[]}')


@router.get("/readyz", response_model=schemas.Health, responses=_NOT_READY, summary="Whether to send requests here")
async def readyz(context: InContext) -> Response:
    """200 with the served versions once a model is loaded and warm; 503 before that and while draining.

    A ledger that is older than a model is told, as it was found last; models are served all the same.
    """
    context.budget.refresh()
    health = readiness(context)
    response = json_response(health.model_dump_json().encode())
    response.status_code = 200 if health.status == "ok" else 503
    response.headers["cache-control"] = "no-store"
    return response


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}}, "description": "The Prometheus exposition format."}},
    summary="Prometheus metrics",
)
async def metrics(context: InContext) -> Response:
    """Latency by route, requests in flight, versions and epsilon of the served models, epsilon spent by dataset."""
    await ledger_overview(context)
    return Response(context.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def readiness(context: Context) -> schemas.Health:
    """What /readyz says."""
    if context.draining:
        return schemas.Health(status="draining")
    models = [schemas.ModelVersion(name=served.name, version=served.version) for served in context.registry.versions()]
    return schemas.Health(
        status="ok" if models else "not ready",
        models=models,
        background=dict(context.background.states),
        ledger=ledger_problems(context),
    )
