"""Which lane of a step each unit is in.

Each unit is in one of L lanes, drawn uniformly and independently. So one more unit comes to one lane, and leaves all
others as they are: what it changes in the rounding of other units' terms is bounded as without lanes
(`mechanism/unit_order.py`). Lanes of a fixed size would pass units on to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lazydp.components.ingest.split import Rows
from lazydp.components.shared.errors import InputError
from lazydp.components.train.data.sampler import Keystream
from lazydp.kernels.noise_key import NoiseKey


def lanes_of(rank: int, *, lanes: int, ranks: int) -> range:
    """The lanes that a rank computes.

    Raises:
        InputError: the number of ranks does not divide the number of lanes.
    """
    if lanes % ranks:
        raise InputError(
            f"the lanes of a step are divided among the ranks: {lanes} lanes do not divide among {ranks} ranks; start "
            f"a power of two of ranks, {lanes} at most, or train a new run with more `lanes`"
        )
    each = lanes // ranks
    return range(rank * each, (rank + 1) * each)


class Lanes:
    """The lanes of each step of a run.

    Args:
        key: the run's key; lanes are drawn under a key derived from it.
        count: L, a power of two.
    """

    def __init__(self, key: NoiseKey, count: int) -> None:
        self._key = key.derive("lanes") if count > 1 else None
        self._count = count

    def divided(self, step: int, units: int) -> Sequence[Rows]:
        """The units of each lane, ascending, of `units` units that a step drew. A pure function of its arguments."""
        if self._key is None:
            return [np.arange(units)]
        lanes = Keystream(self._key, stream=step).below(self._count, units)
        order = np.argsort(lanes, kind="stable")
        ends = np.searchsorted(lanes[order], np.arange(1, self._count))
        return np.split(order, ends)
