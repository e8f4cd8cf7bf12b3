"""A membership game over many runs: train with and without one privacy unit, guess which from what was released.

The audit (`lazydp audit`) bounds epsilon by one run of the product's own path. This game runs a small program many
times, so that a guarantee which fails for one unit in one crafted place is seen, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

Floats = npt.NDArray[np.float64]
Release = Callable[[bool, int], Floats]
"""(whether the unit is in, number of the run) -> what is released, [n]. Every run draws its noise anew."""


def epsilon_shown(release: Release, *, runs: int, delta: float, confidence: float = 0.95) -> float:
    """A lower bound on epsilon for adding or removing the unit, at `confidence`; 0 where the game shows nothing.

    In the first half of the runs the guesser learns the direction in which releases with the unit differ from those
    without, and a threshold; the second half counts right and wrong guesses. If releases are (epsilon, delta)-DP then
    true positives <= e^epsilon * false positives + delta, and the same of negatives; both rates are bounded by
    Clopper and Pearson (1934).

    Args:
        release: the program.
        runs: of each kind; half of them to learn from.
        delta: of the claim.
        confidence: of the bound.
    """
    inside, outside = (
        np.stack([release(is_in, number + runs * is_in) for number in range(runs)]) for is_in in (True, False)
    )
    half = runs // 2
    direction = inside[:half].mean(axis=0) - outside[:half].mean(axis=0)
    # In units of the noise, so that a coordinate with little noise counts as much as it tells.
    direction /= np.maximum(np.stack([inside[:half], outside[:half]]).std(axis=1).mean(axis=0) ** 2, 1e-300)
    scores_in, scores_out = inside @ direction, outside @ direction
    threshold = _best_threshold(scores_in[:half], scores_out[:half])
    hits = int((scores_in[half:] > threshold).sum())
    alarms = int((scores_out[half:] > threshold).sum())
    tested = runs - half
    error = (1 - confidence) / 4  # four rates are bounded
    return max(
        0.0,
        _epsilon(_at_least(hits, tested, error), _at_most(alarms, tested, error), delta),
        _epsilon(_at_least(tested - alarms, tested, error), _at_most(tested - hits, tested, error), delta),
    )


def _best_threshold(inside: Floats, outside: Floats) -> float:
    candidates = np.sort(np.concatenate([inside, outside]))
    middles = (candidates[1:] + candidates[:-1]) / 2
    right = [(inside > middle).sum() + (outside <= middle).sum() for middle in middles]
    return float(middles[int(np.argmax(right))])


def _at_least(successes: int, trials: int, error: float) -> float:
    return float(beta.ppf(error, successes, trials - successes + 1)) if successes else 0.0


def _at_most(successes: int, trials: int, error: float) -> float:
    return float(beta.ppf(1 - error, successes + 1, trials - successes)) if successes < trials else 1.0


def _epsilon(true_rate: float, false_rate: float, delta: float) -> float:
    return math.log((true_rate - delta) / false_rate) if true_rate > delta else 0.0
