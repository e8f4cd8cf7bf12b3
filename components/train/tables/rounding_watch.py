"""Finds tables whose rows outgrew one float32, before a step's gradient is rounded to it.

The rows decide, before they have their noise. That tells nothing: whichever is chosen, on either of two neighbouring
datasets, rounding stays within its half of the margin (docs/floating-point.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from lazydp.components.train.ranks.ranks import Ranks, most
from lazydp.components.train.tables.precision import Rounding, RowSizes, sizes_of
from lazydp.components.train.tables.table import Table
from lazydp.components.train.tables.weight_bound import WeightBound
from lazydp.kernels.arguments import RowGroups


class RoundingWatch:
    """Watches the tables of one float.

    Args:
        rounding: what it is measured by.
        keeps_bounds: whether rows change by what they read alone (noise is pending), so that a bound on a table holds.
        ranks: that have some rows of each table. All come to the same result, and to that of one rank with all rows.
    """

    def __init__(self, rounding: Rounding, *, keeps_bounds: bool, ranks: Ranks) -> None:
        self._rounding = rounding
        self._ranks = ranks
        # Velocities have no bound. Of several ranks each would skip the look at other tables.
        self._keeps_bounds = keeps_bounds and not rounding.optimizer.momentum and ranks.size == 1
        self._bounds: dict[str, WeightBound] = {}

    def forget(self) -> None:
        """Take nothing for granted: weights may have changed otherwise than by steps."""
        self._bounds.clear()

    def outgrown(
        self, tables: Mapping[str, Table], groups: Mapping[str, RowGroups], *, rate: float, reach: float, noise: float
    ) -> list[str]:
        """Names of tables that need a second float, for the rows that the coming step adds to.

        Args:
            tables: those that the step adds to.
            groups: of the lookups of each.
            rate: learning rate of the step.
            reach: what one unit adds to a weight at most, lr C / b.
            noise: standard deviation of all the noise that a row may have got or have pending.
        """
        asked = {name: table for name, table in tables.items() if not table.has_two_floats}
        # On a device a look costs next to nothing.
        bounded = [name for name, table in asked.items() if self._keeps_bounds and table.weight.is_cpu]
        for name in bounded:
            if self._is_surely_small(name, tables[name], groups[name], rate=rate, reach=reach, noise=noise):
                del asked[name]
        looked_at = [(table.weight, table.momentum, groups[name]) for name, table in asked.items()]
        return [
            name
            for (name, table), sizes in zip(asked.items(), self._of_all_ranks(sizes_of(looked_at)), strict=True)
            if self._rounding.needs_second_float(sizes, columns=table.weight.shape[1], rate=rate)
        ]

    def _of_all_ranks(self, sizes: Iterable[RowSizes]) -> Iterable[RowSizes]:
        """The largest of each table, wherever its rows are."""
        if self._ranks.size == 1:
            return sizes
        here = torch.tensor([[of.weight, of.velocity, of.units] for of in sizes], dtype=torch.float64)
        return [RowSizes(*of) for of in most(self._ranks, here, purpose="sizes").tolist()]

    def _is_surely_small(
        self, name: str, table: Table, groups: RowGroups, *, rate: float, reach: float, noise: float
    ) -> bool:
        """Whether no row of the step can have outgrown one float32, by the bound on its table."""
        if not groups.rows.numel():
            return True
        needs = partial(self._rounding.needs_second_float, columns=table.weight.shape[1], rate=rate)
        lookups = groups.starts.diff()
        units = float(lookups.max())
        bound = self._bounds.setdefault(name, WeightBound(table.weight))
        small = bound.refutes(lambda largest: needs(RowSizes(largest, units=units)), noise=noise)
        bound.grow(groups.rows, lookups, most=units, step=reach)
        return small
