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

_DIRECTIONS_POWER, _ITEMS_POWER = 0.75, 0.5
_FEWEST_DIRECTIONS, _MOST_DIRECTIONS = 8, 256
_FEWEST_ITEMS, _MOST_ITEMS = 64, 4096
# A matrix per example has entries of many units each; it pays for the whole of a small catalogue.
_MOST_ITEMS_OF_EXAMPLES = 8192
# Eigenvectors of the matrix that become directions of the sketch: without features, and at most. Beside features there
# are only those that the features do not span, and there need not be any.
_FEWEST_EIGENVECTORS, _MOST_EIGENVECTORS = 8, 64
# Typical part of the history in a logit, over sqrt(z).
_SCALE = 0.0045
_SMALLEST_SCALE, _LARGEST_SCALE = 0.35, 0.5
# In a large catalogue of which nothing public is known, where histories say far more than counts.
_LARGEST_SCALE_WITHOUT_FEATURES = 1.5


@dataclass(frozen=True, slots=True)
class Rule:
    """The constants that a search chose (`lazydp bench search`). The defaults are one rule for all data.

    Attributes:
        directions: of public features that a sketch looks into, over z^(3/4).
        matrix_items: items of the matrix, over sqrt(z).
        matrix_pays_from: least z for a matrix beside features.
        share_beside_features: of the squared mu after the histogram, what a matrix beside features takes.
        share_without_features: the same without features.
        sketch_items: items that a sketch has rows of, over sqrt(z). The sums of the others would be hidden in noise.
        sketch_items_without_features: the same without features. Then nothing else is known of an item, and more pays.
        fewest_sketch_items: least number of such items.
        scale: multiple of the typical part of the history in a logit.
        floor: a count below so many standard deviations of its noise, or below 1, says no more than that it is small.
        shrink: of the noise's largest eigenvalue, what is taken off the eigenvalues.
        ridge: eigenvalues far above this share of the largest count alike, those below in proportion.
        popularity_power: power of its popularity by which an item's vector is divided. Popular items have larger
            entries than their part in a logit is.
        half: an item whose count is so many standard deviations of the noise on its entries keeps half of its row of a
            sketch.
        expected: of the row that an item's features let expect, the part that counts where the row was not released.
    """

    directions: float = 0.21
    matrix_items: float = 5.0
    matrix_pays_from: float = 600.0
    share_beside_features: float = 0.2
    share_without_features: float = 0.6
    sketch_items: float = 25.0
    sketch_items_without_features: float = 50.0
    fewest_sketch_items: int = 640
    scale: float = 1.0
    floor: float = 1.0
    shrink: float = 0.3
    ridge: float = 0.05
    popularity_power: float = 0.4
    half: float = 3.0
    expected: float = 0.5


RULE = Rule()
"""The rule of every start, but in a search."""


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
    *,
    units: float,
    mu: float,
    num_items: int,
    has_features: bool,
    privacy_unit: PrivacyUnit = "user",
    rule: Rule = RULE,
) -> Statistics:
    """The statistics for `units` privacy units (a public or released number) at a total of `mu` (inf: no noise)."""
    z = max(units, 1.0) * mu
    whole = num_items <= _MOST_ITEMS_OF_EXAMPLES and (privacy_unit == "example" or math.isinf(mu))
    largest = _LARGEST_SCALE if has_features or whole else _LARGEST_SCALE_WITHOUT_FEATURES
    scale = rule.scale * min(max(_SCALE * math.sqrt(z), _SMALLEST_SCALE), largest)
    if whole:
        return Statistics(0, 0, matrix_items=num_items, matrix_share=1.0, scale=scale)
    if math.isinf(mu):
        return Statistics(0, 0, 0, matrix_share=0.0, scale=scale, exact=True)
    matrix_items = min(num_items, _between(rule.matrix_items, z, _ITEMS_POWER, _FEWEST_ITEMS, _MOST_ITEMS))
    sketched = rule.sketch_items if has_features else rule.sketch_items_without_features
    sketch_items = min(num_items, _between(sketched, z, _ITEMS_POWER, rule.fewest_sketch_items, num_items))
    if not has_features:
        return Statistics(0, sketch_items, matrix_items, matrix_share=rule.share_without_features, scale=scale)
    directions = _between(rule.directions, z, _DIRECTIONS_POWER, _FEWEST_DIRECTIONS, _MOST_DIRECTIONS)
    if z < rule.matrix_pays_from:
        return Statistics(directions, sketch_items, 0, matrix_share=0.0, scale=scale)
    return Statistics(directions, sketch_items, matrix_items, matrix_share=rule.share_beside_features, scale=scale)


def _between(factor: float, z: float, power: float, fewest: int, most: int) -> int:
    return int(min(max(round(factor * z**power), fewest), most))
