"""The sampler is exactly Poisson, and samplers that are not are told apart from it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from lazydp.components.shared.errors import InputError
from lazydp.components.train.data.sampler import (
    Binomial,
    Keystream,
    NegativeSampler,
    PoissonSampler,
    poisson_dp_event,
    uniform_subset,
)
from lazydp.kernels.noise_key import NoiseKey

POPULATION, PROBABILITY, STEPS = 400, 0.05, 2000
Batch = npt.NDArray[np.int64]
Evidence = Callable[..., dict[str, float]]


def ours() -> list[Batch]:
    sampler = PoissonSampler(NoiseKey.for_tests(1), population=POPULATION, sampling_prob=PROBABILITY)
    return [sampler.members(step) for step in range(1, STEPS + 1)]


def shuffled() -> list[Batch]:
    """Epochs of a shuffled dataset cut into batches of equal size."""
    generator = np.random.default_rng(0)
    size = int(POPULATION * PROBABILITY)
    epochs = [generator.permutation(POPULATION).reshape(-1, size) for _ in range(STEPS * size // POPULATION)]
    return list(np.concatenate(epochs))


def fixed_size() -> list[Batch]:
    generator = np.random.default_rng(0)
    size = int(POPULATION * PROBABILITY)
    return [generator.choice(POPULATION, size, replace=False) for _ in range(STEPS)]


def more_often() -> list[Batch]:
    sampler = PoissonSampler(NoiseKey.for_tests(1), population=POPULATION, sampling_prob=PROBABILITY * 1.05)
    return [sampler.members(step) for step in range(1, STEPS + 1)]


def same_batch_twice() -> list[Batch]:
    return [batch for batch in ours()[: STEPS // 2] for _ in range(2)]


def favours_some() -> list[Batch]:
    generator = np.random.default_rng(0)
    probabilities = np.linspace(0.8, 1.2, POPULATION) * PROBABILITY
    return [np.flatnonzero(generator.random(POPULATION) < probabilities) for _ in range(STEPS)]


def test_batches_have_the_law_of_poisson_sampling(evidence_against_poisson: Evidence) -> None:
    evidence = evidence_against_poisson(ours(), population=POPULATION, probability=PROBABILITY)
    assert min(evidence.values()) > 1e-3, evidence


@pytest.mark.parametrize("impostor", [shuffled, fixed_size, more_often, same_batch_twice, favours_some])
def test_other_samplers_are_told_apart(impostor: Callable[[], list[Batch]], evidence_against_poisson: Evidence) -> None:
    evidence = evidence_against_poisson(impostor(), population=POPULATION, probability=PROBABILITY)
    assert min(evidence.values()) < 1e-6, evidence


@pytest.mark.parametrize(
    ("trials", "probability"), [(0, 0.5), (1, 0.3), (10, 1.0), (10, 0.5), (1000, 0.999), (10**5, 1e-3), (10**9, 2e-6)]
)
def test_binomial_law_is_exact(trials: int, probability: float) -> None:
    binomial = Binomial(trials, probability)
    sizes = np.arange(binomial._first, binomial._first + len(binomial._thresholds))
    found = np.array([threshold / 2**128 for threshold in binomial._thresholds])
    # the log-gammas of scipy, not ours, lose digits at a billion trials
    np.testing.assert_allclose(found, stats.binom(trials, probability).cdf(sizes), rtol=0, atol=1e-6)
    assert binomial._thresholds[-1] == 2**128
    assert binomial._first == 0 or probability == 1 or found[0] < 1e-38


def test_binomial_law_against_rationals() -> None:
    from fractions import Fraction
    from math import comb

    probability = 0.37
    q = Fraction(probability)
    binomial = Binomial(40, probability)
    cumulative = Fraction(0)
    for size in range(binomial._first + len(binomial._thresholds)):
        cumulative += comb(40, size) * q**size * (1 - q) ** (40 - size)
        if size >= binomial._first:
            threshold = Fraction(binomial._thresholds[size - binomial._first], 2**128)
            assert abs(threshold - cumulative) < Fraction(1, 2**100)


def test_members_are_distinct_ascending_and_depend_on_key_and_step_alone() -> None:
    sampler = PoissonSampler(NoiseKey.for_tests(3), population=1000, sampling_prob=0.1)
    backwards = [sampler.members(step) for step in (5, 4, 3, 2, 1)][::-1]
    again = PoissonSampler(NoiseKey.for_tests(3), population=1000, sampling_prob=0.1)
    for step, members in enumerate(backwards, start=1):
        assert (np.diff(members) > 0).all()
        np.testing.assert_array_equal(members, again.members(step))
    other = PoissonSampler(NoiseKey.for_tests(4), population=1000, sampling_prob=0.1)
    assert not np.array_equal(other.members(1), again.members(1))


@pytest.mark.parametrize("probability", [1e-12, 1.0])
def test_extremes(probability: float) -> None:
    sampler = PoissonSampler(NoiseKey.for_tests(1), population=50, sampling_prob=probability)
    assert len(sampler.members(1)) == (0 if probability < 1 else 50)


def test_an_empty_dataset_gives_empty_batches() -> None:
    assert PoissonSampler(NoiseKey.for_tests(1), population=0, sampling_prob=0.5).members(1).size == 0


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.5, float("nan")])
def test_a_wrong_probability_is_refused(probability: float) -> None:
    with pytest.raises(InputError, match=r"sampling_prob must be in \(0, 1\], found"):
        PoissonSampler(NoiseKey.for_tests(1), population=10, sampling_prob=probability)


@pytest.mark.parametrize("population", [-1, 2.5, True])
def test_a_wrong_population_is_refused(population: Any) -> None:
    with pytest.raises(InputError, match="population must be a whole number of at least 0, found"):
        PoissonSampler(NoiseKey.for_tests(1), population=population, sampling_prob=0.5)


def test_steps_count_from_one() -> None:
    with pytest.raises(InputError, match="steps count from 1, found step 0"):
        PoissonSampler(NoiseKey.for_tests(1), population=10, sampling_prob=0.5).members(0)


@pytest.mark.parametrize(("population", "size"), [(6, 2), (6, 4), (5, 5), (5, 0)])
def test_subsets_are_uniform(population: int, size: int) -> None:
    from math import comb

    stream = Keystream(NoiseKey.for_tests(9), stream=0)
    draws = 6000
    codes = [int((1 << uniform_subset(stream, population, size)).sum()) for _ in range(draws)]
    _, counts = np.unique(codes, return_counts=True)
    assert counts.size == comb(population, size)
    if counts.size > 1:
        assert stats.chisquare(counts).pvalue > 1e-3
        skewed = counts.astype(float)
        skewed[0] += 0.3 * counts[0]
        assert stats.chisquare(skewed).pvalue < 1e-3


@pytest.mark.parametrize("bound", [1, 2, 3, 1000, 2**62 + 1])
def test_integers_below_a_bound_are_uniform(bound: int) -> None:
    drawn = Keystream(NoiseKey.for_tests(2), stream=7).below(bound, 20_000)
    assert drawn.min() >= 0
    assert drawn.max() < bound
    if bound > 1:
        cells = min(bound, 10)
        counts = np.bincount((drawn.astype(object) * cells // bound).astype(np.int64), minlength=cells)
        widths = [len(range(-(-cell * bound // cells), -(-(cell + 1) * bound // cells))) for cell in range(cells)]
        assert stats.chisquare(counts, np.array(widths) / bound * 20_000).pvalue > 1e-3


def test_reading_words_in_parts_never_repeats_one() -> None:
    stream = Keystream(NoiseKey.for_tests(2), stream=7)
    words = np.concatenate([stream.words(count) for count in (1, 8, 3, 17)])
    assert np.unique(words).size == words.size


def test_cost_does_not_grow_with_the_dataset() -> None:
    huge = PoissonSampler(NoiseKey.for_tests(1), population=10**12, sampling_prob=1e-9)
    assert 700 < huge.members(1).size < 1300


def test_negatives_are_uniform_over_the_catalogue_and_repeatable() -> None:
    sampler = NegativeSampler(NoiseKey.for_tests(1), num_items=37, negatives=5)
    drawn = sampler.draw(3, 4000)
    assert drawn.shape == (4000, 5)
    assert drawn.min() == 1
    assert drawn.max() == 37
    assert stats.chisquare(np.bincount(drawn.ravel(), minlength=38)[1:]).pvalue > 1e-3
    np.testing.assert_array_equal(drawn, sampler.draw(3, 4000))
    assert not np.array_equal(drawn, sampler.draw(4, 4000))
    assert sampler.draw(5, 0).shape == (0, 5)


def test_batches_and_negatives_do_not_share_a_stream() -> None:
    key = NoiseKey.for_tests(1)
    members = PoissonSampler(key, population=10**6, sampling_prob=1e-3)._key
    negatives = NegativeSampler(key, num_items=10**6, negatives=1)._key
    assert members.to_bytes() != negatives.to_bytes() != key.to_bytes()


def test_the_event_is_the_samplers_own() -> None:
    sampler = PoissonSampler(NoiseKey.for_tests(1), population=50, sampling_prob=0.25)
    assert sampler.dp_event(noise_multiplier=1.5, steps=7) == poisson_dp_event(
        noise_multiplier=1.5, sampling_prob=0.25, steps=7, max_examples_per_user=None
    )
    assert sampler.dp_event(noise_multiplier=1.5, steps=7, max_examples_per_user=3) != sampler.dp_event(
        noise_multiplier=1.5, steps=7
    )
