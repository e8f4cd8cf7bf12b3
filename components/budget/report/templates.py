"""The parts that pages about the budget are made of, and how their figures and times are written."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

import jinja2
from markupsafe import Markup

from lazydp.components.budget.ledger.views import DatasetBudget
from lazydp.components.budget.report import pictures
from lazydp.components.budget.report.claim import PER, at_least, at_most, audit_words, meaning
from lazydp.components.budget.report.overview import Timeline
from lazydp.components.budget.statement import PrivacyStatement

_FILES = ("parts.html", "report.html")


def environment(further: Mapping[str, str] | None = None) -> jinja2.Environment:
    """Templates of the budget's pages, and `further` ones by name; everything is escaped."""
    # importlib.resources cannot read a namespace package of an editable install.
    texts = {name: Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _FILES}
    made = jinja2.Environment(
        loader=jinja2.DictLoader({**texts, **(further or {})}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"moment": moment, "time": _time, "at_most": at_most, "at_least": at_least, "sentence": _sentence}
    made.globals |= {
        "per": PER,
        "meaning": meaning,
        "audit_words": audit_words,
        "budget_words": pictures.budget_words,
        "budget_bar": _budget_bar,
        "budget_chart": _budget_chart,
        "steps_chart": _steps_chart,
    }
    return made


def moment(time: str) -> str:
    """A time of ISO 8601 to the minute, in UTC."""
    return datetime.datetime.fromisoformat(time).astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _time(at: float) -> str:
    """POSIX seconds likewise."""
    return datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _sentence(text: str) -> str:
    """With a capital and a full stop."""
    return text[:1].upper() + text[1:].rstrip(".") + "."


# Pictures escape what they are given.


def _budget_bar(budget: DatasetBudget) -> Markup:
    return Markup(pictures.budget_bar(budget))  # noqa: S704


def _budget_chart(timeline: Timeline, until: float) -> Markup:
    return Markup(pictures.budget_chart(timeline, until=until))  # noqa: S704


def _steps_chart(statement: PrivacyStatement) -> Markup:
    return Markup(pictures.steps_chart(statement))  # noqa: S704
