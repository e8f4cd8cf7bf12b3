"""Batches made in a background thread, so that a step never waits for the dataset."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

_T = TypeVar("_T")
_POLL_S = 0.1


class Prefetcher(Generic[_T]):
    """Iterates over (step, make(step)) for step = first..last, made ahead by one thread, in order.

    `make` is a pure function of the step, so what is made ahead and never used (Ctrl-C, a stop at the budget) is no
    loss. An exception in `make` is raised from the iteration at its step. Used as a context manager: leaving the
    block, by whatever way, stops the thread and waits for it.

    Args:
        make: builds the batch of a step.
        first: first step.
        last: last step, inclusive.
        depth: how many batches may lie ready.
    """

    def __init__(self, make: Callable[[int], _T], *, first: int, last: int, depth: int = 3) -> None:
        self._make = make
        self._steps = range(first, last + 1)
        self._ready: queue.Queue[tuple[int, _T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    def __iter__(self) -> Iterator[tuple[int, _T]]:
        for expected in self._steps:
            step, made, error = self._ready.get()
            if error is not None:
                raise error
            assert step == expected
            assert made is not None
            yield step, made

    def _produce(self) -> None:
        for step in self._steps:
            if self._stopping.is_set():
                return
            try:
                item = (step, self._make(step), None)
            except BaseException as error:
                self._put((step, None, error))
                return
            self._put(item)

    def _put(self, item: tuple[int, _T | None, BaseException | None]) -> None:
        while not self._stopping.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return
