"""The page, in a browser: at two widths, by keyboard, and with the checks that a screen reader's user needs."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
WIDTHS = {"wide": 1280, "narrow": 380}

# What axe-core checks first, in a page's own words: names of controls, one heading tree, landmarks, titles, contrast,
# targets, ids, language, and that nothing is wider than the window.
CHECKS = """() => {
  const found = [];
  const say = (what, node) => found.push(what + ': ' + (node ? node.outerHTML.slice(0, 80) : ''));
  const all = (selector) => [...document.querySelectorAll(selector)];
  if (!document.documentElement.lang) say('no language');
  if (!document.title) say('no title');
  for (const one of ['main', 'header', 'h1']) if (all(one).length !== 1) say('not exactly one ' + one);
  const ids = all('[id]').map((node) => node.id);
  if (new Set(ids).size !== ids.length) say('an id twice');
  let level = 0;
  for (const heading of all('h1,h2,h3,h4')) {
    const next = Number(heading.tagName[1]);
    if (next > level + 1) say('a heading skips a level', heading);
    level = next;
  }
  for (const input of all('input,select,textarea')) {
    if (!(input.labels && input.labels.length && input.labels[0].textContent.trim())) say('no label', input);
  }
  for (const control of all('a,button,summary')) if (!control.textContent.trim()) say('no name', control);
  for (const svg of all('svg')) {
    if (svg.getAttribute('role') !== 'img' || !svg.getAttribute('aria-label')) say('a picture without words', svg);
  }
  for (const attribute of ['aria-labelledby', 'aria-describedby']) {
    for (const node of all('[' + attribute + ']')) {
      for (const id of node.getAttribute(attribute).split(' ')) {
        if (!document.getElementById(id)) say(attribute + ' leads nowhere', node);
      }
    }
  }
  for (const cell of all('th')) if (!cell.getAttribute('scope')) say('a head of a table without scope', cell);
  for (const node of all('[tabindex]')) if (node.tabIndex > 0) say('an order of its own', node);
  const channel = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (rgb) => 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]);
  const colour = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const rgba = colour(getComputedStyle(node).backgroundColor);
      if (rgba.length === 3 || rgba[3] > 0) return rgba;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const text = colour(node.closest('svg') ? style.fill : style.color);
    const [light, dark] = [luminance(text), luminance(ground(node))].sort((a, b) => b - a);
    if ((light + 0.05) / (dark + 0.05) < 4.5) say('too little contrast', node);
  }
  for (const control of all('input,select,button')) {
    const box = control.getBoundingClientRect();
    if (box.height < 24 || box.width < 24) say('too small to hit', control);
  }
  if (document.documentElement.scrollWidth > innerWidth) say('wider than the window');
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        if os.environ.get("LAZYDP_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{CHROMIUM} is missing and LAZYDP_REQUIRE_BROWSER=1: apt-get install chromium")
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def tab(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """A tab of some width that must not ask anybody but the service, and must not complain."""
    context = browser.new_context(viewport={"width": WIDTHS[request.param], "height": 900})
    tab = context.new_page()
    tab.complaints = []
    tab.on("console", lambda message: tab.complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.asked = []
    tab.on("request", lambda sent: tab.asked.append(sent.url))
    yield tab
    context.close()


def looked_over(tab: Any, client: httpx.Client) -> None:
    assert tab.evaluate(CHECKS) == []
    assert tab.complaints == []
    assert all(url.startswith((str(client.base_url), "data:")) for url in tab.asked)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/?model=dlrm", "/docs"])
def test_pages_are_accessible(tab: Any, client: httpx.Client, path: str, scheme: str) -> None:
    tab.emulate_media(color_scheme=scheme)
    tab.goto(f"{client.base_url}{path}")
    for summary in tab.query_selector_all("summary")[:3]:
        summary.click()
    looked_over(tab, client)


def test_a_page_with_faults_is_seen(tab: Any) -> None:
    tab.set_content("<h1>a</h1><h3 style='color:#bbb'>b</h3><input><svg></svg><button></button>")
    found = " ".join(tab.evaluate(CHECKS))
    for fault in ("no language", "skips a level", "no label", "without words", "no name", "contrast", "one main"):
        assert fault in found


def test_somebody_tries_a_user_by_keyboard(tab: Any, client: httpx.Client) -> None:
    tab.goto(str(client.base_url))
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the content"
    while tab.evaluate("document.activeElement.id") != "user_id":
        tab.keyboard.press("Tab")
    tab.keyboard.type("7")
    tab.keyboard.press("Tab")
    tab.keyboard.type("1, 2")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("table")
    rows = tab.query_selector_all("[aria-labelledby=answer] tbody tr")
    assert len(rows) == 10
    best = client.post("/v1/recommendations", json={"user_id": "7", "history": ["1", "2"]}).json()["items"][0]
    assert best["title"] in rows[0].inner_text()
    assert "near to Title of item" in rows[0].query_selector("small").inner_text()
    assert tab.input_value("#user_id") == "7"
    assert "?" not in tab.url
    looked_over(tab, client)


def test_somebody_chooses_another_model(tab: Any, client: httpx.Client) -> None:
    tab.goto(f"{client.base_url}/")
    assert tab.inner_text("h1") == "untrained"
    tab.fill("#user_id", "7")
    tab.fill("#k", "3")
    tab.select_option("#model", "dlrm")
    tab.click("button")
    tab.wait_for_selector("h1:text('dlrm')")
    assert tab.input_value("#user_id") == "7"
    assert "3 items, by the user" in tab.inner_text("caption")
    best = client.post("/v1/recommendations", params={"model": "dlrm"}, json={"user_id": "7"}).json()["items"][0]
    assert best["title"] in tab.inner_text("tbody tr")
    looked_over(tab, client)


def test_what_is_wrong_is_said_in_html_to_a_person_and_in_json_to_a_program(client: httpx.Client) -> None:
    other = {"model": "other"}
    asked: list[tuple[str, str, dict[str, Any]]] = [("GET", "/", {"params": other}), ("POST", "/try", {"data": other})]
    for method, path, model in asked:
        page = client.request(method, path, headers={"accept": "text/html,*/*"}, **model)
        assert page.status_code == 404
        assert page.headers["content-type"].startswith("text/html")
        assert "no such model is served" in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        program = client.request(method, path, **model)
        assert program.headers["content-type"] == "application/problem+json"
    for wrong in ("0", "-1", "many", "101000", "9" * 5000):
        page = client.post("/try", data={"user_id": "7", "k": wrong}, headers={"accept": "text/html"})
        assert page.status_code == 200
        assert "No recommendations" in page.text


def test_pages_know_the_prefix_of_a_proxy(start: Any, bundles: dict[str, Path]) -> None:
    with start(bundles["towers"], root_path="/recs") as client:
        for prefix in ("", "/recs"):
            for path in ("/", "/docs"):
                links = re.findall(r'(?:href|action)="(/[^"]*)"', client.get(prefix + path).text)
                assert links
                assert all(link.startswith("/recs/") for link in links)
            assert client.get(f"{prefix}/v1/models").status_code == 200
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/recs"}]
        assert client.get("/recsx/v1/models").status_code == 404


def test_somebody_unknown_is_told_so(tab: Any, client: httpx.Client) -> None:
    tab.goto(f"{client.base_url}/")
    tab.fill("#user_id", "nobody")
    tab.click("button")
    tab.wait_for_selector("[role=status]")
    assert "nobody" not in tab.url
    looked_over(tab, client)
    assert "does not know this user" in tab.inner_text("[role=status]")


def test_nobody_gets_what_is_popular_where_it_was_released(tab: Any, start: Any, bundles: Any) -> None:
    with start(bundles["popular"]) as client:
        tab.goto(f"{client.base_url}/")
        assert tab.query_selector("[role=status]") is None
        assert "With neither, what is most popular" in tab.inner_text("#try-hint")
        tab.click("button[type=submit]")
        assert "the most popular" in tab.inner_text("#answer")
        asked = client.post("/v1/recommendations", json={"k": 10}).json()
        assert tab.locator("[aria-labelledby=answer] tbody tr").count() == len(asked["items"]) == 10


def test_nobody_gets_nothing_where_nothing_was_released(tab: Any, client: httpx.Client) -> None:
    tab.goto(f"{client.base_url}/")
    assert "popular" not in tab.inner_text("#try-hint")
    tab.click("button[type=submit]")
    assert tab.query_selector("[role=status]") is None


def test_what_is_typed_stays_text(tab: Any, client: httpx.Client) -> None:
    tab.goto(f"{client.base_url}/")
    tab.fill("#user_id", "<script>alert(1)</script>")
    tab.fill("#history", '"><img src=x>')
    tab.click("button")
    tab.wait_for_selector("[role=status]")
    assert tab.query_selector("main script, main img") is None
    assert tab.input_value("#user_id") == "<script>alert(1)</script>"


def test_pages_have_no_outside_assets(client: httpx.Client) -> None:
    for path in ("/", "/docs", "/assets/page.css"):
        response = client.get(path)
        assert response.status_code == 200
        assert re.findall(r"(?:src|href|url\()=?[\"'(]?(https?:|//)", response.text) == []
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


def test_docs_show_code_as_code(client: httpx.Client) -> None:
    text = client.get("/docs").text
    assert "`" not in re.sub(r"(?s)<pre.*?</pre>", "", text)
    assert "<code>next_offset</code>" in text


def test_docs_name_every_path(client: httpx.Client) -> None:
    from lazydp.service.app import document

    text = client.get("/docs").text
    assert [path for path in document()["paths"] if f"<code>{path}</code>" not in text] == []
