"""The OpenAPI document: what FastAPI finds out, with the bodies that handlers read themselves and the problems."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lazydp.components.shared.version import release
from lazydp.service import schemas
from lazydp.service.http.auth import OPEN_PATHS, needed_scopes
from lazydp.service.http.problems import MEDIA_TYPE, PROTOCOL_MEDIA_TYPE, PROTOCOL_PATH, ProblemDocument
from lazydp.service.inference.repository import ChangeRequest, IndexRequest
from lazydp.service.inference.rest import InferRequest

# Bodies that handlers parse themselves (see `body.describe`).
BODIES: tuple[type[BaseModel], ...] = (
    schemas.RecommendationQuery,
    schemas.RecommendationBatch,
    InferRequest,
    IndexRequest,
    ChangeRequest,
    ProblemDocument,
)
_TEMPLATE = "#/components/schemas/{model}"
_PROBLEMS = {
    "400": "The body is not JSON, or not encoded as it says.",
    "401": "No API key, or one that is not known.",
    "403": "An API key of another scope.",
    "404": "No such thing: the model, user or item is not known.",
    "409": "The cursor is of another query or version.",
    "413": "The body is too large.",
    "415": "The body is not of a media type or encoding that is taken.",
    "422": "The request is not valid.",
    "429": "Too many requests at once; see Retry-After.",
    "503": "No model is loaded yet, or the request took too long.",
}
_BODY_ONLY = {"400", "413", "415"}
# Their bodies can name a model, user or item that is not there.
_NAMED_IN_BODY = {"/v1/recommendations", "/try"}
_ALWAYS = {"401", "403", "429", "503"}
_DESCRIPTION = (
    "Recommendations from a model trained with differential privacy, and the privacy budget it spent. "
    "Errors are RFC 9457 problem documents; a request's head that is too long or too slow is answered with one of "
    "status 431 or 408, whatever its path. The service writes nothing of what it is sent to a disk or a log."
)


def build(app: FastAPI) -> dict[str, Any]:
    """The document of `app`."""
    document = get_openapi(
        title="lazydp",
        version=release(),
        summary="Differentially private recommendations",
        description=_DESCRIPTION,
        routes=app.routes,
        servers=[{"url": app.state.context.settings.root_path}] if app.state.context.settings.root_path else None,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    _, extra = models_json_schema([(body, "validation") for body in BODIES], ref_template=_TEMPLATE)
    components = document.setdefault("components", {})
    known = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        known.pop(name, None)
    known.update(extra["$defs"])
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key; needed where the service has keys."},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(path, operation)
    return document


def _complete(path: str, operation: dict[str, Any]) -> None:
    """Problems that an operation may answer with, and the scopes that it asks for."""
    responses = operation["responses"]
    statuses = set() if path in OPEN_PATHS else set(_ALWAYS)
    if "requestBody" in operation:
        statuses |= _BODY_ONLY | {"422"}
    if operation.get("parameters"):
        statuses |= {"404", "422"}
    if path == "/v1/recommendations" or path.endswith("/infer") or _takes_cursor(operation):
        statuses.add("409")
    if path in _NAMED_IN_BODY:
        statuses.add("404")
    if "422" in responses:
        responses.pop("422")
    media_type = PROTOCOL_MEDIA_TYPE if path.startswith(PROTOCOL_PATH) else MEDIA_TYPE
    problem = {media_type: {"schema": {"$ref": "#/components/schemas/ProblemDocument"}}}
    for status in sorted(statuses):
        if status not in responses:
            responses[status] = {"description": _PROBLEMS[status], "content": problem}
    for status, response in responses.items():
        if status.startswith(("4", "5")) and "content" not in response:
            response["content"] = problem
    operation["security"] = [{}] if path in OPEN_PATHS else [{}, *({scheme: []} for scheme in ("bearer", "header"))]
    if path not in OPEN_PATHS:
        scopes = sorted(needed_scopes(path))
        operation["description"] = (
            operation.get("description", "") + f"\n\nScope of the key: {' and '.join(scopes) if scopes else 'any'}."
        )


def _takes_cursor(operation: dict[str, Any]) -> bool:
    return any(parameter["name"] == "cursor" for parameter in operation.get("parameters", []))
