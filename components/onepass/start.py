"""A start: noised counts and noised item vectors, from a few passes over the histories, before any step of training.

    histogram     how popular each item is, and how many privacy units there are
    rule          which statistics that admits
    matrix        how the most popular items go together (where the rule says so)
    sketch        how all items go with directions of public features, and of the matrix
    vectors       one an item, for a model of histories with a prior

The two mechanisms that the accountant sees are the histogram and the statistics after it; `rules` says why these are one.
A start is computed whole or not at all: killed, it begins again, and nothing of it was seen.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.onepass import basis, item_vectors, rules, statistics
from lazydp.components.onepass.contributions import USER_SHARE, Matrix, PrivacyUnit, contributions
from lazydp.components.onepass.statistics import Pass
from lazydp.kernels.noise_key import NoiseKey

# A count below this many standard deviations of its noise, or below 1, says no more than that it is small.
_FLOOR = 0.7

_log = logging.getLogger("lazydp.onepass")


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
class Start:
    """What a start releases.

    Attributes:
        counts: noised counts, float32 [num_items + 1] by item code; 0 for the unknown item.
        prior: their logarithms, floored, float32 [num_items + 1]; the part of a logit that is never trained.
        vectors: float32 [num_items + 1, dim].
    """

    counts: Tensor
    prior: Tensor
    vectors: Tensor


def noised_counts(data: EncodedDataset, privacy_unit: PrivacyUnit, noise: Noise, key: NoiseKey) -> Tensor:
    """The counts alone, float32 [num_items + 1]: the same bits as those of `one_pass`."""
    return _counts(_histogram(_units(data, privacy_unit), data, noise, key))


def one_pass(data: EncodedDataset, privacy_unit: PrivacyUnit, noise: Noise, key: NoiseKey, *, dim: int) -> Start:
    """Compute the start of a run.

    Args:
        data: with items and users (unit `user`) or histories (unit `example`).
        privacy_unit: whose contribution has length 1.
        noise: that is charged.
        key: the run's noise key.
        dim: columns of the item table.

    Raises:
        InputError: the dataset lacks what the unit needs.
    """
    units = _units(data, privacy_unit)
    histogram = _histogram(units, data, noise, key)
    popularity = _floored(histogram, noise)
    known = basis.has_features(data.items, data.item_table)
    chosen = rules.choose(
        units=histogram[0] / USER_SHARE,
        mu=noise.mu,
        num_items=data.items.num_items,
        has_features=known,
        privacy_unit=privacy_unit,
    )
    _log.info("start: %s", chosen)
    vectors = _vectors(units, data, popularity, chosen, noise, key, dim=dim, refill=privacy_unit == "example")
    return Start(
        counts=_counts(histogram),
        prior=torch.from_numpy(np.log(popularity)).float(),
        vectors=torch.from_numpy(vectors).float(),
    )


def _units(data: EncodedDataset, privacy_unit: PrivacyUnit) -> Pass:
    return lambda: contributions(data, privacy_unit)


def _histogram(units: Pass, data: EncodedDataset, noise: Noise, key: NoiseKey) -> Matrix:
    return statistics.noised_histogram(units, num_items=data.items.num_items, std=noise.histogram, key=key)


def _counts(histogram: Matrix) -> Tensor:
    return torch.from_numpy(np.concatenate([[0.0], histogram[1:]])).float()


def _floored(histogram: Matrix, noise: Noise) -> Matrix:
    floor = max(1.0, _FLOOR * noise.histogram)
    popularity = np.maximum(histogram, floor)
    popularity[0] = floor
    return popularity


def _vectors(
    units: Pass,
    data: EncodedDataset,
    popularity: Matrix,
    chosen: rules.Statistics,
    noise: Noise,
    key: NoiseKey,
    *,
    dim: int,
    refill: bool,
) -> Matrix:
    directions = np.zeros((len(popularity), 0))
    if chosen.directions:
        features = basis.public_features(data.items, data.item_table)
        directions = basis.feature_basis(features, popularity, directions=chosen.directions)
    if chosen.matrix_items:
        items = 1 + np.argsort(-popularity[1:], kind="stable")[: chosen.matrix_items]
        std = noise.statistics / math.sqrt(chosen.matrix_share)
        matrix = statistics.noised_matrix(units, items, std=std, key=key)
        if chosen.matrix_share == 1.0:
            found = item_vectors.matrix_eigenvectors(matrix, std=std, rank=dim, refill=refill)
            return item_vectors.item_vectors(*found, popularity, items=items, dim=dim)
        fewest, most = chosen.eigenvectors
        shown = item_vectors.above_noise(matrix, std=std, fewest=fewest, most=most)
        directions = basis.with_eigenvectors(directions, items, shown)
    std = noise.statistics / math.sqrt(1.0 - chosen.matrix_share)
    sketch = statistics.noised_sketch(units, directions, std=std, key=key)
    return item_vectors.item_vectors(
        *item_vectors.sketched_eigenvectors(sketch, directions, std=std, rank=dim), popularity, dim=dim
    )
