"""How far one privacy unit can move a statistic: never by more than 1, whatever the unit brings."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import sparse

from lazydp.components.onepass.basis import Basis
from lazydp.components.onepass.contributions import (
    GRID,
    USER_SHARE,
    Contributions,
    history_rows,
    pair_rows,
    refuse_too_many,
    unit_dense,
    unit_rows,
)
from lazydp.components.onepass.statistics import noised_histogram, noised_matrix, noised_sketch
from lazydp.components.shared.errors import InputError, PrivacyError
from lazydp.kernels.noise_key import NoiseKey

ITEMS = 40
KEY = NoiseKey.for_tests(1)
Array = npt.NDArray[Any]


def adversaries() -> dict[str, list[int]]:
    """Histories of users who want to move a sum as far as they can."""
    dice = np.random.default_rng(7)
    chosen: dict[str, list[int]] = {
        "one item": [3],
        "one item, a thousand times": [3] * 1000,
        "all items": list(range(1, ITEMS + 1)),
        "all items, again and again": list(range(1, ITEMS + 1)) * 50,
        "two items": [1, 2],
        "two items, one of them often": [1] * 3 + [2],
        "four items": [1, 2, 3, 4],  # a length of 2: every quotient is exact, and nothing is rounded
        "one often, all once": [5] * 500 + list(range(1, ITEMS + 1)),
        "nothing": [],
    }
    for number in range(60):
        size = int(dice.integers(1, 300))
        chosen[f"random {number}"] = (1 + dice.zipf(1.3, size) % ITEMS).tolist()
    return chosen


def of_users(histories: list[list[int]], *, ordered: bool) -> Contributions:
    offsets = np.cumsum([0, *map(len, histories)])
    items = np.array([item for history in histories for item in history], dtype=np.int32)
    rows = unit_rows(history_rows(items, offsets, ITEMS, ordered=ordered))
    return Contributions(rows, rows)


def squares(values: Array) -> Fraction:
    """The sum of squares, in exact arithmetic."""
    return sum((Fraction(value) ** 2 for value in values.ravel().tolist()), Fraction(0))


# Powers of two, so that to divide by them and to multiply again is exact.
WEIGHTS = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
EVERY_ITEM = np.arange(1, ITEMS + 1)
SOME_ITEMS = np.array([7, 5, 1, 3, 2])


def basis(columns: int = 6) -> Array:
    q, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(ITEMS + 1, columns)))
    return np.asarray(q)


def exact(units: Contributions, statistic: str) -> Array:
    """The statistic without noise, as what is noised: of the matrix sqrt(2) times what is above its diagonal."""

    def passed() -> Iterator[Contributions]:
        yield units

    if statistic == "histogram":
        return noised_histogram(passed, num_items=ITEMS, std=0.0, key=KEY)
    if statistic == "sketch":
        return noised_sketch(passed, Basis(basis(), WEIGHTS), EVERY_ITEM, std=0.0, key=KEY) * WEIGHTS
    if statistic == "sketch of some items":
        return noised_sketch(passed, Basis(basis(), WEIGHTS), SOME_ITEMS, std=0.0, key=KEY) * WEIGHTS
    return noised_matrix(passed, EVERY_ITEM, std=0.0, key=KEY)


def squared_length(difference: Array) -> Fraction:
    # Of a symmetric matrix the entries off the diagonal count twice, which is sqrt(2) squared.
    return squares(difference)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("statistic", ["histogram", "sketch", "sketch of some items", "matrix"])
def test_no_user_moves_a_statistic_by_more_than_1(statistic: str, ordered: bool) -> None:
    crowd = [history for name, history in adversaries().items() if name.startswith("random")]
    without = exact(of_users(crowd, ordered=ordered), statistic)
    moved = {}
    for name, history in adversaries().items():
        there = exact(of_users([*crowd, history], ordered=ordered), statistic)
        moved[name] = squared_length(there - without)
    assert max(moved.values()) <= 1
    # The control: the bound is met, so nothing hides in slack. (Nobody's row still counts its user. One item makes no
    # pair for the matrix, and rows that are nearly all one item are not made as long as they might be.)
    slack = {name for name in moved if moved[name] <= Fraction(998, 1000)}
    assert "nothing" in slack
    assert moved["nothing"] == (Fraction(USER_SHARE) ** 2 if statistic == "histogram" else 0)
    single = {"nothing", "one item", "one item, a thousand times"}
    if statistic == "matrix":
        assert all(moved[name] == 0 for name in single)
        assert len(slack) < len(moved) / 2
        assert not slack & {"two items", "four items", "all items"}
    else:
        assert slack == {"nothing"}


def test_no_example_moves_a_statistic_by_more_than_1() -> None:
    histories = [history for history in adversaries().values() if history]
    offsets = np.cumsum([0, *map(len, histories)])
    items = np.array([item for history in histories for item in history])
    sources = unit_rows(history_rows(items, offsets, ITEMS, ordered=True))
    targets = np.arange(len(histories)) % ITEMS + 1
    rows = unit_rows(history_rows(targets, np.arange(len(histories) + 1), ITEMS, ordered=False))
    everyone = np.arange(1, ITEMS + 1)
    for number in range(len(histories)):
        one = Contributions(rows[number], sources[number])
        product = np.asarray((one.targets[:, everyone].T @ one.sources[:, everyone]).todense())
        assert Fraction(998, 1000) < squares(product) <= 1
        assert squares(exact(one, "sketch")) <= 1


def test_sums_are_exact_so_the_order_of_units_changes_no_bit() -> None:
    crowd = list(adversaries().values())
    turned = crowd[::-1]
    for statistic in ("histogram", "sketch", "sketch of some items", "matrix"):
        one, other = (exact(of_users(who, ordered=True), statistic) for who in (crowd, turned))
        assert one.tobytes() == other.tobytes()
    # The control: sums of the same rows without a grid depend on their order.
    plain = [np.asarray(history_rows(np.array(h), np.array([0, len(h)]), ITEMS, ordered=True).todense()) for h in crowd]
    lengths = [max(float(np.linalg.norm(row)), 1.0) for row in plain]
    there = sum((row / length for row, length in zip(plain, lengths, strict=True)), np.zeros((1, ITEMS + 1)))
    back = sum((row / length for row, length in zip(plain[::-1], lengths[::-1], strict=True)), np.zeros((1, ITEMS + 1)))
    assert there.tobytes() != back.tobytes()


def test_rows_lie_on_the_grid() -> None:
    rows = of_users(list(adversaries().values()), ordered=True).targets
    assert np.array_equal(np.rint(rows.data / GRID) * GRID, rows.data)
    dense = unit_dense(np.random.default_rng(2).normal(size=(50, 9)))
    assert np.array_equal(np.rint(dense / GRID) * GRID, dense)
    assert all(squares(row) <= 1 for row in dense)


@pytest.mark.parametrize("rows", [unit_rows, pair_rows])
def test_a_row_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    """The check guards against mistakes: rounded up instead of towards zero, rows are too long."""
    three = sparse.csr_matrix(np.array([[1.0, 1.0, 1.0]]))
    assert rows(three).nnz == 3
    monkeypatch.setattr(np, "trunc", np.ceil)
    with pytest.raises(PrivacyError, match="squared length"):
        rows(three)


def test_pairs_of_extreme_rows_have_length_1_at_most_and_fit_64_bits() -> None:
    dice = np.random.default_rng(9)
    weights = [np.exp(dice.normal(scale=spread, size=12)) for spread in (0.1, 1.0, 5.0, 30.0) for _ in range(20)]
    rows = pair_rows(sparse.csr_matrix(np.array([*weights, np.eye(12)[0], np.zeros(12)])))
    for row in np.asarray(rows.todense()):
        product = np.outer(row, row)
        np.fill_diagonal(product, 0.0)
        assert squares(product) <= 1
        assert np.square(row).sum() <= 4.0


def test_more_units_than_sums_are_exact_for_are_refused() -> None:
    refuse_too_many(2**25)
    with pytest.raises(InputError, match="at most 33554432"):
        refuse_too_many(2**25 + 1)
