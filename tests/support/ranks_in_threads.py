"""Ranks as threads of one process: what a step computes on W ranks, without processes and without a network."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from lazydp.components.train.ranks.ranks import Alone, Ranks, Traffic

T = TypeVar("T")


class _Table:
    """Where threads lay down what they send each other."""

    def __init__(self, size: int) -> None:
        self.places: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)


class Thread:
    """One rank; counts what a rank of a process group counts."""

    def __init__(self, rank: int, tables: list[_Table]) -> None:
        self.rank = rank
        self.size = len(tables[0].places)
        self.traffic = Traffic()
        self._tables = tables

    def _all(self, own: Any) -> list[Any]:
        """What every rank lays down."""
        table = self._tables[0]
        table.places[self.rank] = own
        table.barrier.wait()
        found = list(table.places)
        # Every rank has what it came for. One that has gone on may have ended by now, and broken the barrier.
        with contextlib.suppress(threading.BrokenBarrierError):
            table.barrier.wait()
        return found

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int], *, purpose: str) -> list[Tensor]:
        sent = sum(part.numel() for rank, part in enumerate(parts) if rank != self.rank)
        self.traffic.add(purpose, messages=self.size - 1, sent=sent * parts[0].element_size())
        found = [of[self.rank].clone() for of in self._all(list(parts))]
        assert [len(part) for part in found] == list(sizes)
        assert len({part.dtype for part in found}) == 1
        return found

    def gather(self, own: Tensor, *, purpose: str) -> list[Tensor]:
        self.traffic.add(purpose, messages=self.size - 1, sent=own.numel() * (self.size - 1) * own.element_size())
        return [of.clone() for of in self._all(own)]

    def tell(self, document: Mapping[str, Any] | None) -> Mapping[str, Any]:
        told: Mapping[str, Any] = json.loads(json.dumps(self._all(document)[0]))
        return told

    def check_together(self, what: str) -> None:
        self._all(None)

    def another(self) -> Ranks:
        self._all(None)
        return Thread(self.rank, self._tables[1:])


def together(size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each of `size` ranks."""
    if size == 1:
        return [work(Alone())]
    tables = [_Table(size), _Table(size)]
    threads = torch.get_num_threads()

    def one(rank: int) -> T:
        torch.set_num_threads(threads)
        try:
            return work(Thread(rank, tables))
        except BaseException:
            for table in tables:
                table.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        done = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for error in (of.exception() for of in done) if error is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [of.result() for of in done]
