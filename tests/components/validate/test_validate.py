"""What refuses a release before it goes anywhere."""

import json
from typing import Any

import httpx
import pytest

from lazydp.components.shared.errors import InputError
from lazydp.components.validate.component import validate as component
from lazydp.components.validate.validate import ReleaseRefusedError, _check

QUERY = {"history": ["7"], "k": 3, "exclude_seen": True}


def answer(items: list[tuple[str, Any]], status: int = 200) -> httpx.Response:
    body = {"items": [{"id": name, "score": score} for name, score in items]}
    return httpx.Response(status, content=json.dumps(body))


def test_a_ranking_is_accepted() -> None:
    _check(QUERY, answer([("1", 2.0), ("2", 1.0), ("3", 1.0)]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (answer([("1", 1.0)], status=500), "with status 500"),
        (answer([]), "with 0 items"),
        (answer([("1", 2.0), ("1", 1.0)]), "one of them twice"),
        (answer([("1", 4.0), ("2", 3.0), ("3", 2.0), ("4", 1.0)]), "with 4 items"),
        (answer([("1", 1.0), ("2", 2.0)]), "no ranking"),
        (answer([("1", float("nan"))]), "no ranking"),
        (answer([("7", 1.0)]), "an item of the history"),
    ],
)
def test_what_is_no_ranking_is_refused(given: httpx.Response, expected: str) -> None:
    with pytest.raises(ReleaseRefusedError, match=expected):
        _check(QUERY, given)


def test_queries_are_a_json_list() -> None:
    with pytest.raises(InputError, match="expected a JSON list"):
        component.python_func(bundle=None, metrics=None, queries="history: [1]")
