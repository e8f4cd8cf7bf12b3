"""The statistics: sums over privacy units of products of two rows, with Gaussian noise for a sensitivity of 1.

Every function makes one pass over `contributions`, holds the statistic and one block of rows, and adds its noise at the
end. `std` is the noise's standard deviation on every entry; 0 is for runs without privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lazydp.components.onepass.contributions import USER_SHARE, Contributions, Matrix, unit_dense, unit_rows
from lazydp.components.onepass.noise import add_noise
from lazydp.components.shared.noise_addresses import MATRIX_TABLE, POPULARITY_TABLE, SKETCH_TABLE
from lazydp.kernels.noise_key import NoiseKey

Pass = Callable[[], Iterable[Contributions]]
"""Begins a pass over the contributions of all privacy units."""


def noised_histogram(units: Pass, *, num_items: int, std: float, key: NoiseKey) -> Matrix:
    """How much each item was taken, [num_items + 1] by item code; entry 0 counts the privacy units, over 8.

    A unit's row is its target row, shortened so that with the 1/8 at entry 0 (which belongs to no item) its length is
    at most 1.
    """
    sums = np.zeros((num_items + 1, 1))
    length = (1.0 - USER_SHARE**2) ** 0.5
    for part in units():
        rows = unit_rows(part.targets, length=length)
        sums[:, 0] += np.asarray(rows.sum(axis=0)).ravel()
        sums[0, 0] += USER_SHARE * rows.shape[0]
    add_noise(sums, std, key, table=POPULARITY_TABLE)
    return sums[:, 0]


def noised_sketch(units: Pass, basis: Matrix, *, std: float, key: NoiseKey) -> Matrix:
    """Sum over units of target (outer) direction, [num_items + 1, k]: the direction is the source seen in the basis.

    Args:
        units: begins a pass.
        basis: orthonormal columns [num_items + 1, k], computed from what is public or released.
        std: of the noise.
        key: the run's noise key.
    """
    sums = np.zeros(basis.shape)
    for part in units():
        sums += part.targets.T @ unit_dense(np.asarray(part.sources @ basis))
    add_noise(sums, std, key, table=SKETCH_TABLE)
    sums[0] = 0.0  # of unknown items; there are none
    return sums


def noised_matrix(units: Pass, items: np.ndarray, *, std: float, key: NoiseKey) -> Matrix:
    """Sum over units of target (outer) source among `items` (codes [M]), made symmetric: [M, M].

    Where target and source are one row x, the sum of x x' is symmetric before its noise. As x_i^2 on the diagonal and
    sqrt(2) x_i x_j above it have the length |x|^2 <= 1 together, noise of `std` on the diagonal and std / sqrt(2) off
    it is the Gaussian mechanism; (Z + Z') / 2 is such noise, for a Z with `std` on every entry. Where they differ, all
    entries are independent and get noise of `std`. That the sum is made symmetric afterwards is post-processing.
    """
    sums = np.zeros((len(items), len(items)))
    for part in units():
        targets = unit_rows(part.targets[:, items])
        sources = targets if part.symmetric else unit_rows(part.sources[:, items])
        sums += np.asarray((targets.T @ sources).todense())
    add_noise(sums, std, key, table=MATRIX_TABLE)
    return (sums + sums.T) / 2
