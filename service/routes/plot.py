"""Plots of the page as numbers that its template draws as inline SVG."""

from __future__ import annotations

from dataclasses import dataclass

from lazydp.components.budget.statement import PrivacyStatement
from lazydp.service.schemas import DatasetBudget

BAR_WIDTH = 600.0
CURVE_WIDTH, CURVE_HEIGHT = 320.0, 160.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One part of a bar: from x, so wide, of a kind that the style sheet colours."""

    kind: str
    label: str
    epsilon: float
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class BudgetBars:
    """The bar of one dataset.

    Attributes:
        name: of the dataset.
        sentence: the same in words, for who does not see it.
        parts: left to right; empty where nothing is known.
    """

    name: str
    sentence: str
    delta: float | None
    parts: tuple[Bar, ...]


def budget_bars(dataset: DatasetBudget) -> BudgetBars:
    """Spent, reserved by runs under way, and remaining, as shares of the budget."""
    name = dataset.name or dataset.dataset[:12]
    spent = dataset.epsilon_spent
    if spent is None:
        return BudgetBars(name, f"{name}: no privacy is claimed, so there is no epsilon to show", dataset.delta, ())
    reserved = dataset.epsilon_reserved or 0.0
    remaining = dataset.epsilon_remaining
    amounts = [("spent", "spent", spent), ("reserved", "reserved by runs under way", reserved)]
    if remaining is not None:
        amounts.append(("remaining", "remaining", remaining))
    total = sum(amount for _, _, amount in amounts) or 1.0
    parts, x = [], 0.0
    for kind, label, amount in amounts:
        width = BAR_WIDTH * amount / total
        if amount > 0:
            parts.append(Bar(kind, label, amount, round(x, 2), round(width, 2)))
        x += width
    words = ", ".join(f"{amount:.3g} {label}" for _, label, amount in amounts if amount > 0 or label == "spent")
    of = f" of {dataset.epsilon_budget:g}" if dataset.epsilon_budget is not None else ""
    return BudgetBars(name, f"{name}: epsilon{of}: {words}", dataset.delta, tuple(parts))


@dataclass(frozen=True, slots=True)
class Curve:
    """Epsilon over the steps of the run.

    Attributes:
        points: of an SVG polyline.
        last_step: at the right edge.
        epsilon: at the top.
    """

    points: str
    last_step: int
    epsilon: float


def epsilon_curve(statement: PrivacyStatement) -> Curve | None:
    """The curve of a statement, None where it carries none."""
    found = statement.epsilon_over_steps
    if len(found) < 2:
        return None
    top = max(point.epsilon for point in found) or 1.0
    last = max(point.step for point in found) or 1
    points = " ".join(
        f"{CURVE_WIDTH * point.step / last:.1f},{CURVE_HEIGHT * (1 - point.epsilon / top):.1f}" for point in found
    )
    return Curve(points, last, top)
