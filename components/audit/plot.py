"""The picture of an audit: where the canaries' rows went, and the lower bound beside the claim."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lazydp.components.audit.guesses import Coins, Floats
from lazydp.components.audit.report import AuditReport

_IN, _OUT, _CLAIM = "tab:orange", "tab:blue", "black"


def draw(report: AuditReport, along: Floats, included: Coins) -> bytes:
    """An SVG of two panels.

    Args:
        report: the result.
        along: how far each canary's row went along its gradient, in promised standard deviations of its noise, [m].
        included: which canaries were in, [m].
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    rows, bounds = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_rows(rows, along, included)
    _draw_bounds(bounds, report)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _draw_rows(axes: Axes, along: Floats, included: Coins) -> None:
    # What a missing clip or missing noise does would leave nothing to see at full range.
    low, high = np.quantile(along, [0.001, 0.999])
    edges = np.linspace(low - 0.5, high + 0.5, 60).tolist()
    for name, mask, colour in (("out", ~included, _OUT), ("in", included, _IN)):
        axes.hist(along[mask], bins=edges, alpha=0.55, color=colour, label=f"canaries that were {name}")
    axes.set_xlabel("way of the row along the canary's gradient (1 = promised noise)")
    axes.set_ylabel("canaries")
    axes.legend()


def _draw_bounds(axes: Axes, report: AuditReport) -> None:
    labels = [f"{rule.statistic}, {rule.said_to_be_in} is in\n{rule.guesses} guesses" for rule in report.rules]
    positions = np.arange(len(labels))
    axes.barh(positions, [rule.epsilon_lower_bound for rule in report.rules], color=_OUT)
    axes.axvline(report.epsilon_claimed, color=_CLAIM, linestyle="--", label=f"claimed {report.epsilon_claimed:.3g}")
    axes.axvline(
        report.epsilon_lower_bound,
        color=_IN,
        label=f"lower bound {report.epsilon_lower_bound:.3g} ({report.confidence:.0%})",
    )
    axes.set_yticks(positions, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"epsilon at delta {report.delta:g}")
    axes.legend(fontsize=8)
