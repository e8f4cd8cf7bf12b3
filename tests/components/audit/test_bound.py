"""The lower bound on epsilon: against a linear program, by hand, and by simulation of mechanisms with a known curve."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linprog
from scipy.special import expit
from scipy.stats import norm

from lazydp.components.audit.bound import refutes
from lazydp.components.audit.guesses import best_guesses, correct_guesses, rules
from lazydp.components.audit.hypotheses import Hypotheses
from lazydp.components.audit.trade_off import TradeOff, from_profile, gaussian
from lazydp.components.budget.accounting.epsilon import epsilon as epsilon_of
from lazydp.components.budget.accounting.epsilon import privacy_profile
from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.shared.errors import InputError


def of_pairs(*pairs: tuple[float, float]) -> TradeOff:
    """The curve of a mechanism that is (epsilon, delta)-DP for each of `pairs`."""
    epsilons, deltas = np.array(pairs).T
    return from_profile(epsilons, deltas)


# --- trade-off curves --------------------------------------------------------------------------------------------


def test_a_curve_by_hand() -> None:
    """epsilon = ln 3, delta = 0.1: 1 - 0.1 - 3 alpha up to where it meets (0.9 - alpha) / 3, at alpha = 0.225."""
    curve = of_pairs((math.log(3), 0.1))
    for alpha, expected in ((0.0, 0.9), (0.1, 0.6), (0.225, 0.225), (0.6, 0.1), (0.9, 0.0), (1.0, 0.0)):
        assert curve(alpha) == pytest.approx(expected, abs=1e-12)


def test_a_profile_of_a_gaussian_gives_its_curve_from_below() -> None:
    event = dpsgd_event(noise_multiplier=2.0, sampling_prob=1.0, steps=4)
    epsilons = np.concatenate([np.linspace(0.0, 1.0, 65), np.geomspace(1.0, 60.0, 200)[1:]])
    curve, exact = from_profile(epsilons, privacy_profile(event, epsilons)), gaussian(1.0)
    for alpha in [*np.geomspace(1e-9, 0.5, 60), *np.linspace(0.5, 1.0, 20)]:
        # PLD rounds losses up to its grid, so that its curve lies below by as much.
        assert exact(alpha) * 0.99 - 2e-3 <= curve(alpha) <= exact(alpha) + 1e-12


# --- against a linear program ------------------------------------------------------------------------------------


def largest_probability(pairs: Sequence[tuple[float, float]], m: int, r: int, v: int) -> float:
    """The most that v or more right guesses can have, over all distributions of right guesses that the curve admits."""
    j = np.arange(r + 1)
    unequal, limits = [], []
    for i in range(1, r + 1):
        right = np.where(j >= i, j / m, 0.0)
        wrong = np.where(j >= i - 1, (r - j) / m, 0.0)
        for epsilon, delta in pairs:
            # wrong >= slope (1 - right) + height for both lines of the pair
            for slope, height in (
                (-math.exp(epsilon), 1 - delta),
                (-math.exp(-epsilon), (1 - delta) * math.exp(-epsilon)),
            ):
                unequal.append(-(wrong + slope * right))
                limits.append(-(slope + height))
    tail = np.where(j >= v, -1.0, 0.0)
    solved = linprog(tail, A_ub=unequal, b_ub=limits, A_eq=[np.ones(r + 1)], b_eq=[1.0], bounds=(0, 1))
    assert solved.success
    return float(-solved.fun)  # type: ignore[operator]


@pytest.mark.parametrize("pairs", [[(0.0, 0.0)], [(1.0, 0.0)], [(0.5, 0.05)], [(0.2, 0.3), (1.0, 0.1), (2.0, 0.01)]])
@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (5, 2, 2), (9, 9, 6), (30, 12, 10), (40, 20, 20)])
def test_the_recursion_solves_the_linear_program(pairs: list[tuple[float, float]], m: int, r: int, v: int) -> None:
    largest, curve = largest_probability(pairs, m, r, v), of_pairs(*pairs)
    assert not refutes(curve, canaries=m, guesses=r, correct=v, error=largest * (1 - 1e-5))
    if largest < 1 - 1e-5:
        assert refutes(curve, canaries=m, guesses=r, correct=v, error=largest * (1 + 1e-5))


def test_one_guess_by_hand() -> None:
    """One coin under epsilon-DP is told with probability e^epsilon / (1 + e^epsilon) at most: 3/4 at ln 3."""
    curve = of_pairs((math.log(3), 0.0))
    assert refutes(curve, canaries=1, guesses=1, correct=1, error=0.7501)
    assert not refutes(curve, canaries=1, guesses=1, correct=1, error=0.7499)


@pytest.mark.parametrize(
    "wrong", [{"correct": 3}, {"guesses": 11}, {"correct": -1}, {"error": 0.0}, {"error": 1.0}], ids=str
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    given = {"canaries": 10, "guesses": 2, "correct": 2, "error": 0.05, **wrong}
    with pytest.raises(InputError, match=r"expected|must be"):
        refutes(gaussian(1.0), **given)  # type: ignore[arg-type]


# --- the bound ---------------------------------------------------------------------------------------------------


def hypotheses() -> Hypotheses:
    """Four steps of everything that claim epsilon 1.99 together."""
    return Hypotheses(
        lambda sigma: dpsgd_event(noise_multiplier=sigma, sampling_prob=1.0, steps=4), noise_multiplier=4.0, delta=1e-5
    )


def test_more_right_guesses_show_more_and_nothing_shows_nothing() -> None:
    tested = hypotheses()
    assert tested.claim == pytest.approx(1.993, abs=2e-3)
    found = [
        tested.lower_bound(canaries=1000, guesses=200, correct=correct, error=0.05)
        for correct in (0, 100, 120, 150, 180, 200)
    ]
    assert found == sorted(found)
    assert found[:2] == [0.0, 0.0]
    assert found[-1] > tested.claim
    assert tested.lower_bound(canaries=1000, guesses=0, correct=0, error=0.05) == 0.0


def test_the_bound_is_the_epsilon_of_the_last_refuted_run() -> None:
    found = hypotheses().lower_bound(canaries=10_000, guesses=1000, correct=760, error=0.05)
    refuted = [
        sigma
        for sigma in 4.0 * 2.0 ** (np.arange(-60, 24) / 12)
        if refutes(gaussian(2.0 / sigma), canaries=10_000, guesses=1000, correct=760, error=0.05)
    ]
    expected = epsilon_of(dpsgd_event(noise_multiplier=min(refuted), sampling_prob=1.0, steps=4), delta=1e-5)
    assert found == pytest.approx(expected, rel=0.07)  # a step of the grid, for PLD's curve is a little lower
    assert found <= expected


# --- by simulation -----------------------------------------------------------------------------------------------

Coins = npt.NDArray[np.bool_]
Mechanism = Callable[[np.random.Generator, Coins], npt.NDArray[np.float64]]


def randomised_response(epsilon: float) -> Mechanism:
    """Each coin told truly with probability e^eps / (1 + e^eps): epsilon-DP, and the worst such mechanism."""

    def answer(generator: np.random.Generator, coins: Coins) -> npt.NDArray[np.float64]:
        return np.where(generator.random(coins.size) < expit(epsilon), coins, ~coins).astype(float)

    return answer


def sometimes_all(epsilon: float, delta: float) -> Mechanism:
    """Randomised response that tells every coin truly with probability delta: (epsilon, delta)-DP."""
    usually = randomised_response(epsilon)

    def answer(generator: np.random.Generator, coins: Coins) -> npt.NDArray[np.float64]:
        return coins.astype(float) if generator.random() < delta else usually(generator, coins)

    return answer


def refuted_share(mechanism: Mechanism, curve: TradeOff, *, canaries: int, guesses: int, runs: int) -> float:
    """How often guesses about `mechanism` refute `curve` at 95 % confidence."""
    generator = np.random.default_rng(7)
    refuted = 0
    for _ in range(runs):
        coins = generator.random(canaries) < 0.5
        correct = correct_guesses(mechanism(generator, coins), coins, guesses=guesses)
        refuted += refutes(curve, canaries=canaries, guesses=guesses, correct=correct, error=0.05)
    return refuted / runs


RUNS = 2000
# Four standard deviations of a frequency of 0.05 over that many runs.
MOST = 0.05 + 4 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_bound_holds_for_randomised_response(epsilon: float) -> None:
    curve = of_pairs((epsilon, 0.0))
    found = refuted_share(randomised_response(epsilon), curve, canaries=100, guesses=100, runs=RUNS)
    assert found < MOST
    more = refuted_share(randomised_response(epsilon + 2), curve, canaries=100, guesses=100, runs=200)
    assert more > 0.5


def test_the_bound_holds_where_delta_is_used() -> None:
    mechanism = sometimes_all(1.0, 0.1)
    assert refuted_share(mechanism, of_pairs((1.0, 0.1)), canaries=50, guesses=40, runs=RUNS) < MOST
    # Without the delta the same runs refute too often.
    assert refuted_share(mechanism, of_pairs((1.0, 0.0)), canaries=50, guesses=40, runs=RUNS) > MOST


def test_the_bound_holds_for_gaussian_noise_and_sees_half_of_it() -> None:
    canaries = 5000

    def noised(separation: float) -> Mechanism:
        return lambda generator, coins: norm.rvs(size=coins.size, random_state=generator) + separation * coins  # type: ignore[return-value]

    for separation in (0.5, 1.4):
        guesses = best_guesses(canaries=canaries, separation=separation, error=0.05)
        size = {"canaries": canaries, "guesses": guesses}
        assert refuted_share(noised(separation), gaussian(separation), **size, runs=100) <= 0.05
        assert refuted_share(noised(2 * separation), gaussian(separation), **size, runs=50) > 0.9


# --- the rules ---------------------------------------------------------------------------------------------------


def test_guesses_are_the_extremes_and_ties_say_nothing() -> None:
    scores = np.array([5.0, -3.0, 0.0, 0.0, 4.0, -2.0])
    included = np.array([True, False, True, False, False, True])
    assert correct_guesses(scores, included, guesses=2) == 2
    assert correct_guesses(scores, included, guesses=4) == 2
    # Equal scores: by number, which no coin depends on.
    assert correct_guesses(np.zeros(6), included, guesses=6) == 2


@pytest.mark.parametrize("canaries", [100, 2000])
@pytest.mark.parametrize("separation", [0.05, 0.5, 5.0])
def test_rules_share_the_error_and_guess_no_more_than_there_is(canaries: int, separation: float) -> None:
    found = rules(
        watched=canaries // 2,
        others=canaries // 2,
        separation_of_steps=separation,
        separation_along=separation,
        confidence=0.95,
    )
    assert sum(rule.share for rule in found) == pytest.approx(1.0)
    assert all(2 <= rule.guesses <= canaries // 2 and rule.guesses % 2 == 0 for rule in found)
    assert {rule.statistic for rule in found} == {"steps", "along", "across"}
