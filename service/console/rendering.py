"""How every page of the service is made."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse

from lazydp.components.budget.report.templates import environment
from lazydp.components.shared.version import release
from lazydp.service.serving.context import Context

KEPT_FOR_A_DAY = "private, max-age=86400"
_FILES = ("console.html", "privacy.html", "try.html", "traffic.html", "docs.html")
_BACKTICKS = re.compile(r"`([^`]+)`")


@functools.cache
def _templates() -> jinja2.Environment:
    folder = Path(__file__).parent / "templates"
    made = environment({name: (folder / name).read_text(encoding="utf-8") for name in _FILES})
    made.filters["code"] = _code
    return made


def page(context: Context, template: str, *, cache_control: str = "no-store", **values: Any) -> HTMLResponse:
    """A page of the service from a template and its values."""
    text = _templates().get_template(template).render(root=context.settings.root_path, version=release(), **values)
    return HTMLResponse(text, headers={"cache-control": cache_control})


def _code(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    parts = _BACKTICKS.split(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if number % 2 else escape(part) for number, part in enumerate(parts)
    )
