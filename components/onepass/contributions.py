"""What one privacy unit adds to a statistic: rows of length at most 1, exactly, so that a sum moves by at most 1.

A statistic here is a sum over privacy units of a product of two rows, target (outer) source: one unit moves it by
|target| |source| (L2). Both rows are brought to length 1 and then rounded towards zero to a grid of 2^-14. So

- the squares of a row's grid numbers, which are whole numbers, are checked to sum to at most 2^28: the bound holds in
  the arithmetic that is done, not only on paper;
- every product is a multiple of 2^-28, and float64 holds every partial sum of at most 2^25 units exactly: the sum is
  the same in every order, and two neighbouring datasets differ by the unit's own contribution and nothing else.

Unit `user`: target and source are the same row, the items of all the user's positive training rows (not only the k that
training keeps: the length is bounded whatever their number). In a log with time the latest weigh most. Unit `example`:
the target is the example's item, the source its history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse

from lazydp.components.features.spec import HISTORY
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TRAIN
from lazydp.components.onepass.rules import PrivacyUnit
from lazydp.components.shared.errors import InputError, PrivacyError

Rows: TypeAlias = sparse.csr_matrix
Matrix: TypeAlias = npt.NDArray[np.float64]

GRID = 2.0**-14
MOST_UNITS = 2**25
USER_SHARE = 0.125
"""Of the histogram's row of a unit, the part that counts the unit itself; a multiple of the grid."""

_UNIT = 2**14
# Far above the rounding of a norm in float64, far below the grid.
_MARGIN = 1.0 - 1e-9
# Weight of an item taken a places before the last, where order is known: (1 + a)^-0.3.
_DECAY = -0.3
_UNITS_AT_ONCE = 8192
_ITEMS_AT_ONCE = 1 << 19
_POSITIVE = 0.5
# Most by which a pair row is longer than 1: its squares then fit 64 bits.
_LONGEST_PAIR_ROW = 2.0


@dataclass(frozen=True, slots=True)
class Contributions:
    """Rows of some privacy units, [units, num_items + 1] by item code, on the grid and of length at most 1.

    Attributes:
        targets: what is to be ranked high.
        sources: what it is to be ranked by; the very same rows where the unit is a user.
    """

    targets: Rows
    sources: Rows

    @property
    def symmetric(self) -> bool:
        """Whether target and source are the same row."""
        return self.targets is self.sources


def contributions(
    data: EncodedDataset, privacy_unit: PrivacyUnit, *, weights: Matrix | None = None
) -> Iterator[Contributions]:
    """The contributions of every privacy unit of the training split, some units at a time: memory stays bounded.

    Args:
        data: with items and users (unit `user`) or histories (unit `example`).
        privacy_unit: whose rows have length 1.
        weights: of items by code [num_items + 1], before rows are brought to length 1: public or released; None for 1.

    Raises:
        InputError: the dataset lacks items, users or histories, or has more units than sums are exact for.
    """
    if privacy_unit == "user":
        return _of_users(data, weights)
    return _of_examples(data, weights)


def _of_users(data: EncodedDataset, weights: Matrix | None) -> Iterator[Contributions]:
    items, offsets = data.histories()
    num_items, ordered = data.items.num_items, data.spec.timestamp is not None
    refuse_too_many(len(offsets) - 1)
    first = 0
    while first < len(offsets) - 1:
        # Whole users: as many as hold the items of a block, and one at least.
        last = int(np.searchsorted(offsets, offsets[first] + _ITEMS_AT_ONCE, side="right")) - 1
        last = min(max(last, first + 1), first + _UNITS_AT_ONCE, len(offsets) - 1)
        taken = items[offsets[first] : offsets[last]]
        rows = history_rows(taken, offsets[first : last + 1] - offsets[first], num_items, ordered=ordered)
        rows = unit_rows(_weighted(rows, weights))
        yield Contributions(rows, rows)
        first = last


def _of_examples(data: EncodedDataset, weights: Matrix | None) -> Iterator[Contributions]:
    train = data.split(TRAIN)
    if train.item is None or data.spec.history is None:
        raise InputError(
            "a start per example joins an item to the history before it, and the feature spec has no history: give it "
            "`history: {max_length: 200}`, or set privacy_unit: user"
        )
    num_items, ordered = data.items.num_items, data.spec.timestamp is not None
    refuse_too_many(len(train))
    at_once = max(1, _ITEMS_AT_ONCE // data.spec.history.max_length)
    for start in range(0, len(train), at_once):
        numbers = np.arange(start, min(start + at_once, len(train)))
        batch = train.take(numbers[train.label[numbers] >= _POSITIVE])
        assert batch.item is not None
        bags = batch.bags[HISTORY]
        targets = history_rows(batch.item.numpy(), np.arange(batch.size + 1), num_items, ordered=False)
        sources = history_rows(bags.values.numpy(), bags.offsets.numpy(), num_items, ordered=ordered)
        yield Contributions(unit_rows(_weighted(targets, weights)), unit_rows(_weighted(sources, weights)))


def _weighted(rows: Rows, weights: Matrix | None) -> Rows:
    if weights is not None:
        rows.data *= weights[rows.indices]
    return rows


def refuse_too_many(units: int) -> None:
    """Beyond 2^25 units a sum of multiples of 2^-28 is no longer exact in float64."""
    if units > MOST_UNITS:
        raise InputError(
            f"a start sums at most {MOST_UNITS} privacy units exactly, and the dataset has more: use a part of it"
        )


def history_rows(items: npt.NDArray[Any], offsets: npt.NDArray[Any], num_items: int, *, ordered: bool) -> Rows:
    """Bags of item codes as rows of weights, before they are brought to length 1; a repeated item adds up.

    Args:
        items: codes, one bag after the other.
        offsets: [rows + 1]; bag r is items[offsets[r]:offsets[r + 1]], oldest first.
        num_items: of the catalogue.
        ordered: whether the order means anything; then the latest weigh most.
    """
    weights: npt.NDArray[Any] = np.ones(len(items))
    if ordered:
        lengths = np.diff(offsets)
        age = np.repeat(offsets[1:], lengths) - 1 - np.arange(len(items))
        weights = (1.0 + age) ** _DECAY
    rows = sparse.csr_matrix((weights, items.astype(np.int64), offsets), shape=(len(offsets) - 1, num_items + 1))
    rows.sum_duplicates()
    return rows


def unit_rows(rows: Rows, *, length: float = 1.0) -> Rows:
    """`rows` brought to `length`, then rounded towards zero to the grid: no row is longer, and it is checked.

    A row of zeros stays one.

    Raises:
        PrivacyError: a row is longer than it may be, which only a mistake in this code could bring about.
    """
    number = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    norms = np.sqrt(np.bincount(number, weights=np.square(rows.data), minlength=rows.shape[0]))
    scale = np.where(norms > 0, length * _MARGIN / np.where(norms > 0, norms, 1.0), 0.0)
    whole = np.trunc(rows.data * scale[number] * _UNIT)
    _check(np.bincount(number, weights=np.square(whole), minlength=rows.shape[0]), length)
    return sparse.csr_matrix((whole * GRID, rows.indices, rows.indptr), shape=rows.shape)


def pair_rows(rows: Rows) -> Rows:
    """`rows` as they are used for a sum of x x' of which the diagonal is left out: what is left has length at most 1.

    That is, the sum over i != j of (x_i x_j)^2 = |x|^4 - sum_i x_i^4 is at most 1. So a row of few items may be longer
    than 1: two items alike weigh 2^(1/4) times as much as they do where the diagonal counts. A row of one item has no
    pair, and whatever it is scaled to, it adds nothing.

    Raises:
        PrivacyError: as in `unit_rows`.
    """
    number = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))

    def total(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.bincount(number, weights=values, minlength=rows.shape[0])

    norms = np.sqrt(total(np.square(rows.data)))
    units = rows.data / np.where(norms > 0, norms, 1.0)[number]
    pairs = np.maximum(1.0 - total(units**4), _LONGEST_PAIR_ROW**-4)
    whole = np.trunc(units * (_MARGIN * pairs**-0.25)[number] * _UNIT)
    squares = np.square(whole.astype(np.int64))
    sums, fourths = (np.zeros(rows.shape[0], dtype=np.int64) for _ in range(2))
    np.add.at(sums, number, squares)
    np.add.at(fourths, number, np.square(squares))
    _refuse_long(int(np.max(np.square(sums) - fourths, initial=0)), _UNIT**4)
    return sparse.csr_matrix((whole * GRID, rows.indices, rows.indptr), shape=rows.shape)


def unit_dense(rows: Matrix) -> Matrix:
    """The same for dense rows [n, k]."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    whole = np.trunc(rows * np.where(norms > 0, _MARGIN / np.where(norms > 0, norms, 1.0), 0.0) * _UNIT)
    _check(np.square(whole).sum(axis=1), 1.0)
    return np.asarray(whole * GRID)


def _check(squares: npt.NDArray[Any], length: float) -> None:
    # Sums of squares of whole numbers below 2^14 are exact in float64.
    _refuse_long(float(np.max(squares, initial=0.0)), (length * _UNIT) ** 2)


def _refuse_long(longest: float, most: float) -> None:
    if not longest <= most:
        raise PrivacyError(
            f"a contribution has the squared length {longest / most} of the most that is charged: nothing is released; "
            "this is a mistake in the code that bounds contributions"
        )
