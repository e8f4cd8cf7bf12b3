"""The ledger as the service sees it: read only, off the event loop, and absent without making a request fail."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.budget.report.overview import LedgerOverview
from lazydp.components.shared.errors import IntegrityError, LazyDPError
from lazydp.service.serving.ledger_age import LedgerAge

# Many people looking at one page must not become many readings of the ledger.
_KEPT_SECONDS = 1.0
# After that long a request is answered without the ledger; a database that is not there takes longer to say so.
_PATIENCE_SECONDS = 3.0
# After that long a reading that has not ended is begun anew, as long as there are threads for it.
_GIVEN_UP_SECONDS = 15.0
_MOST_READINGS = 8
_SILENT = "the ledger does not answer"
_DAMAGED = "the ledger is damaged, and none of its figures is shown: `lazydp budget verify` says where"
_INSTEAD = "these are the statements of the served models"
_log = structlog.get_logger("lazydp.service")


@dataclass(slots=True)
class _Reading:
    """One reading, under way or kept.

    Attributes:
        task: finds; None where the ledger does not answer.
        began: when it did, by the monotonic clock.
        ended: likewise.
    """

    task: asyncio.Task[LedgerOverview | None]
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
        self.notice: str | None = None if url else f"no ledger is configured: {_INSTEAD}"
        self.age: LedgerAge | None = None
        # Threads of their own: readings that never end must not take those of everything else.
        self._executor = ThreadPoolExecutor(_MOST_READINGS, thread_name_prefix="ledger")
        self._last: _Reading | None = None

    async def overview(self) -> LedgerOverview | None:
        """What the ledger says, its chain verified; None where there is none or it does not answer."""
        self.refresh()
        return await self._waited(self._last)

    def refresh(self) -> None:
        """Begin to read the ledger, unless that was done not long ago; nobody waits.

        While a reading is fresh, everybody who asks shares it.
        """
        if self._url is None or (self._last is not None and self._last.is_fresh):
            return
        self._last = fresh = _Reading(asyncio.create_task(self._read(self._url)), time.monotonic())
        fresh.task.add_done_callback(fresh.end)

    def close(self) -> None:
        """Let the threads go."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _read(self, url: str) -> LedgerOverview | None:
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._executor, _read_ledger, url)
            self.age = LedgerAge.of(found.entries)
        except IntegrityError as error:
            self._miss(_DAMAGED, str(error))
        except LazyDPError as error:
            self._miss(_SILENT, str(error))
        except Exception as error:
            # An entry of another kind than ours must not make every page fail.
            self._miss(_DAMAGED, f"it holds what cannot be read ({type(error).__name__})")
        else:
            return found
        return None

    async def _waited(self, reading: _Reading | None) -> LedgerOverview | None:
        if reading is None:
            return None
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                # Others wait for the same reading.
                return await asyncio.shield(reading.task)
        except TimeoutError:
            self._miss(_SILENT, f"no answer within {_PATIENCE_SECONDS:g} seconds")
            return None

    def _miss(self, what: str, reason: str) -> None:
        _log.warning("ledger does not answer", reason=reason)
        self.notice = f"{what}: {_INSTEAD}"


def _read_ledger(url: str) -> LedgerOverview:
    with Ledger.open(url, read_only=True) as ledger:
        entries = ledger.entries()
        return LedgerOverview.of(entries, verify(entries, recompute=False))
