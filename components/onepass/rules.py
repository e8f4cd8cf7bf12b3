"""Which statistics a start releases, and how its budget is divided: a rule of public and released numbers.

What decides is z, the number of privacy units times mu (a Gaussian mechanism of noise 1 / mu over its sensitivity has
mu): the signal of a statistic grows with the units, its noise does not. docs/quality.md shows the searches that the
constants come from. The number of units is taken from the noised histogram, so that the rule reads nothing private.

Dividing what is left after the histogram as its result suggests is adaptive composition: given the histogram, a matrix
with the share w of the squared mu and then a sketch with 1 - w are together one Gaussian mechanism of that mu (Dong,
Roth and Su, arXiv 1905.02383, corollary 3.3), whatever w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

PrivacyUnit: TypeAlias = Literal["example", "user"]

HISTOGRAM_SHARE = 0.1
"""Of the squared mu, what the histogram takes."""

# Directions of public features that a sketch looks into, over z^(3/4).
_DIRECTIONS, _DIRECTIONS_POWER = 0.21, 0.75
_FEWEST_DIRECTIONS, _MOST_DIRECTIONS = 8, 256
# Items of the matrix, over sqrt(z).
_ITEMS, _ITEMS_POWER = 5.0, 0.5
_FEWEST_ITEMS, _MOST_ITEMS = 64, 4096
# A matrix per example has entries of many units each; it pays for the whole of a small catalogue.
_MOST_ITEMS_OF_EXAMPLES = 8192
# Items that a sketch has rows of, over sqrt(z): the sums of the others would be hidden in noise. Without features
# nothing else is known of an item, so that more pays.
_SKETCH_ITEMS, _SKETCH_ITEMS_WITHOUT_FEATURES = 25.0, 50.0
_FEWEST_SKETCH_ITEMS = 640
# Eigenvectors of the matrix that become directions of the sketch: without features, and at most. Beside features there
# are only those that the features do not span, and there need not be any.
_FEWEST_EIGENVECTORS, _MOST_EIGENVECTORS = 8, 64
_MATRIX_PAYS_FROM = 600.0
# Typical part of the history in a logit, over sqrt(z).
_SCALE = 0.0045
_SMALLEST_SCALE, _LARGEST_SCALE = 0.35, 0.5
# In a large catalogue of which nothing public is known, where histories say far more than counts.
_LARGEST_SCALE_WITHOUT_FEATURES = 1.5
_SHARE_BESIDE_FEATURES = 0.2
_SHARE_WITHOUT_FEATURES = 0.6


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations of the noise, each for a sensitivity of 1; 0 without privacy.

    Attributes:
        histogram: on every count.
        statistics: of the matrix and the sketch together, were they one.
    """

    histogram: float
    statistics: float

    @classmethod
    def of(cls, noise_multiplier: float, *, histogram_share: float) -> Noise:
        """The division of a Gaussian mechanism of `noise_multiplier`: its squared mu is shared out."""
        return cls(
            histogram=noise_multiplier / math.sqrt(histogram_share),
            statistics=noise_multiplier / math.sqrt(1.0 - histogram_share),
        )

    @property
    def mu(self) -> float:
        """Of both together; infinite without noise."""
        return math.hypot(1.0 / self.histogram, 1.0 / self.statistics) if self.statistics else math.inf


@dataclass(frozen=True, slots=True)
class Statistics:
    """What is released after the histogram.

    Attributes:
        directions: most directions of public features in the sketch; 0 without features.
        sketch_items: items that the sketch has rows of, the most popular ones; 0 for no sketch.
        matrix_items: items of the matrix, the most popular ones; 0 for no matrix.
        matrix_share: of the squared mu that is left, what the matrix takes; 1 for a matrix alone, without a sketch.
        scale: typical size of the history's part of a logit; the surer the statistics, the larger beside the prior.
        exact: instead of both, the leading eigenvectors of the matrix of all items, without noise.
    """

    directions: int
    sketch_items: int
    matrix_items: int
    matrix_share: float
    scale: float
    exact: bool = False

    @property
    def eigenvectors(self) -> tuple[int, int]:
        """Fewest and most eigenvectors of the matrix that a sketch looks into."""
        return 0 if self.directions else _FEWEST_EIGENVECTORS, _MOST_EIGENVECTORS


def choose(
    *, units: float, mu: float, num_items: int, has_features: bool, privacy_unit: PrivacyUnit = "user"
) -> Statistics:
    """The statistics for `units` privacy units (a public or released number) at a total of `mu` (inf: no noise)."""
    z = max(units, 1.0) * mu
    whole = num_items <= _MOST_ITEMS_OF_EXAMPLES and (privacy_unit == "example" or math.isinf(mu))
    largest = _LARGEST_SCALE if has_features or whole else _LARGEST_SCALE_WITHOUT_FEATURES
    scale = min(max(_SCALE * math.sqrt(z), _SMALLEST_SCALE), largest)
    directions = (
        _between(_DIRECTIONS, z, _DIRECTIONS_POWER, _FEWEST_DIRECTIONS, _MOST_DIRECTIONS) if has_features else 0
    )
    if whole:
        return Statistics(0, 0, matrix_items=num_items, matrix_share=1.0, scale=scale)
    if math.isinf(mu):
        return Statistics(0, 0, 0, matrix_share=0.0, scale=_LARGEST_SCALE_WITHOUT_FEATURES, exact=True)
    matrix_items = min(num_items, _between(_ITEMS, z, _ITEMS_POWER, _FEWEST_ITEMS, _MOST_ITEMS))
    sketched = _SKETCH_ITEMS if has_features else _SKETCH_ITEMS_WITHOUT_FEATURES
    sketch_items = min(num_items, _between(sketched, z, _ITEMS_POWER, _FEWEST_SKETCH_ITEMS, num_items))
    if not has_features:
        return Statistics(0, sketch_items, matrix_items, matrix_share=_SHARE_WITHOUT_FEATURES, scale=scale)
    if z < _MATRIX_PAYS_FROM:
        return Statistics(directions, sketch_items, 0, matrix_share=0.0, scale=scale)
    return Statistics(directions, sketch_items, matrix_items, matrix_share=_SHARE_BESIDE_FEATURES, scale=scale)


def _between(factor: float, z: float, power: float, fewest: int, most: int) -> int:
    return most if math.isinf(z) else min(max(round(factor * z**power), fewest), most)
