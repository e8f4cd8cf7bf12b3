"""The number of trials of a sweep: its distribution, and what the sweep is to the accountant."""

import decimal
import math
import random

import numpy as np
import pytest
from dp_accounting import dp_event

from lazydp.components.budget.accounting.events import composed, tuning_event
from lazydp.components.budget.accounting.tuning import UNIFORM_BITS, Tuning, success_probability


def tuning_of(name: str, mean: float) -> Tuning:
    return Tuning(distribution=name, mean_trials=mean, metric="auc", score_noise_multiplier=1.0, digest="")


def probabilities(name: str, mean: float) -> dict[int, float]:
    """The distributions as the paper writes them, from gammas found on a grid."""
    if name == "poisson":
        return {k: math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(60)}
    if name == "geometric":
        return {k: (1 / mean) * (1 - 1 / mean) ** (k - 1) for k in range(1, 400)}
    grid = np.linspace(1e-6, 1 - 1e-6, 1_000_001)
    gamma = grid[np.argmin(np.abs((1 / grid - 1) / np.log(1 / grid) - mean))]
    return {k: (1 - gamma) ** k / (k * math.log(1 / gamma)) for k in range(1, 400)}


@pytest.mark.parametrize("name", ["poisson", "geometric", "logarithmic"])
def test_the_number_of_trials_has_its_distribution(name: str) -> None:
    """By its distribution function: inverting at every step of it gives the next number, and not before."""
    below = 0.0
    mean = 3.5
    for k, weight in probabilities(name, mean).items():
        if weight < 1e-3:
            break
        just_in, just_out = below + 0.01 * weight, below + 0.99 * weight
        assert tuning_of(name, mean).number_of_trials(int(just_in * 2**128)) == k
        assert tuning_of(name, mean).number_of_trials(int(just_out * 2**128)) == k
        below += weight
    assert tuning_of(name, mean).number_of_trials(0) == (0 if name == "poisson" else 1)
    assert 10 < tuning_of(name, mean).number_of_trials(2**128 - 1) < 1000


def test_a_step_of_the_distribution_function_belongs_to_the_next_number() -> None:
    """P[K <= 1] of the geometric distribution of mean 2 is exactly one half."""
    half = 1 << (UNIFORM_BITS - 1)
    assert tuning_of("geometric", 2.0).number_of_trials(half - 1) == 1
    assert tuning_of("geometric", 2.0).number_of_trials(half) == 2


@pytest.mark.parametrize("name", ["geometric", "logarithmic"])
def test_a_mean_of_one_is_one_trial(name: str) -> None:
    assert {tuning_of(name, 1.0).number_of_trials(uniform) for uniform in (0, 2**127, 2**128 - 1)} == {1}


def test_the_mean_is_the_one_accounted_for() -> None:
    dice = random.Random(3)
    drawn = [tuning_of("geometric", 6.0).number_of_trials(dice.getrandbits(128)) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(6.0, abs=4 * math.sqrt(30 / 4000))


@pytest.mark.parametrize("shape", ["0", "0.5", "1", "2"])
@pytest.mark.parametrize("mean", [1.25, 3.5, 40.0])
def test_the_success_probability_gives_the_mean_and_no_more(shape: str, mean: float) -> None:
    """The mean of the truncated negative binomial distribution (paper, definition 1), at the gamma that was found."""
    with decimal.localcontext(prec=80):
        eta, wanted = decimal.Decimal(shape), decimal.Decimal(mean)
        gamma = success_probability(wanted, eta)
        fail = 1 - gamma
        found = fail / (gamma * -gamma.ln()) if eta == 0 else eta * fail / (gamma * (1 - gamma**eta))
        assert wanted - found < decimal.Decimal("1e-50")
        assert found - wanted < decimal.Decimal("1e-70")


@pytest.mark.parametrize(("name", "shape"), [("poisson", math.inf), ("geometric", 1.0), ("logarithmic", 0.0)])
def test_a_sweep_is_the_trial_and_its_score_chosen_from_so_many(name: str, shape: float) -> None:
    training = dp_event.GaussianDpEvent(2.0)
    scored = composed([training, dp_event.GaussianDpEvent(1.0)])
    assert tuning_of(name, 8).event(training) == tuning_event(scored, mean_trials=8, shape=shape)
    public = tuning_of(name, 8).model_copy(update={"score_noise_multiplier": None})
    assert public.event(training) == tuning_event(training, mean_trials=8, shape=shape)


@pytest.mark.parametrize(
    "wrong", [{"mean_trials": 0.99}, {"mean_trials": 10_001}, {"score_noise_multiplier": 0}, {"distribution": "none"}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    settings = {"mean_trials": 1, "metric": "auc", "score_noise_multiplier": 1.0, "digest": "", **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Tuning.model_validate(settings)


def test_the_bounds_themselves_and_the_name_in_old_files_are_read() -> None:
    for mean in (1, 10_000):
        settings = {"law": "geometric", "mean_trials": mean, "metric": "auc", "score_noise_multiplier": None}
        found = Tuning.model_validate({**settings, "digest": "d"})
        assert (found.distribution, found.mean_trials) == ("geometric", mean)
