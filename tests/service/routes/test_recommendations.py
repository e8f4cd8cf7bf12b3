"""What the native endpoints answer."""

from typing import Any

import httpx
import pytest

RECOMMEND = "/v1/recommendations"


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["id"] for item in answer["items"]]


def ask(client: httpx.Client, model: str = "untrained", **query: Any) -> dict[str, Any]:
    response = client.post(RECOMMEND, params={"model": model}, json=query)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.mark.parametrize("model", ["untrained", "dlrm"])
def test_a_known_user_is_answered_alike_by_get_and_post(client: httpx.Client, model: str) -> None:
    posted = ask(client, model, user_id="7", k=5)
    got = client.get("/v1/users/7/recommendations", params={"k": 5, "model": model}).json()
    assert posted == got
    assert posted["source"] == "user"
    assert posted["model"]["name"] == model
    assert len(posted["items"]) == 5
    assert posted["items"][0]["title"].startswith("Title of item")
    scores = [item["score"] for item in posted["items"]]
    assert scores == sorted(scores, reverse=True)
    assert posted["next_offset"] == 5


def test_ids_may_be_text_or_integers(client: httpx.Client) -> None:
    assert ask(client, user_id=7, history=[1, 2]) == ask(client, user_id="7", history=["1", "2"])


def test_an_unknown_user_without_history_is_a_404_that_says_why(client: httpx.Client) -> None:
    for response in (
        client.get("/v1/users/nobody/recommendations"),
        client.post(RECOMMEND, json={"user_id": "nobody"}),
    ):
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert "does not know this user" in response.json()["detail"]
        assert "nobody" not in response.text


def test_an_unknown_user_gets_the_popular_items_where_they_were_released(client: httpx.Client) -> None:
    answer = ask(client, "popular", user_id="nobody", k=3)
    assert answer["source"] == "popular"
    assert "released with noise" in answer["notice"]
    # Twice: the counts must not have been changed by the first answer.
    assert ids(ask(client, "popular", user_id="nobody", k=3, exclude=ids(answer))) != ids(answer)
    assert ids(ask(client, "popular", user_id="someone", k=3)) == ids(answer)


def test_somebody_who_says_nothing_gets_the_popular_items_or_a_404_that_says_why(client: httpx.Client) -> None:
    answer = ask(client, "popular", k=3)
    assert answer["source"] == "popular"
    assert "nothing was said about the person" in answer["notice"]
    assert ids(answer) == ids(ask(client, "popular", user_id="nobody", k=3))
    # Lists and pages hold for them too.
    assert ids(ask(client, "popular", k=2, offset=1)) == ids(answer)[1:]
    assert ids(ask(client, "popular", candidates=ids(answer), exclude=ids(answer)[:1])) == ids(answer)[1:]
    refused = client.post(RECOMMEND, json={})
    assert refused.status_code == 404
    assert "nothing was said about the person" in refused.json()["detail"]


def test_a_history_is_answered_without_its_items(client: httpx.Client) -> None:
    answer = ask(client, history=["1", "2", "gone"], k=58)
    assert answer["source"] == "history"
    assert answer["unknown_items"] == ["gone"]
    assert {"1", "2"}.isdisjoint(ids(answer))
    assert len(answer["items"]) == 58
    seen = ask(client, history=["1", "2"], exclude_seen=False, k=60)
    assert {"1", "2"} <= set(ids(seen))


def test_user_and_history_differ_from_either(client: httpx.Client) -> None:
    both = ask(client, user_id="7", history=["1"])
    assert both["source"] == "user+history"
    assert both["items"] != ask(client, user_id="7")["items"]
    assert ask(client, user_id="nobody", history=["1"])["source"] == "history"


def test_features_change_the_answer(client: httpx.Client) -> None:
    plain = ask(client, user_id="7")["items"]
    assert ask(client, user_id="7", features={"device": "phone", "age": 40})["items"] != plain
    assert ask(client, features={"device": "phone"})["source"] == "features"


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"features": {"nonsense": 1}}, "/features"),
        ({"features": {"age": [1, 2]}}, "/features"),
        ({"user_id": "7", "filters": {"nonsense": ["a"]}}, "/filters"),
        ({"user_id": "7", "diversity": {"attribute": "nonsense", "limit": 1}}, "/diversity/attribute"),
        ({"user_id": "7", "k": 0}, "/k"),
        ({"user_id": "7", "k": 1001}, "/k"),
        ({"user_id": "7", "k": "5"}, "/k"),
        ({"user_id": "7", "surprise": 1}, "/surprise"),
        ({"user_id": ""}, "/user_id"),
        ({"queries": []}, "/queries"),
        ({"queries": [{"k": -1}]}, "/queries/0/k"),
        ({"queries": [{"user_id": "7"}, {"filters": {"x": ["y"]}}]}, "/queries/1/filters"),
    ],
)
def test_what_is_not_valid_is_a_422_that_points_at_it(client: httpx.Client, query: Any, pointer: str) -> None:
    response = client.post(RECOMMEND, json=query)
    assert response.status_code == 422, response.text
    assert any(part["pointer"].startswith(pointer) for part in response.json()["errors"])


def test_more_items_than_there_are(client: httpx.Client) -> None:
    answer = ask(client, user_id="7", k=1000)
    assert len(answer["items"]) == 60
    assert answer["next_offset"] is None


def test_pages_do_not_overlap_and_miss_nothing(client: httpx.Client) -> None:
    whole = ids(ask(client, user_id="7", k=60))
    pages: list[str] = []
    offset: int | None = 0
    while offset is not None:
        page = ask(client, user_id="7", k=7, offset=offset)
        pages += ids(page)
        offset = page["next_offset"]
    assert pages == whole


def test_a_filter_that_nothing_meets_is_an_empty_answer(client: httpx.Client) -> None:
    answer = ask(client, user_id="7", filters={"genre": ["Opera"]})
    assert answer["items"] == []
    assert answer["next_offset"] is None


def test_filters_lists_and_caps(client: httpx.Client) -> None:
    # Item n has genre GENRES[n % 5] and GENRES[n % 3], and year 1950 + n % 70.
    drama = {str(n) for n in range(60) if n % 5 == 2 or n % 3 == 2}
    assert set(ids(ask(client, user_id="7", filters={"genre": ["Drama"]}, k=60))) == drama
    both = ask(client, user_id="7", filters={"genre": ["Drama"], "year": [1952, "1957"]}, k=60)
    assert set(ids(both)) == {"2", "7"} & drama
    chosen = ask(client, user_id="7", candidates=["3", "4", "unknown"], k=60)
    assert sorted(ids(chosen)) == ["3", "4"]
    assert chosen["unknown_items"] == ["unknown"]
    assert ids(ask(client, user_id="7", candidates=["3", "4"], exclude=["3"])) == ["4"]
    capped = ask(client, user_id="7", diversity={"attribute": "genre", "limit": 1}, k=60)
    genres = [g for item in ids(capped) for g in {int(item) % 5, int(item) % 3}]
    assert len(genres) == len(set(genres))
    assert ids(capped)[0] == ids(ask(client, user_id="7"))[0]


def test_reasons_name_items_of_the_history(client: httpx.Client) -> None:
    answer = ask(client, history=["1", "2", "3", "4"], explain=True, k=5)
    for item in answer["items"]:
        assert 1 <= len(item["because"]) <= 3
        assert set(item["because"]) <= {"1", "2", "3", "4"}


def test_a_batch_is_answered_in_order_from_one_version(client: httpx.Client) -> None:
    queries: list[dict[str, Any]] = [{"user_id": str(n), "k": 4} for n in range(10)] + [{"user_id": "nobody"}]
    batch = ask(client, queries=queries)
    alone = [ask(client, **query) for query in queries[:10]]
    assert [ids(result) for result in batch["results"][:10]] == [ids(answer) for answer in alone]
    assert batch["results"][10]["source"] == "none"
    assert batch["results"][10]["items"] == []


@pytest.mark.parametrize("model", ["untrained", "dlrm"])
def test_similar_items(client: httpx.Client, model: str) -> None:
    answer = client.get("/v1/items/5/similar", params={"k": 59, "model": model}).json()
    assert answer["source"] == "item"
    assert len(answer["items"]) == 59
    assert "5" not in ids(answer)
    assert all(-1.0001 <= item["score"] <= 1.0001 for item in answer["items"])
    unknown = client.get("/v1/items/none/similar")
    assert unknown.status_code == 404


def test_etags(client: httpx.Client) -> None:
    for path in ("/v1/users/7/recommendations", "/v1/items/5/similar", "/v1/models", "/v1/privacy/budget"):
        first = client.get(path)
        assert client.get(path, headers={"if-none-match": first.headers["etag"]}).status_code == 304
        assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
        assert "cache-control" in first.headers


def test_head_is_get_without_the_body(client: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/v1/users/7/recommendations", "/v1/models", "/", "/nothing"):
        got, head = client.get(path), client.head(path)
        assert head.status_code == got.status_code
        assert head.content == b""
        for name in ("content-length", "content-type", "etag"):
            assert head.headers.get(name) == got.headers.get(name), (path, name)
    assert client.head(RECOMMEND).status_code == 405


def test_an_unknown_model_is_a_404(client: httpx.Client) -> None:
    assert client.post(RECOMMEND, params={"model": "other"}, json={"user_id": "7"}).status_code == 404


def test_open_inference_protocol(client: httpx.Client) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/untrained").json()["inputs"][0]["name"] == "user_id"
    assert client.get("/v2/models/untrained/ready").json()["ready"] is True
    assert client.get("/v2/models/other/ready").status_code == 404
    request: dict[str, Any] = {
        "id": "a",
        "inputs": [
            {"name": "user_id", "shape": [2, 1], "datatype": "BYTES", "data": ["7", ""]},
            {"name": "history", "shape": [2, 2], "datatype": "BYTES", "data": [["1", ""], ["2", "3"]]},
        ],
        "parameters": {"k": 3},
    }
    answer = client.post("/v2/models/untrained/infer", json=request).json()
    assert answer["id"] == "a"
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["item_id"]["shape"] == outputs["score"]["shape"] == [2, 3]
    assert outputs["item_id"]["data"][:3] == ids(ask(client, user_id="7", history=["1"], k=3))
    assert outputs["item_id"]["data"][3:] == ids(ask(client, history=["2", "3"], k=3))
    request["inputs"][0]["data"] = ["7"]
    assert client.post("/v2/models/untrained/infer", json=request).status_code == 422


def test_if_none_match_star_needs_something_that_could_match(client: httpx.Client) -> None:
    star = {"if-none-match": "*"}
    assert client.get("/v1/items/1/similar", headers=star).status_code == 304
    assert client.get("/v1/items/nothing/similar", headers=star).status_code == 404
    assert client.get("/v1/users/nobody/recommendations", headers=star).status_code == 404


def test_every_answer_with_an_etag_varies_by_key(client: httpx.Client) -> None:
    for path in ("/v1/items/1/similar", "/v1/users/7/recommendations", "/v1/models", "/v1/privacy/budget"):
        response = client.get(path)
        assert response.headers["vary"] == "authorization, x-api-key"
        weak = {"if-none-match": f'"a, b", W/{response.headers["etag"]}'}
        assert client.get(path, headers=weak).status_code == 304


def test_a_body_that_is_an_etag_is_no_question(client: httpx.Client) -> None:
    tag = client.get("/v1/users/7/recommendations").headers["etag"]
    response = client.post(RECOMMEND, content=tag.encode(), headers={"content-type": "application/json"})
    assert response.status_code == 422
