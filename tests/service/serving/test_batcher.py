"""Queries that arrive together are ranked together, each gets its own outcome, and a lone one does not wait."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from lazydp.components.bundle.query import Query, Ranking
from lazydp.components.shared.errors import InputError
from lazydp.service.serving.batcher import MAX_BATCH, Batcher


class Recorder:
    """A scorer that answers with k, and refuses a negative one."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def rank(self, queries: Sequence[Query]) -> list[Ranking]:
        self.batches.append(len(queries))
        if any(query.k < 0 for query in queries):
            raise InputError("a negative k")
        return [Ranking(codes=[query.k], scores=np.zeros(1, dtype=np.float32), source="user") for query in queries]


@pytest.fixture(params=["loop", "thread"])
def executor(request: pytest.FixtureRequest) -> Any:
    if request.param == "loop":
        yield None
    else:
        with ThreadPoolExecutor(1) as threads:
            yield threads


async def asked(batcher: Batcher, numbers: Sequence[int], *, apart: int = 0) -> list[Any]:
    """Outcomes of queries that come `apart` rounds of the loop after each other."""

    async def one(position: int, number: int) -> Ranking:
        for _ in range(position * apart):
            await asyncio.sleep(0)
        return await batcher.rank(Query(k=number))

    return await asyncio.gather(*(one(*numbered) for numbered in enumerate(numbers)), return_exceptions=True)


def test_each_query_gets_its_own_answer(executor: Any) -> None:
    scorer = Recorder()
    batcher = Batcher(scorer, executor=executor)  # type: ignore[arg-type]
    for numbers in (range(10), [3], range(3 * MAX_BATCH)):
        outcomes = asyncio.run(asked(batcher, numbers))
        assert [outcome.codes[0] for outcome in outcomes] == list(numbers)
    assert max(scorer.batches) <= MAX_BATCH
    assert len(scorer.batches) < 20


def test_a_wrong_query_fails_alone(executor: Any) -> None:
    batcher = Batcher(Recorder(), executor=executor)  # type: ignore[arg-type]
    outcomes = asyncio.run(asked(batcher, [1, -1, 2]))
    assert [isinstance(outcome, InputError) for outcome in outcomes] == [False, True, False]


def test_on_the_loop_queries_of_following_rounds_join_and_a_pause_ends_the_batch() -> None:
    scorer = Recorder()
    batcher = Batcher(scorer, executor=None)  # type: ignore[arg-type]
    asyncio.run(asked(batcher, range(5), apart=1))
    assert scorer.batches == [5]
    scorer.batches.clear()
    asyncio.run(asked(batcher, range(3), apart=10))
    assert scorer.batches == [1, 1, 1]


def test_who_went_away_is_not_ranked_for() -> None:
    scorer = Recorder()
    batcher = Batcher(scorer, executor=None)  # type: ignore[arg-type]

    async def both() -> Ranking:
        gone = asyncio.create_task(batcher.rank(Query(k=1)))
        await asyncio.sleep(0)
        gone.cancel()
        return await batcher.rank(Query(k=2))

    assert asyncio.run(both()).codes == [2]
    assert scorer.batches == [1]


def test_a_large_request_lets_others_have_their_turn(executor: Any) -> None:
    scorer = Recorder()
    batcher = Batcher(scorer, executor=executor)  # type: ignore[arg-type]
    order: list[str] = []

    async def large() -> list[Ranking]:
        answers = await batcher.rank_all([Query(k=number) for number in range(200)])
        order.append("large")
        return answers

    async def small() -> None:
        await batcher.rank(Query(k=1))
        order.append("small")

    async def both() -> list[Ranking]:
        answers, _ = await asyncio.gather(large(), small())
        return answers

    assert [answer.codes[0] for answer in asyncio.run(both())] == list(range(200))
    if executor is None:
        assert order == ["small", "large"]
        assert asyncio.run(batcher.rank_all([])) == []


def test_an_answer_that_cannot_be_handed_over_holds_up_no_other(executor: Any) -> None:
    batcher = Batcher(Recorder(), executor=executor)  # type: ignore[arg-type]
    told: list[Any] = []

    def broken(_: Ranking | Exception) -> None:
        raise RuntimeError

    async def both() -> Ranking:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        batcher.submit(Query(k=1), broken)
        return await batcher.rank(Query(k=2))

    assert asyncio.run(both()).codes == [2]
    assert [type(error) for error in told] == [RuntimeError]
