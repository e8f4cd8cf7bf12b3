"""The one-page report for a review: what was spent over time, what remains, what was released, and whether it verifies.

One HTML file without outside assets. The plots are SVG without text, stretched to the page; their labels are HTML, so
that they can be read on a phone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from lazydp.components.budget.ledger.state import LedgerState, Release, Run
from lazydp.components.budget.ledger.verify import Verification
from lazydp.components.budget.ledger.views import DatasetBudget, budget_of, holders
from lazydp.components.budget.storage.entries import Entry

_TEMPLATE = Path(__file__).with_name("report.html")
_WIDTH, _HEIGHT = 1000.0, 300.0


@dataclass(frozen=True, slots=True)
class _Moment:
    """A dataset's figures after one entry."""

    at: datetime.datetime
    budget: float
    charged: float
    committed: float


@dataclass(frozen=True, slots=True)
class _Plot:
    """Paths in a box of 1000 by 300, and the labels around it."""

    budget: str
    charged: str
    committed: str
    top: str
    middle: str
    start: str
    end: str


@dataclass(frozen=True, slots=True)
class _Bar:
    """One release in the plot of releases: left edge, width and height in the box, and what it is."""

    x: float
    width: float
    y: float
    height: float
    label: str


@dataclass(frozen=True, slots=True)
class _Section:
    """Everything that the page says of one dataset."""

    budget: DatasetBudget
    committed_share: float
    reserved_share: float
    remaining_share: float
    plot: _Plot | None
    bars: tuple[_Bar, ...]
    most: str
    releases: tuple[Release, ...]
    runs: tuple[Run, ...]


def report(entries: Sequence[Entry], *, ledger: str, verification: Verification) -> str:
    """The page.

    Args:
        entries: of the ledger, in order.
        ledger: its URL, without a password.
        verification: of the same entries.

    Raises:
        IntegrityError: an entry that cannot be read at all.
    """
    state = LedgerState()
    moments: dict[str, list[_Moment]] = {}
    for entry in entries:
        state.apply(entry)
        for identifier in entry.content()["accounts"]:
            moments.setdefault(identifier, []).append(_moment(state, identifier, entry))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        ledger=ledger,
        made_at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=importlib.metadata.version("lazydp"),
        verification=verification,
        sections=[_section(state, identifier, moments.get(identifier, [])) for identifier in holders(state)],
        width=_WIDTH,
        height=_HEIGHT,
    )


def _moment(state: LedgerState, identifier: str, entry: Entry) -> _Moment:
    account = state.accounts[identifier]
    return _Moment(
        at=datetime.datetime.fromisoformat(entry.recorded_at),
        budget=state.budgets[identifier].epsilon,
        charged=account.epsilon,
        committed=account.committed_epsilon,
    )


def _section(state: LedgerState, identifier: str, moments: list[_Moment]) -> _Section:
    budget = budget_of(state, identifier)
    runs = tuple(state.runs_of(state.family(identifier)))
    releases = tuple(sorted((r for run in runs for r in run.releases), key=lambda release: release.entry))
    whole = max(budget.epsilon or 0.0, budget.charged_epsilon) or 1.0
    committed = min(budget.committed_epsilon, budget.charged_epsilon)
    return _Section(
        budget=budget,
        committed_share=100 * committed / whole,
        reserved_share=100 * (budget.charged_epsilon - committed) / whole,
        remaining_share=100 * (budget.remaining_epsilon or 0.0) / whole,
        plot=_plot(moments) if moments else None,
        bars=_bars(releases),
        most=f"{max((release.epsilon or 0.0 for release in releases), default=0.0):.3g}",
        releases=releases,
        runs=runs,
    )


def _plot(moments: list[_Moment]) -> _Plot:
    first, last = moments[0].at, moments[-1].at
    span = (last - first).total_seconds() or 1.0
    top = 1.08 * max(max(moment.budget, moment.charged) for moment in moments)

    def steps(values: list[float]) -> str:
        places = [_WIDTH * (moment.at - first).total_seconds() / span for moment in moments]
        heights = [_HEIGHT * (1 - value / top) for value in values]
        path = f"M0,{heights[0]:.2f}"
        for place, height in zip(places[1:], heights[1:], strict=True):
            path += f"H{place:.2f}V{height:.2f}"
        return path + f"H{_WIDTH:.0f}"

    return _Plot(
        budget=steps([moment.budget for moment in moments]),
        charged=steps([moment.charged for moment in moments]),
        committed=steps([moment.committed for moment in moments]),
        top=f"{top:.3g}",
        middle=f"{top / 2:.3g}",
        start=first.strftime("%Y-%m-%d %H:%M"),
        end=last.strftime("%Y-%m-%d %H:%M"),
    )


def _bars(releases: Sequence[Release]) -> tuple[_Bar, ...]:
    most = max((release.epsilon or 0.0 for release in releases), default=0.0) or 1.0
    slot = _WIDTH / max(len(releases), 12)
    bars = []
    for place, release in enumerate(releases):
        height = _HEIGHT * 0.95 * (release.epsilon or 0.0) / most
        label = f"{release.run_id}: epsilon {release.epsilon or 0.0:.4g}, {release.released_at[:10]}"
        bars.append(_Bar(x=place * slot + slot * 0.1, width=slot * 0.8, y=_HEIGHT - height, height=height, label=label))
    return tuple(bars)
