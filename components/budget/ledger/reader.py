"""Reading of the ledger: its entries, and what they amount to."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from lazydp.components.budget.ledger.state import LedgerState, Release, Run
from lazydp.components.budget.ledger.views import DatasetBudget, budget_of, holders
from lazydp.components.budget.storage.base import Storage
from lazydp.components.budget.storage.entries import Entry, head_of
from lazydp.components.budget.storage.open import open_storage
from lazydp.components.shared.ledger_url import default_ledger_url


class LedgerReader:
    """The part of `Ledger` that decides nothing."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    @classmethod
    def open(cls, url: str | None = None, *, read_only: bool = False) -> Self:
        """Open the ledger at `url`, or the default one; make it where there is none, unless `read_only`.

        Read-only, a SQLite ledger needs neither SQLAlchemy nor scipy, and answers in milliseconds.

        Raises:
            UnavailableError: the database does not answer, or is locked or full.
            FormatError: it is no ledger, or of another schema.
            InputError: not a URL of a database that lazydp knows.
        """
        return cls(open_storage(url or default_ledger_url(), read_only=read_only))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of connections."""
        self._storage.close()

    @property
    def url(self) -> str:
        """The ledger's URL without its password."""
        return self._storage.shown

    def entries(self) -> tuple[Entry, ...]:
        """Every entry, in order, as stored."""
        return tuple(self._storage.read())

    def head(self) -> str:
        """`number:digest` of the last entry: keep it elsewhere, and `verify` finds whatever is rewritten later."""
        entries = self._storage.read()
        return head_of(entries[-1] if entries else None)

    def name(self) -> str:
        """Which ledger it is, wherever it lies: the digest of its first entry; empty where it has none."""
        entries = self._storage.read()
        return entries[0].digest if entries else ""

    def state(self) -> LedgerState:
        """What the entries amount to."""
        return LedgerState.replayed(self._storage.read())

    def budgets(self) -> tuple[DatasetBudget, ...]:
        """The budgets, in the order in which their datasets were registered; one for each declared family."""
        state = self.state()
        return tuple(budget_of(state, identifier) for identifier in holders(state))

    def show(self, dataset: str) -> DatasetBudget:
        """The budget of one dataset, by identifier, its first characters or its name.

        Raises:
            InputError: no such dataset.
        """
        state = self.state()
        return budget_of(state, state.resolve(dataset))

    def runs(self) -> tuple[Run, ...]:
        """Every run, in the order in which they were reserved."""
        return tuple(self.state().runs.values())

    def releases(self) -> tuple[Release, ...]:
        """Everything that left the trust boundary, in order."""
        found = [release for run in self.runs() for release in run.releases]
        return tuple(sorted(found, key=lambda release: release.entry))
