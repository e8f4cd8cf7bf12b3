"""The time of a step, by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Phase = Literal[
    "sampling",
    "lookups",
    "catch-up",
    "gather",
    "forward",
    "backward",
    "norms",
    "weighted products",
    "scatter",
    "dense noise",
    "optimizer",
    "eager noise",
]


def _nothing() -> None:
    return None


class StepTimer:
    """Adds up the seconds spent in each phase; phases don't nest.

    Args:
        settle: called at the end of each phase, inside its time. On a GPU it waits until the phase is computed; without
            it only the launch of the kernels is timed.
    """

    def __init__(self, settle: Callable[[], None] = _nothing) -> None:
        self._settle = settle
        self.seconds: dict[Phase, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of the block under `name`."""
        start = time.perf_counter()
        try:
            yield
            self._settle()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        """Set the seconds of every phase to zero."""
        self.seconds.clear()
