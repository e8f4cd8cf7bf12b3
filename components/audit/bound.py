"""A lower bound on epsilon from guesses about one training run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).

Each of m canaries is in or out of the training data by its own fair coin. From the trained model somebody guesses r of
the coins (and abstains from the rest), and v guesses are right. If training is (epsilon, delta)-DP for adding or
removing one canary, then (corollary 5.4 of the paper)

    P[ at least v right ]  <=  P[W >= v]  +  2 m delta * max over i = 1..v of  P[v > W >= v - i] / i

with W ~ Binomial(r, e^epsilon / (1 + e^epsilon)): no better than randomised response, but for what delta allows. Every
epsilon at which the right side is at most 1 - confidence is refuted at that confidence.

The number of guesses r has to be settled before the run is looked at; which coins are guessed may depend on it.
"""

from __future__ import annotations

import numpy as np
from scipy.special import expit
from scipy.stats import binom

from lazydp.components.shared.errors import InputError

_BISECTIONS = 60


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound on the probability of at least `correct` right guesses under (epsilon, delta)-DP.

    Args:
        canaries: m.
        guesses: r, at most m.
        correct: v, at most r.
        epsilon: at least 0.
        delta: in [0, 1).

    Raises:
        InputError: a value out of range.
    """
    _check(canaries, guesses, correct, delta)
    if not epsilon >= 0:
        raise InputError(f"epsilon must be at least 0, found {epsilon}")
    # In wrong guesses rather than right ones: their probability is small, and 1 - it would round.
    wrong, wrong_probability = guesses - correct, expit(-epsilon)
    tail = float(binom.cdf(wrong, guesses, wrong_probability))
    if delta == 0.0 or correct == 0:
        return tail
    below = np.cumsum(binom.pmf(np.arange(wrong + 1, guesses + 1), guesses, wrong_probability))
    correction = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * correction)


def epsilon_lower_bound(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The largest epsilon that the guesses refute; 0 where they refute none.

    Args:
        canaries: m.
        guesses: r, settled before the run.
        correct: v.
        delta: of the claim.
        confidence: in (0, 1): the chance that a run's bound does not exceed the true epsilon is at least this.

    Raises:
        InputError: a value out of range.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be in (0, 1), found {confidence}")

    def refuted(epsilon: float) -> bool:
        found = p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return found <= 1.0 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    # The refuted end, so that rounding never claims more than was shown.
    return low


def _check(canaries: int, guesses: int, correct: int, delta: float) -> None:
    if not 0 <= correct <= guesses <= canaries:
        raise InputError(
            f"expected 0 <= correct <= guesses <= canaries, found {correct} correct, {guesses} guesses, "
            f"{canaries} canaries"
        )
    if not 0 <= delta < 1:
        raise InputError(f"delta must be in [0, 1), found {delta}")
