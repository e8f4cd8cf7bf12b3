"""Whether float32 rows hold a step's noise: figures known before training, and the second float32 where they don't.

A row takes its gradient when the step ends, and the noise of the step when it is next read. In between it is rounded to
float32: each coordinate moves by at most half its unit in the last place, ulp, and on neighbouring datasets not by the
same. So what one unit adds to a row of D columns, at most lr C / b in norm, may come out larger by `margin` of it:

    margin = roundings * ulp * sqrt(D) / (lr C / b)

Where that is above `MOST_MARGIN`, every row keeps a second float32 beside each weight, and both together are the weight
until their sum has its noise. The first is what is read and released. docs/floating-point.md has the argument.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from lazydp.components.shared.errors import InputError
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd

MOST_MARGIN = 2.0**-7
"""Of what one unit adds to one row."""

_FLOAT32_DIGITS = 24
_CHUNK = 1 << 22
_STEPS_ASKED = 24
_LEAST_LARGEST = 1 / 16
# Rates that matter: below this part of the largest, steps move next to nothing.
LEAST_PART = 1 / 16


def margin(*, largest: float, columns: int, rate: float, bound: float, optimizer: EmbeddingSgd) -> float:
    """What rounding may add to a unit's contribution to one row, relative to it; infinite at rate 0.

    Args:
        largest: the largest absolute weight.
        columns: of the table, D.
        rate: learning rate of the step.
        bound: C / b.
        optimizer: with momentum or weight decay a row is rounded twice before its noise.
    """
    if rate == 0.0:
        return math.inf
    roundings = 2 if optimizer.momentum or optimizer.weight_decay else 1
    return roundings * ulp(largest) * math.sqrt(columns) / (rate * bound)


def ulp(value: float) -> float:
    """The distance of float32 numbers just below the next power of two above `value`."""
    return math.ldexp(1.0, math.frexp(value)[1] - _FLOAT32_DIGITS) if value > 0.0 else 0.0


def needs_second_float(weights: Iterable[Tensor], *, optimizer: EmbeddingSgd, bound: float) -> bool:
    """Whether the margin is too large at a rate that matters, for weights twice as large as at the beginning."""
    rates = _rates(optimizer)
    if not rates:
        return False
    least = min(rate for rate in rates if rate >= LEAST_PART * max(rates))
    return any(
        margin(largest=expected_largest(weight), columns=weight.shape[1], rate=least, bound=bound, optimizer=optimizer)
        > MOST_MARGIN
        for weight in weights
        if weight.numel()
    )


def expected_largest(weight: Tensor) -> float:
    """How large weights are taken to become: twice the initial ones, and 1/8 at least."""
    return 2.0 * max(largest_of(weight), _LEAST_LARGEST)


def _rates(optimizer: EmbeddingSgd) -> list[float]:
    """Rates above 0 at steps 1, 2, 4, ..., as far as the schedule goes."""
    rates = []
    for power in range(_STEPS_ASKED):
        try:
            rates.append(optimizer.rate(1 << power))
        except InputError:
            break
    return [rate for rate in rates if rate > 0.0]


def largest_of(weight: Tensor) -> float:
    """The largest absolute weight, looked for in chunks: a table has no room for a copy."""
    flat = weight.reshape(-1)
    return max((float(chunk.abs().max()) for chunk in flat.split(_CHUNK)), default=0.0)  # type: ignore[no-untyped-call]
