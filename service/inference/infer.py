"""An inference call answered, whichever way it came."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from lazydp.components.shared.errors import InputError
from lazydp.service.http.problems import unprocessable
from lazydp.service.inference.call import Call, key_of, output, queries_of, wanted_outputs
from lazydp.service.inference.tensors import Tensor
from lazydp.service.serving.checks import check_names
from lazydp.service.serving.context import Context
from lazydp.service.serving.served_version import ServedVersion

Written = TypeVar("Written")


@dataclass(frozen=True, slots=True)
class Answer:
    """Tensors of an answer, and whether each goes as bytes."""

    served: ServedVersion
    call_id: str | None
    outputs: list[tuple[Tensor, bool]]


@dataclass(frozen=True, slots=True)
class Transport(Generic[Written]):
    """How calls and answers travel: `read` makes the call, `write` what is sent back."""

    read: Callable[[], Call]
    write: Callable[[Answer], Written]


async def infer(context: Context, name: str, version: str | None, transport: Transport[Written]) -> Written:
    """The answer of one model version to one call.

    Raises:
        Problem: 404 for an unknown model or version, 4xx for a call that is not valid.
    """
    started = time.perf_counter_ns()
    # Where several versions share a model's calls, the call says which of them answers it.
    early = transport.read() if version is None and context.deals(name) else None
    ranker = context.ranker(name if early is None else context.dealt(name, key_of(early)), version)
    statistics = ranker.served.statistics
    try:
        call = early or transport.read()
        outputs = wanted_outputs(call)
        queries = queries_of(ranker, call)
        check_names(ranker.served, queries[0], pointer="/parameters")
        read = time.perf_counter_ns()
        try:
            rankings = await ranker.rank_all(queries)
        except InputError as error:
            raise unprocessable([("/inputs", str(error))]) from None
        ranked = time.perf_counter_ns()
        tensors = [(output(wanted, ranker, queries, rankings), binary) for wanted, binary in outputs]
        written = transport.write(Answer(ranker.served, call.id, tensors))
    except BaseException:
        statistics.fail.add(time.perf_counter_ns() - started)
        raise
    ended = time.perf_counter_ns()
    if early is not None:
        for query in queries:
            context.copied(name, functools.partial(replace, query, after=None))
    for ranking in rankings:
        context.metrics.answered(ranker.served.name, ranking.source)
    statistics.compute_input.add(read - started)
    statistics.compute_infer.add(ranked - read)
    statistics.compute_output.add(ended - ranked)
    statistics.answered(rows=len(queries), ns=ended - started)
    return written
