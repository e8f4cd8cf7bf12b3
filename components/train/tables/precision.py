"""Whether float32 rows hold a step's noise: the bound on what rounding adds, and when a second float32 is needed.

A row takes its gradient when the step ends, and the noise of the step when it is next read. In between it is rounded to
float32. On neighbouring datasets it is not rounded by the same, so what one unit adds to a row of D columns, at most
lr C / b in norm, may come out larger by `margin` of it. For a row w, a velocity v, and m units that meet in the row:

    no momentum:  margin = 2^-23 ( r sqrt(D) max|w| / (lr C / b)  +  r m )                       r = 1, weight decay 2
    momentum:     margin = 2^-23 ( r sqrt(D) max|w| / (lr C / b)  +  9 (sqrt(D) max|v| / (C / b) + m) )      r = 5, 6

(2^-23 is twice what one rounding moves a number, relative: once on either dataset.) Where that is above `MOST_MARGIN`,
the table keeps a second float32 beside each weight and each velocity, and both together are the row until it has its
noise. The first is what is read and released. docs/floating-point.md has the argument and counts the roundings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError
from lazydp.components.train.device.placement import CPU, moved
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.arguments import RowGroups

MOST_MARGIN = 2.0**-7
"""Of what one unit adds to one row."""

_TWO_ROUNDINGS = 2.0**-23
_NOISE_IN_UNITS = 4.0
_CHUNK = 1 << 22
_STEPS_ASKED = 24
_LEAST_LARGEST = 1 / 16
# Below this part of the largest rate, steps move next to nothing.
LEAST_PART = 1 / 16


@dataclass(frozen=True, slots=True)
class RowSizes:
    """How large the rows of a table are, before a step adds its gradient to them.

    Attributes:
        weight: the largest absolute weight.
        velocity: the largest absolute velocity; 0 without momentum.
        units: how many units add to one row at most.
    """

    weight: float
    velocity: float = 0.0
    units: float = 0.0


@dataclass(frozen=True)
class Rounding:
    """What the rounding of rows is measured by.

    Attributes:
        optimizer: of the tables.
        bound: C / b.
        noise_scale: sigma C / b.
    """

    optimizer: EmbeddingSgd
    bound: float
    noise_scale: float

    def margin(self, sizes: RowSizes, *, columns: int, rate: float) -> float:
        """What rounding may add to a unit's contribution to one row of D `columns`, relative to it.

        A step of rate 0 moves no weight, and rounds none.
        """
        root, roundings = math.sqrt(columns), 1 + bool(self.optimizer.weight_decay)
        of_weight = root * sizes.weight / (rate * self.bound) if rate > 0.0 else 0.0
        if self.optimizer.momentum:
            of_velocity = root * sizes.velocity / self.bound + sizes.units
            return _TWO_ROUNDINGS * ((roundings + 4) * of_weight + 9 * of_velocity)
        return _TWO_ROUNDINGS * roundings * (of_weight + sizes.units) if rate > 0.0 else 0.0

    def needs_second_float(self, sizes: RowSizes, *, columns: int, rate: float) -> bool:
        """Whether one float32 rounds away too much: the margin is too large, or noise is below 4 units of it."""
        if self.margin(sizes, columns=columns, rate=rate) > MOST_MARGIN:
            return True
        return 0.0 < rate * self.noise_scale < _NOISE_IN_UNITS * _TWO_ROUNDINGS * sizes.weight

    def begins_with_two(self, weight: Tensor, expected: float | None = None) -> bool:
        """Whether a table that begins as `weight` is to have a second float, at the least rate that matters.

        It is a function of public numbers: the initial weights, the schedule, sigma, C and b.

        Args:
            weight: the table, or a shard of it.
            expected: how large weights are taken to become; None: `expected_largest` of `weight`.
        """
        rates = rates_that_matter(self._rates)
        if not rates or (expected is None and not weight.numel()):
            return False
        largest = expected_largest(weight) if expected is None else expected
        return self.needs_second_float(RowSizes(largest), columns=weight.shape[1], rate=min(rates))

    def is_negligible(self, rate: float) -> bool:
        """Whether a step of this rate moves next to nothing beside the others; never so with momentum."""
        return not self.optimizer.momentum and rate < LEAST_PART * max(self._rates, default=0.0)

    @cached_property
    def _rates(self) -> list[float]:
        """Rates at steps 1, 2, 4, ..., as far as the schedule goes."""
        rates = []
        for power in range(_STEPS_ASKED):
            try:
                rates.append(self.optimizer.rate(1 << power))
            except InputError:
                break
        return rates


def rates_that_matter(rates: list[float]) -> list[float]:
    """Those above 0 that are no less than a sixteenth of the largest."""
    return [rate for rate in rates if rate > 0.0 and rate >= LEAST_PART * max(rates)]


def expected_largest(weight: Tensor) -> float:
    """How large weights are taken to become: twice the initial ones, and 1/8 at least."""
    return 2.0 * max(largest_of(weight), _LEAST_LARGEST)


def largest_of(weight: Tensor) -> float:
    """The largest absolute weight, looked for in chunks: a table has no room for a copy."""
    flat = weight.reshape(-1)
    return max((float(chunk.abs().max()) for chunk in torch.split(flat, _CHUNK) if chunk.numel()), default=0.0)


def sizes_of(tables: list[tuple[Tensor, Tensor | None, RowGroups]]) -> Iterator[RowSizes]:
    """The sizes of the rows that a step adds to: (weight, velocity, groups of the lookups) of each table.

    One look at all of them: on a device the host waits once.
    """
    if tables:
        (figures,) = moved([torch.stack([_figures(*table) for table in tables])], CPU)
        yield from (RowSizes(*found) for found in figures.tolist())


def _figures(weight: Tensor, velocity: Tensor | None, groups: RowGroups) -> Tensor:
    """float32 [3]: largest weight, largest velocity, most lookups of one row (no fewer than its units)."""
    if not groups.rows.numel():
        return weight.new_zeros(3)
    rows = groups.rows.clamp(min=0)  # -1 is none, on a device
    largest = [_largest(part, rows) for part in (weight, velocity)]
    return torch.stack([*largest, groups.starts.diff().max().to(weight.dtype)])


def _largest(values: Tensor | None, rows: Tensor) -> Tensor:
    if values is None:
        return torch.zeros((), device=rows.device)
    least, most = torch.aminmax(values.index_select(0, rows))  # an infinity norm takes twenty times as long
    return torch.maximum(-least, most)
