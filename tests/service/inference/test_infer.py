"""Everything that a native query takes can be asked through the protocol, and is answered alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

PATH = "/v2/models/untrained/infer"


def infer(client: httpx.Client, *, inputs: list[dict[str, Any]], model: str = "untrained", **more: Any) -> Any:
    response = client.post(f"/v2/models/{model}/infer", json={"inputs": inputs, **more})
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def native(client: httpx.Client, model: str = "untrained", **query: Any) -> Any:
    return client.post("/v1/recommendations", params={"model": model}, json=query).json()


USER = {"name": "user_id", "shape": [1], "datatype": "BYTES", "data": ["7"]}
HISTORY = {"name": "history", "shape": [1, 3], "datatype": "BYTES", "data": ["1", "2", ""]}
ATTRIBUTE = "genre"
OPTIONS: list[dict[str, Any]] = [
    {"k": 4},
    {"k": 4, "offset": 3},
    {"exclude_seen": False},
    {"exclude": ["5", 6]},
    {"candidates": ["5", "6", "7", "nothing"]},
    {"explain": True, "k": 3},
]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids="+".join)
def test_parameters_are_those_of_a_query(client: httpx.Client, options: dict[str, Any], as_text: bool) -> None:
    given = {
        name: json.dumps(value) if as_text and isinstance(value, list | dict) else value
        for name, value in options.items()
    }
    outputs = infer(client, inputs=[USER, HISTORY], parameters=given)
    answer = native(client, user_id="7", history=["1", "2"], **options)
    k = options.get("k", 10)
    ids = [item["id"] for item in answer["items"]]
    assert outputs["item_id"]["data"] == ids + [""] * (k - len(ids))
    assert outputs["source"]["data"] == [answer["source"]]
    if options.get("explain"):
        because = outputs["because"]
        assert because["shape"] == [1, 3, 3]
        padded = [[*item["because"], *[""] * (3 - len(item["because"]))] for item in answer["items"]]
        assert because["data"] == [near for item in padded for near in item]


def test_names_are_checked_as_in_a_query(client: httpx.Client) -> None:
    for parameters, words in (
        ({"filters": {"nothing": ["a"]}}, "/parameters/filters"),
        ({"diversity": '{"attribute": "nothing", "limit": 1}'}, "/parameters/diversity"),
        ({"filters": "{"}, "expected JSON"),
        ({"filters": "[" * 100_000}, "/parameters/filters"),
        ({"exclude": '[], "k": 5'}, "expected JSON"),
        ({"k": 0}, "/parameters/k"),
        ({"k": "5"}, "/parameters/k"),
        ({"surprise": 1}, "/parameters/surprise"),
        ([], "/parameters"),
    ):
        response = client.post(PATH, json={"inputs": [USER], "parameters": parameters})
        assert response.status_code == 422, parameters
        assert words in response.json()["error"]


def test_rows_have_lists_of_their_own(client: httpx.Client) -> None:
    pair = {"name": "user_id", "shape": [2], "datatype": "INT64", "data": [7, 7]}
    lists = {"shape": [2, 2], "datatype": "BYTES", "data": ["5", "6", "8", ""]}
    allowed = infer(client, inputs=[pair, {"name": "candidates", **lists}], parameters={"k": 2})["item_id"]["data"]
    assert sorted(allowed[:2]) == ["5", "6"]
    assert allowed[2:] == ["8", ""]
    denied = infer(client, inputs=[pair, {"name": "exclude", **lists}], parameters={"k": 60})["item_id"]["data"]
    assert {"5", "6"}.isdisjoint(denied[:60])
    assert "8" not in denied[60:]
    assert {"5", "6"} <= set(denied[60:])


def test_what_an_answer_rests_on_is_said(client: httpx.Client) -> None:
    three = {"name": "user_id", "shape": [3], "datatype": "BYTES", "data": ["7", "nobody", ""]}
    history = {"name": "history", "shape": [3, 1], "datatype": "BYTES", "data": ["", "", "1"]}
    assert infer(client, inputs=[three, history])["source"]["data"] == ["user", "none", "history"]
    assert infer(client, inputs=[three, history], model="popular")["source"]["data"] == ["user", "popular", "history"]


def test_outputs_are_those_asked_for(client: httpx.Client) -> None:
    outputs = infer(client, inputs=[USER], outputs=[{"name": "next_offset"}, {"name": "title"}], parameters={"k": 2})
    assert list(outputs) == ["next_offset", "title"]
    assert outputs["next_offset"] == {"name": "next_offset", "datatype": "INT64", "shape": [1], "data": [2]}
    last = infer(client, inputs=[USER], outputs=[{"name": "next_offset"}], parameters={"k": 100})
    assert last["next_offset"]["data"] == [-1]
    for wrong in ([{"name": "nonsense"}], [{"name": "score"}] * 2, [{"name": "score", "parameters": {"x": 1}}]):
        assert client.post(PATH, json={"inputs": [USER], "outputs": wrong}).status_code == 422


def test_answers_of_a_batch_are_bounded(client: httpx.Client) -> None:
    # A slow reader holds its answer in the service's memory.
    many = {"name": "user_id", "shape": [256], "datatype": "INT64", "data": list(range(256))}
    request = {"inputs": [many], "parameters": {"k": 1000}}
    assert client.post(PATH, json=request).status_code == 422
    batch = {"queries": [{"user_id": "7", "k": 1000}] * 256}
    assert client.post("/v1/recommendations", json=batch).status_code == 422


def test_answers_are_counted_however_they_are_asked_for(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"]) as client:

        def counted() -> float:
            lines = client.get("/metrics").text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("lazydp_recommendations_total{"))

        asked: list[tuple[Callable[[], object], int]] = [
            (lambda: native(client, user_id="7"), 1),
            (lambda: native(client, user_id="7"), 1),
            (lambda: native(client, queries=[{"user_id": "7"}] * 3), 3),
            (lambda: client.get("/v1/users/7/recommendations"), 1),
            (lambda: client.get("/v1/users/7/recommendations"), 1),
            (lambda: client.get("/v1/items/1/similar"), 1),
            (lambda: infer(client, inputs=[{**USER, "shape": [2], "data": ["7", "8"]}]), 2),
        ]
        for ask, answers in asked:
            before = counted()
            ask()
            assert counted() - before == answers
