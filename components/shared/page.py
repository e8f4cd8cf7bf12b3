"""Pages that Kubeflow shows of a task: HTML with everything in it, for a sandboxed frame without scripts or network."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

from lazydp.components.shared.plot import Series, bar, chart, number_axis

Audience = Literal["private", "public"]
_AUDIENCE = {
    "private": "Private: computed from private data without noise. For people who may read the data.",
    "public": "Public: nothing here was computed from private data but what was released with noise and is charged.",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what they are, one a row."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Figures:
    """A table of numbers: a head, and rows that begin with a name; None is left blank."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve over steps: (step, value) pairs."""

    title: str
    unit: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Part:
    """Part of a whole: its name, size, and the class of `style.css` that gives its colour."""

    name: str
    size: float
    kind: Literal["committed", "reserved"]


@dataclass(frozen=True, slots=True)
class Bar:
    """Parts of a whole, drawn over `whole`."""

    title: str
    whole: float
    parts: Sequence[Part]


Section = Facts | Figures | Line | Bar


@functools.cache
def style() -> str:
    """The style sheet of every page of lazydp."""
    return Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def page(title: str, *, audience: Audience, sections: Sequence[Section], summary: str = "") -> str:
    """The page as text.

    Args:
        title: its heading.
        audience: who may see it; the page says so first.
        sections: from the top; those without rows or points are left out.
        summary: one sentence under the heading.
    """
    body = "".join(_shown(section) for section in sections if _filled(section))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style()}</style></head><body>'
        f'<main><h1>{escape(title)}</h1><p class="notice {audience}">{_AUDIENCE[audience]}</p>'
        f"{f'<p>{escape(summary)}</p>' if summary else ''}{body}</main></body></html>\n"
    )


def number(value: float | None) -> str:
    """A figure as people read it."""
    if value is None or not math.isfinite(value):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def _filled(section: Section) -> bool:
    if isinstance(section, Line):
        return bool(section.points)
    return bool(section.parts if isinstance(section, Bar) else section.rows)


def _facts(section: Facts) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in section.rows
    )
    return f'<h2>{escape(section.title)}</h2><div class="scroll"><table>{rows}</table></div>'


def _figures(section: Figures) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("", *section.head))
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="number">{number(value)}</td>' for value in values)
        + "</tr>"
        for name, values in section.rows
    )
    return (
        f'<h2>{escape(section.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _line(section: Line) -> str:
    points = [(x, y) for x, y in section.points if math.isfinite(y)]
    if not points:
        return ""
    values = [y for _, y in points]
    across = number_axis("step", high=max(x for x, _ in points))
    up = number_axis(section.unit, low=min(0.0, *values), high=max(0.0, *values))
    drawn = chart(section.title, across=across, up=up, series=[Series("first", points)])
    return f"<h2>{escape(section.title)}</h2>{drawn}"


def _bar(section: Bar) -> str:
    drawn = bar(section.title, whole=section.whole, parts=[(part.kind, part.size) for part in section.parts])
    key = "".join(f'<li class="{part.kind}">{escape(part.name)}: {number(part.size)}</li>' for part in section.parts)
    return f'<h2>{escape(section.title)}</h2>{drawn}<ul class="key">{key}</ul>'


def _shown(section: Section) -> str:
    match section:
        case Facts():
            return _facts(section)
        case Figures():
            return _figures(section)
        case Line():
            return _line(section)
        case Bar():
            return _bar(section)
