"""The report, opened in a real browser at the width of a phone and of a desk."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.report import report
from lazydp.components.budget.ledger.verify import verify

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
]  # fmt: skip


def gaussian(noise_multiplier: float):
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=1)


@pytest.fixture
def page_file(sqlite_url: str, tmp_path: Path) -> Path:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop, all of 2026, with a name that is rather long for a phone")
        ledger.set_budget("a" * 64, epsilon=3.0, delta=1e-5, by="A. Turing", reason="privacy review 12")
        ledger.register_dataset("b" * 64, name="shop, December", parents=["a" * 64])
        ledger.set_budget("b" * 64, epsilon=2.5, delta=1e-5, by="A. Turing")
        for number in range(4):
            run = f"run-{number:016x}"
            ledger.reserve(dataset="a" * 64, event=gaussian(9.0 + number), run_id=run)
            if number < 2:
                ledger.commit(run, event=gaussian(9.0 + number), release="sha256:" + "c" * 64, step=1000)
        ledger.void(f"run-{3:016x}", by="A. Turing", reason="the machine burnt down, and its disks with it")
        entries = ledger.entries()
        page = report(entries, ledger=ledger.url, verification=verify(entries))
    file = tmp_path / "budget.html"
    file.write_text(page)
    return file


def test_figures_stand_in_the_page(page_file: Path) -> None:
    page = page_file.read_text()
    assert "Verified:" in page
    assert "privacy review 12" in page
    assert page.count('class="bar"') == 4  # two releases, and each dataset of the family shows them


def test_a_tampered_ledger_is_reported_as_such(sqlite_url: str) -> None:
    with Ledger.open(sqlite_url) as ledger:
        ledger.register_dataset("a" * 64, name="shop")
        page = report(
            ledger.entries(), ledger=ledger.url, verification=verify(ledger.entries(), expect_head="1:" + "0" * 64)
        )
    assert "This ledger does not verify." in page
    assert "Verified:" not in page


def test_an_empty_ledger_has_a_page() -> None:
    assert "No dataset yet." in report([], ledger="sqlite:///x.db", verification=verify([]))


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if not CHROMIUM.exists():
        why = "no /usr/bin/chromium (apt-get install chromium)"
        if os.environ.get("LAZYDP_REQUIRE_BROWSER") == "1":
            pytest.fail(f"LAZYDP_REQUIRE_BROWSER=1, but {why}")
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)], ids=["phone", "desk"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, page_file: Path, tmp_path: Path, width: int, height: int, scheme: str) -> None:
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(request.url))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    assert complaints == []
    assert requests == [page_file.as_uri()]  # nothing from outside
    # No sideways scrolling of the page: wide tables scroll within themselves.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.get_by_role("heading", name="Privacy budget").is_visible()
    for plot in page.locator(".plot svg").all():
        box = plot.bounding_box()
        assert box["width"] > 0.6 * min(width, 1000)
        assert box["height"] > 150
    # Every letter can be read: none smaller than 11 pixels.
    sizes = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.textContent.trim() && !e.closest('svg'))"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 11
    folder = Path(os.environ.get("LAZYDP_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"budget-{width}-{scheme}.png", full_page=True)
    page.close()
