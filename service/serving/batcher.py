"""Micro-batches: queries that arrive together share one matrix product."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple, TypeAlias

from lazydp.components.bundle.query import Query, Ranking
from lazydp.components.bundle.scoring.base import Scorer
from lazydp.components.shared.errors import InputError

MAX_BATCH = 64
# Queries of one request that are ranked on the event loop before others get their turn.
_AT_A_STRETCH = 16

Settle: TypeAlias = Callable[[Ranking | Exception], None]


def _never() -> bool:
    return False


class _Waiting(NamedTuple):
    query: Query
    settle: Settle
    # Whether somebody who went away waits for nothing.
    gone: Callable[[], bool]


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
        self._waiting: list[_Waiting] = []
        self._scheduled = False
        self._looked = 0

    async def rank(self, query: Query) -> Ranking:
        """The scorer's answer to one query."""
        future: asyncio.Future[Ranking] = asyncio.get_running_loop().create_future()
        self.submit(query, functools.partial(_resolve, future), gone=future.done)
        return await future

    def submit(self, query: Query, settle: Settle, *, gone: Callable[[], bool] = _never) -> None:
        """Have `query` ranked.

        Args:
            query: what is asked.
            settle: called once on the event loop, with the scorer's answer or with what it raised.
            gone: says, before the batch is ranked, whether nobody waits for the answer any more; `settle` is then not
                called.
        """
        self._waiting.append(_Waiting(query, settle, gone))
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._gather if self._executor is None else self._start)

    async def rank_all(self, queries: Sequence[Query]) -> list[Ranking]:
        """The scorer's answers to queries that came together."""
        if self._executor is not None:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._scorer.rank, queries)
        answers: list[Ranking] = []
        for start in range(0, len(queries), _AT_A_STRETCH):
            answers += self._scorer.rank(queries[start : start + _AT_A_STRETCH])
            await asyncio.sleep(0)
        return answers

    def _take(self) -> list[_Waiting]:
        batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        return [waiting for waiting in batch if not waiting.gone()]

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
            _settle(batch, self._outcomes([waiting.query for waiting in batch]))
        self._scheduled = False

    def _start(self) -> None:
        batch = self._take()
        if not batch and not self._waiting:
            self._scheduled = False
            return
        assert self._executor is not None
        queries = [waiting.query for waiting in batch]
        work = asyncio.get_running_loop().run_in_executor(self._executor, self._outcomes, queries)
        work.add_done_callback(lambda done: self._finished(batch, done))

    def _finished(
        self,
        batch: list[_Waiting],
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


def _settle(batch: Sequence[_Waiting], outcomes: Sequence[Ranking | Exception]) -> None:
    for waiting, outcome in zip(batch, outcomes, strict=True):
        try:
            waiting.settle(outcome)
        except Exception as error:
            # As the event loop does with a callback that fails: the others of the batch still get their answers.
            told = {"message": "an answer could not be handed over", "exception": error}
            asyncio.get_running_loop().call_exception_handler(told)


def _resolve(future: asyncio.Future[Ranking], outcome: Ranking | Exception) -> None:
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
