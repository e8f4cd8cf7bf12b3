"""What the operators and their reference both take and return."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Distribution = Literal["gaussian", "ones"]


@dataclass(frozen=True, slots=True)
class RowGroups:
    """The lookups of a batch grouped by the row they read, made once per step and table by `ops.group_rows`.

    Attributes:
        rows: int64 [U], the distinct rows, ascending.
        order: int64 [N], positions of the lookups sorted by row; lookups of one row keep their order.
        starts: int64 [U + 1]; the lookups of rows[u] are order[starts[u]:starts[u + 1]].

    On CUDA the host does not know U: rows is padded to [N] with -1, starts to [N + 1] with N (docs/cuda.md).
    """

    rows: Tensor
    order: Tensor
    starts: Tensor


_GRIDS_PER_BOUND = 38


def exact_grid(bound: float) -> float:
    """What the terms of an exact sum are rounded to: 2^-38 of the least power of two that is not below `bound`.

    Raises:
        ValueError: a bound that is not a normal float32: the coefficients of the terms are.
    """
    if not 2.0**-126 <= bound <= 2.0**126:
        raise ValueError(f"bound: expected 2^-126 <= bound <= 2^126, found {bound}")
    mantissa, exponent = math.frexp(bound)
    return math.ldexp(1.0, exponent - _GRIDS_PER_BOUND - (mantissa == 0.5))
