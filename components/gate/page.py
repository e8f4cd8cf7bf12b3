"""What the gate decided: the budget before and after the reservation. Public, as the ledger is."""

from __future__ import annotations

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.state import LedgerState
from lazydp.components.budget.ledger.views import DatasetBudget, Reservation, budget_of
from lazydp.components.shared.page import Bar, Facts, Part, number, page


def page_of(url: str, reservation: Reservation) -> str:
    """The page of a reservation in the ledger at `url`."""
    with Ledger.open(url, read_only=True) as ledger:
        entries, budget = ledger.entries(), ledger.show(reservation.dataset)
    before = None
    if reservation.entry is not None and not reservation.existing:
        state = LedgerState.replayed(entry for entry in entries if entry.number < reservation.entry)
        before = budget_of(state, reservation.dataset) if reservation.dataset in state.datasets else None
    return gate_page(reservation, before=before, budget=budget)


def no_budget_page(run_id: str) -> str:
    """The page of a run without privacy, which reserves nothing."""
    return page(
        f"Budget for {run_id}",
        audience="public",
        summary="The run has no privacy (mode sgd): it reserves nothing, and what comes of it is no release.",
        sections=[],
    )


def gate_page(reservation: Reservation, *, before: DatasetBudget | None, budget: DatasetBudget) -> str:
    """The page.

    Args:
        reservation: what the run was given.
        before: the budget before that; None where it is not told apart (a retry, or a dataset that is new).
        budget: of its dataset, with the reservation in it.
    """
    assert budget.epsilon is not None
    left = max(0.0, budget.epsilon - budget.charged_epsilon)
    return page(
        f"Budget for {reservation.run_id}",
        audience="public",
        summary=(
            f"The run may at most spend epsilon {number(reservation.epsilon)} at delta {reservation.delta:g}; "
            f"{number(left)} of {number(budget.epsilon)} stay for others."
        ),
        sections=[
            Bar(
                f"Epsilon of {budget.name}",
                budget.epsilon,
                [
                    Part("spent by releases, all runs", budget.committed_epsilon, "committed"),
                    Part("reserved, this run included", budget.reserved_epsilon, "reserved"),
                ],
            ),
            Facts(
                "Figures",
                [
                    ("budget", f"epsilon {number(budget.epsilon)}, delta {reservation.delta:g}"),
                    (
                        "charged before",
                        number(before.charged_epsilon) if before is not None else "nothing, or this run",
                    ),
                    ("this run alone", number(reservation.epsilon)),
                    ("charged now (losses compose to less than their sum)", number(budget.charged_epsilon)),
                    ("left", number(left)),
                    ("family", budget.declared_family or "none declared"),
                    ("privacy unit", budget.privacy_unit or ""),
                    ("dataset, as the ledger names it", budget.dataset),
                    ("ledger entry", "held before" if reservation.existing else str(reservation.entry)),
                ],
            ),
        ],
    )
