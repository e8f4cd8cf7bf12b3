"""Sums of clipped gradients in float64: float32 could not keep a unit's bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class DoubleSums:
    """One contiguous float64 buffer for each parameter, kept from step to step.

    What is added to a float32 sum is rounded beside what others added. So layers add up in float64, and the sum is
    rounded once, after its noise (docs/floating-point.md).
    """

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._used: set[Tensor] = set()

    def of(self, parameter: Tensor) -> Tensor:
        """The sum of this step for `parameter`, float64 of its shape; to be added to."""
        total, empty = self.begun(parameter)
        return total.zero_() if empty else total

    def begun(self, parameter: Tensor) -> tuple[Tensor, bool]:
        """The sum for `parameter`, and whether this step asks for it for the first time.

        If so, it holds values of an earlier step, and the caller has to overwrite all of it.
        """
        if parameter not in self._sums:
            self._sums[parameter] = torch.empty(parameter.shape, dtype=torch.float64, device=parameter.device)
        first = parameter not in self._used
        self._used.add(parameter)
        return self._sums[parameter], first

    def used(self, parameter: Tensor) -> Tensor | None:
        """The sum for `parameter`, where this step has one."""
        return self._sums[parameter] if parameter in self._used else None

    def clear(self) -> None:
        """Before a step: all sums are 0, in the same memory."""
        self._used.clear()

    def add(self, other: DoubleSums) -> None:
        """Add the sums of `other`."""
        for parameter in other._used:
            self.of(parameter).add_(other._sums[parameter])


class LaneSums:
    """The sums of a step, lane by lane: those of two neighbouring lanes are added, then those of neighbouring pairs.

    The tree of additions is that of `ranks.tree`. So a rank with some neighbouring lanes has one of its branches.
    """

    def __init__(self) -> None:
        self._branches: list[tuple[int, DoubleSums]] = []  # the number of levels below, and the sums
        self._free: list[DoubleSums] = []
        self.begin_lane()

    @property
    def current(self) -> DoubleSums:
        """The sums of the present lane; after the last lane, those of all."""
        return self._branches[-1][1]

    def clear(self) -> None:
        """Before a step: begin the first lane."""
        self._free += [sums for _, sums in self._branches]
        self._branches = []
        self.begin_lane()

    def begin_lane(self) -> None:
        """What is added from here on belongs to the next lane."""
        sums = self._free.pop() if self._free else DoubleSums()
        sums.clear()
        self._branches.append((0, sums))

    def end_lane(self) -> None:
        """Add the branches of the tree that are complete."""
        while len(self._branches) > 1 and self._branches[-1][0] == self._branches[-2][0]:
            level, later = self._branches.pop()
            self.current.add(later)
            self._free.append(later)
            self._branches[-1] = (level + 1, self.current)


class LayerSums(Mapping[str, Tensor]):
    """The sums of one layer's parameters, by the names that the layer gives them.

    Reading one by its name gives the tensor to add to; `begun` gives the one to overwrite.
    """

    def __init__(self, sums: DoubleSums, parameters: Mapping[str, Tensor], rows: slice | None = None) -> None:
        """Take the parameters of a layer.

        Args:
            sums: of all layers.
            parameters: by name.
            rows: the layer's rows of each parameter; None: all.
        """
        self._sums = sums
        self._parameters = parameters
        self._rows = rows

    def __getitem__(self, name: str) -> Tensor:
        total = self._sums.of(self._parameters[name])
        return total if self._rows is None else total[self._rows]

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def begun(self, name: str) -> tuple[Tensor, bool]:
        """See `DoubleSums.begun`; some rows are never to be overwritten alone."""
        return self._sums.begun(self._parameters[name]) if self._rows is None else (self[name], False)
