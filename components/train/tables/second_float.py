"""Rows of two float32: what is read, and what it leaves of the true value. `precision` says which tables need them.

The sum of both is the row: weight and `rest`, velocity and `momentum_rest`. It is formed in float64 and split again, so
that gradients and transitions are rounded to 2^-48 of the row before its noise. All of it runs on any device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazydp.kernels import ops
from lazydp.kernels.arguments import RowGroups

_ROWS = 1 << 17


@dataclass(frozen=True, slots=True)
class TwoFloats:
    """The rows of a table.

    Attributes:
        weight: float32 [R, D].
        rest: float32 [R, D].
        momentum: float32 [R, D], or None.
        momentum_rest: float32 [R, D], or None.
    """

    weight: Tensor
    rest: Tensor
    momentum: Tensor | None = None
    momentum_rest: Tensor | None = None

    def catch_up(
        self,
        last: Tensor,
        rows: Tensor,
        key: Tensor,
        *,
        number: int,
        arguments: Mapping[str, Any],
        exact_transition: Tensor,
    ) -> None:
        """Apply the pending noise of `rows`.

        The noise is added to the small parts by the operator that all tables use; what the transition makes of the
        first floats joins them in float64.

        Args:
            last: int32 [R].
            rows: int64 [U], distinct; -1 is none.
            key: of the noise.
            number: of the table.
            arguments: step, transition, factor, noise and first_row of `ops.catch_up_`.
            exact_transition: the transition in float64, [H, 1 or 4].
        """
        rows = rows[rows >= 0]
        rows = rows[last[rows] < arguments["step"]]
        if not rows.numel():
            return
        transition = exact_transition[last[rows].long()]
        ops.catch_up_(self.rest, last, rows, key, table=number, momentum=self.momentum_rest, **arguments)
        before = self.weight[rows].double()
        weight = transition[:, :1] * before
        if self.momentum is not None and self.momentum_rest is not None:
            velocity = self.momentum[rows].double()
            weight += transition[:, 1:2] * velocity
            velocity = transition[:, 2:3] * before + transition[:, 3:4] * velocity
            _split(velocity + self.momentum_rest[rows].double(), self.momentum, self.momentum_rest, rows)
        _split(weight + self.rest[rows].double(), self.weight, self.rest, rows)

    def scatter_add(self, groups: RowGroups, *lookups: Tensor, **settings: Any) -> None:
        """`ops.scatter_add_` to the weights, or with momentum to the velocities, without rounding the sum to them.

        Args:
            groups: of the lookups.
            lookups: bag_of_lookup, grad and scale of the operator.
            settings: its alpha, per_lookup_weights and bound.
        """
        first, rest = self.weight, self.rest
        if self.momentum is not None and self.momentum_rest is not None:
            first, rest = self.momentum, self.momentum_rest
        count = groups.rows.shape[0]
        numbered = torch.arange(count, device=groups.rows.device).where(groups.rows >= 0, groups.rows)
        alone = RowGroups(numbered, groups.order, groups.starts)
        # The sum, rounded; then what that leaves of it.
        high = first.new_zeros(count, first.shape[1])
        ops.scatter_add_(high, alone, *lookups, **settings)
        low = -high
        ops.scatter_add_(low, alone, *lookups, **settings)
        there = groups.rows >= 0
        rows = groups.rows[there]
        row = first[rows].double() + rest[rows].double()
        _split(row + (high[there].double() + low[there].double()), first, rest, rows)


def _split(value: Tensor, first: Tensor, rest: Tensor, rows: Tensor) -> None:
    """Write float64 values as two floats."""
    rounded = value.float()
    first[rows] = rounded
    rest[rows] = (value - rounded.double()).float()


def chunks(num_rows: int, device: torch.device) -> Iterator[Tensor]:
    """All rows of a table, some at a time."""
    for first in range(0, num_rows, _ROWS):
        yield torch.arange(first, min(first + _ROWS, num_rows), device=device)
