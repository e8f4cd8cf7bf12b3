"""The OpenAPI document is complete, true, and what the service does."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, settings

from lazydp.service.app import document
from lazydp.service.console import interface, traffic
from lazydp.service.console import privacy as privacy_page
from lazydp.service.console import recommendations as try_page
from lazydp.service.routes import health, inference_protocol, models, privacy, recommendations

CONSOLE = (interface, privacy_page, traffic, try_page)
ROUTERS = [module.router for module in (health, inference_protocol, models, privacy, recommendations, *CONSOLE)]
OPERATIONS = [
    f"{method} {route.path_format}"
    for router in ROUTERS
    for route in router.routes
    if isinstance(route, APIRoute) and route.include_in_schema
    for method in sorted(route.methods or ())
]


# The document, and the tests that schemathesis makes of it, are made in the one process that runs these tests.
@pytest.fixture(scope="module", name="openapi")
def _openapi() -> dict[str, Any]:
    return document()


def test_every_route_is_in_the_document(openapi: dict[str, Any]) -> None:
    described = [f"{method.upper()} {path}" for path, methods in openapi["paths"].items() for method in methods]
    assert sorted(described) == sorted(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_described(name: str, openapi: dict[str, Any]) -> None:
    method, path = name.split()
    operation = openapi["paths"][path][method.lower()]
    assert operation["summary"]
    assert operation["description"]
    assert operation["tags"]
    for parameter in operation.get("parameters", []):
        assert parameter["description"], parameter["name"]
    answer = operation["responses"]["200"]["content"]
    for media, part in answer.items():
        assert part.get("schema") != {} or not media.startswith("application/json"), "no response model"


@pytest.mark.parametrize("path", ["/v1/recommendations", "/try"])
def test_a_body_may_name_what_is_not_there(path: str, openapi: dict[str, Any]) -> None:
    assert "404" in openapi["paths"][path]["post"]["responses"]


def test_bodies_and_answers_have_examples(openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    for name in ("RecommendationQuery", "RecommendationBatch", "Recommendations", "InferRequest"):
        assert schemas[name]["examples"], name


def test_examples_are_accepted(client: httpx.Client, openapi: dict[str, Any]) -> None:
    schemas = openapi["components"]["schemas"]
    for name in ("RecommendationQuery", "RecommendationBatch"):
        for example in schemas[name]["examples"]:
            response = client.post("/v1/recommendations", json=example)
            assert response.status_code in (200, 404), response.text


def test_every_reference_leads_somewhere(openapi: dict[str, Any]) -> None:
    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
            return own + [found for value in part.values() for found in references(value)]
        return [found for value in part for found in references(value)] if isinstance(part, list) else []

    schemas = openapi["components"]["schemas"]
    assert {reference.rsplit("/", 1)[1] for reference in references(openapi)} <= schemas.keys()


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


@pytest.fixture(scope="module", name="fuzz", params=[15, pytest.param(150, marks=pytest.mark.slow)])
def _fuzz(request: pytest.FixtureRequest, openapi: dict[str, Any]) -> dict[str, Callable[..., None]]:
    """For each operation the test that schemathesis makes of it; not when tests are collected, in every process."""
    import schemathesis
    from schemathesis.checks import load_all_checks
    from schemathesis.pytest.lazy import get_all_tests

    def accepted(case: schemathesis.Case, client: httpx.Client) -> None:
        case.call_and_validate(base_url=str(client.base_url))

    load_all_checks()
    schema = schemathesis.openapi.from_dict(openapi)
    schema.hook("filter_body")(only_names_that_could_be_known)
    given = settings(
        max_examples=request.param,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    made: Any = get_all_tests(schema=schema, test_func=accepted, settings=given, given_kwargs=None)
    return {operation.label: test for operation, test in (result.ok() for result in made)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_schemathesis_finds_nothing(name: str, fuzz: dict[str, Callable[..., None]], client: httpx.Client) -> None:
    fuzz[name](client=client)
