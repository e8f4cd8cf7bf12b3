"""The Open Inference Protocol with its repository extension."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from starlette.responses import Response

from lazydp.components.bundle.query import Query, Ranking
from lazydp.components.shared.errors import InputError, LazyDPError, UnavailableError
from lazydp.service import schemas
from lazydp.service.http.problems import Problem, unprocessable
from lazydp.service.routes.deps import InContext, json_response
from lazydp.service.routes.request_body import describe, parse
from lazydp.service.serving.served_version import ServedVersion

router = APIRouter(tags=["open inference protocol"])

Name = Annotated[
    str, Path(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="name of a model", examples=["ml-100k"])
]
_PLATFORM = "lazydp"


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


class ServerMetadata(BaseModel):
    """Open Inference Protocol: the server."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """Open Inference Protocol: one input or output; -1 stands for any extent."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """Open Inference Protocol: a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InferInput(BaseModel):
    """Open Inference Protocol: one input tensor. `user_id` [B] or [B, 1]; `history` [B, H], "" fills short rows."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: Literal["user_id", "history"]
    shape: Annotated[list[schemas.Extent], Field(min_length=1, max_length=2)]
    datatype: Literal["BYTES", "INT64"]
    data: Annotated[list[Any], Field(max_length=schemas.MAX_BATCH * schemas.MAX_HISTORY)]


class InferParameters(BaseModel):
    """Parameters of a request: `k` items for each row."""

    model_config = ConfigDict(extra="ignore", strict=True)

    k: schemas.Count = schemas.DEFAULT_K


class InferRequest(BaseModel):
    """Open Inference Protocol: a request of B rows."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "inputs": [{"name": "user_id", "shape": [2], "datatype": "BYTES", "data": ["196", "22"]}],
                    "parameters": {"k": 5},
                }
            ]
        },
    )

    id: Annotated[str, Field(max_length=256)] | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1, max_length=2)]
    parameters: InferParameters = InferParameters()


class InferOutput(BaseModel):
    """Open Inference Protocol: one output tensor."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class InferResponse(BaseModel):
    """Open Inference Protocol: `item_id` and `score`, [B, k]; rows with fewer items end in "" and the lowest float."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[InferOutput]


class RepositoryModel(BaseModel):
    """Open Inference Protocol, repository extension: one model."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class LoadedModel(BaseModel):
    """What POST /v2/repository/models/{name}/load brought in, or .../unload took out."""

    name: str
    version: str
    durable: bool = Field(description="whether it holds after a restart too; otherwise set state_file")


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


@router.get("/v2", response_model=ServerMetadata, summary="Server metadata")
async def server() -> ServerMetadata:
    """Name, version and extensions."""
    return ServerMetadata(name="lazydp", version=importlib.metadata.version("lazydp"), extensions=["model_repository"])


@router.get("/v2/models/{name}", response_model=ModelMetadata, summary="Model metadata")
async def model(context: InContext, name: Name) -> ModelMetadata:
    """Inputs and outputs of a model."""
    served = context.served(name)
    return ModelMetadata(
        name=served.name,
        versions=[served.version],
        platform=_PLATFORM,
        inputs=[
            TensorMetadata(name="user_id", datatype="BYTES", shape=[-1]),
            TensorMetadata(name="history", datatype="BYTES", shape=[-1, -1]),
        ],
        outputs=[
            TensorMetadata(name="item_id", datatype="BYTES", shape=[-1, -1]),
            TensorMetadata(name="score", datatype="FP32", shape=[-1, -1]),
        ],
    )


@router.get("/v2/models/{name}/ready", response_model=ModelReady, summary="Model ready")
async def model_ready(context: InContext, name: Name) -> ModelReady:
    """True for a served model; 404 for another."""
    return ModelReady(name=context.served(name).name, ready=True)


_INFER = TypeAdapter(InferRequest)
_LOWEST = -3.4028234663852886e38


@router.post(
    "/v2/models/{name}/infer",
    response_model=InferResponse,
    openapi_extra=describe("InferRequest"),
    summary="Recommend for rows of users and histories",
)
async def infer(request: Request, context: InContext, name: Name) -> Response:
    """`user_id`, `history` or both; B rows of k items, best first."""
    ranker = context.ranker(name)
    asked = await parse(request, _INFER)
    queries = _queries(asked)
    try:
        rankings = await ranker.rank_all(queries)
    except InputError as error:
        raise unprocessable([("/inputs", str(error))]) from None
    return json_response(orjson.dumps(_outputs(ranker.served, asked, rankings)))


def _queries(asked: InferRequest) -> list[Query]:
    columns: dict[str, list[list[str]]] = {}
    for number, tensor in enumerate(asked.inputs):
        rows, width = tensor.shape[0], tensor.shape[1] if len(tensor.shape) == 2 else 1
        flat = tensor.data
        while flat and isinstance(flat[0], list):
            flat = [value for row in flat for value in (row if isinstance(row, list) else [row])]
        if len(flat) != rows * width:
            raise unprocessable([(f"/inputs/{number}/data", f"expected {rows * width} values, found {len(flat)}")])
        if not all(
            isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)) for value in flat
        ):
            raise unprocessable([(f"/inputs/{number}/data", "expected text or integers")])
        if tensor.name in columns or (tensor.name == "user_id" and width != 1):
            raise unprocessable([(f"/inputs/{number}", "user_id has one value a row, and each input comes once")])
        texts = [str(value)[:256] for value in flat]
        columns[tensor.name] = [texts[row * width : (row + 1) * width] for row in range(rows)]
    sizes = {len(rows) for rows in columns.values()}
    if len(sizes) != 1 or not 1 <= max(sizes) <= schemas.MAX_BATCH:
        raise unprocessable([("/inputs", f"expected equally many rows of every input, 1 to {schemas.MAX_BATCH}")])
    users = columns.get("user_id", [[""]] * max(sizes))
    histories = columns.get("history", [[]] * max(sizes))
    return [
        Query(user_id=user[0] or None, history=[item for item in history if item], k=asked.parameters.k)
        for user, history in zip(users, histories, strict=True)
    ]


def _outputs(served: ServedVersion, asked: InferRequest, rankings: list[Ranking]) -> dict[str, Any]:
    k = asked.parameters.k
    ids, scores = [], []
    for ranking in rankings:
        fill = k - len(ranking.codes)
        ids += [served.scorer.items.ids[code - 1] for code in ranking.codes] + [""] * fill
        scores += ranking.scores.tolist() + [_LOWEST] * fill
    shape = [len(rankings), k]
    return {
        "model_name": served.name,
        "model_version": served.version,
        **({"id": asked.id} if asked.id is not None else {}),
        "outputs": [
            {"name": "item_id", "shape": shape, "datatype": "BYTES", "data": ids},
            {"name": "score", "shape": shape, "datatype": "FP32", "data": scores},
        ],
    }


@router.post(
    "/v2/repository/index",
    response_model=list[RepositoryModel],
    summary="Models of the repository",
)
async def index(context: InContext) -> list[RepositoryModel]:
    """Models being served, and bundles of the repository that could be."""
    served = {version.name: version for version in context.registry.versions()}
    found = [
        RepositoryModel(name=name, version=version.version, state="READY", reason=context.registry.refused(name) or "")
        for name, version in served.items()
    ]
    found += [
        RepositoryModel(name=name, version=version, state="UNAVAILABLE", reason="not loaded")
        for name, version in context.registry.repository_names()
        if name not in served
    ]
    return found


@router.post(
    "/v2/repository/models/{name}/load",
    response_model=LoadedModel,
    summary="Bring in a version of a model",
)
async def load(context: InContext, name: Name) -> LoadedModel:
    """Load what the repository holds under `name`, or else what the configured path of the model points at now.

    Requests go on being answered by the version before until the new one is checked and warm; a bundle that is
    refused (422) leaves it in place.
    """
    paths = context.registry.paths(name)
    path = context.registry.in_repository(name) or (paths[0] if paths else None)
    if path is None:
        raise Problem(404, "unknown-model", "neither the repository nor the configuration has a model of this name")
    try:
        fresh = await context.registry.load(path, expected_name=name)
    except UnavailableError as error:
        raise Problem(503, "not-remembered", str(error), headers={"retry-after": "1"}) from None
    except LazyDPError as error:
        raise Problem(422, "bundle-refused", str(error)) from None
    return LoadedModel(name=fresh.name, version=fresh.version, durable=context.registry.remembers(path))


@router.post(
    "/v2/repository/models/{name}/unload",
    response_model=LoadedModel,
    responses={409: {"description": "The default model stays."}},
    summary="Serve a model no more",
)
async def unload(context: InContext, name: Name) -> LoadedModel:
    """Take a model out; the default one stays."""
    served = context.served(name)
    try:
        unloaded = await context.registry.unload(name)
    except UnavailableError as error:
        raise Problem(503, "not-remembered", str(error), headers={"retry-after": "1"}) from None
    if not unloaded:
        raise Problem(409, "default-model", "the default model cannot be unloaded: load another version instead")
    return LoadedModel(name=name, version=served.version, durable=context.settings.state_file is not None)
