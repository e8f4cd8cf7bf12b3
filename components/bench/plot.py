"""The picture of a comparison of steps: one SVG file without outside assets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from lazydp.components.shared.bench_harness import Result

_WIDTH = 760
_LEFT, _RIGHT = 150, 90
_BAR, _GAP = 22, 12
_COLOURS = {"lazydp": "#1f77b4", "dpsgd": "#d62728", "opacus": "#9467bd"}
_PLAIN = "#8c8c8c"
_PHASES = ("#1f77b4", "#aec7e8", "#ff7f0e", "#ffbb78", "#2ca02c", "#98df8a", "#d62728", "#ff9896", "#9467bd", "#c5b0d5")


def svg(results: Sequence[Result], *, title: str, parts: Mapping[str, float] | None = None) -> str:
    """A bar for each contestant's median, with a line from its 10th to its 90th percentile, and below it the parts.

    Args:
        results: of one run.
        title: the sentence above the picture.
        parts: seconds of each phase of a lazydp step, as `Breakdown.parts`; none are drawn where None.
    """
    lines = _wrapped(title)
    y = 24 + 18 * len(lines)
    drawn = [f'<text x="12" y="{24 + 18 * i}" font-weight="bold">{escape(line)}</text>' for i, line in enumerate(lines)]
    scale = (_WIDTH - _LEFT - _RIGHT) / max(result.p90_s for result in results)
    for result in results:
        drawn += _bar(result, y, scale)
        y += _BAR + _GAP
    if parts:
        y += 28
        drawn.append(f'<text x="12" y="{y - 10}" font-weight="bold">Where a lazydp step goes</text>')
        drawn += _parts(parts, y)
        y += (_BAR + _GAP) * len(parts)
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 12}" font-family="sans-serif" '
        f'font-size="13" role="img">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _bar(result: Result, y: float, scale: float) -> list[str]:
    colour = _COLOURS.get(result.contestant.partition("/")[0], _PLAIN)
    middle = y + _BAR / 2
    low, high = _LEFT + scale * result.p10_s, _LEFT + scale * result.p90_s
    return [
        *_labelled(result.contestant, result.median_s, y, scale, colour, label_at=high),
        f'<path d="M{low:.1f},{middle}H{high:.1f}" stroke="black"/>',
    ]


def _parts(parts: Mapping[str, float], y: float) -> list[str]:
    scale = (_WIDTH - _LEFT - _RIGHT) / max(parts.values())
    drawn = []
    for number, (name, seconds) in enumerate(parts.items()):
        shown = max(0.0, seconds)
        colour = _PHASES[number % len(_PHASES)]
        drawn += _labelled(name, shown, y + number * (_BAR + _GAP), scale, colour, label_at=_LEFT + scale * shown)
    return drawn


def _labelled(name: str, seconds: float, y: float, scale: float, colour: str, *, label_at: float) -> list[str]:
    text = y + _BAR / 2 + 5
    return [
        f'<text x="{_LEFT - 8}" y="{text}" text-anchor="end">{escape(name)}</text>',
        f'<rect x="{_LEFT}" y="{y}" width="{scale * seconds:.1f}" height="{_BAR}" fill="{colour}"/>',
        f'<text x="{label_at + 6:.1f}" y="{text}">{seconds * 1e3:.3g} ms</text>',
    ]


def _wrapped(text: str, width: int = 105) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
