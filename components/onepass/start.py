"""A start: noised counts and noised item vectors, from a few passes over the histories, before any step of training.

    histogram     how popular each item is, and how many privacy units there are
    rule          which statistics that admits
    matrix        how the most popular items go together (where the rule says so)
    sketch        how all items go with directions of public features, and of the matrix
    vectors       one an item, for a model of histories with a prior

The accountant sees two mechanisms, the histogram and the statistics after it; `rules` says why these are one.
A start is computed whole or not at all: killed, it begins again under the run's key, to the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.onepass import basis, item_vectors, rules, statistics
from lazydp.components.onepass.contributions import USER_SHARE, Contributions, Matrix, contributions
from lazydp.components.onepass.rules import RULE, Noise, PrivacyUnit, Rule
from lazydp.components.onepass.statistics import Pass
from lazydp.kernels.noise_key import NoiseKey

# Without privacy items weigh with this power of their popularity (as in a graph's normalised adjacency matrix).
_EXACT_POWER = -0.5

_log = logging.getLogger("lazydp.onepass")


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


def one_pass(
    data: EncodedDataset,
    privacy_unit: PrivacyUnit,
    noise: Noise,
    key: NoiseKey,
    *,
    dim: int,
    rule: Rule = RULE,
) -> Start:
    """Compute the start of a run.

    Args:
        data: with items and users (unit `user`) or histories (unit `example`).
        privacy_unit: whose contribution has length 1.
        noise: that is charged.
        key: the run's noise key.
        dim: columns of the item table.
        rule: another one than that of every start is for a search (`bench search`).

    Raises:
        InputError: the dataset lacks what the unit needs.
    """
    units = _units(data, privacy_unit)
    histogram = _histogram(units, data, noise, key)
    floor = _floor(noise.histogram, rule)
    popularity = _floored(histogram, floor)
    known = basis.has_features(data.items, data.item_table)
    chosen = rules.choose(
        units=histogram[0] / USER_SHARE,
        mu=noise.mu,
        num_items=data.items.num_items,
        has_features=known,
        privacy_unit=privacy_unit,
        rule=rule,
    )
    _log.info("start: %s", chosen)
    if chosen.exact:
        vectors = _exact_vectors(data, privacy_unit, popularity, chosen, dim=dim)
    else:
        vectors = _vectors(units, data, popularity, chosen, noise, key, dim=dim, rule=rule)
    return Start(
        counts=_counts(histogram),
        prior=_log_counts(torch.from_numpy(popularity), floor),
        vectors=torch.from_numpy(vectors).float(),
    )


def _units(data: EncodedDataset, privacy_unit: PrivacyUnit) -> Pass:
    return lambda: contributions(data, privacy_unit)


def _histogram(units: Pass, data: EncodedDataset, noise: Noise, key: NoiseKey) -> Matrix:
    return statistics.noised_histogram(units, num_items=data.items.num_items, std=noise.histogram, key=key)


def _counts(histogram: Matrix) -> Tensor:
    return torch.from_numpy(np.concatenate([[0.0], histogram[1:]])).float()


def log_counts(counts: Tensor, *, std: float) -> Tensor:
    """The prior that counts make, float32 [n]: the logarithm, floored where a count is lost in its noise.

    Args:
        counts: noised.
        std: standard deviation of the noise on each.
    """
    return _log_counts(counts, _floor(std, RULE))


def _log_counts(counts: Tensor, floor: float) -> Tensor:
    return counts.double().clamp(min=floor).log().float()


def _floor(std: float, rule: Rule) -> float:
    return max(1.0, rule.floor * std)


def _floored(histogram: Matrix, floor: float) -> Matrix:
    popularity = np.maximum(histogram, floor)
    popularity[0] = floor
    return popularity


def _exact_vectors(
    data: EncodedDataset, privacy_unit: PrivacyUnit, popularity: Matrix, chosen: rules.Statistics, *, dim: int
) -> Matrix:
    """Without privacy: the leading eigenvectors for all items, which weigh less the more popular they are."""

    def weighted() -> Iterator[Contributions]:
        return contributions(data, privacy_unit, weights=popularity**_EXACT_POWER)

    found = statistics.leading_eigenvectors(weighted, num_items=data.items.num_items, rank=dim)
    return item_vectors.item_vectors(*found, popularity, dim=dim, scale=chosen.scale, power=0.0)


def _vectors(
    units: Pass,
    data: EncodedDataset,
    popularity: Matrix,
    chosen: rules.Statistics,
    noise: Noise,
    key: NoiseKey,
    *,
    dim: int,
    rule: Rule,
) -> Matrix:
    directions = basis.empty_basis(data.items.num_items)
    if chosen.directions:
        features = basis.public_features(data.items, data.item_table)
        directions = basis.feature_basis(features, popularity, directions=chosen.directions)
    if chosen.matrix_items:
        items = _most_popular(popularity, chosen.matrix_items)
        std = noise.statistics / math.sqrt(chosen.matrix_share)
        matrix = statistics.noised_matrix(units, items, std=std, key=key)
        if chosen.matrix_share == 1.0:
            found = item_vectors.matrix_eigenvectors(matrix, std=std, rank=dim, rule=rule)
            return item_vectors.item_vectors(*found, popularity, items=items, dim=dim, scale=chosen.scale, rule=rule)
        fewest, most = chosen.eigenvectors
        shown = item_vectors.above_noise(matrix, directions.columns[items], std=std, fewest=fewest, most=most)
        directions = basis.with_eigenvectors(directions, items, shown)
    std = noise.statistics / math.sqrt(1.0 - chosen.matrix_share)
    items = _most_popular(popularity, chosen.sketch_items)
    sketch = statistics.noised_sketch(units, directions, items, std=std, key=key)
    found = item_vectors.sketched_eigenvectors(
        sketch, directions.columns, popularity, items, std=std, rank=dim, rule=rule
    )
    return item_vectors.item_vectors(*found, popularity, dim=dim, scale=chosen.scale, rule=rule)


def _most_popular(popularity: Matrix, number: int) -> np.ndarray:
    """Codes of so many items, the most popular first."""
    return np.asarray(1 + np.argsort(-popularity[1:], kind="stable")[:number])
