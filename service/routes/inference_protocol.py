"""The Open Inference Protocol over HTTP, with its extensions for binary tensors, repository and statistics."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, TypeAdapter
from starlette.responses import Response

from lazydp.service.http.problems import Problem
from lazydp.service.http.request_body import Parsed, decoded, describe, parse_bytes
from lazydp.service.inference import metadata, repository, rest
from lazydp.service.inference.infer import Answer, Transport
from lazydp.service.inference.infer import infer as answer_call
from lazydp.service.inference.rest import InferResponse
from lazydp.service.routes.deps import InContext, json_response

router = APIRouter(tags=["open inference protocol"])

Name = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="name of a model", examples=["ml-100k"])
]
Version = Annotated[
    str,
    Path(min_length=1, max_length=64, description="version of a model: the one served", examples=["3f2a9c51d0e7"]),
]
_BYTES = "application/octet-stream"
_SERVED = "/v2/models/{name}"
_OF_VERSION = "/v2/models/{name}/versions/{version}"
_INDEX = TypeAdapter(repository.IndexRequest)
_CHANGE = TypeAdapter(repository.ChangeRequest)


class Live(BaseModel):
    """Open Inference Protocol: whether the server lives."""

    live: bool


class Ready(BaseModel):
    """Open Inference Protocol: whether the server is ready."""

    ready: bool


class ModelReady(BaseModel):
    """Open Inference Protocol: whether a model is ready."""

    name: str
    ready: bool


@router.get("/v2/health/live", response_model=Live, summary="Server live")
async def live() -> Response:
    """Always true."""
    return json_response(b'{"live":true}')


@router.get(
    "/v2/health/ready",
    response_model=Ready,
    responses={503: {"model": Ready, "description": "Not ready."}},
    summary="Server ready",
)
async def ready(context: InContext) -> Response:
    """True once a model is loaded, until the service drains."""
    is_ready = context.registry.ready and not context.draining
    response = json_response(b'{"ready":true}' if is_ready else b'{"ready":false}')
    response.status_code = 200 if is_ready else 503
    return response


@router.get("/v2/", response_model=metadata.ServerMetadata, include_in_schema=False)
@router.get("/v2", response_model=metadata.ServerMetadata, summary="Server metadata")
async def server() -> metadata.ServerMetadata:
    """Name, version and extensions."""
    return metadata.server_metadata()


# Before the paths of one model: a model called `stats` is asked for by its version.
@router.get("/v2/models/stats", response_model=metadata.ServerStatistics, summary="Statistics of every model")
async def statistics(context: InContext) -> metadata.ServerStatistics:
    """Inference calls of every served version since it was loaded."""
    return metadata.ServerStatistics(
        model_stats=[metadata.statistics(version) for version in context.registry.versions()]
    )


@router.get(_SERVED, response_model=metadata.ModelMetadata, summary="Model metadata")
async def model(context: InContext, name: Name) -> metadata.ModelMetadata:
    """Inputs and outputs of a model."""
    return metadata.model_metadata(name, context.served(name), versions=context.versions(name))


@router.get(_OF_VERSION, response_model=metadata.ModelMetadata, summary="Metadata of a version")
async def model_of_version(context: InContext, name: Name, version: Version) -> metadata.ModelMetadata:
    """Inputs and outputs of a model; 404 where another version is served."""
    return metadata.model_metadata(name, context.served(name, version))


@router.get(f"{_SERVED}/ready", response_model=ModelReady, summary="Model ready")
async def model_ready(context: InContext, name: Name) -> ModelReady:
    """True for a served model; 404 for another."""
    context.served(name)
    return ModelReady(name=name, ready=True)


@router.get(f"{_OF_VERSION}/ready", response_model=ModelReady, summary="Version ready")
async def version_ready(context: InContext, name: Name, version: Version) -> ModelReady:
    """True for the served version of a model; 404 for another."""
    context.served(name, version)
    return ModelReady(name=name, ready=True)


@router.get(f"{_SERVED}/config", response_model=metadata.ModelConfig, summary="Model configuration")
async def config(context: InContext, name: Name) -> metadata.ModelConfig:
    """The model as the configuration extension describes one."""
    return metadata.model_config(name, context.served(name))


@router.get(f"{_OF_VERSION}/config", response_model=metadata.ModelConfig, summary="Configuration of a version")
async def config_of_version(context: InContext, name: Name, version: Version) -> metadata.ModelConfig:
    """The model as the configuration extension describes one; 404 where another version is served."""
    return metadata.model_config(name, context.served(name, version))


@router.get(f"{_SERVED}/stats", response_model=metadata.ServerStatistics, summary="Statistics of a model")
async def model_statistics(context: InContext, name: Name) -> metadata.ServerStatistics:
    """Inference calls of the served version of a model since it was loaded."""
    return metadata.ServerStatistics(model_stats=[metadata.statistics(context.served(name))])


@router.get(f"{_OF_VERSION}/stats", response_model=metadata.ServerStatistics, summary="Statistics of a version")
async def version_statistics(context: InContext, name: Name, version: Version) -> metadata.ServerStatistics:
    """Inference calls of a version since it was loaded; 404 where another version is served."""
    return metadata.ServerStatistics(model_stats=[metadata.statistics(context.served(name, version))])


@router.post(
    f"{_SERVED}/infer",
    response_model=InferResponse,
    openapi_extra=describe("InferRequest"),
    summary="Recommend for rows of users and histories",
)
async def infer(request: Request, context: InContext, name: Name) -> Response:
    """`user_id`, `history`, features, or any of them together; B rows of k items, best first.

    Tensors may follow the JSON as bytes, and the answer's too (the protocol's binary extension).
    """
    return await _infer(request, context, name, None)


@router.post(
    f"{_OF_VERSION}/infer",
    response_model=InferResponse,
    openapi_extra=describe("InferRequest"),
    summary="Recommend with a version",
)
async def infer_with_version(request: Request, context: InContext, name: Name, version: Version) -> Response:
    """As without a version; 404 where another version is served."""
    return await _infer(request, context, name, version)


async def _infer(request: Request, context: InContext, name: str, version: str | None) -> Response:
    headers = dict(request.scope["headers"])
    _check_media_type(headers)
    body = decoded(headers, await request.body(), max_bytes=context.settings.max_body_bytes)

    def write(answer: Answer) -> Response:
        content, length = rest.write(
            model=name, version=answer.served.version, call_id=answer.call_id, outputs=answer.outputs
        )
        if length is None:
            return json_response(content)
        return Response(content, media_type=_BYTES, headers={rest.HEADER.decode(): str(length)})

    return await answer_call(context, name, version, Transport(lambda: rest.read(headers, body), write))


async def _optional(request: Request, context: InContext, adapter: TypeAdapter[Parsed]) -> Parsed:
    """The body of a request that may have none."""
    headers = dict(request.scope["headers"])
    _check_media_type(headers)
    body = decoded(headers, await request.body(), max_bytes=context.settings.max_body_bytes)
    return parse_bytes(body.strip() or b"{}", adapter)


def _check_media_type(headers: dict[bytes, bytes]) -> None:
    """Clients of the protocol send JSON, JSON with bytes behind it, or do not say what they send."""
    given = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if given not in ("", "application/json", _BYTES) and not given.endswith("+json"):
        raise Problem(415, "not-json", f"send the body as application/json, or {_BYTES} where tensors follow the JSON")


@router.post(
    "/v2/repository/index",
    response_model=list[repository.RepositoryModel],
    openapi_extra=describe("IndexRequest", required=False),
    summary="Models of the repository",
)
async def index(request: Request, context: InContext) -> list[repository.RepositoryModel]:
    """Models being served, and bundles of the repository that could be; with `ready` the first alone."""
    return repository.index(context, ready=(await _optional(request, context, _INDEX)).ready)


@router.post(
    "/v2/repository/models/{name}/load",
    response_model=repository.LoadedModel,
    openapi_extra=describe("ChangeRequest", required=False),
    summary="Bring in a version of a model",
)
async def load(request: Request, context: InContext, name: Name) -> repository.LoadedModel:
    """Load what the repository holds under `name`, or else what the configured path of the model points at now.

    Requests go on being answered by the version before until the new one is checked and warm; a bundle that is
    refused (422) leaves it in place.
    """
    await _optional(request, context, _CHANGE)
    return await repository.load(context, name)


@router.post(
    "/v2/repository/models/{name}/unload",
    response_model=repository.LoadedModel,
    responses={409: {"description": "The default model stays."}},
    openapi_extra=describe("ChangeRequest", required=False),
    summary="Serve a model no more",
)
async def unload(request: Request, context: InContext, name: Name) -> repository.LoadedModel:
    """Take a model out; the default one stays."""
    await _optional(request, context, _CHANGE)
    return await repository.unload(context, name)
