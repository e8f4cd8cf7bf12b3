"""Reads the rows of coming steps from disk before they are needed.

The sampler is a pure function of the step, so the rows of later steps are known. The kernel is asked for them and reads
many at once, while earlier steps are computed. What it reads lies in the page cache, which the kernel bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from lazydp.components.ingest.split import Rows, Split

# Steps between asking for the rows of a step, asking for their lists, and reading both.
STEPS_BETWEEN = 2


class HasRows(Protocol):
    """What a step draws: rows of the split."""

    @property
    def rows(self) -> Rows:
        """int64 [B]."""


_Drawn = TypeVar("_Drawn", bound=HasRows)


class ReadAhead(Generic[_Drawn]):
    """Gives what each step draws, and has the rows of the steps after it on their way. For one thread.

    Args:
        split: the rows lie in it.
        draw: step (1, 2, ...) -> what it draws; a pure function.
        last: the last step; nothing is read for later ones.
    """

    def __init__(self, split: Split, draw: Callable[[int], _Drawn], *, last: int) -> None:
        self._split = split
        self._draw = draw
        self._last = last
        self._drawn: dict[int, _Drawn] = {}
        self._with_lists: set[int] = set()
        split.read_at_random()

    def __call__(self, step: int) -> _Drawn:
        """What `step` draws."""
        for coming in range(step, min(step + 2 * STEPS_BETWEEN, self._last) + 1):
            if coming not in self._drawn:
                self._drawn[coming] = self._draw(coming)
                self._split.will_need(self._drawn[coming].rows)
        for coming in range(step, min(step + STEPS_BETWEEN, self._last) + 1):
            if coming not in self._with_lists:
                self._with_lists.add(coming)
                self._split.will_need_lists(self._drawn[coming].rows)
        drawn = self._drawn.get(step) or self._draw(step)
        # Steps are asked for in order: what lies before this one is not asked for again.
        self._drawn = {coming: kept for coming, kept in self._drawn.items() if coming > step}
        self._with_lists = {coming for coming in self._with_lists if coming > step}
        return drawn
