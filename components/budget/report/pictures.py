"""Pictures of a budget and of a claim, with the sentences that say the same."""

from __future__ import annotations

import datetime

from lazydp.components.budget.ledger.views import DatasetBudget
from lazydp.components.budget.report.claim import PER, at_least, at_most
from lazydp.components.budget.report.overview import Timeline
from lazydp.components.budget.statement import PrivacyStatement
from lazydp.components.shared.plot import Axis, Series, bar, chart, number_axis, time_axis


def budget_words(budget: DatasetBudget) -> str:
    """What was spent, what is reserved and what is left, in one sentence."""
    if budget.epsilon is None:
        return "No budget was set: nothing can be reserved on this dataset."
    left = at_least(budget.remaining_epsilon or 0.0)
    return (
        f"Of epsilon {budget.epsilon:g}, {at_most(budget.committed_epsilon)} is spent by releases, "
        f"{at_most(budget.reserved_epsilon)} is reserved by open runs, and {left} is left."
    )


def budget_bar(budget: DatasetBudget) -> str:
    """Spent and reserved on the width of the budget; nothing where none was set."""
    if budget.epsilon is None:
        return ""
    committed = min(budget.committed_epsilon, budget.charged_epsilon)
    parts = [("committed", committed), ("reserved", budget.charged_epsilon - committed)]
    return bar(budget_words(budget), whole=budget.epsilon, parts=parts)


def budget_chart(timeline: Timeline, *, until: float) -> str:
    """Spent, with reserved upon it, under the line of the budget, up to the time `until` (POSIX seconds)."""
    moments = timeline.moments
    if not moments:
        return ""
    first, last = moments[0].at, max(until, moments[-1].at)
    days = " to ".join(datetime.datetime.fromtimestamp(at, datetime.UTC).strftime("%d %b %Y") for at in (first, last))
    budget = timeline.budget
    per = PER.get(budget.privacy_unit or "", "unit")
    return chart(
        f"Epsilon spent and reserved, and the budget, {days}. {budget_words(budget)}",
        across=time_axis(f"time (UTC), {days}", first=first, last=last),
        up=number_axis(
            f"epsilon per {per}, at delta {at_most(budget.delta or 0)}",
            high=1.05 * max(max(m.limit, m.charged) for m in moments),
        ),
        series=[
            Series("committed", [(m.at, min(m.committed, m.charged)) for m in moments], "stack"),
            Series("reserved", [(m.at, m.charged) for m in moments], "stack"),
            Series("limit", [(m.at, m.limit) for m in moments], "steps"),
        ],
    )


def steps_chart(statement: PrivacyStatement) -> str:
    """Epsilon over the steps of the run; nothing where the statement has no such figures."""
    points = [(float(point.step), point.epsilon) for point in statement.epsilon_over_steps]
    if len(points) < 2:
        return ""
    steps, top = points[-1][0], max(epsilon for _, epsilon in points)
    across: Axis = number_axis("step", high=steps)
    up = number_axis(f"epsilon per {PER[statement.privacy_unit]}, at delta {at_most(statement.delta)}", high=top)
    words = f"Epsilon grows to {at_most(top)} over {steps:g} steps"
    return chart(words, across=across, up=up, series=[Series("first", points)])
