"""Epsilons: published values, the library called by hand, Opacus, and bounds that must hold on either side."""

import itertools
import logging
import math
import warnings

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr

from lazydp.components.budget.accounting import epsilon as accounting
from lazydp.components.budget.accounting import loss_store
from lazydp.components.budget.accounting.epsilon import (
    calibrate_noise_multiplier,
    epsilon,
    epsilon_over_steps,
)
from lazydp.components.budget.accounting.events import (
    composed,
    dpsgd_event,
    event_from_json,
    event_to_json,
    repeated,
    tuning_event,
    user_level_event,
    without_amplification,
)
from lazydp.components.budget.accounting.loss_store import LossStore
from lazydp.components.budget.accounting.mixture import RenyiAccountant, mixture_distribution
from lazydp.components.shared.errors import InputError, PrivacyError

STANDARD = dpsgd_event(noise_multiplier=1.0, sampling_prob=0.01, steps=1000)


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian mechanism (Balle and Wang, arXiv 1805.06530)."""

    def excess(x: float) -> float:
        a, b = 0.5 / noise_multiplier, x * noise_multiplier
        return math.exp(log_ndtr(a - b)) - math.exp(x + log_ndtr(-a - b)) - delta

    return float(brentq(excess, 0, 6000, xtol=1e-12))


def test_known_values() -> None:
    assert epsilon(STANDARD, delta=1e-5) == pytest.approx(1.828, abs=1e-3)
    assert epsilon(STANDARD, delta=1e-5, accountant="rdp") == pytest.approx(2.101, abs=1e-3)


# --- published values --------------------------------------------------------------------------------------------

PUBLISHED_ORDERS = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))


def epsilon_of_2017(event: dp_event.DpEvent, delta: float) -> float:
    """By our Renyi curve, and the conversion of Mironov (arXiv 1702.07476, proposition 3) that was in use then."""
    accountant = RenyiAccountant(PUBLISHED_ORDERS)
    accountant.compose(event)
    return min(
        float(renyi) - math.log(delta) / (order - 1)
        for order, renyi in zip(PUBLISHED_ORDERS, accountant._rdp, strict=True)
    )


def mnist(batch: int, noise_multiplier: float, epochs: int) -> dp_event.DpEvent:
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=batch / 60000, steps=epochs * 60000 // batch)


RENYI = [
    # TensorFlow Privacy, tutorials/README.md: MNIST, 60,000 examples.
    (mnist(256, 1.3, 15), 1.19),
    (mnist(256, 1.1, 60), 3.01),
    (mnist(256, 0.7, 45), 7.10),
    # Abadi et al. (arXiv 1607.00133), section 3.2: the moments accountant at q 0.01, sigma 4, 10,000 steps.
    (dpsgd_event(noise_multiplier=4.0, sampling_prob=0.01, steps=10_000), 1.26),
]


def test_the_renyi_bound_may_be_the_smaller_one() -> None:
    """Both hold, and neither is a check of the other."""
    event = dpsgd_event(noise_multiplier=20.0, sampling_prob=0.001, steps=100_000)
    assert epsilon(event, delta=1e-10) == pytest.approx(0.1110, abs=1e-3)
    assert epsilon(event, delta=1e-10, accountant="rdp") == pytest.approx(0.0951, abs=1e-3)


@pytest.mark.parametrize(("event", "published"), RENYI)
def test_published_by_renyi(event: dp_event.DpEvent, published: float) -> None:
    """To the digits that were published; today's conversion, and loss distributions, are tighter and in that order."""
    assert epsilon_of_2017(event, 1e-5) == pytest.approx(published, abs=0.005)
    assert epsilon(event, delta=1e-5) < epsilon(event, delta=1e-5, accountant="rdp") < published
    # the control: one per cent less noise is no longer the published run
    [(single, steps)] = [(event.event, event.count)]
    louder = dpsgd_event(
        noise_multiplier=0.99 * single.event.noise_multiplier, sampling_prob=single.sampling_probability, steps=steps
    )
    assert epsilon_of_2017(louder, 1e-5) != pytest.approx(published, abs=0.005)


def mixture(standard_deviation: float, sensitivities: list[float], probabilities: list[float]) -> dp_event.DpEvent:
    return dp_event.MixtureOfGaussiansDpEvent(standard_deviation, sensitivities, probabilities)


def truncated(population: int) -> dp_event.DpEvent:
    return dp_event.TruncatedSubsampledGaussianDpEvent(population, 0.5, 2, 1.0)


# From the tests that dp-accounting 0.6.0 is published with: pld_privacy_accountant_test.py, accountant_test.py.
LOSSES = {
    "Gaussian": (repeated(dp_event.GaussianDpEvent(math.sqrt(3)), 3), 0.126936, 1.0),
    "sampled Gaussian": (dpsgd_event(noise_multiplier=0.5, sampling_prob=0.2, steps=3), 0.15594, 1.0),
    "its least noise": (dpsgd_event(noise_multiplier=0.67379294682, sampling_prob=0.01, steps=1), 1e-5, 1.0),
    "of sensitivity 6": (dpsgd_event(noise_multiplier=3.20956502598 / 6, sampling_prob=0.001, steps=25), 1e-5, 1.0),
    "mixtures": (
        composed(
            [
                repeated(mixture(1.0, [0.0, 1.0, 2.0], [0.2, 0.6, 0.2]), 3),
                repeated(mixture(2.0, [0.0, 2.0, 3.0], [0.33, 0.34, 0.33]), 2),
            ]
        ),
        1e-6,
        17.193115,
    ),
    "truncated": (composed([repeated(truncated(4), 3), repeated(truncated(3), 2)]), 1e-6, 17.904330),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "truncated" else name for name in LOSSES]
)
def test_published_by_loss_distributions(name: str) -> None:
    event, delta, published = LOSSES[name]
    assert epsilon(event, delta=delta) == pytest.approx(published, rel=1e-4)
    # the control: at a delta one per cent off it is another figure
    assert epsilon(event, delta=0.99 * delta) != pytest.approx(published, rel=1e-4)


def test_published_renyi_curve() -> None:
    """rdp_privacy_accountant_test.py: the curve of a sampled Gaussian, and the sigma of exactly (1, 1e-6)."""
    accountant = RenyiAccountant([1.5, 2.5, 5, 50, 100])
    accountant.compose(dpsgd_event(noise_multiplier=2.5, sampling_prob=0.01, steps=50))
    published = [6.70579741e-04, 1.08548710e-03, 2.18075656e-03, 2.38460375e-02, 1.67416308e02]
    assert accountant._rdp == pytest.approx(published, rel=1e-8)
    found = epsilon(dp_event.GaussianDpEvent(4.530877117), delta=1e-6, accountant="rdp")
    assert found == pytest.approx(1.0, abs=1e-6)


def test_user_level_by_hand() -> None:
    """A user of two examples, each drawn with probability 1/2, sigma 1: none, one or both, at 1/4, 1/2, 1/4.

    The ratio of densities with and without the user, 1/4 + e^(x - 1/2) / 2 + e^(2x - 2) / 4, rises with x. At x = 1
    it is 1/2 + e^(1/2) / 2 = 1.3243606, so epsilon = 0.2809298, and by a table of the normal distribution

        delta = P[N > 1] / 4 + P[N > 0] / 2 + P[N > -1] / 4 - 1.3243606 P[N > 1]
              = 0.0396638 + 0.25 + 0.2103362 - 0.2101165 = 0.2898835.

    In the other direction the ratio falls below 1 / 1.3243606 = 0.7550814 where u = e^x solves
    0.0338338 u^2 + 0.3032653 u = 0.5050814: u = 1.4356, x = 0.3616, and with P[N < x] = 0.6412, P[N < x - 1] = 0.2616,
    P[N < x - 2] = 0.0507 delta is 0.6412 - 1.3243606 (0.1603 + 0.1308 + 0.0127) = 0.2389, which is less.
    """
    event = user_level_event(noise_multiplier=1.0, sampling_prob=0.5, steps=1, max_examples_per_user=2)
    assert epsilon(event, delta=0.2898835) == pytest.approx(0.2809298, abs=2e-6)
    # Two steps cost more than one, and by basic composition at most twice (epsilon, delta).
    twice = user_level_event(noise_multiplier=1.0, sampling_prob=0.5, steps=2, max_examples_per_user=2)
    assert epsilon(twice, delta=0.2898835) > 0.2809298
    assert epsilon(twice, delta=2 * 0.2898835) < 2 * 0.2809298
    # The controls: a user taken for an example, and for two examples that are always drawn together.
    for wrong in (
        dpsgd_event(noise_multiplier=1.0, sampling_prob=0.5, steps=1),
        dpsgd_event(noise_multiplier=0.5, sampling_prob=0.5, steps=1),
    ):
        assert abs(epsilon(wrong, delta=0.2898835) - 0.2809298) > 0.05


@pytest.mark.parametrize("noise_multiplier", [0.7, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 1e-2])
def test_gaussian_against_its_closed_form(noise_multiplier: float, delta: float) -> None:
    true = gaussian_epsilon(noise_multiplier, delta)
    found = epsilon(dp_event.GaussianDpEvent(noise_multiplier), delta=delta)
    assert true * (1 - 1e-9) <= found <= true + 2e-4


def test_heterogeneous_composition_is_the_librarys_by_hand() -> None:
    runs = [
        STANDARD,
        dpsgd_event(noise_multiplier=2.0, sampling_prob=0.02, steps=300),
        STANDARD,
        dp_event.GaussianDpEvent(8.0),
        dp_event.LaplaceDpEvent(20.0),
        dp_event.DiscreteLaplaceDpEvent(0.05, 1),
        repeated(dp_event.GaussianDpEvent(30.0), 4),
    ]
    library = PLDAccountant()
    library.compose(composed(runs))
    for delta in (1e-7, 1e-5):
        assert epsilon(composed(runs), delta=delta) == pytest.approx(library.get_epsilon(delta), rel=1e-6)
    # The order in which they came is of no account.
    assert epsilon(composed(runs[::-1]), delta=1e-5) == pytest.approx(epsilon(composed(runs), delta=1e-5), rel=1e-9)
    with_renyi = [run for run in runs if not isinstance(run, dp_event.DiscreteLaplaceDpEvent)]
    assert epsilon(composed(with_renyi), delta=1e-5) <= epsilon(composed(with_renyi), delta=1e-5, accountant="rdp")


def test_truncated_sampling_is_the_librarys_by_hand() -> None:
    event = dpsgd_event(
        noise_multiplier=4.0, sampling_prob=0.05, steps=50, sampler="truncated_poisson", population=100, batch_size=20
    )
    library = PLDAccountant()
    library.compose(event)
    assert epsilon(event, delta=1e-5) == pytest.approx(library.get_epsilon(1e-5), rel=1e-6)


@pytest.mark.parametrize("k", [2, 5])
def test_mixture_is_the_librarys_by_hand(k: int) -> None:
    # On a coarse grid: the library takes a minute for what is done here in a second.
    event = user_level_event(noise_multiplier=2.0, sampling_prob=0.02, steps=1, max_examples_per_user=k)
    ours = mixture_distribution(event, interval=1e-2).self_compose(50)
    theirs = pld.from_mixture_gaussian_mechanism(
        2.0, event.sensitivities, event.sampling_probs, value_discretization_interval=1e-2
    ).self_compose(50)
    for delta in (1e-7, 1e-5, 1e-2):
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(theirs.get_epsilon_for_delta(delta), rel=1e-6)


def test_mixture_of_one_is_the_sampled_gaussian() -> None:
    mixture = dp_event.MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0], [0.99, 0.01])
    sampled = dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(1.0))
    assert epsilon(repeated(mixture, 1000), delta=1e-5) == pytest.approx(epsilon(STANDARD, delta=1e-5), rel=1e-6)
    orders = [2, 3, 8, 32, 64]
    found, expected = RenyiAccountant(orders), RdpAccountant(orders)
    found.compose(mixture)
    expected.compose(sampled)
    assert found._rdp == pytest.approx(expected._rdp, rel=1e-6)


def test_mixture_delta_is_at_least_what_integration_gives() -> None:
    """Hockey-stick divergence of the real binomial mixture, by quadrature."""
    k, q, sigma = 6, 0.1, 2.0
    event = user_level_event(noise_multiplier=sigma, sampling_prob=q, steps=1, max_examples_per_user=k)
    distribution = mixture_distribution(event, interval=1e-4)
    x = np.arange(-14 * sigma, k + 14 * sigma, sigma / 4000)
    base = np.exp(-0.5 * (x / sigma) ** 2)
    mixture = sum(
        math.comb(k, j) * q**j * (1 - q) ** (k - j) * np.exp(-0.5 * ((x - j) / sigma) ** 2) for j in range(k + 1)
    )
    scale = sigma / 4000 / (sigma * math.sqrt(2 * math.pi))
    for level in (0.1, 0.5, 1.0, 2.0):
        true = scale * max(
            np.maximum(mixture - math.exp(level) * base, 0).sum(), np.maximum(base - math.exp(level) * mixture, 0).sum()
        )
        assert true * (1 - 1e-6) <= distribution.get_delta_for_epsilon(level) <= true * 1.001 + 1e-12


GRID = list(itertools.product([0.7, 1.0, 2.0], [0.001, 0.01], [100, 2000], [1e-6, 1e-5]))


def check_against_opacus(noise_multiplier: float, sampling_prob: float, steps: int, delta: float) -> None:
    """Opacus' PRV answers its upper bound, at an error of 0.01: PLD lies within that below it, and below Renyi DP."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import PRVAccountant
    event = dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps)
    by_loss = epsilon(event, delta=delta)
    accountant = PRVAccountant()
    accountant.history = [(noise_multiplier, sampling_prob, steps)]
    opacus = accountant.get_epsilon(delta)
    assert opacus - 0.03 <= by_loss <= opacus + 1e-3
    assert by_loss <= epsilon(event, delta=delta, accountant="rdp")


def test_against_opacus_and_renyi() -> None:
    check_against_opacus(1.0, 0.01, 1000, 1e-5)
    check_against_opacus(2.0, 0.001, 100, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("point", GRID, ids=str)
def test_grid_against_opacus_and_renyi(point: tuple[float, float, int, float]) -> None:
    check_against_opacus(*point)


def test_user_level_lies_between_its_bounds() -> None:
    common = {"noise_multiplier": 2.0, "sampling_prob": 0.01, "steps": 500}
    found = [epsilon(user_level_event(**common, max_examples_per_user=k), delta=1e-5) for k in (1, 2, 5)]  # type: ignore[arg-type]
    assert found == sorted(found)
    assert found[-1] < epsilon(
        without_amplification(noise_multiplier=2.0, steps=500, max_examples_per_user=5), delta=1e-5
    )
    event = user_level_event(**common, max_examples_per_user=5)  # type: ignore[arg-type]
    assert found[-1] <= epsilon(event, delta=1e-5, accountant="rdp")


def test_without_amplification_costs_more() -> None:
    found = epsilon(without_amplification(noise_multiplier=1.0, steps=1000), delta=1e-5)
    assert found == pytest.approx(gaussian_epsilon(1 / math.sqrt(1000), 1e-5), rel=1e-3)
    assert found > 100 * epsilon(STANDARD, delta=1e-5)


def test_over_steps_rises_to_the_end() -> None:
    points = epsilon_over_steps(
        lambda step: dpsgd_event(noise_multiplier=1.0, sampling_prob=0.01, steps=step), steps=1000, delta=1e-5
    )
    steps, values = zip(*points, strict=True)
    assert steps[-1] == 1000
    assert list(values) == sorted(values)
    # On the coarser grid, hence never below.
    assert epsilon(STANDARD, delta=1e-5) <= values[-1] <= 1.001 * epsilon(STANDARD, delta=1e-5)


@pytest.mark.parametrize(
    ("target", "make_event"),
    [
        (8.0, lambda sigma: dpsgd_event(noise_multiplier=sigma, sampling_prob=0.01, steps=3000)),
        (0.5, lambda sigma: dpsgd_event(noise_multiplier=sigma, sampling_prob=0.01, steps=3000)),
        (8.0, lambda s: user_level_event(noise_multiplier=s, sampling_prob=0.01, steps=200, max_examples_per_user=3)),
    ],
)
def test_calibration(target: float, make_event) -> None:
    found = calibrate_noise_multiplier(target_epsilon=target, target_delta=1e-5, make_event=make_event)
    assert epsilon(make_event(found), delta=1e-5) <= target
    # Little noise is wasted, and a little less would not do.
    assert epsilon(make_event(found * 0.997), delta=1e-5) > target


@pytest.mark.parametrize("wrong", [{"target_epsilon": 0.0}, {"target_epsilon": math.inf}, {"target_delta": 0.0}])
def test_calibration_refuses(wrong: dict) -> None:
    with pytest.raises(InputError):
        calibrate_noise_multiplier(
            **({"target_epsilon": 1.0, "target_delta": 1e-5} | wrong), make_event=dp_event.GaussianDpEvent
        )


def test_calibration_is_done_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_event(sigma: float) -> dp_event.DpEvent:
        return dpsgd_event(noise_multiplier=sigma, sampling_prob=0.5, steps=7)

    found = calibrate_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, make_event=make_event)

    def again(*_: object) -> float:
        raise AssertionError("epsilon was asked for again")

    monkeypatch.setattr(accounting, "_epsilon_at", again)
    assert calibrate_noise_multiplier(target_epsilon=3.0, target_delta=1e-5, make_event=make_event) == found
    for target, delta, steps in ((3.1, 1e-5, 7), (3.0, 1e-6, 7), (3.0, 1e-5, 8)):
        with pytest.raises(AssertionError, match="again"):
            calibrate_noise_multiplier(
                target_epsilon=target,
                target_delta=delta,
                make_event=lambda sigma, steps=steps: dpsgd_event(  # type: ignore[misc]
                    noise_multiplier=sigma, sampling_prob=0.5, steps=steps
                ),
            )


def test_a_target_that_asks_for_no_noise_is_refused() -> None:
    with pytest.raises(InputError, match="asks for no noise at all"):
        calibrate_noise_multiplier(
            target_epsilon=1e5,
            target_delta=1e-5,
            make_event=lambda sigma: dpsgd_event(noise_multiplier=sigma, sampling_prob=1.0, steps=1),
        )


def test_no_noise_is_no_privacy() -> None:
    for event in (
        dp_event.NonPrivateDpEvent(),
        dpsgd_event(noise_multiplier=0.0, sampling_prob=0.1, steps=1),
        composed([STANDARD, dp_event.GaussianDpEvent(0.0)]),
    ):
        assert epsilon(event, delta=1e-5) == math.inf
    assert epsilon(dp_event.NoOpDpEvent(), delta=1e-5) == 0


@pytest.mark.parametrize("noise_multiplier", [1e-9, 1e-4, 0.009])
def test_hardly_any_noise_is_one_clear_error(noise_multiplier: float) -> None:
    with pytest.raises(InputError, match=r"protects nobody.*give 0\.01 or more") as error:
        dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=0.1, steps=1)
    assert "\n" not in str(error.value)


def test_what_comes_to_hardly_any_noise_has_no_epsilon() -> None:
    """An event that came by another way (a ledger's entry, very many steps) neither crashes nor gets a figure."""
    for event in (
        dp_event.GaussianDpEvent(1e-9),
        dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(1e-9)),
        without_amplification(noise_multiplier=1.0, steps=10**6, max_examples_per_user=100),
    ):
        assert epsilon(event, delta=1e-5) == math.inf
    # (The parameter of discrete Laplace noise is the inverse of its scale.)
    assert epsilon(dp_event.DiscreteLaplaceDpEvent(0.001, 1), delta=1e-5) <= 0.0011
    # Where it ends there is still a figure, and it is above the truth.
    true = gaussian_epsilon(0.0101, 1e-5)
    assert true <= epsilon(dp_event.GaussianDpEvent(0.0101), delta=1e-5) <= true * 1.001


def test_orders_that_do_not_converge_are_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    """The library's warning of each left-out order is not printed; every other warning is."""
    event = dpsgd_event(noise_multiplier=0.3, sampling_prob=0.05, steps=10)
    library = RdpAccountant()
    library.compose(event)
    assert "failed to converge" in caplog.text  # else there is nothing to silence, and this test tests nothing
    caplog.clear()
    found = epsilon(event, delta=1e-5, accountant="rdp")
    assert caplog.text == ""
    assert found == library.get_epsilon(1e-5)
    assert epsilon(event, delta=1e-5) <= found < math.inf
    logging.getLogger("absl").warning("something else")
    assert "something else" in caplog.text


def test_a_negative_divergence_bounds_nothing() -> None:
    accountant = RenyiAccountant([2.0, 8.0])
    accountant.compose(dp_event.GaussianDpEvent(1.0))
    true = accountant.get_epsilon(1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RdpAccountant, "_maybe_compose", lambda self, *rest: setattr(self, "_rdp", self._rdp - [9.0, 0.0])
        )
        accountant.compose(dp_event.GaussianDpEvent(5.0))
    # The library would now say 0.
    assert accountant.get_epsilon(1e-5) >= true


def test_tuning_costs_more_than_one_trial_and_less_than_all() -> None:
    trial = dp_event.GaussianDpEvent(10.0)
    event = tuning_event(trial, mean_trials=10, shape=math.inf)
    found = epsilon(event, delta=1e-5)
    assert epsilon(trial, delta=1e-5) < found < 10 * epsilon(trial, delta=1e-5)
    # Composed with others: at most what the Renyi accountant says of everything, at least the others alone.
    both = composed([event, STANDARD])
    assert epsilon(STANDARD, delta=1e-5) < epsilon(both, delta=1e-5) <= epsilon(both, delta=1e-5, accountant="rdp")


@pytest.mark.parametrize(
    ("delta", "accountant"), [(0.0, "pld"), (1.0, "pld"), (1e-13, "pld"), (1e-5, "clt"), (1e-5, "gdp")]
)
def test_wrong_questions_are_refused(delta: float, accountant: str) -> None:
    with pytest.raises(InputError):
        epsilon(STANDARD, delta=delta, accountant=accountant)


def test_unknown_mechanisms_are_refused() -> None:
    sampled = dp_event.PoissonSampledDpEvent(0.1, dp_event.DiscreteLaplaceDpEvent(1.0, 1))
    with pytest.raises(PrivacyError):
        epsilon(sampled, delta=1e-5)


# --- what is kept ------------------------------------------------------------------------------------------------


def test_kept_compositions_change_nothing(tmp_path) -> None:
    events = [dpsgd_event(noise_multiplier=s, sampling_prob=0.01, steps=50) for s in (1.0, 1.1, 1.2, 1.3, 1.4)]
    plain = [epsilon(composed(events[:n]), delta=1e-5) for n in range(1, 6)]
    first = LossStore(tmp_path)
    assert [epsilon(composed(events[:n]), delta=1e-5, store=first) for n in range(1, 6)] == pytest.approx(
        plain, rel=1e-9
    )
    again = LossStore(tmp_path)
    assert [epsilon(composed(events[:n]), delta=1e-5, store=again) for n in range(1, 6)] == pytest.approx(
        plain, rel=1e-9
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The single distributions that are computed from now on."""
    made: list[str] = []
    single = accounting._distribution.__wrapped__

    def watched(key: str, interval: float) -> object:
        made.append(key)
        return single(key, interval)

    monkeypatch.setattr(accounting, "_distribution", watched)
    return made


def test_a_release_more_composes_one_distribution_more(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and in the next one from what lies on the disk: the thousandth costs what the tenth does."""
    monkeypatch.setattr(loss_store, "_DURABLE_SECONDS", 0.0)
    events = [dpsgd_event(noise_multiplier=2 + n / 10, sampling_prob=0.001, steps=10) for n in range(12)]
    store = LossStore(tmp_path)
    for n in range(1, 10):
        epsilon(composed(events[:n]), delta=1e-5, store=store)
    made = counted(monkeypatch)
    epsilon(composed(events[:10]), delta=1e-5, store=store)
    assert len(made) == 1
    epsilon(composed(events[:11]), delta=1e-5, store=LossStore(tmp_path))
    assert len(made) == 2
    # An event that came before, in whatever order they are named; Gaussians, which are one.
    epsilon(composed([*reversed(events[:11]), events[3]]), delta=1e-5, store=LossStore(tmp_path))
    assert len(made) == 3
    noise = dp_event.GaussianDpEvent(50.0)
    epsilon(composed([*events[:11], noise]), delta=1e-5, store=LossStore(tmp_path))
    made.clear()
    epsilon(composed([*events[:12], noise, noise]), delta=1e-5, store=LossStore(tmp_path))
    assert len(made) == 2
    # The control: without what was kept, all of them.
    made.clear()
    epsilon(composed(events), delta=1e-5, store=LossStore(None))
    assert len(made) == 12


def test_short_steps_add_up_to_a_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_store, "_DURABLE_SECONDS", 1.0)
    store = LossStore(tmp_path)
    leaves = tuple((f"event {n}", 1) for n in range(10))
    distribution = pld.from_laplace_mechanism(1.0, value_discretization_interval=0.1)
    kept = loss_store.Kept(distribution, 0.0)
    for n in range(1, 11):
        kept = store.put(leaves[:n], 1e-4, loss_store.Kept(distribution, kept.unsaved + 0.4))
    assert len(list(tmp_path.glob("*.npz"))) == 3
    assert store.find(leaves, 1e-4)[0] == ()
    assert LossStore(tmp_path).find(leaves, 1e-4)[0] == leaves[9:]
    assert LossStore(tmp_path).find(leaves, 1e-3) == (leaves, None)


def test_what_lacks_is_told_exactly(tmp_path) -> None:
    store = LossStore(None)
    distribution = pld.from_laplace_mechanism(1.0, value_discretization_interval=0.1)
    leaves = (("a", 2), ("b", 1), ("c", 5))
    store.put(leaves, 1e-4, loss_store.Kept(distribution, 0.0))
    for asked, lacking in (
        ((("c", 5), ("a", 2), ("b", 1)), ()),
        ((("a", 3), ("b", 1), ("c", 5)), (("a", 1),)),
        ((("a", 2), ("b", 1), ("c", 5), ("d", 1)), (("d", 1),)),
        ((("a", 2), ("b", 1), ("c", 5), ("d", 7), ("e", 1)), (("d", 7), ("e", 1))),
        ((("a", 1), ("b", 1), ("c", 5)), None),
        ((("a", 2), ("b", 1)), None),
    ):
        found = store.find(asked, 1e-4)
        assert found[0] == (asked if lacking is None else lacking)
        assert (found[1] is None) == (lacking is None)


def test_a_torn_file_is_computed_anew(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_store, "_DURABLE_SECONDS", 0.0)
    event = composed([STANDARD, dp_event.LaplaceDpEvent(9.0)])
    true = epsilon(event, delta=1e-5, store=LossStore(tmp_path))
    files = sorted(tmp_path.glob("*.npz"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-100])
    assert epsilon(event, delta=1e-5, store=LossStore(tmp_path)) == pytest.approx(true, rel=1e-12)


def test_json_keeps_epsilon_exactly() -> None:
    event = user_level_event(noise_multiplier=1.7, sampling_prob=0.013, steps=100, max_examples_per_user=7)
    assert epsilon(event_from_json(event_to_json(event)), delta=1e-5) == epsilon(event, delta=1e-5)


_MIXTURE = dp_event.MixtureOfGaussiansDpEvent
_SAMPLED_NOTHING = dp_event.PoissonSampledDpEvent(0.0, dp_event.GaussianDpEvent(1.0))


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize(
    ("event", "told"),
    [
        (_SAMPLED_NOTHING, "sampling_probability: expected a probability above 0"),
        (dp_event.TruncatedSubsampledGaussianDpEvent(10, 0.0, 3, 1.0), "expected a probability above 0"),
        (dp_event.ComposedDpEvent([_SAMPLED_NOTHING]), "expected a probability above 0"),
        (_MIXTURE(1.0, [0.0], [1.0]), "sensitivities: expected one above 0"),
        (_MIXTURE(1.0, [0.0, 1.0], [1.0, 0.0]), "expected one above 0 with a probability above 0"),
        (_MIXTURE(1.0, [0.0, 1.0], [0.5, 0.1]), "with the sum 1; found 2 with the sum 0.6"),
        (_MIXTURE(1.0, [0.0, 1.0], [1.0]), "one probability for each of 2 sensitivities"),
        (dp_event.GaussianDpEvent(-1.0), "noise_multiplier: expected a number of at least 0, found -1"),
        (dp_event.GaussianDpEvent(math.nan), "found nan"),
        (dp_event.RepeatAndSelectDpEvent(dp_event.GaussianDpEvent(-1.0), 2.0, 1.0), "found -1"),
        (dp_event.RepeatAndSelectDpEvent(dp_event.GaussianDpEvent(1.0), 0.0, 1.0), "mean: expected a finite number"),
        (dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(1.0), -1), "count: expected a whole number"),
        (dp_event.TruncatedSubsampledGaussianDpEvent(-5, 0.1, 3, 1.0), "dataset_size: expected a whole number"),
    ],
)
def test_an_event_with_a_value_out_of_range_is_refused_in_one_line(event: DpEvent, told: str, accountant: str) -> None:
    with pytest.raises(InputError, match=told):
        epsilon(event, delta=1e-5, accountant=accountant)


def test_calibration_refuses_such_an_event_too() -> None:
    with pytest.raises(InputError, match="sampling_probability"):
        calibrate_noise_multiplier(
            target_epsilon=1.0,
            target_delta=1e-5,
            make_event=lambda sigma: dp_event.PoissonSampledDpEvent(0.0, dp_event.GaussianDpEvent(sigma)),
        )


def test_infinite_noise_tells_nothing_and_numbers_of_numpy_are_numbers() -> None:
    hidden = dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(math.inf))
    one = dp_event.PoissonSampledDpEvent(0.1, dp_event.GaussianDpEvent(2.0))
    assert epsilon(hidden, delta=1e-5) == 0.0
    assert epsilon(dp_event.ComposedDpEvent([hidden, one]), delta=1e-5) == epsilon(one, delta=1e-5)
    of_numpy = dp_event.SelfComposedDpEvent(dp_event.PoissonSampledDpEvent(np.float64(0.1), one.event), np.int64(3))
    assert epsilon(of_numpy, delta=1e-5) == epsilon(dp_event.SelfComposedDpEvent(one, 3), delta=1e-5)
