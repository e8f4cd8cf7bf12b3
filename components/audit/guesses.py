"""Which coins are guessed, from what statistic of the canaries' rows, and how many: all settled before the run.

A canary pulls its own row along one direction, and nothing else pulls it there. Two statistics see it:

    along    how far the row went in that direction: the canary's gradients, plus noise
    across   how far it went in all other directions: noise alone. Promised is the same noise for every row, read or
             not; lazy noise that is lost, doubled or scaled wrongly on rows that were read gives them away here

The highest scores are guessed to be in, the lowest to be out, as many of each; the rest is abstained from. Several
rules look at one run, so each is held to a share of the error that the audit may make (a union bound): half of it goes
to the rule that is strongest where everything is right, the rest to those that raise the alarm where something is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import norm

from lazydp.components.audit.bound import epsilon_lower_bound

Floats: TypeAlias = npt.NDArray[np.float64]
Coins: TypeAlias = npt.NDArray[np.bool_]
Statistic = Literal["along", "across"]

_MOST = 3 / 4  # of the canaries; more would guess coins that a perfect separation still gets wrong
_FRACTIONS = tuple(2.0**-power for power in range(1, 12))


@dataclass(frozen=True, slots=True)
class Rule:
    """One way to guess.

    Attributes:
        statistic: what is looked at.
        high_is_in: whether a high value speaks for a canary that was in.
        guesses: r, even: half of them the highest values, half the lowest.
        share: of the error that the audit may make.
    """

    statistic: Statistic
    high_is_in: bool
    guesses: int
    share: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule found.

    Attributes:
        rule: the rule.
        correct: v, its right guesses.
        epsilon_lower_bound: at the rule's share of the error.
    """

    rule: Rule
    correct: int
    epsilon_lower_bound: float


def rules(*, canaries: int, separation: float, delta: float, confidence: float) -> tuple[Rule, ...]:
    """The rules of an audit.

    Args:
        canaries: m.
        separation: what `along` is promised to differ by between in and out, in standard deviations of its noise.
        delta: of the claim.
        confidence: of the audit.
    """
    few = best_guesses(canaries=canaries, separation=separation, delta=delta, confidence=1 - (1 - confidence) / 2)
    many = _even(_MOST * canaries)
    alarms: list[tuple[Statistic, bool, int]] = [("along", True, many)]
    alarms += [("across", high_is_in, count) for high_is_in in (True, False) for count in (few, many)]
    share = 0.5 / len(alarms)
    return (Rule("along", True, few, 0.5), *(Rule(*alarm, share) for alarm in alarms))


def best_guesses(*, canaries: int, separation: float, delta: float, confidence: float) -> int:
    """The number of guesses for which the bound on Gaussian scores of this separation is best, as predicted."""

    def predicted(count: int) -> float:
        accuracy = _accuracy(count / canaries, separation)
        # One standard deviation below the expectation: a choice that pays also in runs that are not lucky.
        correct = math.floor(count * accuracy - math.sqrt(count * accuracy * (1 - accuracy)))
        return epsilon_lower_bound(
            canaries=canaries, guesses=count, correct=max(correct, 0), delta=delta, confidence=confidence
        )

    return max({_even(fraction * canaries) for fraction in _FRACTIONS}, key=lambda count: (predicted(count), count))


def judge(
    rule: Rule, statistics: dict[Statistic, Floats], included: Coins, *, delta: float, confidence: float
) -> Outcome:
    """Guess by `rule`, count, and bound epsilon at the rule's share of the error.

    Args:
        rule: settled before the run.
        statistics: of every canary, [m] each.
        included: the coins, [m].
        delta: of the claim.
        confidence: of the whole audit.
    """
    scores = statistics[rule.statistic] if rule.high_is_in else -statistics[rule.statistic]
    correct = correct_guesses(scores, included, guesses=rule.guesses)
    bound = epsilon_lower_bound(
        canaries=len(included),
        guesses=rule.guesses,
        correct=correct,
        delta=delta,
        confidence=1 - (1 - confidence) * rule.share,
    )
    return Outcome(rule, correct, bound)


def correct_guesses(scores: Floats, included: Coins, *, guesses: int) -> int:
    """Right guesses where the `guesses / 2` highest scores are said to be in, and as many lowest to be out.

    Equal scores are told apart by the canary's number, which says nothing about its coin.
    """
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(included[order[len(order) - half :]].sum() + (~included[order[:half]]).sum())


def strongest(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome with the highest bound."""
    return max(outcomes, key=lambda outcome: outcome.epsilon_lower_bound)


def _accuracy(fraction: float, separation: float) -> float:
    """Chance that a guess is right, if N(0, 1) is out and N(separation, 1) is in and `fraction` of all is guessed."""

    def guessed(threshold: float) -> float:
        return float(norm.sf(threshold) + norm.sf(threshold - separation)) - fraction

    threshold = brentq(guessed, -40.0, 40.0 + separation)
    return float(norm.sf(threshold - separation)) / fraction


def _even(count: float) -> int:
    return max(2, 2 * round(count / 2))
