"""How good recommendations are: every contestant under one protocol, in one run, on one encoded dataset.

Every test example is ranked among the items that its user has not taken in training, over the whole catalogue, as
`lazydp evaluate` ranks. A private contestant is a start under a fresh noise key for each seed: what `lazydp train`
makes of a configuration that names an epsilon and no steps, and what `lazydp export` would release. Nothing is released
here, so no budget is spent; and so the figures are private.

Contestants without privacy: `popularity`; `pure_svd` (Cremonesi et al., RecSys 2010), rank 64; `ease` (Steck, WWW
2019), where the catalogue is small enough for its matrix; `ials` (Hu et al., ICDM 2008; the package `implicit`), where
that is installed; `start`, ours without noise. With privacy: `dp_popularity`, the prior of a start alone; `start`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import linalg
from torch import Tensor

from lazydp.components.evaluate.metrics import RankingMetrics, Ranks, ranking_metrics, ranks
from lazydp.components.features.batch import Batch
from lazydp.components.features.spec import ITEM
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TEST
from lazydp.components.models.build import build_model
from lazydp.components.models.recommender import Recommender, pool
from lazydp.components.models.two_tower import TwoTower
from lazydp.components.onepass.rules import PrivacyUnit
from lazydp.components.onepass.start import Start, one_pass
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import calibrated_noise_multiplier
from lazydp.kernels.noise_key import NoiseKey

Score = Callable[[Batch], Tensor]
"""From B test examples to scores [B, num_items + 1] by item code."""

_AT_ONCE = 512
_RANK = 64
_EASE_ITEMS = 10_000
# Steck's L2, and implicit's confidence and regularisation: the best of a few on validation splits of ml-100k.
_EASE_RIDGE = 300.0
_IALS: dict[str, Any] = {"factors": _RANK, "regularization": 0.1, "alpha": 1.0, "iterations": 15}
_METRICS = ("hr_at_10", "ndcg_at_10", "recall_at_20")

_log = logging.getLogger("lazydp.bench")


@dataclass(frozen=True, slots=True)
class Quality:
    """One contestant on one dataset: means over seeds, and the standard deviations over them.

    Attributes:
        dataset: name of its feature spec.
        contestant: see the module.
        privacy_unit: None without privacy.
        epsilon: None without privacy.
        seeds: how many noise keys the means are over.
        of_users: users of the dataset.
        users: that it was measured by, each with something to find.
        mean: metric -> mean.
        std: metric -> standard deviation over seeds; 0 where there is one.
    """

    dataset: str
    contestant: str
    privacy_unit: PrivacyUnit | None
    epsilon: float | None
    seeds: int
    of_users: int
    users: int
    mean: dict[str, float]
    std: dict[str, float]

    def to_json(self) -> str:
        """As one line."""
        return json.dumps({"bench": "quality", **asdict(self)})


def run(
    data: EncodedDataset,
    *,
    epsilons: Sequence[float],
    units: Sequence[PrivacyUnit] = ("user",),
    seeds: int = 5,
    delta: float = 1e-5,
    most_users: int | None = None,
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
        key_of_seed: noise key of a seed; None for fresh secret ones.

    Raises:
        InputError: the dataset lacks something that the protocol needs.
    """
    if data.spec.item is None or data.spec.user is None or data.spec.history is None:
        raise InputError(f"dataset {data.path} lacks items, users or histories: there is nothing to rank by")
    if len(data.split(TEST)) == 0:
        raise InputError(f"dataset {data.path} has no test examples: ingest it with a split")
    rows = _measured(data, most_users)

    def result(name: str, found: Sequence[RankingMetrics], unit: PrivacyUnit | None, epsilon: float | None) -> Quality:
        values = {metric: [getattr(one, metric) for one in found] for metric in _METRICS}
        return Quality(
            dataset=data.spec.name,
            contestant=name,
            privacy_unit=unit,
            epsilon=epsilon,
            seeds=len(found),
            of_users=data.num_users,
            users=found[0].users,
            mean={metric: float(np.mean(of)) for metric, of in values.items()},
            std={metric: float(np.std(of)) for metric, of in values.items()},
        )

    for name, score in _without_privacy(data):
        yield result(name, [_measure(data, rows, score)], None, None)
    for unit in units:
        for epsilon in epsilons:
            settings = {"target_epsilon": epsilon, "target_delta": delta, "privacy_unit": unit}
            config = TrainConfig.parse(settings, where="(of the bench)")
            popular, started = [], []
            for seed in range(seeds):
                key = NoiseKey.generate() if key_of_seed is None else key_of_seed(seed)
                start = _start(data, config, key)
                popular.append(_measure(data, rows, _by_prior(start)))
                started.append(_measure(data, rows, _scored_by(data, config, start)))
            yield result("dp_popularity", popular, unit, epsilon)
            yield result("start", started, unit, epsilon)


def _start(data: EncodedDataset, config: TrainConfig, key: NoiseKey) -> Start:
    """What `train` begins from under this configuration."""
    noise = config.start_noise(calibrated_noise_multiplier(config, None) if config.private else None)
    assert noise is not None
    return one_pass(data, config.privacy_unit, noise, key, dim=config.model.embedding_dim)


def _scored_by(data: EncodedDataset, config: TrainConfig, start: Start) -> Score:
    """Scores by the model that a bundle of `start` holds."""
    model: Recommender = build_model(data.spec, config.model)
    assert isinstance(model, TwoTower)
    with torch.no_grad():
        model.prior.copy_(start.prior)
    tables = {ITEM: start.vectors}
    items = model.item_vector(tables, torch.empty(0))

    def score(batch: Batch) -> Tensor:
        pooled = pool(model.layout.example, tables, batch.bags)
        return model.user_vector(pooled, batch.dense) @ items.T / model.config.temperature

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
    yield "start", _scored_by(data, config, _start(data, config, NoiseKey.for_tests(0)))


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


def _measured(data: EncodedDataset, most_users: int | None) -> np.ndarray:
    """Numbers of the test examples that count."""
    test = data.split(TEST)
    assert test.user_index is not None
    numbers = np.flatnonzero(test.label >= 0.5)
    users = np.unique(test.user_index[numbers])
    if most_users is None or len(users) <= most_users:
        return numbers
    chosen = np.random.default_rng(0).choice(users, most_users, replace=False)
    return numbers[np.isin(test.user_index[numbers], chosen)]


def _measure(data: EncodedDataset, rows: np.ndarray, score: Score) -> RankingMetrics:
    test, seen = data.split(TEST), data.seen_items()
    found, users = [], []
    for start in range(0, len(rows), _AT_ONCE):
        batch = test.take(rows[start : start + _AT_ONCE])
        assert batch.item is not None
        assert batch.user_index is not None
        with torch.no_grad():
            found.append(ranks(score(batch).float(), batch.item, seen.take(batch.user_index)))
        users.append(batch.user_index.numpy())
    joined = Ranks(
        rank=np.concatenate([part.rank for part in found]),
        competitors=np.concatenate([part.competitors for part in found]),
    )
    return ranking_metrics(joined, np.concatenate(users))
