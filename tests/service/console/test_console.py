"""The console: what it answers, and Chromium's view of it, by keyboard alone and as axe-core judges it."""

import html
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lazydp.components.budget.ledger.reader import LedgerReader
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.report.claim import at_least, at_most
from lazydp.components.budget.report.overview import LedgerOverview
from lazydp.components.budget.report.report import report
from lazydp.components.budget.statement import DEFAULT_NOT_COVERED
from support.browser import WIDTHS, Watch, accessibility_faults, browser, overflow
from support.console import HOSTILE, Console, simulate_hour, write_console
from support.service import running_app

__all__ = ["browser"]

PAGES = ("/", "/try", "/traffic")
# Colours do not depend on the width, nor the layout on the colours: two looks show both of each.
LOOKS = (("wide", "light"), ("narrow", "dark"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Console:
    return write_console(tmp_path_factory.mktemp("console"))


@pytest.fixture
def ledger(made: Console) -> Iterator[LedgerReader]:
    with LedgerReader.open(made.ledger, read_only=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def console(made: Console) -> Iterator[httpx.Client]:
    """A service over the models and the ledger of `support.console`, with an hour of traffic."""
    with running_app(*made.bundles, ledger=made.ledger) as (client, app):
        context = app.state.context
        simulate_hour(context.metrics, context.traffic, now=time.time())
        yield client


@pytest.fixture(scope="module")
def only_tab(browser: Any) -> Any:
    """One for all tests: a renderer takes most of a second to start."""
    return browser.new_page()


@pytest.fixture
def tab(only_tab: Any) -> Any:
    only_tab.set_viewport_size({"width": WIDTHS["wide"], "height": 900})
    only_tab.emulate_media(color_scheme="light")
    only_tab.goto("about:blank")
    only_tab.watch = Watch(only_tab)
    return only_tab


def article(page: str, number: int) -> str:
    """The text of the card of a model."""
    (found,) = re.findall(rf'(?s)<article class="card" aria-labelledby="model-{number}">(.*?)</article>', page)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", found)).split())


def test_the_page_alone_answers_the_four_questions(console: httpx.Client, ledger: LedgerReader) -> None:
    card = article(console.get("/").text, 1)
    budget = ledger.show("films-2026")
    last = ledger.releases()[-1]
    assert last.epsilon is not None
    assert budget.remaining_epsilon is not None
    # What was spent per person, by this model and by all; and how much is left.
    assert f"This model, per person {at_most(last.epsilon)} epsilon spent, at delta 0.000001" in card
    spent = f"{at_most(budget.committed_epsilon)} epsilon spent on its dataset, films-2026, at delta 0.000001"
    assert f"All releases, per person {spent}" in card
    left = f"Left {at_least(budget.remaining_epsilon)} of epsilon 8 per person"
    assert f"{left}, after all releases and the {at_most(budget.reserved_epsilon)} that open runs have reserved" in card
    # Who released last.
    assert "Last release: G. Hopper on 2026-10-05 08:17 UTC (training, run-2026-10)." in card
    # What is not covered, in plain view.
    assert all(part[1:] in card for part in DEFAULT_NOT_COVERED)
    assert f"Shown by an audit {at_least(0.6 * last.epsilon)} an attack made for the purpose" in card
    assert f"the claim, {at_most(last.epsilon)}, is an upper bound, so the audit does not contradict it" in card


def test_a_model_shows_nothing_of_a_dataset_that_is_not_its_own(console: httpx.Client) -> None:
    page = console.get("/").text
    trial = article(page, 2)
    assert "The ledger does not know this model's dataset" in trial
    unknown = "unknown the ledger does not know its dataset"
    assert f"All releases, per person {unknown} Left {unknown} Shown by an audit none no audit was made" in trial
    assert "Everything else that was spent on its dataset: the ledger does not know its dataset." in trial
    assert "This model, per interaction (example): epsilon 3.976." in trial
    assert not re.search("films-2026|Hopper|spent by releases", trial)
    assert "Epsilon per person is 61.27, above 10" in trial
    assert "Warning" not in article(page, 1)
    assert page.count("Budget of films-2026</h2>") == 1


def test_the_page_tells_of_releases_reservations_and_the_chain(
    console: httpx.Client, made: Console, ledger: LedgerReader
) -> None:
    for path in ("/", "/report"):
        text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", console.get(path).text)).split())
        releases, reservations = text.split(" Releases ")[1].split(" Reservations still open ")
        assert releases.count("G. Hopper") == 3
        assert releases.count("B. Liskov") == 1
        assert "B. Liskov training run-2026-11" in reservations
        assert "All releases together, per person. Somebody who" in text
        together = at_most(ledger.show("films-2026").committed_epsilon)
        assert f"Do not add these figures: all releases together cost {together}, which is less." in releases
        changes = reservations.split("Changes of the budget, and reservations given back ")[1]
        assert changes.startswith(
            "2026-09-01 09:17 UTC, A. Turing: budget set to epsilon 8 instead of 6 (decision 7 of the board). "
            "2026-07-20 09:17 UTC, B. Liskov: reservation of run-2026-07 given back "
            "(the machine failed; its checkpoints were deleted). "
            "2026-01-12 09:30 UTC, A. Turing: budget set to epsilon 6 (privacy review 12). "
        )
        assert re.search(r"[aA]s of \d{4}-\d\d-\d\d \d\d:\d\d UTC", text)
        assert text.count("Delta is the chance that this bound does not hold.") == 1
        assert "1e-06" not in re.sub(r"(?s)The whole privacy statement.*?Budget of films-2026", "", text)
        assert "The chain is verified: 14 entries without a gap" in text
        assert ledger.head() in text
        assert str(made.ledger) not in text, "where the ledger lies is nothing for readers"


def test_the_page_and_the_report_are_made_of_the_same_parts(console: httpx.Client, ledger: LedgerReader) -> None:
    entries = ledger.entries()
    written = report(LedgerOverview.of(entries, verify(entries, recompute=False)), source=ledger.url)
    tables = [re.findall(r"(?s)<table.*?</table>", text) for text in (console.get("/").text, written)]
    assert len(tables[0]) == len(tables[1]) == 3
    # Releases and reservations; of the third, the figures over time, the page shows the latest ten.
    assert tables[0][:2] == tables[1][:2]
    assert [table.count("<tr>") for table in (tables[0][2], tables[1][2])] == [11, 14]


def looked_over(tab: Any, client: httpx.Client, *, within: str | None = None) -> None:
    """Nothing that axe-core objects to, wider than the window, from elsewhere, or in the browser's console."""
    assert accessibility_faults(tab, within=within) == [], tab.url
    assert overflow(tab) <= 0, tab.url
    assert tab.watch.complaints == [], tab.url
    assert all(url.startswith((str(client.base_url), "data:", "about:")) for url in tab.watch.asked)


def tabbed(tab: Any, selector: str) -> None:
    """The element with the keyboard's focus becomes the one that `selector` names, by nothing but the tab key."""
    for _ in range(80):
        tab.keyboard.press("Tab")
        if tab.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"the tab key does not reach {selector}")


def test_every_page_at_two_widths_in_light_and_dark(tab: Any, console: httpx.Client) -> None:
    for path in PAGES:
        tab.goto(f"{console.base_url}{path}")
        assert tab.evaluate("document.scripts.length") == 0
        tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
        for width, scheme in LOOKS:
            tab.set_viewport_size({"width": WIDTHS[width], "height": 900})
            tab.emulate_media(color_scheme=scheme)
            looked_over(tab, console)


def test_the_documentation_of_the_interface(tab: Any, console: httpx.Client) -> None:
    tab.goto(f"{console.base_url}/docs")
    # One section of its many stands for all.
    tab.evaluate("[...document.querySelectorAll('details')].slice(0, 3).forEach(fold => { fold.open = true })")
    looked_over(tab, console, within="section:first-of-type")
    tab.set_viewport_size({"width": WIDTHS["narrow"], "height": 900})
    assert overflow(tab) <= 0


def test_a_page_with_faults_is_seen(tab: Any) -> None:
    tab.set_content(
        "<h3 style='color:#bbb'>too pale</h3><input><img src='data:,'><button></button><p style='width:2000px'>a"
    )
    found = " ".join(accessibility_faults(tab))
    for rule in ("html-has-lang", "color-contrast", "label", "image-alt", "button-name", "document-title"):
        assert f"{rule}:" in found
    assert overflow(tab) > 0


def test_somebody_compares_two_models_by_keyboard_alone(tab: Any, console: httpx.Client) -> None:
    tab.goto(str(console.base_url))
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the content"
    tabbed(tab, "nav a[href='/try']")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#user_id")
    for selector, typed in (("#user_id", "7"), ("#history", "3, 12"), ("#k", "6")):
        tabbed(tab, selector)
        tab.keyboard.press("Control+a")
        tab.keyboard.type(typed)
    tabbed(tab, "#beside")
    tab.keyboard.type("films-t")
    tabbed(tab, "summary")
    tab.keyboard.press("Enter")
    tabbed(tab, "[name='filter.genre']")
    tab.keyboard.type("Drama")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#answer")
    assert tab.url == f"{console.base_url}/try#answer"
    query = {"user_id": "7", "history": ["3", "12"], "k": 6, "filters": {"genre": ["Drama"]}}
    for number, name in enumerate(("films", "films-trial"), start=1):
        answered = console.post("/v1/recommendations", params={"model": name}, json=query).json()["items"]
        shown = tab.locator(f"[aria-labelledby=side-{number}] .title").all_inner_texts()
        assert [text.split("\n")[0].split(" only")[0].split(" rank")[0] for text in shown] == [
            item["title"] for item in answered
        ]
    assert tab.locator(".results img").count() == 12
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert tab.input_value("#user_id") == "7"
    looked_over(tab, console)
    tab.set_viewport_size({"width": WIDTHS["narrow"], "height": 900})
    assert overflow(tab) <= 0
    # And on to what is similar to the best item.
    tabbed(tab, ".results button")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("h2:text('similar to')")
    assert "by the item" in tab.inner_text("[aria-labelledby=side-1]")


def test_what_is_typed_and_what_the_catalogue_holds_stays_text(tab: Any, console: httpx.Client) -> None:
    tab.goto(f"{console.base_url}/try")
    tab.fill("#user_id", HOSTILE)
    tab.fill("#history", '"><script>document.title = "taken"</script>')
    tab.press("#user_id", "Enter")
    tab.wait_for_selector("[role=status]")
    assert tab.input_value("#user_id") == HOSTILE
    tab.fill("#item_id", "0")
    tab.fill("#item-k", "63")
    tab.press("#item_id", "Enter")
    tab.wait_for_selector(".results")
    assert tab.locator(".title", has_text=HOSTILE).count() == 1
    assert tab.title() == "Recommendations – lazydp"
    assert tab.locator("main script, img[src=x]").count() == 0
    assert tab.watch.complaints == []


def test_the_report_is_one_file_without_the_service(tab: Any, console: httpx.Client, tmp_path: Path) -> None:
    tab.goto(str(console.base_url))
    with tab.expect_download() as download:
        tab.click("text=Download the report")
    assert download.value.suggested_filename.startswith("privacy-budget-")
    file = tmp_path / "report.html"
    download.value.save_as(file)
    tab.watch.asked.clear()
    tab.goto(file.as_uri())
    assert accessibility_faults(tab, within="section:first-of-type") == []
    assert tab.evaluate("document.styleSheets[0].cssRules.length") > 50, "the style is let through by the policy"
    tab.set_viewport_size({"width": WIDTHS["narrow"], "height": 900})
    assert overflow(tab) <= 0
    assert set(tab.watch.asked) == {file.as_uri()}
    assert tab.watch.complaints == []
