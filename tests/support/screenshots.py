"""Takes the pictures of docs/images that show the console: `make screenshots`. Everything on them is made up."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from support.browser import ARGUMENTS, CHROMIUM, WIDTHS
from support.console import simulate_hour, write_console
from support.service import running_app

_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"


def as_it_is(_: Any) -> None:
    """Nothing is done."""


def show_recommendations(tab: Any) -> None:
    """A user and a history, asked of both models."""
    tab.fill("#user_id", "7")
    tab.fill("#history", "3, 12, 40")
    tab.fill("#k", "6")
    tab.select_option("#beside", "films-trial")
    tab.click("summary")
    tab.fill("#filter-1", "Drama, Comedy")
    tab.press("#user_id", "Enter")
    tab.wait_for_selector("#answer")


PAGES = {
    "privacy": ("/", as_it_is),
    "recommendations": ("/try", show_recommendations),
    "traffic": ("/traffic", as_it_is),
}
# Name of the file -> page, width, colours.
PICTURES: dict[str, tuple[str, str, Literal["light", "dark"]]] = {
    "console-privacy": ("privacy", "wide", "light"),
    "console-privacy-dark": ("privacy", "wide", "dark"),
    "console-privacy-narrow": ("privacy", "narrow", "light"),
    "console-recommendations": ("recommendations", "wide", "light"),
    "console-recommendations-narrow": ("recommendations", "narrow", "dark"),
    "console-traffic": ("traffic", "wide", "light"),
    "console-traffic-narrow": ("traffic", "narrow", "dark"),
}


def _write(path: Path, picture: bytes) -> None:
    """A palette takes a third of the room, and shows the same."""
    with Image.open(io.BytesIO(picture)) as opened:
        opened.convert("RGB").quantize(192).save(path, optimize=True)


def main(folder: Path) -> None:
    """Take the pictures into `folder`."""
    with tempfile.TemporaryDirectory() as made, sync_playwright() as playwright:
        console = write_console(Path(made))
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        with running_app(*console.bundles, ledger=console.ledger) as (client, app):
            context = app.state.context
            simulate_hour(context.metrics, context.traffic, now=time.time())
            for name, (page, width, scheme) in PICTURES.items():
                path, prepare = PAGES[page]
                tab = browser.new_page(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
                tab.goto(f"{client.base_url}{path}")
                prepare(tab)
                _write(folder / f"{name}.png", tab.screenshot(full_page=True))
                tab.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else _FOLDER)
