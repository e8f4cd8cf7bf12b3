"""The ledger as the service sees it: read only, off the event loop, and absent without making a request fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.shared.errors import LazyDPError
from lazydp.service import schemas

# Many people looking at one page must not become many readings of the ledger.
_KEPT_SECONDS = 1.0
# After that long a request is answered without the ledger; a database that is not there takes longer to say so.
_PATIENCE_SECONDS = 3.0
_log = structlog.get_logger("lazydp.service")

Found = TypeVar("Found")


@dataclass(slots=True)
class _Reading(Generic[Found]):
    """One reading, under way or kept.

    Attributes:
        task: finds; None where the ledger does not answer.
        ended: when it did, by the monotonic clock.
    """

    task: asyncio.Task[list[Found] | None]
    ended: float | None = None

    @property
    def is_fresh(self) -> bool:
        return self.ended is None or time.monotonic() - self.ended < _KEPT_SECONDS

    def end(self, _: object) -> None:
        self.ended = time.monotonic()


class BudgetSource:
    """Reads the ledger at a URL, where there is one.

    Attributes:
        notice: why figures of the ledger are missing, in words that are safe to publish.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self.notice: str | None = (
            None if url else "no ledger is configured: these are the statements of the served models"
        )
        self._datasets: _Reading[schemas.DatasetBudget] | None = None
        self._entries: _Reading[schemas.LedgerEntry] | None = None

    async def datasets(self) -> list[schemas.DatasetBudget] | None:
        """The budget of every dataset; None where there is no ledger or it does not answer."""
        self._datasets = self._reading(self._datasets, _datasets)
        return await self._waited(self._datasets)

    async def entries(self) -> list[schemas.LedgerEntry] | None:
        """Every entry, oldest first; None where there is no ledger or it does not answer."""
        self._entries = self._reading(self._entries, _entries)
        return await self._waited(self._entries)

    def _reading(
        self, before: _Reading[Found] | None, reading: Callable[[Ledger], list[Found]]
    ) -> _Reading[Found] | None:
        """The reading that answers now: `before` while it is fresh, so that everybody who asks shares one."""
        if self._url is None or (before is not None and before.is_fresh):
            return before
        fresh = _Reading(asyncio.create_task(self._read(self._url, reading)))
        fresh.task.add_done_callback(fresh.end)
        return fresh

    async def _read(self, url: str, reading: Callable[[Ledger], list[Found]]) -> list[Found] | None:
        try:
            return await asyncio.to_thread(_read_ledger, url, reading)
        except LazyDPError as error:
            self._miss(str(error))
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
