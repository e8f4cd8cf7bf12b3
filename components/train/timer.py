"""Where the time of a step goes, by named phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


class StepTimer:
    """Adds up the seconds spent in each phase; phases don't nest."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the time of the block under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        """Forget everything."""
        self.seconds.clear()
