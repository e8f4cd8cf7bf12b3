"""What one rank computes of a step: its lanes of the batch.

The units of a batch are divided among L lanes, a power of two. Each lane has its own micro-batches, hence its own
matrix products, and the sums of the lanes are added by a fixed tree. So it changes no bit whether one rank computes all
lanes or several ranks some each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from lazydp.components.train.data.examples import Examples


@dataclass(frozen=True, slots=True)
class Share:
    """The lanes of a step that one rank computes, and what it has to know of the others.

    Attributes:
        lanes: micro-batches of each lane; an empty lane has none.
        first_lane: number of the first.
        examples: of the whole step, all ranks together.
        most_parts: micro-batches of the lane that has most, of all lanes.
    """

    lanes: Sequence[Sequence[Examples]]
    first_lane: int
    examples: int
    most_parts: int

    def __iter__(self) -> Iterator[Examples]:
        """All micro-batches, lane by lane."""
        return (examples for lane in self.lanes for examples in lane)

    def __len__(self) -> int:
        """How many micro-batches there are."""
        return sum(len(lane) for lane in self.lanes)

    @classmethod
    def whole(cls, micro_batches: Examples | Sequence[Examples]) -> Self:
        """A step of one lane."""
        given = [micro_batches] if isinstance(micro_batches, Examples) else micro_batches
        examples = [part for part in given if part.size]
        return cls([examples], 0, sum(part.size for part in examples), len(examples))
