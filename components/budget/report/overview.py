"""What the entries of a ledger amount to for a reader: budgets over time, releases, reservations, the chain."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

from lazydp.components.budget.ledger.state import Budget, LedgerState, Release, Run
from lazydp.components.budget.ledger.verify import Verification
from lazydp.components.budget.ledger.views import DatasetBudget, budget_of, holders
from lazydp.components.budget.storage.entries import Entry

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Moment:
    """A dataset's figures after one entry.

    Attributes:
        at: POSIX seconds.
        limit: its budget.
        charged: committed and reserved, composed.
        committed: released, composed.
    """

    at: float
    limit: float
    charged: float
    committed: float


@dataclass(frozen=True, slots=True)
class Change:
    """A budget that was set, or a reservation that was given back.

    Attributes:
        entry: number of the ledger's entry.
        at: time of ISO 8601.
        what: in words.
    """

    entry: int
    at: str
    by: str
    what: str
    reason: str


_Entered = TypeVar("_Entered", Release, Change)


@dataclass(frozen=True, slots=True)
class Timeline:
    """The budget of one dataset, and how it came about.

    Attributes:
        budget: as it stands.
        moments: oldest first; empty where no budget was set.
        runs: on the dataset and all that it shares users with, latest first.
        releases: of these runs, latest first.
        changes: of the budget, and reservations of these runs that were given back, latest first.
    """

    budget: DatasetBudget
    moments: tuple[Moment, ...]
    runs: tuple[Run, ...]
    releases: tuple[Release, ...]
    changes: tuple[Change, ...]

    @property
    def open_runs(self) -> tuple[Run, ...]:
        """Those that still hold a reservation, latest first."""
        return tuple(run for run in self.runs if run.status == "reserved")


@dataclass(frozen=True, slots=True)
class LedgerOverview:
    """One reading of a ledger.

    Attributes:
        entries: all of them.
        verification: of these entries.
        state: what they amount to.
        moments: by the dataset that holds a budget.
        budget_changes: likewise.
        given_back: reservations, by the dataset of the run.
    """

    entries: tuple[Entry, ...]
    verification: Verification
    state: LedgerState
    moments: dict[str, tuple[Moment, ...]]
    budget_changes: dict[str, tuple[Change, ...]]
    given_back: dict[str, tuple[Change, ...]]

    @classmethod
    def of(cls, entries: Sequence[Entry], verification: Verification) -> Self:
        """From the entries of a ledger, in order, and their verification.

        Raises:
            IntegrityError: an entry that cannot be read at all.
            FormatError: an entry of a newer format.
        """
        state = LedgerState()
        moments: dict[str, list[Moment]] = {}
        budgets: dict[str, list[Change]] = {}
        voids: dict[str, list[Change]] = {}
        for entry in entries:
            before = state.budgets.get(entry.dataset)
            state.apply(entry)
            if entry.kind == "budget":
                budgets.setdefault(entry.dataset, []).append(
                    _budget_change(before, state.budgets[entry.dataset], entry)
                )
            elif entry.kind == "voided":
                voids.setdefault(entry.dataset, []).append(_given_back(state.runs[entry.run_id], entry))
            # Accounts without a budget are a problem that verification finds.
            for identifier in state.budgets.keys() & entry.content()["accounts"].keys():
                moments.setdefault(identifier, []).append(_moment(state, identifier, entry))
        return cls(tuple(entries), verification, state, _frozen(moments), _frozen(budgets), _frozen(voids))

    def budgets(self) -> list[DatasetBudget]:
        """The budgets, in the order in which their datasets were registered; one for each declared family."""
        return [budget_of(self.state, identifier) for identifier in holders(self.state)]

    def timelines(self) -> list[Timeline]:
        """Likewise, with how each came about."""
        return [self._timeline(identifier) for identifier in holders(self.state)]

    def timeline(self, dataset: str) -> Timeline | None:
        """Of the dataset with this identifier; None where the ledger does not know it."""
        return self._timeline(dataset) if dataset in self.state.datasets else None

    def _timeline(self, identifier: str) -> Timeline:
        family, holder = self.state.family(identifier), self.state.holder(identifier)
        runs = tuple(self.state.runs_of(family))
        given_back = [change for member in family for change in self.given_back.get(member, ())]
        return Timeline(
            budget=budget_of(self.state, identifier),
            moments=self.moments.get(holder, ()),
            runs=runs[::-1],
            releases=_latest_first(release for run in runs for release in run.releases),
            changes=_latest_first((*self.budget_changes.get(holder, ()), *given_back)),
        )


def _latest_first(found: Iterable[_Entered]) -> tuple[_Entered, ...]:
    return tuple(sorted(found, key=lambda each: each.entry, reverse=True))


def _frozen(found: dict[str, list[_T]]) -> dict[str, tuple[_T, ...]]:
    return {name: tuple(values) for name, values in found.items()}


def _budget_change(before: Budget | None, after: Budget, entry: Entry) -> Change:
    earlier = "" if before is None or before.epsilon == after.epsilon else f" instead of {before.epsilon:g}"
    what = f"budget set to epsilon {after.epsilon:g}{earlier}"
    return Change(entry.number, entry.recorded_at, entry.recorded_by, what, after.reason)


def _given_back(run: Run, entry: Entry) -> Change:
    what = f"reservation of {run.run_id} given back"
    return Change(entry.number, entry.recorded_at, entry.recorded_by, what, run.void_reason)


def _moment(state: LedgerState, identifier: str, entry: Entry) -> Moment:
    account = state.accounts[identifier]
    return Moment(
        at=datetime.datetime.fromisoformat(entry.recorded_at).timestamp(),
        limit=state.budgets[identifier].epsilon,
        charged=account.epsilon,
        committed=account.committed_epsilon,
    )
