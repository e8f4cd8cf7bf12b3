"""Plots: ticks at round places, points where they belong, nothing that a name could smuggle in."""

import datetime
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazydp.components.shared.plot import Axis, Series, bar, chart, number_axis, time_axis

PLAIN = Axis("x", 0.0, 10.0, ((0.0, "0"), (10.0, "10")))


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-6, 1e9))
def test_ticks_are_round_few_and_around_the_values(low: float, span: float) -> None:
    axis = number_axis("value", low=low, high=low + span)
    slack = 1e-6 * (abs(low) + span)
    assert axis.low <= low + slack
    assert axis.high >= low + span - slack
    assert 2 <= len(axis.ticks) <= 7
    apart = [after - before for (before, _), (after, _) in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert max(apart) - min(apart) <= 1e-9 * max(abs(axis.low), abs(axis.high))
    assert [axis.ticks[0][0], axis.ticks[-1][0]] == [axis.low, axis.high]


def test_one_value_still_has_an_axis() -> None:
    assert number_axis("value", high=0.0).high > 0
    assert [text for _, text in number_axis("value", high=8.4).ticks] == ["0", "2.5", "5", "7.5", "10"]
    with pytest.raises(ValueError, match="finite"):
        number_axis("value", high=math.inf)


@given(first=st.floats(1e6, 2e9), span=st.floats(0, 2e9))
def test_times_have_ticks_at_whole_units_within_the_axis(first: float, span: float) -> None:
    axis = time_axis("time", first=first, last=first + span)
    assert len(axis.ticks) <= 6
    assert all(axis.low <= at <= axis.high for at, _ in axis.ticks)
    assert all(at % 60 == 0 for at, _ in axis.ticks)
    assert len({text for _, text in axis.ticks}) == len(axis.ticks) or span < 1e6


@pytest.mark.parametrize(
    ("days", "labels"),
    [
        (1 / 24, ["09:30", "09:45", "10:00", "10:15", "10:30"]),
        (10, ["13 Jan", "15 Jan", "17 Jan", "19 Jan", "21 Jan"]),
        (320, ["Apr 2026", "Jul 2026", "Oct 2026"]),
        (1500, ["Jan 2028", "Jan 2030"]),
    ],
)
def test_labels_of_times(days: float, labels: list[str]) -> None:
    first = datetime.datetime(2026, 1, 12, 9, 30, tzinfo=datetime.UTC).timestamp()
    assert [text for _, text in time_axis("time", first=first, last=first + 86400 * days).ticks] == labels


def rectangles(drawn: str, kind: str) -> list[tuple[float, ...]]:
    found = re.findall(rf'<rect class="{kind}" x="(.*?)%" y="(.*?)" width="(.*?)%" height="(.*?)"', drawn)
    return [tuple(map(float, numbers)) for numbers in found]


def test_stacked_steps_lie_upon_one_another() -> None:
    below = Series("committed", [(0.0, 0.0), (5.0, 5.0)], "stack")
    above = Series("reserved", [(0.0, 2.0), (5.0, 10.0)], "stack")
    drawn = chart("w", across=PLAIN, up=PLAIN, series=[below, above])
    assert rectangles(drawn, "committed") == [(50, 100, 50, 100)]
    assert rectangles(drawn, "reserved") == [(0, 160, 50, 40), (50, 0, 50, 100)]


def test_a_line_of_steps_is_drawn_once_for_each_value() -> None:
    limit = Series("limit", [(0.0, 5.0), (1.0, 5.0), (2.0, 5.0), (6.0, 10.0)], "steps")
    drawn = chart("w", across=PLAIN, up=PLAIN, series=[limit])
    assert re.findall(r'class="limit" x1="(.*?)" y1="(.*?)" x2="(.*?)" y2="(.*?)"', drawn) == [
        ("0.00%", "100", "60.00%", "100"),
        ("60.00%", "100", "60.00%", "0"),
        ("60.00%", "0", "100.00%", "0"),
    ]


def test_gaps_stay_gaps_and_a_point_alone_is_seen() -> None:
    line = Series("first", [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 4.0), (4.0, None)])
    drawn = chart("w", across=PLAIN, up=PLAIN, series=[line])
    assert drawn.count('<line class="first"') == 1
    assert re.findall(r'<circle class="first" cx="(.*?)"', drawn) == ["30.00%"]


def test_bars_and_parts() -> None:
    drawn = chart("w", across=PLAIN, up=PLAIN, series=[Series("first", [(0.0, 5.0), (5.0, 0.0)], "bars", width=5.0)])
    assert rectangles(drawn, "first") == [(0, 100, 40, 100)]
    assert rectangles(bar("w", whole=8.0, parts=[("committed", 2.0), ("reserved", 4.0)]), "reserved") == [
        (25, 0, 50, 28)
    ]
    assert rectangles(bar("w", whole=1.0, parts=[("committed", 4.0)]), "committed") == [(0, 0, 100, 28)]
    assert "NaN" not in bar("w", whole=0.0, parts=[("committed", 0.0)])


def test_many_changes_make_no_more_than_can_be_seen() -> None:
    limit = Series("limit", [(n / 10_000, float(n % 7)) for n in range(100_000)], "steps")
    assert chart("w", across=PLAIN, up=PLAIN, series=[limit]).count('class="limit"') <= 4001


def test_words_are_escaped() -> None:
    hostile = '"><script>'
    drawn = chart(hostile, across=Axis(hostile, 0, 1, ((0, hostile),)), up=PLAIN, series=[]) + bar(
        hostile, whole=1, parts=[]
    )
    assert "<script>" not in drawn
