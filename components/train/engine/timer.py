"""The time of a step, phase by phase."""

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
"""The phases of a step. `step.py` explains them. The phase `sampling`, drawing the batch, is timed by the caller."""


def _nothing() -> None:
    return None


class StepTimer:
    """Adds up the seconds of each phase. A phase must not contain another phase.

    Args:
        settle: called at the end of each phase, and timed with it. For a GPU, give a function that waits until the GPU
            is done. Otherwise only the launch of the GPU's kernels is timed.

    Attributes:
        seconds: of each phase so far.
    """

    def __init__(self, settle: Callable[[], None] = _nothing) -> None:
        self._settle = settle
        self.seconds: dict[Phase, float] = {}

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Add the time of the `with` block to the phase `name`."""
        start = time.perf_counter()
        try:
            yield
            self._settle()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def reset(self) -> None:
        """Set the seconds of every phase to zero."""
        self.seconds.clear()
