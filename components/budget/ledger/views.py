"""What callers of the ledger are told: budgets, reservations and commitments, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from lazydp.components.budget.ledger.state import LedgerState, Status
from lazydp.components.budget.storage.entries import Entry


@dataclass(frozen=True, slots=True)
class DatasetBudget:
    """The budget of one dataset as it stands.

    Attributes:
        dataset: identifier.
        epsilon: the budget; None where none was set, and so nothing can be reserved.
        delta: of every epsilon here.
        charged_epsilon: everything committed and reserved on the dataset's family, composed.
        committed_epsilon: everything that was released, composed.
        reserved_epsilon: what the open reservations add to it, up to charged_epsilon.
        remaining_epsilon: epsilon less charged_epsilon. As losses compose to less than their sum, a run of that
            epsilon or a little more may still be admitted.
        family: identifiers of the other datasets whose runs count here.
        declared_family: the name of its population, as its operator declared it; empty where none was declared.
        other_people: the operator's words for why these people have no other budget in the ledger, where it asked.
        reserved_runs: runs that hold a reservation.
        committed_runs: runs that are closed with a release.
        updated_at: when the figures last changed.
    """

    dataset: str
    name: str
    privacy_unit: str | None
    epsilon: float | None
    delta: float | None
    charged_epsilon: float
    committed_epsilon: float
    reserved_epsilon: float
    remaining_epsilon: float | None
    set_by: str
    reason: str
    family: tuple[str, ...]
    reserved_runs: int
    committed_runs: int
    releases: int
    updated_at: str | None
    declared_family: str = ""
    other_people: str = ""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A run's claim on the budget.

    Attributes:
        epsilon: of the run alone.
        charged_epsilon: of everything on the dataset, this run included.
        entry: number of the ledger's entry.
        existing: true where the run held it already.
    """

    run_id: str
    dataset: str
    status: Status
    epsilon: float
    charged_epsilon: float
    budget_epsilon: float
    delta: float
    entry: int | None
    existing: bool


@dataclass(frozen=True, slots=True)
class Commitment:
    """A release, charged.

    Attributes:
        epsilon: of the run alone, up to this release.
        charged_epsilon: of everything on the dataset.
    """

    run_id: str
    dataset: str
    epsilon: float
    charged_epsilon: float
    delta: float
    existing: bool


def holders(state: LedgerState) -> list[str]:
    """The datasets with a budget of their own, and of each declared family without one the first."""
    first = {state.holder(state.declared(identifier)[0]) for identifier in state.datasets}
    return [identifier for identifier in state.datasets if identifier in first or identifier in state.budgets]


def budget_of(state: LedgerState, identifier: str) -> DatasetBudget:
    holder = state.holder(identifier)
    budget = state.budgets.get(holder)
    account = state.accounts.get(holder)
    family = state.family(identifier)
    runs = list(state.runs_of(family))
    charged = 0.0 if account is None else account.epsilon
    committed = 0.0 if account is None else account.committed_epsilon
    return DatasetBudget(
        dataset=identifier,
        name=state.datasets[identifier].name,
        privacy_unit=budget.privacy_unit if budget else None,
        epsilon=budget.epsilon if budget else None,
        delta=budget.delta if budget else None,
        charged_epsilon=charged,
        committed_epsilon=committed,
        # What a run in the end released may compose, by a rounding, to more than it reserved.
        reserved_epsilon=max(0.0, charged - committed),
        remaining_epsilon=max(0.0, budget.epsilon - charged) if budget else None,
        set_by=budget.set_by if budget else "",
        reason=budget.reason if budget else "",
        family=tuple(member for member in family if member != identifier),
        reserved_runs=sum(run.status == "reserved" for run in runs),
        committed_runs=sum(run.status == "committed" for run in runs),
        releases=sum(len(run.releases) for run in runs),
        updated_at=state.updated_at.get(holder),
        declared_family=state.datasets[identifier].family,
        other_people=budget.other_people if budget else "",
    )


def reservation_of(state: LedgerState, run_id: str, entry: Entry | None) -> Reservation:
    run = state.runs[run_id]
    holder = state.holder(run.dataset)
    account = state.accounts[holder]
    return Reservation(
        run_id=run_id,
        dataset=run.dataset,
        status=run.status,
        epsilon=run.epsilon,
        charged_epsilon=account.epsilon,
        budget_epsilon=state.budgets[holder].epsilon,
        delta=account.delta,
        entry=None if entry is None else entry.number,
        existing=entry is None,
    )
