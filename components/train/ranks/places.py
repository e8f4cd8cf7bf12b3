"""Where the rows of a table lie, and which rank owns them.

Row r of a table of R rows has the place a r mod R. Each rank owns a block of neighbouring places. Codes often ascend
with falling popularity, so the first block of rows is read far more often than the others. A factor a near R times the
golden ratio spreads neighbouring rows evenly over all places, and so over all ranks. It depends on R alone: a table
that was trained on two ranks is the same table on four. With a = 1 a row's place is its number.

Noise and initial weights are addressed by the place, and a rank knows its rows by their places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError

Arrangement = Literal["spread", "ordered"]
"""`spread`: neighbouring rows lie far from each other. `ordered`: the place of a row is its number."""

MAX_ROWS = 1 << 31
"""Of a table whose places are computed: a product of two numbers of rows is an int64."""

_GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, slots=True)
class Places:
    """The places of the rows of one table, a permutation.

    Attributes:
        num_rows: R.
        factor: a, without a common divisor with R; 1 <= a.
    """

    num_rows: int
    factor: int = 1

    @classmethod
    def of_table(cls, num_rows: int, arrangement: Arrangement) -> Self:
        """The places of a table of `num_rows` rows.

        Raises:
            InputError: more rows than places can be computed for.
        """
        if num_rows >= MAX_ROWS:
            raise InputError(f"a table that is spread over ranks has fewer than 2^31 rows, found {num_rows}")
        return cls(num_rows) if arrangement == "ordered" else cls(num_rows, _spreading_factor(num_rows))

    def of(self, rows: Tensor) -> Tensor:
        """The places of `rows`, int64 [N]."""
        return rows if self.factor == 1 else rows * self.factor % self.num_rows

    def by_row(self, weight: Tensor) -> Tensor:
        """Rows [R, D], which lie in the order of their places, by their numbers; a copy unless both agree."""
        return weight if self.factor == 1 else weight[self.of(torch.arange(self.num_rows))]


def _spreading_factor(num_rows: int) -> int:
    factor = max(1, round(num_rows * _GOLDEN_RATIO))
    while math.gcd(factor, num_rows) > 1:
        factor += 1
    return factor


def shard(num_places: int, *, rank: int, ranks: int) -> range:
    """The places that `rank` owns, of `ranks` ranks; blocks differ by one place at most."""
    return range(rank * num_places // ranks, (rank + 1) * num_places // ranks)
