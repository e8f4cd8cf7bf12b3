"""The OpenAPI document is complete, true, and what the service does."""

from typing import Any

import httpx
import pytest
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import load_all_checks

from lazydp.service.app import document
from lazydp.service.console import interface, traffic
from lazydp.service.console import privacy as privacy_page
from lazydp.service.console import recommendations as try_page
from lazydp.service.routes import health, inference_protocol, models, privacy, recommendations

CONSOLE = (interface, privacy_page, traffic, try_page)
DOCUMENT = document()
OPERATIONS = [
    (method, path, operation) for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
]
load_all_checks()
pytest_plugins = ("schemathesis.pytest.plugin",)  # loaded here alone: it takes seconds, of every process
SCHEMA = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.parametrize(("method", "path", "operation"), OPERATIONS, ids=[f"{m} {p}" for m, p, _ in OPERATIONS])
def test_every_operation_is_described(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    assert operation["tags"]
    for parameter in operation.get("parameters", []):
        assert parameter["description"], parameter["name"]
    answer = operation["responses"]["200"]["content"]
    for media, part in answer.items():
        assert part.get("schema") != {} or not media.startswith("application/json"), "no response model"


@pytest.mark.parametrize("path", ["/v1/recommendations", "/try"])
def test_a_body_may_name_what_is_not_there(path: str) -> None:
    assert "404" in DOCUMENT["paths"][path]["post"]["responses"]


def test_bodies_and_answers_have_examples() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name in ("RecommendationQuery", "RecommendationBatch", "Recommendations", "InferRequest"):
        assert schemas[name]["examples"], name


def test_examples_are_accepted(client: httpx.Client) -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name in ("RecommendationQuery", "RecommendationBatch"):
        for example in schemas[name]["examples"]:
            response = client.post("/v1/recommendations", json=example)
            assert response.status_code in (200, 404), response.text


def test_every_reference_leads_somewhere() -> None:
    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
            return own + [found for value in part.values() for found in references(value)]
        return [found for value in part for found in references(value)] if isinstance(part, list) else []

    schemas = DOCUMENT["components"]["schemas"]
    assert {reference.rsplit("/", 1)[1] for reference in references(DOCUMENT)} <= schemas.keys()


def test_every_route_is_in_the_document() -> None:
    modules = (health, inference_protocol, models, privacy, recommendations, *CONSOLE)
    routers = [module.router for module in modules]
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    assert {route.path_format for route in routes if route.include_in_schema} == set(DOCUMENT["paths"])


@SCHEMA.hook("filter_body")
def only_names_that_could_be_known(_: Any, body: Any) -> bool:
    """Names of features and attributes are the model's, which no schema can list, and neither can one say that lists
    are equally long: the fuzz of bodies covers them."""
    queries = [body, *(body.get("queries") or [])] if isinstance(body, dict) else []
    return not any(
        query.get(field)
        for query in queries
        if isinstance(query, dict)
        for field in ("features", "filters", "boosts", "diversity", "history_weights", "similar_weights", "similar_to")
    )


@SCHEMA.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_schemathesis_finds_nothing(case: schemathesis.Case, client: httpx.Client) -> None:
    case.call_and_validate(base_url=str(client.base_url))
