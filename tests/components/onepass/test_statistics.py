"""Noise of a start: its size, its addresses, and what it adds up to for the accountant."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from dp_accounting.pld import PLDAccountant
from scipy import sparse, stats

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import start_event
from lazydp.components.onepass import item_vectors, rules, statistics
from lazydp.components.onepass.contributions import Contributions
from lazydp.components.onepass.noise import add_noise
from lazydp.components.onepass.rules import Noise, choose
from lazydp.components.shared.noise_addresses import FIRST_RESERVED, MATRIX_TABLE, POPULARITY_TABLE, SKETCH_TABLE
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import RunCost, calibrated_noise_multiplier
from lazydp.kernels import reference
from lazydp.kernels.noise_key import NoiseKey
from lazydp.kernels.reference import KEYSTREAM_TABLE

Array = npt.NDArray[Any]


def noised(std: float, *, seed: int = 1, table: int = SKETCH_TABLE, rows: int = 300, columns: int = 40) -> Array:
    sums = np.zeros((rows, columns))
    add_noise(sums, std, NoiseKey.for_tests(seed), table=table)
    return sums


def looks_like(values: Array, std: float) -> bool:
    """Whether the values could be normal with `std`: chi-squared of their squares, and Kolmogorov of their shape."""
    total = float(np.square(values / std).sum())
    low, high = (float(stats.chi2.ppf(tail, values.size)) for tail in (0.001, 0.999))
    return bool(low < total < high and stats.kstest(values.ravel() / std, "norm").pvalue > 0.001)


def test_the_noise_has_the_standard_deviation_that_is_charged() -> None:
    found = noised(3.0)
    assert looks_like(found, 3.0)
    assert not looks_like(found, 2.0)
    assert not looks_like(found, 4.5)


def test_the_noise_is_that_of_its_addresses() -> None:
    key = NoiseKey.for_tests(5)
    sums = np.zeros((7, 3))
    add_noise(sums, 2.0, key, table=MATRIX_TABLE, first_row=4)
    secret = key.derive("noise").tensor()
    expected = reference.noise(secret, table=MATRIX_TABLE, rows=np_rows(4, 7), step=0, columns=3)
    assert np.abs(sums - 2.0 * expected.double().numpy()).max() <= 2.0**-8
    assert len({POPULARITY_TABLE, SKETCH_TABLE, MATRIX_TABLE}) == 3
    assert all(FIRST_RESERVED <= table < KEYSTREAM_TABLE for table in (POPULARITY_TABLE, SKETCH_TABLE, MATRIX_TABLE))


def np_rows(first: int, count: int) -> Any:
    import torch

    return torch.arange(first, first + count)


def test_the_same_key_gives_the_same_bits_and_no_other_does() -> None:
    assert noised(1.0).tobytes() == noised(1.0).tobytes()
    assert noised(1.0).tobytes() != noised(1.0, seed=2).tobytes()
    assert noised(1.0).tobytes() != noised(1.0, table=MATRIX_TABLE).tobytes()


def test_noised_values_are_coarse() -> None:
    found = noised(3.0)
    grid = 2.0**-7  # 3 / 256 lies between 2^-7 and 2^-6
    assert np.array_equal(np.rint(found / grid) * grid, found)
    assert not np.array_equal(np.rint(found / (4 * grid)) * (4 * grid), found)


def test_without_noise_nothing_is_added() -> None:
    assert not noised(0.0).any()


# --- what it costs -----------------------------------------------------------------------------------------------


def gaussian_delta(mu: float, epsilon_: float) -> float:
    """Delta of a Gaussian mechanism (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    upper = stats.norm.cdf(mu / 2 - epsilon_ / mu)
    return float(upper - math.exp(epsilon_) * stats.norm.cdf(-mu / 2 - epsilon_ / mu))


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_a_start_costs_what_its_two_gaussians_cost(target: float) -> None:
    config = TrainConfig.parse({"target_epsilon": target}, where="(test)")
    sigma = calibrated_noise_multiplier(config, None)
    cost = RunCost(config, None, sigma)
    spent = epsilon(cost.of_release(), delta=1e-5)
    assert 0.98 * target < spent <= target
    # By hand: the squared mu of the two add up to that of sigma, and the loss is that of one Gaussian.
    noise = config.start_noise(sigma)
    assert noise is not None
    assert noise.mu == pytest.approx(1 / sigma)
    assert gaussian_delta(noise.mu, spent) == pytest.approx(1e-5, rel=0.1)
    # And by dp-accounting itself, from the standard deviations that the statistics are given.
    accountant = PLDAccountant()
    accountant.compose(start_event(histogram=noise.histogram, statistics=noise.statistics))
    assert accountant.get_epsilon(1e-5) == pytest.approx(spent, rel=1e-3)


def test_a_user_of_k_examples_is_charged_for_all_of_them() -> None:
    config = TrainConfig.parse({"noise_multiplier": 4.0, "privacy_unit": "example"}, where="(test)")
    of_user, of_example = (RunCost(config, 5, 4.0).of_user(), RunCost(config, 1, 20.0).of_user())
    assert epsilon(of_user, delta=1e-5) > 4 * epsilon(RunCost(config, 5, 4.0).of_release(), delta=1e-5)
    assert epsilon(RunCost(config, 5, 20.0).of_user(), delta=1e-5) == pytest.approx(
        epsilon(RunCost(config, 5, 4.0).of_release(), delta=1e-5), rel=1e-3
    )
    assert of_example != of_user


# --- what is made of it ------------------------------------------------------------------------------------------


def without_the_unknown(vectors: Array) -> Array:
    """Orthonormal columns by item code: a row of zeros before the others."""
    return np.vstack([np.zeros(vectors.shape[1]), np.linalg.qr(vectors)[0]])


def test_a_matrix_that_the_basis_spans_is_completed_exactly() -> None:
    dice = np.random.default_rng(4)
    basis, items = without_the_unknown(dice.normal(size=(30, 5))), np.arange(1, 31)
    inner = dice.normal(size=(5, 5))
    whole = basis @ (inner @ inner.T) @ basis.T
    popularity = np.ones(31)
    rows = (whole @ basis)[items]
    vectors, values = item_vectors.sketched_eigenvectors(rows, basis, popularity, items, std=0.0, rank=5)
    assert np.allclose((vectors * values) @ vectors.T, whole)
    # A basis that spans less of it completes less.
    few = basis[:, :2]
    rows = (whole @ few)[items]
    vectors, values = item_vectors.sketched_eigenvectors(rows, few, popularity, items, std=0.0, rank=5)
    assert not np.allclose((vectors * values) @ vectors.T, whole)


def test_items_without_a_row_get_a_part_of_what_their_features_let_expect() -> None:
    """Two kinds of items, and rows of half of each."""
    kinds = np.array([0, *[1] * 20, *[2] * 20])
    basis = np.stack([kinds == 1, kinds == 2], axis=1) / math.sqrt(20)
    sketch = np.where(kinds[:, np.newaxis] == 1, [3.0, 1.0], [1.0, 2.0])
    items = np.r_[1:11, 21:31]
    found = item_vectors._all_rows(sketch[items], basis, items, expected=0.5)
    assert np.allclose(found[items], sketch[items])
    assert np.allclose(found[11:21], sketch[11:21] / 2)
    assert np.allclose(found[31:], sketch[31:] / 2)
    assert not found[0].any()
    # Of an item of no kind nothing is expected.
    basis[40] = 0.0
    assert np.allclose(item_vectors._all_rows(sketch[items], basis, items, expected=0.5)[40], 0.0)


def test_what_looks_like_noise_is_left_out() -> None:
    dice = np.random.default_rng(5)
    noise = dice.normal(size=(200, 200))
    signal = np.zeros(200)
    signal[:20] = 1 / math.sqrt(20)
    matrix = 400 * np.outer(signal, signal) + (noise + noise.T) / 2
    nothing = np.zeros((200, 0))
    found = item_vectors.above_noise(matrix.copy(), nothing, std=1.0, fewest=1, most=50)
    assert found.shape == (200, 1)
    assert abs(float(found[:, 0] @ signal)) > 0.99
    assert item_vectors.above_noise((noise + noise.T) / 2, nothing, std=0.1, fewest=1, most=50).shape[1] == 50
    # What the basis spans already is left out, and what it does not span is found beside it.
    other = np.r_[np.zeros(100), np.ones(100)] / 10
    spanned = signal[:, np.newaxis]
    assert item_vectors.above_noise(matrix.copy(), spanned, std=1.0, fewest=0, most=50).shape == (200, 0)
    found = item_vectors.above_noise(matrix + 200 * np.outer(other, other), spanned, std=1.0, fewest=0, most=50)
    assert found.shape == (200, 1)
    assert abs(float(found[:, 0] @ other)) > 0.98
    assert abs(float(found[:, 0] @ signal)) < 1e-9


def test_a_refilled_diagonal_is_that_of_the_low_rank_part() -> None:
    vectors, _ = np.linalg.qr(np.random.default_rng(6).normal(size=(60, 2)))
    whole = (vectors * [9.0, 4.0]) @ vectors.T
    hollow = whole.copy()
    np.fill_diagonal(hollow, 0.0)
    _, refilled = item_vectors.matrix_eigenvectors(hollow.copy(), std=0.0, rank=2)
    left = np.sort(np.linalg.eigvalsh(hollow))[::-1][:2]
    assert np.abs(refilled - [9.0, 4.0]).max() < np.abs(left - [9.0, 4.0]).max() / 3


def test_rows_of_a_sketch_that_noise_outweighs_are_shrunk() -> None:
    """Many items that nobody takes do not hide a direction of few popular ones."""
    dice = np.random.default_rng(7)
    items, popular = 5000, 50
    basis = np.zeros((items + 1, 2))
    basis[1 : popular + 1] = np.linalg.qr(dice.normal(size=(popular, 2)))[0]
    codes = np.arange(1, items + 1)
    popularity = np.where(np.arange(items + 1) <= popular, 100.0, 1.0)
    sketch = basis[codes] * [60.0, 40.0] + dice.normal(size=(items, 2))
    found, _ = item_vectors.sketched_eigenvectors(sketch, basis, popularity, codes, std=1.0, rank=2)
    kept = np.square(found[1 : popular + 1]).sum(axis=0)
    assert kept.min() > 0.95
    # The control: where all items pass for popular, the eigenvectors hold the noise of all.
    alike, _ = item_vectors.sketched_eigenvectors(sketch, basis, np.full(items + 1, 100.0), codes, std=1.0, rank=2)
    assert np.square(alike[1 : popular + 1]).sum(axis=0).max(initial=0.0) < 0.9


def test_leading_eigenvectors_are_those_of_the_whole_sum() -> None:
    dice = np.random.default_rng(10)
    rows = sparse.csr_matrix(np.square(dice.normal(size=(400, 91))) @ np.diag(0.95 ** np.arange(91)))
    halves = [Contributions(part, part) for part in (rows[:150], rows[150:])]
    vectors, values = statistics.leading_eigenvectors(lambda: halves, num_items=90, rank=5)
    expected, whole = np.linalg.eigh((rows.T @ rows).todense())
    assert np.allclose(values, expected[::-1][:5], rtol=1e-4)
    assert np.abs(np.sum(vectors * np.asarray(whole)[:, ::-1][:, :5], axis=0)).min() > 0.999
    crossed = [Contributions(rows, rows[:, np.arange(90, -1, -1)].tocsr())]
    _, values = statistics.leading_eigenvectors(lambda: crossed, num_items=90, rank=5)
    product = np.asarray((rows.T @ crossed[0].sources).todense())
    assert np.allclose(values, np.linalg.eigvalsh((product + product.T) / 2)[::-1][:5], rtol=1e-3)


def test_vectors_of_unknown_items_are_zero_and_typical_products_have_the_scale() -> None:
    dice = np.random.default_rng(8)
    popularity = np.exp(dice.normal(size=51))
    q, _ = np.linalg.qr(dice.normal(size=(50, 4)))
    items = np.arange(1, 51)
    found = item_vectors.item_vectors(q, np.array([4.0, 3.0, 2.0, 1.0]), popularity, items=items, dim=6, scale=0.7)
    assert found.shape == (51, 6)
    assert not found[0].any()
    assert not found[:, 4:].any()
    share = popularity[1:] / popularity[1:].sum()
    products = found[1:] @ found[1:].T
    assert math.sqrt(float(share @ np.square(products) @ share)) == pytest.approx(0.7)


# --- the rule ----------------------------------------------------------------------------------------------------


def test_more_users_are_asked_more() -> None:
    few, many = (choose(units=n, mu=1.0, num_items=10**5, has_features=True) for n in (500, 50_000))
    assert few.matrix_items == 0
    assert few.directions < many.directions
    assert few.sketch_items < many.sketch_items
    assert (few.eigenvectors[0], many.eigenvectors[0]) == (0, 0)
    assert 0 < many.matrix_items <= 4096
    assert few.scale <= many.scale
    plain = choose(units=500, mu=1.0, num_items=10**5, has_features=False)
    assert plain.directions == 0
    assert plain.eigenvectors[0] > 0
    assert plain.sketch_items > few.sketch_items
    assert choose(units=1e9, mu=1.0, num_items=300, has_features=True).sketch_items == 300
    assert plain.matrix_items > 0


def test_the_whole_of_a_small_catalogue_is_asked_where_examples_are_the_unit_or_nothing_is_hidden() -> None:
    example = choose(units=1e5, mu=1.0, num_items=3000, has_features=True, privacy_unit="example")
    public = choose(units=1e3, mu=math.inf, num_items=3000, has_features=True)
    assert example.matrix_items == public.matrix_items == 3000
    assert example.matrix_share == public.matrix_share == 1.0


def test_a_large_catalogue_without_privacy_is_decomposed_whole() -> None:
    chosen = choose(units=1e3, mu=math.inf, num_items=30_000, has_features=True)
    assert (chosen.exact, chosen.directions, chosen.matrix_items) == (True, 0, 0)
    assert not choose(units=1e3, mu=1.0, num_items=30_000, has_features=False).exact


def test_shares_of_the_budget_add_up() -> None:
    noise = Noise.of(2.0, histogram_share=rules.HISTOGRAM_SHARE)
    assert 1 / noise.histogram**2 + 1 / noise.statistics**2 == pytest.approx(1 / 2.0**2)
    assert math.isinf(Noise.of(0.0, histogram_share=0.1).mu)
