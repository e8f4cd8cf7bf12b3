"""The lower bound on epsilon: against values worked out by hand and exactly, and by simulation at known epsilon."""

import math
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import expit

from lazydp.components.audit.bound import epsilon_lower_bound, p_value
from lazydp.components.audit.guesses import best_guesses, correct_guesses, rules
from lazydp.components.shared.errors import InputError


def exact_p_value(m: int, r: int, v: int, right: Fraction, delta: Fraction) -> Fraction:
    """The theorem in rational numbers: `right` is e^epsilon / (1 + e^epsilon)."""

    def pmf(k: int) -> Fraction:
        return math.comb(r, k) * right**k * (1 - right) ** (r - k)

    tail = sum((pmf(k) for k in range(v, r + 1)), Fraction(0))
    corrections = [sum((pmf(v - j) for j in range(1, i + 1)), Fraction(0)) / i for i in range(1, v + 1)]
    return min(Fraction(1), tail + 2 * m * delta * max(corrections, default=Fraction(0)))


@pytest.mark.parametrize("odds", [1, 3, 20])
@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (5, 2, 2), (9, 9, 5), (40, 20, 17), (200, 60, 60), (7, 3, 0)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 1000), Fraction(1, 50)])
def test_p_value_is_the_theorem(m: int, r: int, v: int, odds: int, delta: Fraction) -> None:
    expected = exact_p_value(m, r, v, Fraction(odds, odds + 1), delta)
    found = p_value(canaries=m, guesses=r, correct=v, epsilon=math.log(odds), delta=float(delta))
    assert found == pytest.approx(float(expected), rel=1e-11)


def test_two_guesses_by_hand() -> None:
    # At epsilon = ln 3 a guess is right with 3/4: P[2 right] = 9/16, P[1] = 6/16, P[0] = 1/16. With v = 2 the
    # correction is max(6/16, (6/16 + 1/16) / 2) = 6/16, and 2 m delta = 2 * 10 * 0.01 = 0.2.
    found = p_value(canaries=10, guesses=2, correct=2, epsilon=math.log(3), delta=0.01)
    assert found == pytest.approx(9 / 16 + 0.2 * 6 / 16, rel=1e-12)


@pytest.mark.parametrize(("guesses", "expected"), [(5, 0.1978), (10, 1.0519), (100, 3.4930), (1000, 5.8091)])
def test_all_guesses_right_by_hand(guesses: int, expected: float) -> None:
    # Without delta: (e^eps / (1 + e^eps))^r = 0.05.
    found = epsilon_lower_bound(canaries=guesses, guesses=guesses, correct=guesses, delta=0.0, confidence=0.95)
    right = 0.05 ** (1 / guesses)
    assert found == pytest.approx(math.log(right / (1 - right)), rel=1e-9)
    assert found == pytest.approx(expected, abs=1e-4)


def test_high_epsilon_keeps_its_digits() -> None:
    # 1 - expit(25) is 1.4e-11: right guesses counted in float64 would lose half of its digits.
    with mpmath.workdps(50):
        wrong = 1 / (1 + mpmath.exp(25))
        expected = 1 - (1 - wrong) ** 1000 - 1000 * wrong * (1 - wrong) ** 999
        at_most_one_wrong = float(1 - expected)
        complement = float(expected)
    found = p_value(canaries=1000, guesses=1000, correct=999, epsilon=25.0, delta=0.0)
    assert found == pytest.approx(at_most_one_wrong, rel=1e-14)
    assert complement < 1e-15


def test_nothing_is_shown_by_nothing() -> None:
    assert epsilon_lower_bound(canaries=10, guesses=0, correct=0, delta=1e-5, confidence=0.95) == 0.0
    assert epsilon_lower_bound(canaries=1000, guesses=100, correct=50, delta=1e-5, confidence=0.95) == 0.0


def test_more_right_guesses_show_more_and_a_larger_delta_less() -> None:
    def bound(correct: int, delta: float) -> float:
        return epsilon_lower_bound(canaries=1000, guesses=200, correct=correct, delta=delta, confidence=0.95)

    by_correct = [bound(correct, 1e-5) for correct in range(100, 201, 10)]
    assert by_correct == sorted(by_correct)
    by_delta = [bound(190, delta) for delta in (0.0, 1e-6, 1e-5, 1e-4, 1e-3)]
    assert by_delta == sorted(by_delta, reverse=True)
    assert by_delta[0] > by_delta[-1] > 0


@pytest.mark.parametrize(
    "wrong", [{"correct": 3}, {"guesses": 11}, {"correct": -1}, {"delta": 1.0}, {"delta": -0.1}, {"confidence": 1.0}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    given = {"canaries": 10, "guesses": 2, "correct": 2, "delta": 0.0, "confidence": 0.95, **wrong}
    with pytest.raises(InputError, match=r"expected|must be"):
        epsilon_lower_bound(**given)  # type: ignore[arg-type]


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


def exceeds(mechanism: Mechanism, *, epsilon: float, delta: float, canaries: int, guesses: int, runs: int) -> float:
    """How often the bound at 95 % confidence lies above `epsilon`."""
    generator = np.random.default_rng(7)
    level, above = 0.05, 0
    for _ in range(runs):
        coins = generator.random(canaries) < 0.5
        correct = correct_guesses(mechanism(generator, coins), coins, guesses=guesses)
        # The bound exceeds epsilon if and only if epsilon is refuted: quicker than to search for it.
        above += p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta) <= level
    return above / runs


RUNS = 2000
# Four standard deviations of a frequency of 0.05 over that many runs.
MOST = 0.05 + 4 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_the_bound_holds_for_randomised_response(epsilon: float) -> None:
    mechanism = randomised_response(epsilon)
    found = exceeds(mechanism, epsilon=epsilon, delta=0.0, canaries=500, guesses=100, runs=RUNS)
    # The theorem is tight for it, so the error is used: a bound that never errs would be too weak.
    assert 0.01 < found < MOST


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_bound_sees_randomised_response_that_tells_more(epsilon: float) -> None:
    found = exceeds(randomised_response(epsilon + 1), epsilon=epsilon, delta=0.0, canaries=500, guesses=100, runs=400)
    assert found > 0.5


def test_the_bound_holds_where_delta_is_used() -> None:
    mechanism = sometimes_all(1.0, 0.02)
    assert exceeds(mechanism, epsilon=1.0, delta=0.02, canaries=50, guesses=40, runs=RUNS) < MOST
    # Without the correction the same runs err too often.
    careless = exceeds(sometimes_all(1.0, 0.1), epsilon=1.0, delta=0.0, canaries=50, guesses=40, runs=RUNS)
    assert careless > MOST


def test_the_bound_holds_for_gaussian_noise_and_sees_half_of_it() -> None:
    separation, epsilon, delta, canaries = 0.5, 1.993, 1e-5, 20_000
    guesses = best_guesses(canaries=canaries, separation=separation, delta=delta, confidence=0.95)

    def gaussian(separation: float) -> Mechanism:
        return lambda generator, coins: generator.standard_normal(coins.size) + separation * coins

    claims = {"epsilon": epsilon, "delta": delta, "canaries": canaries, "guesses": guesses}
    assert exceeds(gaussian(separation), **claims, runs=100) == 0.0  # type: ignore[arg-type]
    assert exceeds(gaussian(2 * separation), **claims, runs=100) > 0.9  # type: ignore[arg-type]


# --- the rules ---------------------------------------------------------------------------------------------------


def test_guesses_are_the_extremes_and_ties_say_nothing() -> None:
    scores = np.array([5.0, -3.0, 0.0, 0.0, 4.0, -2.0])
    included = np.array([True, False, True, False, False, True])
    assert correct_guesses(scores, included, guesses=2) == 2
    assert correct_guesses(scores, included, guesses=4) == 2
    # Equal scores: by number, which no coin depends on.
    assert correct_guesses(np.zeros(6), included, guesses=6) == 2


@pytest.mark.parametrize("canaries", [100, 1000, 20_000])
@pytest.mark.parametrize("separation", [0.05, 0.5, 5.0])
def test_rules_share_the_error_and_guess_no_more_than_there_is(canaries: int, separation: float) -> None:
    found = rules(canaries=canaries, separation=separation, delta=1e-5, confidence=0.95)
    assert sum(rule.share for rule in found) == pytest.approx(1.0)
    assert all(2 <= rule.guesses <= canaries and rule.guesses % 2 == 0 for rule in found)
    assert {rule.statistic for rule in found} == {"along", "across"}
