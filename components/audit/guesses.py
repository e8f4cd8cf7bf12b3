"""Which coins are guessed, from what statistic of the canaries' rows, and how many: all settled before the run.

A canary moves its own row along one direction, and nothing else moves it there. Three statistics see it:

    steps    what each step added along that direction: for the canaries that are looked at after every step
    along    how far the row went in that direction by the end: the canary's gradients, plus noise
    across   how far it went in all other directions: noise alone. Promised is the same noise for every row, read or
             not; lazy noise that is lost, doubled or scaled wrongly on rows that were read shows here

The highest scores are guessed to be in, the lowest to be out, as many of each; the rest is abstained from. Several
rules look at one run, so each is held to a share of the error that the audit may make (a union bound): most of it goes
to the two rules that are strongest where everything is right, the rest to those that raise the alarm where something is
not.
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

from lazydp.components.audit.bound import refutes
from lazydp.components.audit.hypotheses import Hypotheses
from lazydp.components.audit.trade_off import gaussian

Floats: TypeAlias = npt.NDArray[np.float64]
Coins: TypeAlias = npt.NDArray[np.bool_]
Statistic = Literal["steps", "along", "across"]

_MOST = 3 / 4  # of the canaries; more would guess coins that a perfect separation still gets wrong
_FRACTIONS = tuple(2.0**-power for power in range(1, 9))
_LARGEST_SEPARATION = 64.0
_BISECTIONS = 10
_STRONGEST = 0.35  # of the error, for each of the two strongest rules


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


def rules(
    *, watched: int, others: int, separation_of_steps: float, separation_along: float, confidence: float
) -> tuple[Rule, ...]:
    """The rules of an audit.

    Args:
        watched: canaries that are looked at after every step.
        others: canaries that only the last model shows.
        separation_of_steps: what `steps` is promised to differ by between in and out, in standard deviations.
        separation_along: the same of `along`.
        confidence: of the audit.
    """
    strongest_error = (1 - confidence) * _STRONGEST
    of_steps = best_guesses(canaries=watched, separation=separation_of_steps, error=strongest_error)
    few = best_guesses(canaries=others, separation=separation_along, error=strongest_error)
    many = _even(_MOST * others)
    alarms: list[tuple[Statistic, bool, int]] = [("steps", True, _even(_MOST * watched)), ("along", True, many)]
    alarms += [("across", high_is_in, count) for high_is_in in (True, False) for count in (few, many)]
    share = (1 - 2 * _STRONGEST) / len(alarms)
    return (
        Rule("steps", True, of_steps, _STRONGEST),
        Rule("along", True, few, _STRONGEST),
        *(Rule(*alarm, share) for alarm in alarms),
    )


def best_guesses(*, canaries: int, separation: float, error: float) -> int:
    """The number of guesses for which the bound on Gaussian scores of this separation is best, as predicted.

    Args:
        canaries: m.
        separation: between the means of in and out, in standard deviations.
        error: of the rule.
    """
    separation = min(separation, _LARGEST_SEPARATION)

    def predicted(guesses: int) -> float:
        accuracy = _accuracy(guesses / canaries, separation)
        # One standard deviation below the expectation: a choice that pays also in runs that are not lucky.
        correct = max(0, math.floor(guesses * accuracy - math.sqrt(guesses * accuracy * (1 - accuracy))))
        low, high = 0.0, separation
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            refuted = refutes(gaussian(middle), canaries=canaries, guesses=guesses, correct=correct, error=error)
            low, high = (middle, high) if refuted else (low, middle)
        return low

    return max(
        {_even(fraction * canaries) for fraction in _FRACTIONS}, key=lambda guesses: (predicted(guesses), guesses)
    )


def judge(rule: Rule, scores: Floats, included: Coins, hypotheses: Hypotheses, *, confidence: float) -> Outcome:
    """Guess by `rule`, count, and bound epsilon at the rule's share of the error.

    Args:
        rule: settled before the run.
        scores: the rule's statistic of every canary that it is known of, [m].
        included: their coins, [m].
        hypotheses: what is tested.
        confidence: of the whole audit.
    """
    correct = correct_guesses(scores if rule.high_is_in else -scores, included, guesses=rule.guesses)
    bound = hypotheses.lower_bound(
        canaries=len(included), guesses=rule.guesses, correct=correct, error=(1 - confidence) * rule.share
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
