"""Rows of two float32: the weight, and what it leaves of the true value. `precision` says which tables need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lazydp.kernels import ops

_ROWS = 1 << 17


def catch_up_rows(
    weight: Tensor,
    rest: Tensor,
    last: Tensor,
    momentum: Tensor | None,
    rows: Tensor,
    key: Tensor,
    *,
    number: int,
    arguments: Mapping[str, Any],
    exact_transition: Tensor | None = None,
) -> None:
    """Apply the pending noise of `rows`, to the sum of `weight` and `rest`; then `weight` is that sum, rounded.

    A gradient that came after the row was last read is in `rest` (or in the momentum), and the noise is added there:
    nothing that depends on the gradient is rounded to the precision of the weight before its noise.

    Args:
        weight: float32 [R, D].
        rest: float32 [R, D].
        last: int32 [R].
        momentum: float32 [R, D], or None.
        rows: int64 [U], distinct; -1 is none.
        key: of the noise.
        number: of the table.
        arguments: step, transition, factor and noise of `ops.catch_up_`.
        exact_transition: the transition in float64, [H, 1 or 4]; that of the arguments where None.
    """
    if exact_transition is None:
        exact_transition = arguments["transition"].double()
    rows = rows[rows >= 0]
    rows = rows[last[rows] < arguments["step"]]
    if not rows.numel():
        return
    transition = exact_transition[last[rows].long()]
    ops.catch_up_(rest, last, rows, key, table=number, momentum=momentum, **arguments)
    before = weight[rows].double()
    total = transition[:, :1] * before + rest[rows].double()
    weight[rows] = total.float()
    rest[rows] = (total - weight[rows].double()).float()
    if momentum is not None:  # what weight decay takes from the weight; of the rest the operator knew
        momentum[rows] = (momentum[rows].double() + transition[:, 2:3] * before).float()


def chunks(num_rows: int, device: torch.device) -> Iterator[Tensor]:
    """All rows of a table, some at a time."""
    for first in range(0, num_rows, _ROWS):
        yield torch.arange(first, min(first + _ROWS, num_rows), device=device)
