"""The ledger as the service sees it: read only, off the event loop, and absent without making a request fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from lazydp.components.budget.ledger import Ledger
from lazydp.components.shared.errors import LazyDPError
from lazydp.service import schemas

# Many people looking at one page must not become many readings of the ledger.
_KEPT_SECONDS = 1.0
_log = structlog.get_logger("lazydp.service")

Found = TypeVar("Found")


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
        self._kept: dict[str, tuple[float, object]] = {}

    async def datasets(self) -> list[schemas.DatasetBudget] | None:
        """The budget of every dataset; None where there is no ledger or it does not answer."""
        return await self._read("datasets", _datasets)

    async def entries(self) -> list[schemas.LedgerEntry] | None:
        """Every entry, oldest first; None where there is no ledger or it does not answer."""
        return await self._read("entries", _entries)

    async def _read(self, what: str, reading: Callable[[Ledger], list[Found]]) -> list[Found] | None:
        if self._url is None:
            return None
        kept = self._kept.get(what)
        if kept is not None and time.monotonic() - kept[0] < _KEPT_SECONDS:
            return kept[1]  # type: ignore[return-value]  # one type for each `what`
        try:
            found = await asyncio.to_thread(_reading, self._url, reading)
        except LazyDPError as error:
            _log.warning("ledger does not answer", reason=str(error))
            self.notice = "the ledger does not answer: these are the statements of the served models"
            return None
        self._kept[what] = (time.monotonic(), found)
        return found


def _reading(url: str, reading: Callable[[Ledger], list[Found]]) -> list[Found]:
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
            content=entry.content(),
            digest=entry.digest,
        )
        for entry in ledger.entries()
    ]
