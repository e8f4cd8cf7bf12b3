"""An upper bound on every weight of a table, so that most steps need not look at the rows they read.

A look at all rows of a step costs a tenth of a step whose bags are large. Between two looks at the whole table a weight
moves by its gradients, of which each unit adds lr C / b at most, and by noise. Rows that many units read in one step
are few: they are looked at, so that the bound grows by what the others can move.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from lazydp.components.train.tables.precision import largest_of

_HOT = 8
_STEPS_BETWEEN_LOOKS = 256
# No element of a table of 10^10 has noise beyond it, but with probability 2e-9.
_NOISE_DEVIATIONS = 9.0


class WeightBound:
    """The bound on one table that lives on the CPU and has no momentum.

    Args:
        weight: float32 [R, D].
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._largest = math.inf
        self._since = _STEPS_BETWEEN_LOOKS

    def refutes(self, too_large: Callable[[float], bool], *, noise: float) -> bool:
        """Whether no weight is `too_large`, which is asked of the bound; the whole table is looked at now and then.

        Args:
            too_large: whether a weight of that size is.
            noise: standard deviation of all the noise that a row may have got or have pending.
        """
        if not too_large(self._largest + _NOISE_DEVIATIONS * noise):
            return True
        if self._since < _STEPS_BETWEEN_LOOKS:
            return False
        self._since, self._largest = 0, largest_of(self._weight)
        return not too_large(self._largest + _NOISE_DEVIATIONS * noise)

    def grow(self, rows: Tensor, lookups: Tensor, *, most: float, step: float) -> None:
        """Take in a step, before it changes the rows.

        Args:
            rows: that it reads, int64 [U].
            lookups: how many of its lookups read each, int64 [U]; no fewer than the units that do.
            most: the largest of `lookups`.
            step: what one unit adds at most, lr C / b.
        """
        self._since += 1
        self._largest += _HOT * step
        if most > _HOT:
            hot = (lookups > _HOT).nonzero().squeeze(1)
            reach = self._weight[rows[hot]].abs().amax(1) + step * lookups[hot]
            self._largest = max(self._largest, float(reach.max()))
