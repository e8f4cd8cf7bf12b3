"""The statistics: sums over privacy units of products of two rows, with Gaussian noise for a sensitivity of 1.

Every function makes one pass over `contributions`, holds the statistic and one block of rows, and adds its noise at the
end. `std` is the noise's standard deviation on every entry; 0 is for runs without privacy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lazydp.components.onepass.basis import Basis
from lazydp.components.onepass.contributions import (
    USER_SHARE,
    Contributions,
    Matrix,
    pair_rows,
    unit_dense,
    unit_rows,
)
from lazydp.components.onepass.noise import add_noise
from lazydp.components.shared.noise_addresses import MATRIX_TABLE, POPULARITY_TABLE, SKETCH_TABLE
from lazydp.kernels.noise_key import NoiseKey

Pass = Callable[[], Iterable[Contributions]]
"""Begins a pass over the contributions of all privacy units."""

_PASSES = 4
_MORE_COLUMNS = 32


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


def noised_sketch(units: Pass, basis: Basis, items: np.ndarray, *, std: float, key: NoiseKey) -> Matrix:
    """Sum over units of target (outer) direction, for the targets `items` only: [t, k].

    A unit's target row keeps its entries at `items` and is brought to length 1 again. So a unit adds the more to the
    sums of these items, and no longer anything to items whose sums the noise would hide. Its direction, the source seen
    in the basis, has length 1 after the basis has weighed its columns. The weights are divided out of the sum.

    Args:
        units: begins a pass.
        basis: of k directions, computed from what is public or released.
        items: codes [t], chosen from what is public or released.
        std: of the noise.
        key: the run's noise key.
    """
    sums = np.zeros((len(items), basis.columns.shape[1]))
    for part in units():
        directions = unit_dense(np.asarray(part.sources @ basis.columns) * basis.weights)
        sums += unit_rows(part.targets[:, items]).T @ directions
    add_noise(sums, std, key, table=SKETCH_TABLE)
    sums /= basis.weights
    return sums


def noised_matrix(units: Pass, items: np.ndarray, *, std: float, key: NoiseKey) -> Matrix:
    """Sum over units of target (outer) source among `items` (codes [M]), made symmetric, its diagonal zero: [M, M].

    Where target and source are one row x, the sum of x x' is symmetric before its noise. Its diagonal, how often items
    are taken, is in the histogram already and would take most of the length of short histories: it is not released, and
    what a unit adds off it, sqrt(2) x_i x_j for i < j, has a length of at most 1 (`pair_rows`). Noise of std / sqrt(2)
    on each entry above the diagonal is then the Gaussian mechanism; (Z + Z') / 2 is such noise, for a Z with `std` on
    every entry. Where target and source differ, all entries are independent and get noise of `std`. That the sum is
    made symmetric afterwards, and loses its diagonal, is post-processing.
    """
    sums = np.zeros((len(items), len(items)))
    for part in units():
        if part.symmetric:
            targets = sources = pair_rows(part.targets[:, items])
        else:
            targets, sources = unit_rows(part.targets[:, items]), unit_rows(part.sources[:, items])
        sums += np.asarray((targets.T @ sources).todense())
    add_noise(sums, std, key, table=MATRIX_TABLE)
    np.fill_diagonal(sums, 0.0)
    return (sums + sums.T) / 2


def leading_eigenvectors(units: Pass, *, num_items: int, rank: int) -> tuple[Matrix, np.ndarray]:
    """The leading eigenvectors [num_items + 1, rank] and eigenvalues of the sum over units of target (outer) source.

    Without noise, for runs without privacy whose catalogue is too large for the matrix: subspace iteration from a fixed
    beginning (Halko, Martinsson and Tropp, SIAM Review 2011, algorithm 4.4), each a pass.

    Args:
        units: begins a pass.
        num_items: of the catalogue.
        rank: eigenvectors wanted; there are no more than num_items.
    """
    width = min(rank + _MORE_COLUMNS, num_items)
    spanned = np.random.default_rng(0).normal(size=(num_items + 1, width)).astype(np.float32)
    for _ in range(_PASSES):
        spanned = _times(units, np.linalg.qr(spanned)[0])
    spanned = np.linalg.qr(spanned)[0]
    values, vectors = np.linalg.eigh(spanned.T @ _times(units, spanned))
    leading = np.argsort(-values)[:rank]
    return (spanned @ vectors[:, leading]).astype(np.float64), values[leading].astype(np.float64)


def _times(units: Pass, columns: Any) -> Any:
    """The sum, made symmetric, times `columns` [num_items + 1, k], float32."""
    product = np.zeros_like(columns)
    for part in units():
        targets, sources = part.targets.astype(np.float32), part.sources.astype(np.float32)
        if part.symmetric:
            product += targets.T @ (targets @ columns)
        else:
            product += (targets.T @ (sources @ columns) + sources.T @ (targets @ columns)) / 2
    return product
