"""Trade-off curves: how well any test can tell two neighbouring datasets apart from what a mechanism released.

The curve f of a mechanism gives, for every false positive rate alpha, the smallest false negative rate that a test can
have (Dong, Roth and Su 2022, arXiv 1905.02383). A smaller f means less privacy. For neighbours in both directions f is
symmetric: it is its own inverse.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

TradeOff = Callable[[float], float]
"""False positive rate in [0, 1] -> false negative rate in [0, 1]; convex, decreasing, symmetric."""


def gaussian(mu: float) -> TradeOff:
    """The curve of N(0, 1) against N(mu, 1), mu >= 0."""

    def curve(alpha: float) -> float:
        return float(ndtr(-ndtri(alpha) - mu))

    return curve


def from_profile(epsilons: npt.NDArray[np.float64], deltas: npt.NDArray[np.float64]) -> TradeOff:
    """The curve of a mechanism that is (epsilons[i], deltas[i])-DP for every i, in both directions.

    It is the upper envelope of the lines 1 - delta - e^epsilon alpha and e^-epsilon (1 - delta - alpha) (proposition 6
    of the paper above). Fewer points give a lower curve: what refutes this curve refutes the exact one, too.

    Args:
        epsilons: at least 0, [n].
        deltas: in [0, 1], [n].
    """
    growth = np.exp(epsilons)
    slopes = np.concatenate([-growth, -1.0 / growth, [0.0]])
    heights = np.concatenate([1.0 - deltas, (1.0 - deltas) / growth, [0.0]])
    lines = sorted(zip(slopes.tolist(), heights.tolist(), strict=True))
    envelope: list[tuple[float, float]] = []
    starts: list[float] = []
    for slope, height in lines:
        while envelope:
            last_slope, last_height = envelope[-1]
            # Lines of one slope are sorted by height: the later one is nowhere below.
            crossing = -1.0 if slope == last_slope else (last_height - height) / (slope - last_slope)
            if crossing > starts[-1]:
                break
            envelope.pop()
            starts.pop()
        else:
            crossing = 0.0
        envelope.append((slope, height))
        starts.append(crossing)

    def curve(alpha: float) -> float:
        slope, height = envelope[bisect_right(starts, alpha) - 1]
        return slope * alpha + height

    return curve
