"""The page to try recommendations on, without a browser: forms, refusals, addresses and the prefix of a proxy."""

import html
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from lazydp.service.console.recommendations import _may_be_shown
from support.console import HOSTILE, statement, write_films

HTML = {"accept": "text/html,*/*"}
TITLE = re.compile(r'<p class="title">(.*?)(?: <span class="mark">(.*?)</span>)?</p>')


def titles(page: str) -> list[str]:
    return [html.unescape(title) for title, _ in TITLE.findall(page)]


def answered(client: httpx.Client, model: str = "untrained", /, **query: Any) -> list[str]:
    found = client.post("/v1/recommendations", params={"model": model}, json=query).json()["items"]
    return [item["title"] for item in found]


def test_every_field_of_the_form_reaches_the_query(client: httpx.Client) -> None:
    form = {"user_id": "7", "history": "3, 12 ,", "k": "5", "filter.genre": "Drama, Comedy", "filter.year": ""}
    query: dict[str, Any] = {"user_id": "7", "history": ["3", "12"], "k": 5, "filters": {"genre": ["Drama", "Comedy"]}}
    assert titles(client.post("/try", data=form).text) == answered(client, **query)
    kept = titles(client.post("/try", data={**form, "seen": "1"}).text)
    assert kept == answered(client, **query, exclude_seen=False)
    assert titles(client.post("/try", data={**form, "model": "dlrm"}).text) == answered(client, "dlrm", **query)


FURTHER: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "values, and one not": (
        {"filter.genre": "Drama, Comedy, not Horror, not War"},
        {"filters": {"genre": {"any_of": ["Drama", "Comedy"], "not": ["Horror", "War"]}}},
    ),
    "bounds": ({"filter.year": ">= 1980, <1990"}, {"filters": {"year": {"gte": 1980, "lt": 1990}}}),
    "other bounds": ({"filter.year": "> 1980, <= 1990"}, {"filters": {"year": {"gt": 1980, "lte": 1990}}}),
    "a factor for some": (
        {"boost": "genre", "boosted": "Drama", "boost_how": "multiply", "boost_by": "1000"},
        {"boosts": [{"attribute": "genre", "matching": ["Drama"], "multiply": 1000}]},
    ),
    "an addend by the number": (
        {"boost": "year", "boosted": "", "boost_how": "add", "boost_by": "-0.5"},
        {"boosts": [{"attribute": "year", "add": -0.5}]},
    ),
    "weights": ({"weights": "1, 50"}, {"history_weights": [1, 50]}),
    "a half-life": ({"half_life": "0.1"}, {"half_life": 0.1}),
}


@pytest.mark.parametrize("case", FURTHER)
def test_ranges_not_boosts_and_weights_reach_the_query(client: httpx.Client, case: str) -> None:
    form, query = FURTHER[case]
    history = {"history": ["3", "12"], "k": 8}
    plain = answered(client, **history)
    page = client.post("/try", data={"history": "3, 12", "k": "8", **form}).text
    assert titles(page) == answered(client, **history, **query) != plain
    # What was typed is shown again, and not hidden in a fold.
    assert "<details open>" in page
    assert all(f'value="{html.escape(text)}"' in page for text in form.values() if text)


UNREADABLE = {
    "a bound without a number": ({"filter.year": ">= soon"}, "expected a number for the bound >="),
    "a bound twice": ({"filter.year": "< 1980, < 1990"}, "the bound < is given twice"),
    "a weight": ({"history": "3", "weights": "much"}, "expected a number for a weight"),
    "too few weights": ({"history": "3, 12", "weights": "1"}, "expected one for each of 2 items, found 1"),
    "a half-life": ({"half_life": "long"}, "expected a number for the half-life"),
    "a boost": ({"boost": "year", "boost_by": "more"}, "expected a number for a boost"),
    "a factor below 0": ({"boost": "year", "boost_by": "-1"}, "greater than or equal to 0.000001"),
    "a number that is none": ({"filter.year": ">= nan"}, "finite"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_field_that_cannot_be_read_is_told_on_the_page(client: httpx.Client, case: str) -> None:
    form, words = UNREADABLE[case]
    page = html.unescape(client.post("/try", data={"user_id": "7", **form}, headers=HTML).text)
    assert "No recommendations" in page
    assert words in page


def test_similar_items(client: httpx.Client) -> None:
    page = client.post("/try", data={"item_id": "5", "k": "4", "user_id": ""}).text
    found = client.get("/v1/items/5/similar", params={"k": 4}).json()["items"]
    assert titles(page) == [item["title"] for item in found]
    assert "does not know this item" in html.unescape(client.post("/try", data={"item_id": HOSTILE}).text)


def test_two_models_side_by_side_say_where_they_agree(client: httpx.Client) -> None:
    page = client.post("/try", data={"user_id": "7", "k": "30", "model": "untrained", "beside": "dlrm"}).text
    sides = [answered(client, name, user_id="7", k=30) for name in ("untrained", "dlrm")]
    marks = [mark for _, mark in TITLE.findall(page)]
    for mine, others, told in ((sides[0], sides[1], marks[:30]), (sides[1], sides[0], marks[30:])):
        expected = [f"rank {others.index(title) + 1} there" if title in others else "only here" for title in mine]
        assert told == expected
    assert f"{len(set(sides[0]) & set(sides[1]))} of 30 items are in both" in page
    assert 0 < len(set(sides[0]) & set(sides[1])) < 30


def test_one_side_that_refuses_leaves_the_other(client: httpx.Client) -> None:
    page = client.post("/try", data={"user_id": "nobody", "model": "popular", "beside": "dlrm"}).text
    assert len(titles(page)) == 10
    assert "the most popular" in page
    assert "No recommendations: the model does not know this user" in html.unescape(page)


def test_nobody_gets_what_is_popular_only_where_it_was_released(client: httpx.Client) -> None:
    assert "With neither, what is most popular" not in client.get("/try").text
    assert "With neither, what is most popular" in client.get("/try", params={"model": "popular"}).text
    assert 'id="answer"' not in client.post("/try", data={}).text
    assert titles(client.post("/try", data={"model": "popular"}).text) == answered(client, "popular")


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "101", "1e1", "²", "9" * 5000])
def test_a_count_that_is_none_is_refused_in_words(client: httpx.Client, wrong: str) -> None:
    for asked in ({"user_id": "7"}, {"item_id": "5"}):
        page = client.post("/try", data={**asked, "k": wrong}, headers=HTML)
        assert page.status_code == 200
        assert "No recommendations" in page.text


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"model": "other"}, 404),
        ({"user_id": "7", "beside": "other"}, 404),
        ({"nothing": "7"}, 422),
        ({f"filter.{n}": "x" for n in range(60)}, 422),
    ],
)
def test_what_is_wrong_is_said_in_html_to_a_person_and_in_json_to_a_program(
    client: httpx.Client, form: dict[str, str], status: int
) -> None:
    page = client.post("/try", data=form, headers=HTML)
    assert page.status_code == status
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert client.post("/try", data=form).headers["content-type"] == "application/problem+json"


def test_an_unknown_model_in_the_address_is_told_to_a_person(client: httpx.Client) -> None:
    page = client.get("/try", params={"model": "nope"}, headers=HTML)
    assert page.status_code == 404
    assert "no such model is served" in page.text
    assert client.post("/try", content=b"{}", headers={"content-type": "application/json"}).status_code == 415


@pytest.mark.parametrize(("path", "first"), [("/nope", "./"), ("/tries/of/mine", "../../"), ("/favicon.ico", "./")])
def test_a_path_that_is_not_is_told_to_a_person_too(client: httpx.Client, path: str, first: str) -> None:
    page = client.get(path, headers=HTML)
    assert (page.status_code, page.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "nothing at this path" in page.text
    assert f'<a href="{first}">' in page.text
    for program in ("/v1/nope", "/v2/nope", "/metrics/nope", path):
        accept = {} if program == path else HTML
        assert client.get(program, headers=accept).headers["content-type"].endswith("json")


def test_an_unknown_attribute_and_a_long_id_are_told_on_the_page(client: httpx.Client) -> None:
    assert "No recommendations" in client.post("/try", data={"user_id": "7", "filter.taste": "sweet"}).text
    assert "No recommendations" in client.post("/try", data={"user_id": "7" * 300}).text


def test_no_form_sends_ids_in_an_address(client: httpx.Client) -> None:
    page = client.post("/try", data={"user_id": "7", "history": "3", "model": "untrained", "beside": "dlrm"}).text
    forms = re.findall(r"<form [^>]*>", page)
    assert len(forms) == 2 + 20
    assert all('method="post"' in form for form in forms)
    assert set(re.findall(r'href="([^"]*)"', page)) == {
        "/assets/page.css", "/assets/icon.svg", "#main", "/", "/try", "/traffic", "/docs",
    }  # fmt: skip


def test_what_is_typed_stays_text(client: httpx.Client) -> None:
    form = {"user_id": HOSTILE, "history": HOSTILE, "filter.genre": HOSTILE, f"filter.{HOSTILE}": "x", "item_id": ""}
    page = client.post("/try", data=form).text
    assert "<img" not in page
    assert html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("data:image/png;base64,AA", True),
        ("/films/7.jpg", True),
        ("https://images.example/7.jpg", True),
        ("https://images.example.evil/7.jpg", False),
        ("https://images.example", False),
        ("http://images.example/7.jpg", False),
        ("//evil.example/7.jpg", False),
        ("/\\evil.example/7.jpg", False),
        ("data:text/html,<script>", False),
        ("javascript:alert(1)", False),
        ("7.jpg", False),
    ],
)
def test_only_pictures_that_the_policy_lets_through_are_shown(address: str, shown: bool) -> None:
    assert _may_be_shown(address, ("https://images.example",)) == shown


def test_pictures_are_a_setting(start: Any, tmp_path: Path) -> None:
    private = statement(23.0)
    write_films(tmp_path / "films", name="films", dataset="d", claimed=private)
    with start(tmp_path / "films", image_origins=["https://images.example"]) as client:
        page = client.post("/try", data={"user_id": "7"})
        assert page.text.count('<img src="data:image/svg+xml,') == 10
        assert "img-src 'self' data: https://images.example;" in page.headers["content-security-policy"]
        assert 'name="filter.image"' not in page.text
    with start(tmp_path / "films", image_attribute=None) as client:
        assert "<img" not in client.post("/try", data={"user_id": "7"}).text


def test_pages_know_the_prefix_of_a_proxy(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"], root_path="/recs") as client:
        for prefix in ("", "/recs"):
            for path in ("/", "/try", "/traffic", "/docs"):
                links = re.findall(r'(?:href|action)="(/[^"]*)"', client.get(prefix + path).text)
                assert len(links) >= 6
                assert all(link.startswith("/recs/") for link in links)
            answer = client.post(f"{prefix}/try", data={"user_id": "7"}).text
            assert len(titles(answer)) == 10
            assert set(re.findall(r'action="([^"]*)"', answer)) == {"/recs/try#answer"}
            assert client.get(f"{prefix}/v1/models").status_code == 200
        wrong = client.get("/recs/try", params={"model": "nope"}, headers=HTML).text
        assert {"./assets/page.css", "./"} == set(re.findall(r'href="([^"]*)"', wrong))
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/recs"}]
        assert client.get("/recsx/v1/models").status_code == 404
