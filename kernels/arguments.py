"""What the operators and their reference both take and return."""

from __future__ import annotations

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
