"""The typed client does what the OpenAPI document says."""

import inspect
import re
from typing import Any

import httpx
import pytest

from lazydp.components.shared.errors import UnavailableError
from lazydp.service import schemas
from lazydp.service.app import document
from lazydp.service.client import Client, RequestRefusedError

DOCUMENT = document()
METHODS = [
    method
    for name, method in inspect.getmembers(Client, inspect.isfunction)
    if "GET /" in (method.__doc__ or "") or "POST /" in (method.__doc__ or "")
]


@pytest.fixture
def api(client: httpx.Client) -> Any:
    with Client(str(client.base_url)) as api:
        yield api


def operation_of(method: Any) -> dict[str, Any]:
    found = re.search(r"(GET|POST) (/[\w/{}]+)", method.__doc__)
    assert found is not None
    operation: dict[str, Any] = DOCUMENT["paths"][found[2]][found[1].lower()]
    return operation


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_methods_take_what_the_document_lists(method: Any) -> None:
    listed = {parameter["name"] for parameter in operation_of(method).get("parameters", [])}
    taken = set(inspect.signature(method).parameters) - {"self", "query", "queries"}
    assert taken == listed


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_methods_return_what_the_document_says(method: Any) -> None:
    returned = method.__annotations__["return"]
    if returned == "bool":
        return
    content = operation_of(method)["responses"]["200"]["content"]["application/json"]["schema"]
    listed = re.findall(r"'#/components/schemas/(\w+)'", repr(content))
    assert returned.removeprefix("schemas.") in listed


def test_every_native_path_has_a_method() -> None:
    native = {path for path in DOCUMENT["paths"] if path.startswith("/v1/")}
    assert {found for method in METHODS for found in re.findall(r"(/v1/[\w/{}]+)", method.__doc__)} == native  # type: ignore[arg-type]


def test_answers_are_typed(api: Client) -> None:
    query = schemas.RecommendationQuery(user_id="7", k=50)
    pages = list(api.pages(query))
    assert [len(page.items) for page in pages] == [50, 10]
    assert api.recommend_to_user("7", k=50, cursor="") == pages[0]
    results = api.recommend_all([query, schemas.RecommendationQuery(history=["1"])], model="dlrm")
    assert [result.source for result in results.results] == ["user", "history"]
    assert api.similar("5", k=2).items[0].title is not None
    assert api.models().models[0].name == "untrained"
    assert api.budget().models[0].statement.test_key
    assert api.releases().source == "statement"
    assert api.ready()


def test_problems_are_errors(api: Client) -> None:
    with pytest.raises(RequestRefusedError, match="404 Not Found") as caught:
        api.recommend_to_user("no/body?")
    assert caught.value.problem.type == "urn:lazydp:problem:nothing-known"


def test_nothing_answers() -> None:
    with Client("http://127.0.0.1:1") as api:
        assert not api.ready()
        with pytest.raises(UnavailableError, match="does not answer"):
            api.models()
