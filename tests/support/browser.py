"""One Chromium for the tests of a file, and what a page must not do in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
WIDTHS = {"wide": 1280, "narrow": 390}
_WIDER = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
_AXE = """async (within) => {
  const found = await axe.run(within || document, {resultTypes: ['violations']});
  return found.violations.flatMap((rule) => rule.nodes.map((node) => rule.id + ': ' + node.html.slice(0, 120)));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Skips where there is no Chromium, unless LAZYDP_REQUIRE_BROWSER=1."""
    if not CHROMIUM.exists():
        why = f"{CHROMIUM} is missing: apt-get install chromium"
        if os.environ.get("LAZYDP_REQUIRE_BROWSER") == "1":
            pytest.fail(f"LAZYDP_REQUIRE_BROWSER=1, but {why}")
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield opened
        opened.close()


def accessibility_faults(tab: Any, *, within: str | None = None) -> list[str]:
    """What axe-core finds wrong with the page, or what a selector names of it: every rule, best practices as well."""
    from axe_playwright_python.base import AXE_SCRIPT

    # By the debugger's protocol, which the page's own policy does not concern.
    if not tab.evaluate("() => 'axe' in window"):
        tab.evaluate(AXE_SCRIPT)
    faults: list[str] = tab.evaluate(_AXE, within)
    return faults


def overflow(tab: Any) -> int:
    """By how many pixels the page is wider than the window."""
    wider: int = tab.evaluate(_WIDER)
    return wider


class Watch:
    """What a tab asked for and complained of."""

    def __init__(self, tab: Any) -> None:
        self.complaints: list[str] = []
        self.asked: list[str] = []
        tab.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        tab.on("request", lambda sent: self.asked.append(sent.url))
