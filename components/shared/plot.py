"""Plots as inline SVG for pages of ours: no scripts, no outside assets, and text of one size at every width.

Across, everything is placed in per cent of the picture; up and down, in pixels. So a picture fills the width that it is
given, and its text is never scaled. Colours come from classes of `style.css`.
"""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, TypeAlias

_HEIGHT = 200
_BAR_HEIGHT = 28
# Steps of a time axis, in seconds, with the form of their labels.
_DAY = 86400
_TIME_STEPS = tuple(
    [(step * 60, "%H:%M") for step in (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720)]
    + [(step * _DAY, "%d %b") for step in (1, 2, 5, 7, 14)]
)
_MONTH_STEPS = (1, 2, 3, 6, 12, 24, 60, 120)
_LEAST_SPAN = 60.0
# A change that is narrower than this, in per cent of the picture, is drawn with the next one.
_FINEST = 0.05

Form: TypeAlias = Literal["steps", "stack", "line", "bars"]
Point: TypeAlias = tuple[float, float | None]


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis.

    Attributes:
        label: name and unit.
        low: value at its beginning.
        high: value at its end, above `low`.
        ticks: values with their labels.
    """

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


@dataclass(frozen=True, slots=True)
class Series:
    """What is drawn of one quantity.

    Attributes:
        kind: class of `style.css` that gives the colour.
        points: (x, y) in order of x; y None leaves a gap.
        form: `steps` holds each value until the next point; `stack` fills the steps from zero, or from the series named
            first; `line` joins points; `bars` draws one of `width` from each x.
        width: of a bar, in units of x.
    """

    kind: str
    points: Sequence[Point]
    form: Form = "line"
    width: float = 0.0


def number_axis(label: str, *, high: float, low: float = 0.0, count: int = 4) -> Axis:
    """An axis from `low` or below to `high` or above, with about `count` ticks at 1, 2, 2.5 or 5 times a power of ten.

    Raises:
        ValueError: an end is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"expected finite ends of an axis, found {low} and {high}")
    span = high - low if high > low else max(abs(high), 1.0)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10, 20) if factor * power * count >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    ticks = tuple((place * step, f"{place * step:.6g}") for place in range(first, last + 1))
    return Axis(label, first * step, last * step, ticks)


def time_axis(label: str, *, first: float, last: float, count: int = 5) -> Axis:
    """An axis of times in UTC, with ticks at whole minutes, hours, days or months.

    Args:
        label: its name.
        first: POSIX seconds of its beginning.
        last: POSIX seconds of its end; at least a minute is shown.
        count: intervals between ticks, at most.
    """
    last = max(last, first + _LEAST_SPAN)
    found = next(((step, form) for step, form in _TIME_STEPS if step * count >= last - first), None)
    if found is None:
        return Axis(label, first, last, _months(first, last, count - 1))
    step, form = found
    begin = math.ceil(first / step) * step
    ticks = ((at, _utc(at).strftime(form)) for at in range(begin, math.floor(last) + 1, step))
    return Axis(label, first, last, tuple((float(at), text) for at, text in ticks))


def _months(first: float, last: float, count: int) -> tuple[tuple[float, str], ...]:
    """The beginnings of months between two times, evenly apart."""
    ends = [12 * at.year + at.month - 1 for at in (_utc(first), _utc(last))]
    apart = ends[1] - ends[0]
    step = next((step for step in _MONTH_STEPS if step * count >= apart), max(apart // count, 1))
    months = range(ends[0] + 1, ends[1] + 1)
    starts = (
        datetime.datetime(month // 12, month % 12 + 1, 1, tzinfo=datetime.UTC) for month in months if not month % step
    )
    return tuple((start.timestamp(), start.strftime("%b %Y")) for start in starts)


def _utc(at: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(at, datetime.UTC)


def chart(words: str, *, across: Axis, up: Axis, series: Sequence[Series]) -> str:
    """A picture with both axes.

    Args:
        words: what it shows, for those who do not see it.
        across: the horizontal axis.
        up: the vertical axis.
        series: drawn in order; those of the form `stack` lie upon one another.
    """
    drawn = "".join([*_grid(across, up), *_all(series, across, up)])
    return (
        f'<svg class="chart" height="{_HEIGHT}" role="img" aria-label="{escape(words)}">{drawn}'
        f'<text class="axis-label" x="-48" y="-14">{escape(up.label)}</text>'
        f'<text class="axis-label" x="100%" y="{_HEIGHT + 40}" text-anchor="end">{escape(across.label)}</text></svg>'
    )


def bar(words: str, *, whole: float, parts: Sequence[tuple[str, float]]) -> str:
    """Parts of a whole side by side.

    Args:
        words: what it shows, for those who do not see it.
        whole: the width of the picture; the sum of the parts where that is more.
        parts: (class of `style.css`, size).
    """
    whole = max(whole, sum(size for _, size in parts)) or 1.0
    drawn, left = "", 0.0
    for kind, size in parts:
        width = 100 * size / whole
        drawn += _rectangle(kind, left, 0, width, _BAR_HEIGHT)
        left += width
    return (
        f'<svg class="bar" height="{_BAR_HEIGHT}" role="img" aria-label="{escape(words)}">'
        f'<rect class="track" width="100%" height="{_BAR_HEIGHT}"/>{drawn}</svg>'
    )


def _grid(across: Axis, up: Axis) -> Iterator[str]:
    for value, text in up.ticks:
        y = _y(up, value)
        yield f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>'
        yield f'<text x="-8" y="{y + 4:g}" text-anchor="end">{escape(text)}</text>'
    for value, text in across.ticks:
        x = f"{100 * across.share(value):.2f}%"
        yield f'<line class="axis" x1="{x}" x2="{x}" y1="{_HEIGHT}" y2="{_HEIGHT + 5}"/>'
        yield f'<text x="{x}" y="{_HEIGHT + 20}" text-anchor="middle">{escape(text)}</text>'
    yield f'<line class="axis" x1="0" x2="100%" y1="{_HEIGHT}" y2="{_HEIGHT}"/>'


def _all(series: Sequence[Series], across: Axis, up: Axis) -> Iterator[str]:
    below: Series | None = None
    for one in series:
        if one.form == "stack":
            yield from _stack(one, below, across, up)
            below = one
        else:
            yield from _DRAWN[one.form](one, across, up)


def _stack(series: Series, below: Series | None, across: Axis, up: Axis) -> Iterator[str]:
    """Rectangles between the steps of two series with the same x, or between one and zero."""
    floors = [0.0] * len(series.points) if below is None else [y or 0.0 for _, y in below.points]
    for number, left, right in _intervals(series, across):
        top, bottom = _y(up, series.points[number][1] or 0.0), _y(up, floors[number])
        if bottom > top:
            yield _rectangle(series.kind, left, top, right - left, bottom - top)


def _steps(series: Series, across: Axis, up: Axis) -> Iterator[str]:
    """One line for each value and each change, so that dashes run on where nothing changes."""
    spans = [
        (left, right, _y(up, series.points[number][1] or 0.0)) for number, left, right in _intervals(series, across)
    ]
    before: float | None = None
    for y, same in itertools.groupby(spans, key=lambda span: span[2]):
        level = list(same)
        left, right = level[0][0], level[-1][1]
        if before is not None:
            yield _segment(series.kind, left, before, left, y)
        yield _segment(series.kind, left, y, right, y)
        before = y


def _line(series: Series, across: Axis, up: Axis) -> Iterator[str]:
    places = [(100 * across.share(x), None if y is None else _y(up, y)) for x, y in series.points]
    for (left, here), (right, there) in itertools.pairwise(places):
        if here is not None and there is not None:
            yield _segment(series.kind, left, here, right, there)
    heights = [None, *(y for _, y in places), None]
    for (x, y), before, after in zip(places, heights[:-2], heights[2:], strict=True):
        if y is not None and before is None and after is None:
            yield f'<circle class="{series.kind}" cx="{x:.2f}%" cy="{y:g}" r="2.5"/>'


def _bars(series: Series, across: Axis, up: Axis) -> Iterator[str]:
    for x, y in series.points:
        if y:
            left, right = 100 * across.share(x), 100 * across.share(x + series.width)
            top = _y(up, y)
            yield _rectangle(series.kind, left, top, 0.8 * (right - left), _HEIGHT - top)


_DRAWN = {"steps": _steps, "line": _line, "bars": _bars}


def _intervals(series: Series, across: Axis) -> Iterator[tuple[int, float, float]]:
    """Number of a point, and where it holds, in per cent; the last holds to the end, and none is too narrow to see."""
    starts = [100 * across.share(x) for x, _ in series.points]
    left = starts[0] if starts else 0.0
    for number, end in enumerate([*starts[1:], 100.0]):
        if end - left >= _FINEST or (number == len(starts) - 1 and starts):
            yield number, left, end
            left = end


def _y(up: Axis, value: float) -> float:
    return round(_HEIGHT * (1 - up.share(value)), 1)


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.2f}%" y="{y:g}" width="{width:.2f}%" height="{height:g}"/>'


def _segment(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}%" y1="{y1:g}" x2="{x2:.2f}%" y2="{y2:g}"/>'
