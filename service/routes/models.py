"""Which models are served, and in which versions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from lazydp.service import schemas
from lazydp.service.routes.deps import InContext, tagged_document
from lazydp.service.serving.context import Context
from lazydp.service.serving.served_version import ServedVersion

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=schemas.Models, summary="Models and the versions served")
async def models(request: Request, context: InContext) -> Response:
    """Every model that the service holds, its version, and what it costs in privacy."""
    document = schemas.Models(models=[_describe(context, served) for served in context.registry.versions()])
    return await tagged_document(request, document.model_dump_json().encode(), cache_control="private, no-cache")


def _describe(context: Context, served: ServedVersion) -> schemas.ServedModel:
    bundle = served.bundle
    return schemas.ServedModel(
        name=served.name,
        version=served.version,
        served=served.name == context.registry.default,
        kind=bundle.model.config.kind,
        num_items=served.scorer.num_items,
        dim=bundle.model.config.embedding_dim,
        index=served.scorer.index,
        recall=served.scorer.recall,
        attributes=list(served.scorer.items.attributes),
        features=list(served.scorer.encoder.features),
        private=bundle.statement.private,
        epsilon=bundle.statement.epsilon,
        delta=bundle.statement.delta,
        run_id=bundle.manifest.lineage.run_id,
        loaded=served.loaded,
        refused=context.registry.refused(served.name),
    )
