"""How good recommendations are: every contestant under one protocol, in one run, on one encoded dataset.

A private contestant is a start under a fresh noise key for each seed: what `lazydp train` makes of a configuration that
names an epsilon and no steps, and what `lazydp export` would release. Nothing is released here, so no budget is spent;
and so the figures are private.

Contestants without privacy: `popularity`; `pure_svd` (Cremonesi et al., RecSys 2010), rank 64; `ease` (Steck, WWW
2019), where the catalogue is small enough for its matrix; `ials` (Hu et al., ICDM 2008; the package `implicit`), where
that is installed; `start`, ours without noise. With privacy: `dp_popularity`, the prior of a start alone; `start`; and
what `lazydp train` makes of given configurations with steps, by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import linalg
from torch import Tensor

from lazydp.components.bench.protocol import Measured, Quality, Score
from lazydp.components.bench.trained import trained
from lazydp.components.features.batch import Batch
from lazydp.components.features.spec import ITEM
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TEST
from lazydp.components.models.build import build_model
from lazydp.components.models.recommender import Recommender, pool
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.onepass.rules import RULE, PrivacyUnit, Rule
from lazydp.components.onepass.start import Start, one_pass
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import calibrated_noise_multiplier
from lazydp.kernels.noise_key import NoiseKey

_RANK = 64
_EASE_ITEMS = 10_000
# Steck's L2, and implicit's confidence and regularisation: the best of a few on validation splits of ml-100k.
_EASE_RIDGE = 300.0
_IALS: dict[str, Any] = {"factors": _RANK, "regularization": 0.1, "alpha": 1.0, "iterations": 15}

_log = logging.getLogger("lazydp.bench")


def run(
    data: EncodedDataset,
    *,
    epsilons: Sequence[float],
    units: Sequence[PrivacyUnit] = ("user",),
    seeds: int = 5,
    delta: float = 1e-5,
    most_users: int | None = None,
    negatives: int | None = None,
    configs: Mapping[str, TrainConfig] = MappingProxyType({}),
    key_of_seed: Callable[[int], NoiseKey] | None = None,
) -> Iterator[Quality]:
    """Measure every contestant, the ones without privacy first.

    Args:
        data: with a test split, items, users and histories.
        epsilons: of the private contestants.
        units: privacy units.
        seeds: noise keys of each private contestant.
        delta: of every epsilon.
        most_users: measure by so many users, drawn at random; None for all.
        negatives: rank each held-out item among so many items that its user has not taken, drawn at random, the same
            for all contestants; None for the whole catalogue.
        configs: runs with steps, by the name that they get among the contestants.
        key_of_seed: noise key of a seed; None for fresh secret ones.

    Raises:
        InputError: the dataset lacks something that the protocol needs.
    """
    if data.spec.item is None or data.spec.user is None or data.spec.history is None:
        raise InputError(f"dataset {data.path} lacks items, users or histories: there is nothing to rank by")
    if len(data.split(TEST)) == 0:
        raise InputError(f"dataset {data.path} has no test examples: ingest it with a split")
    measured = Measured(data, most_users, negatives)

    def fresh(seed: int) -> NoiseKey:
        return NoiseKey.generate() if key_of_seed is None else key_of_seed(seed)

    for name, score in _without_privacy(data):
        yield measured.result(name, [measured.by(score)], None, None)
    for unit in units:
        for epsilon in epsilons:
            settings = {"target_epsilon": epsilon, "target_delta": delta, "privacy_unit": unit}
            config = TrainConfig.parse(settings, where="(of the bench)")
            popular, started = [], []
            for seed in range(seeds):
                start = start_of(data, config, fresh(seed))
                popular.append(measured.by(_by_prior(start)))
                started.append(measured.by(scored_by(data, config, start)))
            yield measured.result("dp_popularity", popular, unit, epsilon)
            yield measured.result("start", started, unit, epsilon)
    for name, config in configs.items():
        runs = [measured.by(trained(data, config, fresh(seed))) for seed in range(seeds)]
        private = config.privacy_unit if config.private else None
        yield measured.result(name, runs, private, config.target_epsilon)


def start_of(data: EncodedDataset, config: TrainConfig, key: NoiseKey, rule: Rule = RULE) -> Start:
    """What `train` begins from under this configuration, and under another rule in a search."""
    noise = config.start_noise(calibrated_noise_multiplier(config, None) if config.private else None)
    assert noise is not None
    return one_pass(data, config.privacy_unit, noise, key, dim=config.model.embedding_dim, rule=rule)


def scored_by(data: EncodedDataset, config: TrainConfig, start: Start) -> Score:
    """Scores by the model that a bundle of `start` holds."""
    model: Recommender = build_model(data.spec, config.model)
    assert isinstance(model, TwoTower)
    with torch.no_grad():
        model.prior.copy_(start.prior)
    tables = {ITEM: start.vectors}
    items = model.item_vector(tables, torch.empty(0))

    def score(batch: Batch) -> Tensor:
        pooled = pool(model.layout.example, tables, batch.bags)
        return (model.user_vector(pooled, batch.dense) / model.config.temperature) @ items.T

    return score


def _by_prior(start: Start) -> Score:
    return lambda batch: start.prior.expand(batch.size, -1)


def _without_privacy(data: EncodedDataset) -> Iterator[tuple[str, Score]]:
    taken = _taken(data)
    counts = torch.from_numpy(np.asarray(taken.sum(axis=0)).ravel()).float()
    yield "popularity", lambda batch: counts.expand(batch.size, -1)
    yield "pure_svd", _pure_svd(taken)
    if data.items.num_items <= _EASE_ITEMS:
        yield "ease", _ease(taken)
    else:
        _log.info("ease is left out: a matrix of %d items does not fit", data.items.num_items)
    ials = _ials(taken)
    if ials is not None:
        yield "ials", ials
    config = TrainConfig.parse({"mode": "sgd"}, where="(of the bench)")
    yield "start", scored_by(data, config, start_of(data, config, NoiseKey.for_tests(0)))


def _taken(data: EncodedDataset) -> sparse.csr_matrix:
    """Which users took which items in training, binary [num_users, num_items + 1]."""
    items, offsets = data.histories()
    taken = sparse.csr_matrix(
        (np.ones(len(items), dtype=np.float32), items.astype(np.int64), offsets),
        shape=(len(offsets) - 1, data.items.num_items + 1),
    )
    taken.sum_duplicates()
    taken.data[:] = 1.0
    return taken


def _rows_of(taken: sparse.csr_matrix, batch: Batch) -> sparse.csr_matrix:
    assert batch.user_index is not None
    return taken[batch.user_index.numpy()]


def _pure_svd(taken: sparse.csr_matrix) -> Score:
    rank = min(_RANK, min(taken.shape) - 1)
    _, _, items = linalg.svds(taken, k=rank, v0=np.ones(min(taken.shape), dtype=np.float32))
    return lambda batch: torch.from_numpy((_rows_of(taken, batch) @ items.T) @ items)


def _ease(taken: sparse.csr_matrix) -> Score:
    gram = np.asarray((taken.T @ taken).todense(), dtype=np.float64)
    inverse = np.linalg.inv(gram + _EASE_RIDGE * np.eye(len(gram)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    of_items = weights.astype(np.float32)
    return lambda batch: torch.from_numpy(np.asarray(_rows_of(taken, batch) @ of_items))


def _ials(taken: sparse.csr_matrix) -> Score | None:
    try:
        from implicit.als import AlternatingLeastSquares  # noqa: PLC0415 - an optional peer
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - comes with it
    except ImportError:
        _log.warning("ials is left out: `pip install implicit` adds it")
        return None
    # It computes with threads of its own; those of BLAS beside them make it many times slower.
    with threadpool_limits(1, "blas"):
        model = AlternatingLeastSquares(random_state=0, num_threads=torch.get_num_threads(), **_IALS)
        model.fit(taken, show_progress=False)
    users, items = torch.from_numpy(model.user_factors), torch.from_numpy(model.item_factors)

    def score(batch: Batch) -> Tensor:
        assert batch.user_index is not None
        return users[batch.user_index] @ items.T

    return score
