"""Work that goes on beside the requests: when it ends, that is logged and counted, and it begins again."""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable, Callable
from typing import Literal, TypeAlias

import structlog

from lazydp.service.http.metrics import Metrics

State: TypeAlias = Literal["running", "restarting"]
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
# Work that lasted so long may begin again at once.
_SETTLED_S = 300.0
_log = structlog.get_logger("lazydp.service")


class Background:
    """Keeps pieces of work going for as long as the service runs.

    Attributes:
        states: of each piece of work, by name.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.states: dict[str, State] = {}
        self._metrics = metrics
        self._tasks: list[asyncio.Task[None]] = []

    def keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Begin `work`, which should never end, and begin it again whenever it does."""
        self.states[name] = "running"
        self._metrics.background.labels(name)
        self._tasks.append(asyncio.create_task(self._kept(name, work)))

    async def close(self) -> None:
        """Stop all of it."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _kept(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE_S
        while True:
            began = loop.time()
            reason = "it returned"
            try:
                await work()
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__} at {where.filename.rpartition('/')[2]}:{where.lineno}"
            if loop.time() - began > _SETTLED_S:
                pause = _FIRST_PAUSE_S
            _log.error("background task ended", task=name, reason=reason, again_in_s=pause)
            self._metrics.background.labels(name).inc()
            self.states[name] = "restarting"
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            self.states[name] = "running"
