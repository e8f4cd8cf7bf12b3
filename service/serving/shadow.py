"""Shadow traffic: a copy of each request, ranked by another version beside the answer, which never waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from lazydp.components.bundle.query import Query
from lazydp.components.shared.errors import LazyDPError
from lazydp.service.http.metrics import Metrics
from lazydp.service.http.problems import Problem
from lazydp.service.serving.ranker import Ranker


class Shadow:
    """Ranks copies one after the other, in a thread of its own. What does not fit into its queue is dropped."""

    def __init__(self, name: str, *, ranker: Callable[[], Ranker], places: int, metrics: Metrics) -> None:
        """Rank copies by `ranker()`.

        Args:
            name: of the version, as metrics call it.
            ranker: what ranks now.
            places: copies that may wait.
            metrics: count what became of the copies.
        """
        self._name = name
        self._ranker = ranker
        self._waiting: asyncio.Queue[Query] = asyncio.Queue(places)
        self._metrics = metrics
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def copy(self, query: Query) -> None:
        """Have `query` ranked some time, where there is room."""
        try:
            self._waiting.put_nowait(query)
        except asyncio.QueueFull:
            self._count("dropped")

    async def run(self) -> None:
        """Rank what comes, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            query = await self._waiting.get()
            try:
                await loop.run_in_executor(self._executor, self._rank, query)
            except (LazyDPError, Problem):
                # It lacks a feature or an attribute, say, or is not served now: for its owner to see in the metrics.
                self._count("failed")
            else:
                self._count("answered")

    def close(self) -> None:
        """Let the thread go."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _rank(self, query: Query) -> None:
        self._ranker().rank_here(query)

    def _count(self, outcome: str) -> None:
        self._metrics.shadow.labels(self._name, outcome).inc()
