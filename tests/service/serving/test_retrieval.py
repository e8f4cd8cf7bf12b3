"""A DLRM ranks what a two-tower model finds, where its catalogue is too large to rank whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lazydp.components.bundle.manifest import BundleManifest
from lazydp.components.shared.errors import InputError
from lazydp.service.app import create_app
from lazydp.service.settings import load_settings

RETRIEVED = 20
QUERIES: list[dict[str, Any]] = [
    {"user_id": "7"},
    {"history": ["1", "2"]},
    {"user_id": "7", "exclude": ["3", "4"], "filters": {"genre": ["Drama"]}},
    {"user_id": "7", "features": {"device": "phone"}},
]


@pytest.fixture(scope="module")
def pair(start: Any, bundles: dict[str, Path]) -> Iterator[httpx.Client]:
    settings = {"retrievers": {"dlrm": "untrained"}, "retrieved_items": RETRIEVED, "rank_whole_up_to": 59}
    with start(bundles["towers"], bundles["dlrm"], bundles["popular"], **settings) as client:
        yield client


def ask(client: httpx.Client, model: str = "dlrm", **query: Any) -> dict[str, Any]:
    response = client.post("/v1/recommendations", params={"model": model}, json=query)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids(answer: dict[str, Any]) -> list[str]:
    return [item["id"] for item in answer["items"]]


@pytest.mark.parametrize("query", QUERIES)
def test_it_ranks_the_best_items_of_the_retriever(pair: httpx.Client, client: httpx.Client, query: Any) -> None:
    found = ids(ask(pair, "untrained", **query, k=RETRIEVED))
    answer = ask(pair, **query, k=60)
    assert set(ids(answer)) == set(found)
    # In the order in which the DLRM puts them when it ranks everything.
    whole = ids(ask(client, **query, k=60))
    assert ids(answer) == [item for item in whole if item in set(found)]
    assert ids(answer) != found
    assert answer["next_offset"] is None


def test_an_answer_names_both_versions(pair: httpx.Client, bundles: dict[str, Path]) -> None:
    answer = ask(pair, user_id="7")
    assert answer["source"] == "user"
    assert answer["model"]["version"] == BundleManifest.load(bundles["dlrm"]).version
    assert answer["retriever"] == {"name": "untrained", "version": BundleManifest.load(bundles["towers"]).version}


def test_a_small_catalogue_or_given_candidates_need_no_retriever(pair: httpx.Client, client: httpx.Client) -> None:
    assert ask(client, user_id="7")["retriever"] is None
    chosen = ask(pair, user_id="7", candidates=["3", "4", "5"])
    assert chosen["retriever"] is None
    assert sorted(ids(chosen)) == ["3", "4", "5"]
    assert ask(pair, "untrained", user_id="7")["retriever"] is None


def test_pages_of_what_was_found(pair: httpx.Client) -> None:
    whole = ids(ask(pair, user_id="7", k=60))
    pages, offset = [], 0
    while offset is not None:
        page = ask(pair, user_id="7", k=7, offset=offset)
        pages += ids(page)
        offset = page["next_offset"]
    assert pages == whole


def test_a_cap_holds_among_what_was_found(pair: httpx.Client) -> None:
    capped = ask(pair, user_id="7", diversity={"attribute": "genre", "limit": 1}, k=60)
    genres = [genre for item in ids(capped) for genre in {int(item) % 5, int(item) % 3}]
    assert len(genres) == len(set(genres))
    assert ids(capped)[0] == ids(ask(pair, user_id="7"))[0]


def test_batches_are_answered_as_their_queries_are(pair: httpx.Client) -> None:
    queries = [*QUERIES, {"user_id": "7", "candidates": ["3", "4"]}, {"user_id": "nobody"}]
    batch = ask(pair, queries=queries)["results"]
    for query, answer in zip(queries[:-1], batch, strict=False):
        alone = ask(pair, **query)
        assert (ids(answer), answer["retriever"]) == (ids(alone), alone["retriever"])
    assert batch[-1]["source"] == "none"
    request = {
        "inputs": [{"name": "user_id", "shape": [1], "datatype": "BYTES", "data": ["7"]}],
        "parameters": {"k": 10},
    }
    outputs = pair.post("/v2/models/dlrm/infer", json=request).json()["outputs"]
    assert outputs[0]["data"] == ids(ask(pair, user_id="7"))


def test_nobody_known_is_a_404(pair: httpx.Client) -> None:
    assert pair.get("/v1/users/nobody/recommendations", params={"model": "dlrm"}).status_code == 404


def test_another_version_of_the_retriever_is_another_answer(
    start: Any, bundles: dict[str, Path], tmp_path: Path
) -> None:
    link = tmp_path / "towers"
    link.symlink_to(bundles["towers"])
    settings = {"retrievers": {"dlrm": "untrained"}, "retrieved_items": RETRIEVED, "rank_whole_up_to": 59, "poll_s": 60}
    with start(link, bundles["dlrm"], **settings) as client:
        path = "/v1/users/7/recommendations"
        before, got = ask(client, user_id="7"), client.get(path, params={"model": "dlrm"})
        link.unlink()
        link.symlink_to(bundles["newer"])
        assert client.post("/v2/repository/models/untrained/load").status_code == 200
        after = ask(client, user_id="7")
        tagged = client.get(path, params={"model": "dlrm"}, headers={"if-none-match": got.headers["etag"]})
    assert after["retriever"]["version"] != before["retriever"]["version"]
    assert ids(after) != ids(before)
    assert tagged.status_code == 200
    assert tagged.json() == after


def test_a_large_catalogue_without_a_retriever_asks_for_candidates(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["dlrm"], rank_whole_up_to=59) as client:
        for answer in (
            client.post("/v1/recommendations", json={"user_id": "7"}),
            client.post("/v1/recommendations", json={"queries": [{"user_id": "7"}]}),
            client.get("/v1/users/7/recommendations"),
        ):
            assert answer.status_code == 422
            assert answer.json()["type"] == "urn:lazydp:problem:candidates-needed"
        assert sorted(ids(ask(client, user_id="7", candidates=["3", "4"]))) == ["3", "4"]


@pytest.mark.parametrize(
    ("retrievers", "words"),
    [
        ({"dlrm": "other"}, "no model 'other'"),
        ({"other": "untrained"}, "no model 'other'"),
        ({"untrained": "dlrm"}, "no two-tower"),
    ],
)
def test_a_retriever_that_is_none_is_refused_at_start(
    bundles: dict[str, Path], retrievers: dict[str, str], words: str
) -> None:
    paths = (bundles["towers"], bundles["dlrm"])
    app = create_app(load_settings(bundles=paths, allow_test_key=True, retrievers=retrievers))
    with pytest.raises(InputError, match=words):
        app.state.context.registry.start()
    app.state.context.registry.close()
