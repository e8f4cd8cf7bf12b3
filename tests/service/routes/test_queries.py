"""Conditions, boosts, lists, cursors, sessions and similar items: native, by the protocol, by client, by command."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from click.testing import CliRunner

from lazydp.service import schemas
from lazydp.service.client import Client, RequestRefusedError
from lazydp.service.recommend_cli import command

RECOMMEND, INFER = "/v1/recommendations", "/v2/models/untrained/infer"


def ask(client: httpx.Client, **query: Any) -> dict[str, Any]:
    response = client.post(RECOMMEND, json=query)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["id"] for item in answer["items"]]


def year(item: str) -> int:
    return 1950 + int(item)


@pytest.fixture(scope="module")
def ranked(client: httpx.Client) -> list[str]:
    return ids(ask(client, user_id="7", k=100, cursor=""))


PERSON = {"user_id": "7", "k": 60}
OPTIONS: dict[str, dict[str, Any]] = {
    "range": PERSON | {"filters": {"year": {"gte": 1960, "lt": 1980.5}}},
    "not": PERSON | {"filters": {"genre": {"not": ["Drama", "Action"]}}},
    "not a range": PERSON | {"filters": {"year": {"gt": 1955, "not": {"gte": 1960, "lte": 2000}}}},
    "boost": PERSON | {"boosts": [{"attribute": "genre", "matching": ["Drama"], "multiply": 3}]},
    "boosts": PERSON
    | {"boosts": [{"attribute": "year", "add": 0.1}, {"attribute": "year", "matching": {"lt": 1960}, "add": -3}]},
    "lists": PERSON
    | {"candidates": ["1", 2, "3", "4"], "candidate_lists": [["2", "3", "9"], [3, 2, 4]], "exclude_lists": [["3"], []]},
    "similar": {"similar_to": ["3", "9"], "similar_weights": [1, 4], "explain": True},
    "session": {"history": ["3", "9", "4"], "half_life": 0.5},
    "cursor": PERSON | {"cursor": "", "k": 7},
}


def test_conditions_choose(client: httpx.Client, ranked: list[str]) -> None:
    assert ids(ask(client, **OPTIONS["range"])) == [item for item in ranked if 1960 <= year(item) < 1980.5]
    outside = [item for item in ranked if year(item) > 1955 and not 1960 <= year(item) <= 2000]
    assert ids(ask(client, **OPTIONS["not a range"])) == outside
    genres = {genre: set(ids(ask(client, **PERSON, filters={"genre": [genre]}))) for genre in ("Drama", "Action")}
    assert ids(ask(client, **OPTIONS["not"])) == [
        item for item in ranked if item not in genres["Drama"] | genres["Action"]
    ]


def test_boosts_raise(client: httpx.Client) -> None:
    plain = {item["id"]: item["score"] for item in ask(client, **PERSON)["items"]}
    drama = set(ids(ask(client, **PERSON, filters={"genre": ["Drama"]})))
    for item in ask(client, **OPTIONS["boost"])["items"]:
        before = plain[item["id"]]
        factor = 1 if item["id"] not in drama else 3 if before > 0 else 1 / 3
        assert item["score"] == pytest.approx(before * factor, rel=1e-4, abs=1e-5)
    for item in ask(client, **OPTIONS["boosts"])["items"]:
        added = 0.1 * year(item["id"]) - (3 if year(item["id"]) < 1960 else 0)
        assert item["score"] == pytest.approx(plain[item["id"]] + added, rel=1e-4)


def test_several_lists_hold_at_once(client: httpx.Client) -> None:
    assert ids(ask(client, **OPTIONS["lists"])) == ["2"]
    assert ids(ask(client, user_id="7", candidate_lists=[["5"], ["6"]])) == []


def test_similar_items_by_several(client: httpx.Client) -> None:
    one = client.get("/v1/items/3/similar", params={"k": 5}).json()
    assert ask(client, similar_to=["3"], k=5) == one
    both = ask(client, **OPTIONS["similar"])
    assert both["source"] == "item"
    assert {"3", "9"}.isdisjoint(ids(both))
    assert ids(both) != ids(ask(client, similar_to=["3", "9"], similar_weights=[4, 1]))
    assert all(sorted(item["because"]) == ["3", "9"] for item in both["items"])
    assert ask(client, similar_to=["3", "nothing"], k=5)["unknown_items"] == ["nothing"]
    response = client.post(RECOMMEND, json={"similar_to": ["nothing"]})
    assert (response.status_code, response.json()["type"]) == (404, "urn:lazydp:problem:unknown-item")


def pages(client: httpx.Client, path: str = RECOMMEND, **query: Any) -> Iterator[dict[str, Any]]:
    cursor: str | None = ""
    while cursor is not None:
        page = ask(client, **query, cursor=cursor)
        yield page
        cursor = page["next_cursor"]


@pytest.mark.parametrize(
    "who", [{"user_id": "7"}, {"similar_to": ["3", "9"]}, {"user_id": "7", "candidates": ["1", "2"]}]
)
@pytest.mark.parametrize("boost", [{"attribute": "year", "matching": {"gt": 0}, "add": 1e6}, None])
def test_pages_by_cursor_join_to_the_ranking(client: httpx.Client, who: dict[str, Any], boost: Any) -> None:
    # An added amount of 1,000,000 leaves scores a few bits: many tie.
    query = who | ({"boosts": [boost]} if boost else {})
    whole = ask(client, **query, cursor="", k=100)
    assert (
        boost is None
        or len({item["score"] for item in whole["items"]}) < len(whole["items"])
        or len(whole["items"]) < 3
    )
    found = list(pages(client, **query, k=7))
    assert [item for page in found for item in page["items"]] == whole["items"]
    assert whole["next_cursor"] is None


def test_a_cursor_is_refused_where_it_does_not_belong(client: httpx.Client) -> None:
    cursor = ask(client, user_id="7", cursor="", k=3)["next_cursor"]
    following = ask(client, user_id="7", cursor=cursor, k=50, offset=1, explain=True)
    assert len(following["items"]) == 50
    for query in (
        {"user_id": "8", "cursor": cursor},
        {"user_id": "7", "cursor": cursor, "exclude": ["1"]},
        {"user_id": "7", "cursor": cursor[:-4]},
        {"user_id": "7", "cursor": "e30"},
        {"user_id": "7", "cursor": "ü%"},
    ):
        response = client.post(RECOMMEND, json=query)
        assert response.status_code == 409
        assert response.json()["errors"][0]["pointer"] == "/cursor"
    batch = {"queries": [{"user_id": "7", "cursor": cursor, "k": 3}, {"user_id": "8", "cursor": cursor}]}
    response = client.post(RECOMMEND, json=batch)
    assert response.json()["errors"][0]["pointer"] == "/queries/1/cursor"
    for path in ("/v1/users/7/recommendations", "/v1/items/7/similar"):
        first = client.get(path, params={"cursor": "", "k": 3}).json()
        second = client.get(path, params={"cursor": first["next_cursor"], "k": 3}).json()
        assert ids(first) + ids(second) == ids(client.get(path, params={"k": 6}).json())
        assert client.get(path, params={"cursor": "x"}).status_code == 409


def test_a_cursor_of_another_version_is_refused_in_so_many_words(
    start: Any, bundles: dict[str, Path], tmp_path: Path
) -> None:
    link = tmp_path / "served"
    link.symlink_to(bundles["towers"])
    with start(link, poll_s=3600) as client:
        query: dict[str, Any] = {"user_id": "7", "k": 3}
        cursor = ask(client, **query, cursor="")["next_cursor"]
        infer = {"inputs": [{"name": "user_id", "shape": [1], "datatype": "BYTES", "data": ["7"]}]}
        link.unlink()
        link.symlink_to(bundles["newer"])
        assert client.post("/v2/repository/models/untrained/load").status_code == 200
        response = client.post(RECOMMEND, json={**query, "cursor": cursor})
        assert response.status_code == 409
        problem = response.json()
        assert problem["type"] == "urn:lazydp:problem:outdated-cursor"
        assert client.get("/v1/models").json()["models"][0]["version"] in problem["detail"]
        assert 'begin again with cursor ""' in problem["detail"]
        response = client.post(INFER, json={**infer, "parameters": {"k": 3, "cursor": cursor}})
        assert response.status_code == 409
        with Client(str(client.base_url)) as api, pytest.raises(RequestRefusedError, match="another version"):
            list(api.pages(schemas.RecommendationQuery(**query, cursor=cursor)))


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"filters": {"year": {}}}, "/filters/year"),
        ({"filters": {"year": {"gte": None}}}, "/filters/year"),
        ({"filters": {"year": {"gte": "1980"}}}, "/filters/year/gte"),
        ({"filters": {"year": {"over": 1980}}}, "/filters/year/over"),
        ({"filters": {"genre": []}}, "/filters/genre"),
        ({"filters": {"genre": ["a", None]}}, "/filters/genre/1"),
        ({"filters": {"genre": {"not": {"not": ["a"]}}}}, "/filters/genre/not/not"),
        ({"filters": {"colour": {"gte": 1}}}, "/filters"),
        ({"boosts": [{"attribute": "year"}]}, "/boosts/0"),
        ({"boosts": [{"attribute": "year", "multiply": 1, "add": 1}]}, "/boosts/0"),
        ({"boosts": [{"attribute": "year", "multiply": 0}]}, "/boosts/0/multiply"),
        ({"boosts": [{"attribute": "colour", "add": 1}]}, "/boosts"),
        ({"history_weights": [1]}, ""),
        ({"history": ["1"], "history_weights": [0]}, "/history_weights/0"),
        ({"half_life": 0}, "/half_life"),
        ({"similar_to": ["1"]}, ""),
        ({"candidate_lists": ["1"]}, "/candidate_lists/0"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, query: dict[str, Any], pointer: str) -> None:
    response = client.post(RECOMMEND, json={"user_id": "7", **query})
    assert response.status_code == 422, response.text
    found = [error["pointer"] for error in response.json()["errors"]]
    assert any(f"{where}/".startswith(f"{pointer}/") for where in found), found


def infer(client: httpx.Client, inputs: list[dict[str, Any]], **parameters: Any) -> dict[str, list[Any]]:
    outputs = [{"name": name} for name in ("item_id", "source", "search", "user_known", "next_cursor")]
    response = client.post(INFER, json={"inputs": inputs, "outputs": outputs, "parameters": parameters})
    assert response.status_code == 200, response.text
    return {output["name"]: output["data"] for output in response.json()["outputs"]}


def tensor(name: str, data: list[Any], datatype: str = "BYTES") -> dict[str, Any]:
    return {"name": name, "shape": [1, len(data)], "datatype": datatype, "data": data}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_protocol_takes_each(client: httpx.Client, option: str, as_text: bool) -> None:
    query = dict(OPTIONS[option])
    native = ask(client, **query)
    inputs = [tensor("user_id", [query.pop("user_id", "")]), tensor("history", query.pop("history", []))]
    parameters = {
        name: json.dumps(value) if as_text and isinstance(value, list | dict) else value
        for name, value in query.items()
    }
    found = infer(client, inputs, **parameters)
    assert [item for item in found["item_id"] if item] == ids(native)
    assert found["source"] == [native["source"]]
    assert found["search"] == [native["search"]] == ["exact"]
    assert found["user_known"] == [native["user_known"] or ""]
    assert found["next_cursor"] == [native["next_cursor"] or ""]


def test_rows_have_weights_and_cursors_of_their_own(client: httpx.Client) -> None:
    lists = {"shape": [2, 3], "datatype": "BYTES"}
    history = {"name": "history", **lists, "data": ["3", "9", "", "4", "3", "9"]}
    weights = {"name": "history_weights", **lists, "datatype": "FP32", "data": [1, 4, 0, 2, 1, 1]}
    alike = {"name": "similar_to", **lists, "data": ["3", "9", "", "4", "3", "9"]}
    alike_weights = {**weights, "name": "similar_weights"}
    cursors = {"name": "cursor", "shape": [2], "datatype": "BYTES", "data": ["", ""]}
    for name, inputs in (("history", [history, weights]), ("similar", [alike, alike_weights])):
        own: list[dict[str, Any]] = (
            [
                {"history": ["3", "9"], "history_weights": [1, 4]},
                {"history": ["4", "3", "9"], "history_weights": [2, 1, 1]},
            ]
            if name == "history"
            else [
                {"similar_to": ["3", "9"], "similar_weights": [1, 4]},
                {"similar_to": ["4", "3", "9"], "similar_weights": [2, 1, 1]},
            ]
        )
        begun = infer(client, [*inputs, cursors], k=3)
        assert begun["item_id"] == [item for query in own for item in ids(ask(client, **query, k=3, cursor=""))]
        going = infer(client, [*inputs, {**cursors, "data": begun["next_cursor"]}], k=3)
        for row, query in enumerate(own):
            whole = ids(ask(client, **query, k=6, cursor=""))
            assert begun["item_id"][3 * row : 3 * row + 3] + going["item_id"][3 * row : 3 * row + 3] == whole
        swapped = {**cursors, "data": begun["next_cursor"][::-1]}
        response = client.post(INFER, json={"inputs": [*inputs, swapped], "parameters": {"k": 3}})
        assert response.status_code == 409
    for wrong in (
        [weights],
        [history, {**weights, "data": [1, 0, 0, 2, 1, 1]}],
        [history, {**weights, "datatype": "BYTES", "data": ["1"] * 6}],
        [history, {**weights, "shape": [2, 2], "data": [1] * 4}],
        [alike, history],
    ):
        assert client.post(INFER, json={"inputs": wrong}).status_code == 422


def test_weights_travel_as_bytes_of_an_unmodified_client(client: httpx.Client) -> None:
    history = triton.InferInput("history", [1, 2], "BYTES")
    history.set_data_from_numpy(np.array([["3", "9"]], dtype=np.object_))
    weights = triton.InferInput("history_weights", [1, 2], "FP32")
    weights.set_data_from_numpy(np.array([[1, 4]], dtype=np.float32))
    with triton.InferenceServerClient(f"{client.base_url.host}:{client.base_url.port}") as to:
        parameters = {"k": 3, "filters": json.dumps({"year": {"gte": 1960}})}
        found = to.infer("untrained", [history, weights], parameters=parameters).as_numpy("item_id")
    query = {"history": ["3", "9"], "history_weights": [1, 4], "filters": {"year": {"gte": 1960}}}
    assert [item.decode() for item in found[0]] == ids(ask(client, **query, k=3))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_client_takes_each(client: httpx.Client, option: str) -> None:
    query = schemas.RecommendationQuery.model_validate_json(json.dumps(OPTIONS[option]))
    with Client(str(client.base_url)) as api:
        assert (
            api.recommend(query).model_dump() == schemas.Recommendations(**ask(client, **OPTIONS[option])).model_dump()
        )


COMMANDS = {
    "range": ["--user", "7", "-k", "60", "--filter", "year>=1960", "--filter", "year<1980.5"],
    "not": ["--user", "7", "-k", "60", "--filter", "genre!=Drama,Action"],
    "boost": ["--user", "7", "-k", "60", "--boost", "genre=Drama:*3"],
    "boosts": ["--user", "7", "-k", "60", "--boost", "year:+0.1", "--boost", "year<1960:-3"],
    "session": ["--history", "3", "--history", "9", "--history", "4", "--half-life", "0.5"],
    "similar": ["--similar-to", "3", "--similar-to", "9", "--query", '{"similar_weights": [1, 4], "explain": true}'],
    "lists": [
        "--user",
        "7",
        "-k",
        "60",
        "--query",
        json.dumps({k: v for k, v in OPTIONS["lists"].items() if k[0] in "ce"}),
    ],
    "cursor": ["--user", "7", "-k", "7", "--query", '{"cursor": ""}'],
}


@pytest.mark.parametrize("option", COMMANDS)
def test_the_command_takes_each(client: httpx.Client, option: str) -> None:
    run = CliRunner().invoke(command, ["--url", str(client.base_url), *COMMANDS[option], "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output) == ask(client, **OPTIONS[option])


def test_the_command_prints_lines_for_people(client: httpx.Client, ranked: list[str]) -> None:
    asked = ["--url", str(client.base_url), "--user", "7", "-k", "25", "--all"]
    run = CliRunner().invoke(command, asked)
    assert run.exit_code == 0, run.output
    head, *lines = run.output.splitlines()
    assert head.startswith("untrained ")
    assert head.endswith(", by user, exact search")
    assert [line.split()[2] for line in lines] == ranked
    assert [int(line.split()[0]) for line in lines] == list(range(1, 61))
    assert "  because of 3" in CliRunner().invoke(
        command, ["--url", str(client.base_url), "--similar-to", "3", "--query", '{"explain": true}']
    ).output.replace(", ", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--filter", "year"], "expected NAME=VALUE"),
        (["--filter", "year>=old"], "expected a number"),
        (["--filter", "year>1", "--filter", "year>2"], "given twice"),
        (["--boost", "year=1980"], "expected FILTER:*FACTOR"),
        (["--boost", "year:*x"], "expected a number"),
        (["--query", "{"], "expected JSON"),
        (["--query", "[]"], "expected a JSON object"),
        (["--query", '{"colour": 1}'], "the query is not valid: colour"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(arguments: list[str], words: str) -> None:
    run = CliRunner().invoke(command, ["--user", "7", *arguments])
    assert run.exit_code == 2
    assert words in run.output


def test_an_approximate_search_says_what_it_did(start: Any, bundles: dict[str, Path]) -> None:
    pytest.importorskip("faiss")
    with start(bundles["towers"], approximate_from=1) as client:
        assert ask(client, user_id="7")["search"] == "approximate"
        assert ask(client, history=["3", "9"], history_weights=[1, 4])["search"] == "approximate"
        for option in ("range", "not", "boost", "lists", "similar", "cursor"):
            assert ask(client, **OPTIONS[option])["search"] == "exact"


def test_the_command_brings_the_key(start: Any, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from lazydp.service.http.auth import make_key

    key, digest = make_key()
    keys = [{"name": "web", "sha256": digest, "scopes": ["recommend"]}]
    with start(bundles["towers"], api_keys=keys) as client:
        asked = ["--url", str(client.base_url), "--user", "7"]
        refused = CliRunner().invoke(command, asked)
        assert isinstance(refused.exception, RequestRefusedError)
        monkeypatch.setitem(os.environ, "LAZYDP_API_KEY", key)
        assert CliRunner().invoke(command, asked).exit_code == 0
