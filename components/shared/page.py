"""Pages that Kubeflow shows of a task: HTML with everything in it, for a sandboxed frame without scripts or network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Audience = Literal["private", "public"]
_AUDIENCE = {
    "private": "Private: computed from private data without noise. For people who may read the data.",
    "public": "Public: nothing here was computed from private data but what was released with noise and is charged.",
}
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --mark: #0969da; --other: #bc4c00 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --line: #3d444d; --mark: #4493f8; --other: #db6d28 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { font-size: 1.3rem; margin: 0 0 .5rem } h2 { font-size: 1.05rem; margin: 1.5rem 0 .5rem }
.notice { border-left: 4px solid var(--mark); padding: .25rem .75rem; margin: 0 0 1rem }
.private { border-color: var(--other) }
.scroll { overflow-x: auto } table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
th { font-weight: 600; overflow-wrap: normal } td.number { text-align: right; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 240, 70, 40


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
class Bar:
    """Parts of a whole: (name, size) pairs, drawn over `whole`."""

    title: str
    whole: float
    parts: Sequence[tuple[str, float]]


Section = Facts | Figures | Line | Bar


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
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1><p class="notice {audience}">{_AUDIENCE[audience]}</p>'
        f"{f'<p>{escape(summary)}</p>' if summary else ''}{body}</body></html>\n"
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
    right, top = max(x for x, _ in points), max(y for _, y in points)
    low = min(0.0, *(y for _, y in points))
    across, up = (right or 1.0), ((top - low) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / across * (_WIDTH - _LEFT - 20), 20 + (top - y) / up * (_HEIGHT - _BOTTOM - 20)

    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in (place(*point) for point in points))
    base = place(0, low)[1]
    return (
        f"<h2>{escape(section.title)}</h2>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(section.title)}">'
        f'<g stroke="var(--line)"><line x1="{_LEFT}" y1="20" x2="{_LEFT}" y2="{base:.1f}"/>'
        f'<line x1="{_LEFT}" y1="{base:.1f}" x2="{_WIDTH - 20}" y2="{base:.1f}"/></g>'
        f'<polyline points="{path}" fill="none" stroke="var(--mark)" stroke-width="2"/>'
        f'<g fill="var(--mark)">{marks}</g>'
        f'<text x="{_LEFT - 6}" y="24" text-anchor="end">{number(top)}</text>'
        f'<text x="{_LEFT - 6}" y="{base:.1f}" text-anchor="end">{number(low)}</text>'
        f'<text x="{_WIDTH - 20}" y="{_HEIGHT - 16}" text-anchor="end">step {number(right)}</text>'
        f'<text x="{_LEFT}" y="14">{escape(section.unit)}</text></svg>'
    )


def _bar(section: Bar) -> str:
    whole = max(section.whole, sum(size for _, size in section.parts)) or 1.0
    colours = ("var(--mark)", "var(--other)", "var(--line)")
    drawn, left, names = "", 0.0, []
    for index, (name, size) in enumerate(section.parts):
        width = size / whole * _WIDTH
        drawn += f'<rect x="{left:.1f}" y="4" width="{width:.1f}" height="24" fill="{colours[index % 3]}"/>'
        left += width
        names.append((name, number(size)))
    return (
        f"<h2>{escape(section.title)}</h2>"
        f'<svg viewBox="0 0 {_WIDTH} 32" role="img" aria-label="{escape(section.title)}">{drawn}'
        f'<rect x="0.5" y="4" width="{_WIDTH - 1}" height="24" fill="none" stroke="var(--ink)"/></svg>'
        + _facts(Facts("", names)).replace("<h2></h2>", "")
    )


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
