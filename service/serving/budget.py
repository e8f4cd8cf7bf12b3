"""The ledger as the service sees it: read only, off the event loop, and absent without making a request fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.shared.errors import LazyDPError
from lazydp.service import schemas
from lazydp.service.serving.ledger_age import LedgerAge

# Many people looking at one page must not become many readings of the ledger.
_KEPT_SECONDS = 1.0
# After that long a request is answered without the ledger; a database that is not there takes longer to say so.
_PATIENCE_SECONDS = 3.0
# After that long a reading that has not ended is begun anew, as long as there are threads for it.
_GIVEN_UP_SECONDS = 15.0
_MOST_READINGS = 8
_log = structlog.get_logger("lazydp.service")

Found = TypeVar("Found")


@dataclass(slots=True)
class _Reading(Generic[Found]):
    """One reading, under way or kept.

    Attributes:
        task: finds; None where the ledger does not answer.
        began: when it did, by the monotonic clock.
        ended: likewise.
    """

    task: asyncio.Task[list[Found] | None]
    began: float
    ended: float | None = None

    @property
    def is_fresh(self) -> bool:
        """One that is under way for long may never end: the next who asks begins another."""
        if self.ended is None:
            return time.monotonic() - self.began < _GIVEN_UP_SECONDS
        return time.monotonic() - self.ended < _KEPT_SECONDS

    def end(self, _: object) -> None:
        self.ended = time.monotonic()


class BudgetSource:
    """Reads the ledger at a URL, where there is one.

    Attributes:
        notice: why figures of the ledger are missing, in words that are safe to publish.
        age: of the ledger, when it last answered; None before that.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self.notice: str | None = (
            None if url else "no ledger is configured: these are the statements of the served models"
        )
        self.age: LedgerAge | None = None
        # Threads of their own: readings that never end must not take those of everything else.
        self._executor = ThreadPoolExecutor(_MOST_READINGS, thread_name_prefix="ledger")
        self._datasets: _Reading[schemas.DatasetBudget] | None = None
        self._entries: _Reading[schemas.LedgerEntry] | None = None

    async def datasets(self) -> list[schemas.DatasetBudget] | None:
        """The budget of every dataset; None where there is no ledger or it does not answer."""
        self.refresh()
        return await self._waited(self._datasets)

    def refresh(self) -> None:
        """Begin to read the ledger, unless that was done not long ago; nobody waits."""
        self._datasets = self._reading(self._datasets, self._read_datasets)

    async def entries(self) -> list[schemas.LedgerEntry] | None:
        """Every entry, oldest first; None where there is no ledger or it does not answer."""
        self._entries = self._reading(self._entries, _entries)
        return await self._waited(self._entries)

    def close(self) -> None:
        """Let the threads go."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _reading(
        self, before: _Reading[Found] | None, reading: Callable[[Ledger], list[Found]]
    ) -> _Reading[Found] | None:
        """The reading that answers now: `before` while it is fresh, so that everybody who asks shares one."""
        if self._url is None or (before is not None and before.is_fresh):
            return before
        fresh = _Reading(asyncio.create_task(self._read(self._url, reading)), time.monotonic())
        fresh.task.add_done_callback(fresh.end)
        return fresh

    def _read_datasets(self, ledger: Ledger) -> list[schemas.DatasetBudget]:
        found = _datasets(ledger)
        self.age = LedgerAge.of(ledger.entries())
        return found

    async def _read(self, url: str, reading: Callable[[Ledger], list[Found]]) -> list[Found] | None:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, _read_ledger, url, reading)
        except LazyDPError as error:
            self._miss(str(error))
        except Exception as error:
            # An entry of another kind than ours must not make every page fail.
            self._miss(f"it holds what cannot be read ({type(error).__name__})")
        return None

    async def _waited(self, reading: _Reading[Found] | None) -> list[Found] | None:
        if reading is None:
            return None
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                # Others wait for the same reading.
                return await asyncio.shield(reading.task)
        except TimeoutError:
            self._miss(f"no answer within {_PATIENCE_SECONDS:g} seconds")
            return None

    def _miss(self, reason: str) -> None:
        _log.warning("ledger does not answer", reason=reason)
        self.notice = "the ledger does not answer: these are the statements of the served models"


def _read_ledger(url: str, reading: Callable[[Ledger], list[Found]]) -> list[Found]:
    with Ledger.open(url, read_only=True) as ledger:
        return reading(ledger)


def _datasets(ledger: Ledger) -> list[schemas.DatasetBudget]:
    return [
        schemas.DatasetBudget(
            dataset=budget.dataset,
            name=budget.name,
            privacy_unit=budget.privacy_unit,
            epsilon_budget=budget.epsilon,
            delta=budget.delta,
            epsilon_spent=budget.committed_epsilon,
            epsilon_reserved=budget.reserved_epsilon,
            epsilon_remaining=budget.remaining_epsilon,
            releases=budget.releases,
            family=list(budget.family),
        )
        for budget in ledger.budgets()
    ]


def _entries(ledger: Ledger) -> list[schemas.LedgerEntry]:
    return [
        schemas.LedgerEntry(
            number=entry.number,
            kind=entry.kind,
            dataset=entry.dataset,
            run_id=entry.run_id or None,
            recorded_at=entry.recorded_at,
            recorded_by=entry.recorded_by or None,
            content=entry.content(),
            digest=entry.digest,
        )
        for entry in ledger.entries()
    ]
