"""Sums of clipped gradients in float64: float32 could not keep a unit's bound."""

from __future__ import annotations

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
        if parameter not in self._sums:
            self._sums[parameter] = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
        self._used.add(parameter)
        return self._sums[parameter]

    def used(self, parameter: Tensor) -> Tensor | None:
        """The sum for `parameter`, where this step has one."""
        return self._sums[parameter] if parameter in self._used else None

    def clear(self) -> None:
        """Before a step: all sums are 0, in the same memory."""
        for parameter in self._used:
            self._sums[parameter].zero_()
        self._used.clear()
