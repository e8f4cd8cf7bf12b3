"""Micro-batches: queries that arrive together share one matrix product."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor

from lazydp.components.bundle.query import Query, Ranking
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.shared.errors import InputError

MAX_BATCH = 64
# Queries of one request that are ranked on the event loop before others get their turn.
_AT_A_STRETCH = 16


class Batcher:
    """Collects queries of one event loop and ranks them together.

    A cheap catalogue is scored on the event loop, after the first round of it that brings no further query: a thread
    would cost more than the product, and a round without news takes microseconds. A dear one is scored in a thread,
    and whatever arrives meanwhile forms the next batch; so batches grow with the load, and a lone query never waits
    for company.
    """

    def __init__(self, scorer: Scorer, *, executor: Executor | None) -> None:
        """Batch for `scorer`; `executor` None scores on the event loop."""
        self._scorer = scorer
        self._executor = executor
        self._waiting: list[tuple[Query, asyncio.Future[Ranking]]] = []
        self._scheduled = False
        self._looked = 0

    async def rank(self, query: Query) -> Ranking:
        """The scorer's answer to one query."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Ranking] = loop.create_future()
        self._waiting.append((query, future))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._gather if self._executor is None else self._start)
        return await future

    async def rank_all(self, queries: Sequence[Query]) -> list[Ranking]:
        """The scorer's answers to queries that came together."""
        if self._executor is not None:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._scorer.rank, queries)
        answers: list[Ranking] = []
        for start in range(0, len(queries), _AT_A_STRETCH):
            answers += self._scorer.rank(queries[start : start + _AT_A_STRETCH])
            await asyncio.sleep(0)
        return answers

    def _take(self) -> list[tuple[Query, asyncio.Future[Ranking]]]:
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        # Somebody who went away waits for nothing.
        return [(query, future) for query, future in batch if not future.done()]

    def _gather(self) -> None:
        """Flush once a whole round of the loop, which reads every socket that has something, brought nothing new."""
        count = len(self._waiting)
        if count == self._looked or count >= MAX_BATCH:
            self._flush()
        else:
            self._looked = count
            asyncio.get_running_loop().call_soon(self._gather)

    def _flush(self) -> None:
        self._looked = 0
        while self._waiting:
            batch = self._take()
            _settle(batch, self._outcomes([query for query, _ in batch]))
        self._scheduled = False

    def _start(self) -> None:
        batch = self._take()
        if not batch and not self._waiting:
            self._scheduled = False
            return
        assert self._executor is not None
        work = asyncio.get_running_loop().run_in_executor(self._executor, self._outcomes, [query for query, _ in batch])
        work.add_done_callback(lambda done: self._finished(batch, done))

    def _finished(
        self,
        batch: list[tuple[Query, asyncio.Future[Ranking]]],
        done: asyncio.Future[list[Ranking | Exception]],
    ) -> None:
        error = done.exception()
        _settle(batch, done.result() if error is None else [_as_exception(error)] * len(batch))
        self._start()

    def _outcomes(self, queries: Sequence[Query]) -> list[Ranking | Exception]:
        """One outcome a query: a query that is wrong must not fail those it happened to arrive with."""
        try:
            return list(self._scorer.rank(queries))
        except Exception as error:
            if len(queries) == 1 or not isinstance(error, InputError):
                return [error] * len(queries)
            return [outcome for query in queries for outcome in self._outcomes([query])]


def _as_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def _settle(batch: Sequence[tuple[Query, asyncio.Future[Ranking]]], outcomes: Sequence[Ranking | Exception]) -> None:
    for (_, future), outcome in zip(batch, outcomes, strict=True):
        if future.done():
            continue
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
