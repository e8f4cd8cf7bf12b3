"""Tuning as one mechanism: a random number of trials, each private together with its score, of which the best is kept.

Papernot and Steinke (arXiv 2110.03620, theorems 2 and 6) bound what choosing the best of K runs costs, where

1. K is drawn beforehand from one of the distributions below, apart from the data, and is not told: what comes out is
   the best trial alone (its settings, its model, its score), never how many there were or how the others did;
2. every trial is the same mechanism, settings drawn at random included, and is private **together with its score**.

A score on held-out rows of the users who are protected is no part of what training accounts for: taken as it is, it may
carry one user's rows whole into the choice. So a score is noised and its noise is part of the trial's event, or it is
computed on data that is declared public and then costs nothing.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AliasChoices, Field

from lazydp.components.shared.frozen_model import FrozenModel

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

TrialDistribution = Literal["poisson", "geometric", "logarithmic"]
Metric = Literal["auc", "hit_at_10", "ndcg_at_10", "brier"]

UNIFORM_BITS = 128
"""Bits of the uniform integer from which a number of trials is drawn."""

# Shape of the truncated negative binomial distribution; infinity stands for Poisson.
_SHAPES: dict[TrialDistribution, float] = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}
_DIGITS = decimal.Context(prec=80, Emin=-decimal.MAX_EMAX, Emax=decimal.MAX_EMAX)


class Tuning(FrozenModel):
    """The mechanism of one sweep.

    Attributes:
        distribution: of the number of trials: `poisson` (may be none at all), `geometric`, or `logarithmic` (cheapest
            in privacy for its mean, with the longest tail). Files of lazydp 0.1 call it `law`.
        mean_trials: its mean.
        metric: what scores a trial.
        score_noise_multiplier: standard deviation of the noise on the sum over users of scores in [0, 1], a sum of
            which one user moves by 1 at most; None where the score comes from public data.
        public_dataset: fingerprint of the dataset that trials are scored on, where it is declared public.
        digest: SHA-256 of every setting of the sweep, what may be drawn included, and of nothing else: it is published.
    """

    distribution: Annotated[TrialDistribution, Field(validation_alias=AliasChoices("distribution", "law"))] = "poisson"
    mean_trials: Annotated[float, Field(ge=1, le=10_000)]
    metric: Metric
    score_noise_multiplier: Annotated[float, Field(gt=0)] | None
    public_dataset: str | None = None
    digest: str

    def event(self, training: DpEvent) -> DpEvent:
        """What the sweep is to the accountant, where one trial's training is `training`."""
        from dp_accounting.dp_event import GaussianDpEvent  # noqa: PLC0415 - slow to import

        from lazydp.components.budget.accounting.events import composed, tuning_event  # noqa: PLC0415 - scipy is slow to import

        trial = training
        if self.score_noise_multiplier is not None:
            trial = composed([training, GaussianDpEvent(self.score_noise_multiplier)])
        return tuning_event(trial, mean_trials=self.mean_trials, shape=_SHAPES[self.distribution])

    def number_of_trials(self, uniform: int) -> int:
        """K, by inversion of its distribution function in 80 digits.

        Args:
            uniform: uniform over 0 .. 2**128 - 1; the distribution is met to 2**-120 in total variation.
        """
        with decimal.localcontext(_DIGITS):
            mean = decimal.Decimal(self.mean_trials)
            if self.distribution == "poisson":
                return _invert(uniform, first=0, weight=(-mean).exp(), ratio=lambda k: mean / (k + 1))
            if mean == 1:
                return 1
            shape = decimal.Decimal(_SHAPES[self.distribution])
            success = success_probability(mean, shape)
            fail = 1 - success
            return _invert(
                uniform,
                first=1,
                weight=fail / -success.ln() if shape == 0 else shape * fail / (success**-shape - 1),
                ratio=lambda k: fail * (k + shape) / (k + 1),
            )


def success_probability(mean: decimal.Decimal, shape: decimal.Decimal) -> decimal.Decimal:
    """gamma of the truncated negative binomial distribution of this mean (paper, definition 1), not below the true one.

    A larger gamma is a smaller mean: what is drawn costs no more than what is accounted for.
    """
    if shape == 1:
        return 1 / mean
    low, high = decimal.Decimal(0), decimal.Decimal(1)
    for _ in range(200):
        middle = (low + high) / 2
        fail = 1 - middle
        found = fail / (-middle.ln() * middle) if shape == 0 else shape * fail / (middle * (1 - middle**shape))
        low, high = (middle, high) if found > mean else (low, middle)
    return high


def _invert(uniform: int, *, first: int, weight: decimal.Decimal, ratio: Callable[[int], decimal.Decimal]) -> int:
    """The least k at which the distribution function passes uniform / 2**128; ratio(k) = P[K=k+1] / P[K=k]."""
    target = decimal.Decimal(uniform) / (1 << UNIFORM_BITS)
    k, below = first, weight
    while below <= target and weight > 0:
        weight *= ratio(k)
        k += 1
        below += weight
    return k
