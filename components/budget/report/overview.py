"""What the entries of a ledger amount to for a reader: budgets over time, releases, reservations, the chain."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from lazydp.components.budget.ledger.state import LedgerState, Release, Run
from lazydp.components.budget.ledger.verify import Verification
from lazydp.components.budget.ledger.views import DatasetBudget, budget_of, holders
from lazydp.components.budget.storage.entries import Entry


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
class Timeline:
    """The budget of one dataset, and how it came about.

    Attributes:
        budget: as it stands.
        moments: oldest first; empty where no budget was set.
        runs: on the dataset and all that it shares users with, latest first.
        releases: of these runs, latest first.
    """

    budget: DatasetBudget
    moments: tuple[Moment, ...]
    runs: tuple[Run, ...]
    releases: tuple[Release, ...]

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
    """

    entries: tuple[Entry, ...]
    verification: Verification
    state: LedgerState
    moments: dict[str, tuple[Moment, ...]]

    @classmethod
    def of(cls, entries: Sequence[Entry], verification: Verification) -> Self:
        """From the entries of a ledger, in order, and their verification.

        Raises:
            IntegrityError: an entry that cannot be read at all.
            FormatError: an entry of a newer format.
        """
        state = LedgerState()
        moments: dict[str, list[Moment]] = {}
        for entry in entries:
            state.apply(entry)
            # Accounts without a budget are a problem that verification finds.
            for identifier in state.budgets.keys() & entry.content()["accounts"].keys():
                moments.setdefault(identifier, []).append(_moment(state, identifier, entry))
        return cls(tuple(entries), verification, state, {name: tuple(found) for name, found in moments.items()})

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
        runs = tuple(self.state.runs_of(self.state.family(identifier)))
        return Timeline(
            budget=budget_of(self.state, identifier),
            moments=self.moments.get(self.state.holder(identifier), ()),
            runs=runs[::-1],
            releases=_latest_first(release for run in runs for release in run.releases),
        )


def _latest_first(releases: Iterable[Release]) -> tuple[Release, ...]:
    return tuple(sorted(releases, key=lambda release: release.entry, reverse=True))


def _moment(state: LedgerState, identifier: str, entry: Entry) -> Moment:
    account = state.accounts[identifier]
    return Moment(
        at=datetime.datetime.fromisoformat(entry.recorded_at).timestamp(),
        limit=state.budgets[identifier].epsilon,
        charged=account.epsilon,
        committed=account.committed_epsilon,
    )
