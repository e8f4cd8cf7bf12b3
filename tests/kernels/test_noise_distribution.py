"""The noise has the distribution it claims. Every test has a control: the same check on a wrong distribution must fail.

Samples come from a fixed key, so that a test passes always or never.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from torch import Tensor

from lazydp.kernels import ops

Sample = npt.NDArray[np.float64]
Check = Callable[[Sample], bool]

SIGMAS = 5.0  # the right distribution fails a check with probability below 6e-7


def draw(key: Tensor, rows: int, columns: int, *, table: int = 1, step: int = 1) -> Sample:
    out = ops.normal_(torch.empty(rows, columns), key, table=table, first_row=0, step=step)
    return out.numpy().astype(np.float64)


def mean_is_zero(x: Sample) -> bool:
    return abs(x.mean()) < SIGMAS / np.sqrt(x.size)


def variance_is_one(x: Sample) -> bool:
    return abs(x.var() - 1.0) < SIGMAS * np.sqrt(2.0 / x.size)


def kurtosis_is_three(x: Sample) -> bool:
    return abs((x**4).mean() - 3.0) < SIGMAS * np.sqrt(96.0 / x.size)


def distribution_is_normal(x: Sample) -> bool:
    return stats.kstest(x.ravel()[:200_000], "norm").pvalue > 1e-6  # type: ignore[return-value]


def tails_are_normal(x: Sample) -> bool:
    for threshold in (3.0, 4.0, 4.5):
        expected = x.size * 2.0 * stats.norm.sf(threshold)
        if abs((np.abs(x) > threshold).sum() - expected) > SIGMAS * np.sqrt(expected) + 1:
            return False
    return True


def columns_are_independent(x: Sample) -> bool:
    correlations = np.corrcoef(np.concatenate([x, x**2], axis=1), rowvar=False)
    np.fill_diagonal(correlations, 0.0)
    return bool(np.abs(correlations).max() < 6.0 / np.sqrt(len(x)))


CONTROLS: dict[Check, Callable[[Sample], Sample]] = {
    mean_is_zero: lambda x: x + 0.01,
    kurtosis_is_three: lambda x: np.clip(x, -3.0, 3.0),
    tails_are_normal: lambda x: np.clip(x, -3.8, 3.8),
}


@pytest.mark.parametrize(
    "check", [mean_is_zero, variance_is_one, kurtosis_is_three, distribution_is_normal, tails_are_normal]
)
def test_moments_distribution_and_tails(check: Check, key: Tensor, simd_level: str) -> None:
    sample = draw(key, 8192, 60 if simd_level == "portable" else 252)
    assert check(sample)
    if check in CONTROLS:
        assert not check(CONTROLS[check](sample))
    else:
        assert not check(sample * 2 / 3)
        assert not check(sample * 3 / 2)


@pytest.mark.parametrize("position", range(12))
def test_every_place_of_a_block_is_normal(position: int, key: Tensor) -> None:
    place = draw(key, 16384, 12)[:, position]
    assert mean_is_zero(place)
    assert variance_is_one(place)
    assert distribution_is_normal(place)
    assert not variance_is_one(place * 1.1)


def test_columns_are_independent(key: Tensor) -> None:
    sample = draw(key, 32768, 36)
    assert columns_are_independent(sample)
    sample[:, 30] = 0.1 * sample[:, 3] + np.sqrt(0.99) * sample[:, 30]
    assert not columns_are_independent(sample)


def test_rows_are_independent(key: Tensor) -> None:
    sample = draw(key, 36, 32768).T
    assert columns_are_independent(sample)
    sample[:, 1] = sample[:, 0]
    assert not columns_are_independent(sample)


def test_steps_and_tables_are_independent(key: Tensor) -> None:
    draws = [
        draw(key, 1, 32768, table=table, step=step)[0] for table in (0, 1, 0x8000) for step in (1, 2, 3, 2**31 - 1)
    ]
    assert columns_are_independent(np.stack(draws, axis=1))
    draws[5] = -draws[0]
    assert not columns_are_independent(np.stack(draws, axis=1))


def test_the_two_normals_of_an_element_are_independent(key: Tensor) -> None:
    """With momentum an element takes two normals: s = M s + L z with M = 0, L = I writes them out."""
    weight, momentum = torch.zeros(32768, 6), torch.zeros(32768, 6)
    last = torch.zeros(32768, dtype=torch.int32)
    transition, factor = torch.zeros(1, 4), torch.tensor([[1.0, 0.0, 1.0]])
    ops.flush_(weight, last, key, table=1, step=1, transition=transition, factor=factor, momentum=momentum)
    sample = torch.cat([weight, momentum], dim=1).numpy().astype(np.float64)
    assert columns_are_independent(sample)
    assert variance_is_one(sample)
    sample[:, 6] = sample[:, 0]
    assert not columns_are_independent(sample)


def lazily(key: Tensor, rates: list[float], *, power: float = 0.5) -> Sample:
    """All pending noise of `rates` in one draw: factor (sum of squares)^power; 0.5 is right."""
    weight, last = torch.zeros(16384, 12), torch.zeros(16384, dtype=torch.int32)
    factor = torch.tensor([[float(np.square(rates).sum() ** power)]])
    ops.flush_(weight, last, key, table=1, step=len(rates), transition=torch.ones(1, 1), factor=factor)
    return weight.numpy().astype(np.float64)


def eagerly(key: Tensor, rates: list[float]) -> Sample:
    """The same noise drawn at every step."""
    weight, last = torch.zeros(16384, 12), torch.zeros(16384, dtype=torch.int32)
    for step, rate in enumerate(rates, start=1):
        factor = torch.full((step, 1), rate)
        ops.flush_(weight, last, key, table=2, step=step, transition=torch.ones(step, 1), factor=factor)
    return weight.numpy().astype(np.float64)


def test_one_draw_for_many_steps_has_the_law_of_many_draws(key: Tensor) -> None:
    rates = [0.5, 0.1, 0.8, 0.3, 0.3, 1.2]
    eager = eagerly(key, rates)
    scale = np.sqrt(np.square(rates).sum())

    def equal_in_law(lazy: Sample) -> bool:
        same = stats.ks_2samp(lazy.ravel(), eager.ravel()).pvalue > 1e-6
        return bool(same and variance_is_one(lazy / scale) and variance_is_one(eager / scale))

    assert equal_in_law(lazily(key, rates))
    assert not equal_in_law(lazily(key, rates, power=1.0))
    assert not equal_in_law(lazily(key, rates[:-1]))


def words_with(angle: int, radius: int, fine: int) -> Tensor:
    """A block whose six pairs all have the given angle and radius words and, in words 12..15, the given word."""
    words = np.array([[angle] * 6 + [radius] * 6 + [fine] * 4], dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


@pytest.mark.parametrize(
    ("radius", "fine", "distance", "from_one"),
    [
        (0, 0, (0, 1), False),  # the smallest u: the farthest tail
        (0, 0xFFFFFFFF, (0, 2**22 - 1), False),
        (1, 0, (1, 1), False),
        (1000, 0, (1000, 1), False),
        (0x7FFFFFFF, 0, (0x7FFFFFFF, 1), False),  # just below 1/2
        (0x80000000, 0, (0x7FFFFFFF, 1), True),  # just above 1/2
        (0xBFFFFFFF, 0, (0x40000000, 1), True),  # 3/4: the exponent turns
        (0xC0000000, 0, (0x3FFFFFFF, 1), True),
        (0xFFFFFF00, 0, (0xFF, 1), True),
        (0xFFFFFFFF, 0, (0, 1), True),  # the largest u: the smallest radius, not zero
    ],
)
def test_radius_is_exact_at_both_ends(
    radius: int, fine: int, distance: tuple[int, int], from_one: bool, simd_level: str
) -> None:
    """Words that chance would not bring: sqrt(-2 ln u) to a few units in the last place, tails included.

    `distance` of u to its end of (0, 1), in units of 2^-32 and of 2^-54.
    """
    with mpmath.workdps(40):
        y = distance[0] * mpmath.mpf(2) ** -32 + distance[1] * mpmath.mpf(2) ** -54
        expected = float(mpmath.sqrt(-2 * mpmath.log(1 - y if from_one else y)))
    found = ops.normals_of_blocks(words_with(0, radius, fine))[0, 0::2].double()  # angle 0: radius * cos(0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=4e-7)
    assert (found > 0).all()


def test_tail_reaches_beyond_eight_sigma(simd_level: str) -> None:
    farthest = ops.normals_of_blocks(words_with(0, 0, 0))
    assert 8.6 < farthest.max() < 8.7


def test_angle_turns_around_the_circle(simd_level: str) -> None:
    angles = np.random.default_rng(1).integers(0, 2**32, size=4096, dtype=np.uint32)
    angles[:8] = [0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0x40000000, 0xC0000000, 0xFFFFFFFF]
    words = np.zeros((len(angles), 16), dtype=np.uint32)
    words[:, 0] = angles
    words[:, 6] = 0x80000000  # u = 1/2
    z = ops.normals_of_blocks(torch.from_numpy(words.view(np.int32)))[:, :2].double().numpy()
    phi = angles.view(np.int32) * (np.pi / 2**32)
    turned = np.where(angles & 1, np.pi - phi, phi)
    radius = np.sqrt(2 * np.log(2))
    np.testing.assert_allclose(z, radius * np.stack([np.cos(turned), np.sin(turned)], axis=1), atol=4e-7)
    uniform = np.mod(np.arctan2(z[8:, 1], z[8:, 0]) / (2 * np.pi), 1.0)
    assert stats.kstest(uniform, "uniform").pvalue > 1e-6
    assert stats.kstest(uniform**1.2, "uniform").pvalue < 1e-6


def test_fine_bits_of_every_pair_count() -> None:
    """Each pair has 21 fine bits of its own in words 12..15, and all 126 of them matter."""
    base = ops.normals_of_blocks(words_with(0, 0, 0))[0, 0::2]
    moved = np.zeros((4, 32, 6), dtype=bool)
    for word in range(4):
        for bit in range(32):
            words = words_with(0, 0, 0)
            words[0, 12 + word] = torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            moved[word, bit] = (ops.normals_of_blocks(words)[0, 0::2] != base).numpy()
    assert moved.sum(axis=2).max() == 1, "a bit moves at most one pair"
    assert moved.sum(axis=(0, 1)).tolist() == [21] * 6
