"""One score in [0, 1] for each user of the held-out split: a sum that one user, come or gone, moves by 1 at most.

So a score may be released: noise of standard deviation sigma on the sum over users is a Gaussian mechanism of
noise_multiplier sigma, per user and per example alike. What bounds the sum is the form of this module, and nothing that
is measured: each example's figure is clamped to [0, 1], one that is not a number is left out, a user's figures are
averaged, and no user's figure reads another user's rows. The number of users, which is
private, divides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazydp.components.budget.accounting.tuning import Metric
from lazydp.components.evaluate.evaluate import SCORES_AT_ONCE, batches
from lazydp.components.evaluate.metrics import HIT_AT, Ranks, ranks
from lazydp.components.evaluate.scoring import Scorer, catalogue_scorer, observed_scores
from lazydp.components.features.batch import Bags, Batch
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.recommender import Recommender
from lazydp.components.shared.errors import InputError

Floats = npt.NDArray[np.float64]


def user_scores(data: EncodedDataset, *, model: Recommender, tables: Mapping[str, Tensor], metric: Metric) -> Floats:
    """float64 [users with held-out examples], each in [0, 1]. Private, like the split they are computed from.

    Args:
        data: with a test split; without a user column every example is a user of its own.
        model: dense layers.
        tables: flushed weights by table name.
        metric: `auc`, `hit_at_10` and `ndcg_at_10` rank a user's held-out positive items among the whole catalogue
            without what that user took in training; `brier` is 1 - (label - predicted probability)^2.

    Raises:
        InputError: nothing is held out, or a ranking metric without items.
    """
    check_scorable(data, metric)
    if metric == "brier":
        return mean_by_user(_brier(data, model, tables), _users(data))
    return mean_by_user(_ranked(data, catalogue_scorer(model, tables, data.items), metric), _users(data))


def scores_over_popularity(
    data: EncodedDataset,
    *,
    model: Recommender,
    tables: Mapping[str, Tensor],
    counts: Tensor,
    metric: Metric,
    over_popularity: float,
) -> Floats:
    """A user's score by the model less `over_popularity` times that by `counts`: float64 in [-over_popularity, 1].

    The counts must be released ones, with noise: exact counts are those of everybody, and a user's figure would read
    the rows of others.

    Args:
        data: as `user_scores`.
        model: as `user_scores`.
        tables: as `user_scores`.
        counts: noised, float32 [num_items + 1] by item code.
        metric: a ranking metric of `user_scores`.
        over_popularity: what the score by counts is multiplied with.

    Raises:
        InputError: as `user_scores`.
    """
    check_scorable(data, metric)

    def popular(batch: Batch) -> Tensor:
        return counts.expand(batch.size, -1)

    users = _users(data)
    by_model = mean_by_user(_ranked(data, catalogue_scorer(model, tables, data.items), metric), users)
    return by_model - over_popularity * mean_by_user(_ranked(data, popular, metric), users)


def _users(data: EncodedDataset) -> npt.NDArray[np.int64]:
    """Whose each test example is; without a user column, everybody has one."""
    test = data.split("test")
    return np.arange(len(test)) if test.user_index is None else np.asarray(test.user_index)


def check_scorable(data: EncodedDataset, metric: Metric) -> None:
    """Refuse a dataset that has nothing to score by `metric`.

    Raises:
        InputError: nothing is held out, or a ranking metric without items.
    """
    if len(data.split("test")) == 0:
        raise InputError(f"dataset {data.path} has no test examples to score trials on: ingest it with a split")
    if metric != "brier" and data.spec.item is None:
        raise InputError(f"metric {metric} ranks items, and dataset {data.path} has none: use brier")


def mean_by_user(scores: Floats, users: npt.NDArray[np.int64]) -> Floats:
    """Mean score of each user that has any, float64 [users], each in [0, 1].

    Args:
        scores: float64 [n], one for each example; NaN for none.
        users: int64 [n], whose example it is.
    """
    told = ~np.isnan(scores)
    _, of_user, examples = np.unique(users[told], return_inverse=True, return_counts=True)
    clamped = np.clip(scores[told], 0.0, 1.0)
    return np.bincount(of_user, weights=clamped, minlength=examples.size) / examples


def _brier(data: EncodedDataset, model: Recommender, tables: Mapping[str, Tensor]) -> Floats:
    catalogue = data.items if data.spec.item is not None else None
    parts = []
    for batch in batches(data.split("test"), 1 << 14):
        predicted = torch.sigmoid(observed_scores(model, tables, catalogue, batch).double())
        parts.append((1.0 - (batch.labels.double() - predicted).square()).numpy())
    return np.concatenate(parts)


def _ranked(data: EncodedDataset, scorer: Scorer, metric: Metric) -> Floats:
    """A figure for each test example, NaN for one that is no positive."""
    test = data.split("test")
    seen = data.seen_items() if data.spec.user is not None else None
    figures = np.full(len(test), np.nan)
    read = 0
    for batch in batches(test, max(1, SCORES_AT_ONCE // (data.items.num_items + 1))):
        wanted = torch.nonzero(batch.labels >= 0.5).squeeze(1)
        first, read = read, read + batch.size
        if not wanted.numel():
            continue
        positives = batch.take(wanted)
        assert positives.item is not None
        known = Bags.single(torch.zeros_like(wanted))
        if seen is not None and positives.user_index is not None:
            known = seen.take(positives.user_index)
        figures[first + wanted.numpy()] = _figure(ranks(scorer(positives), positives.item, known), metric)
    return figures


def _figure(found: Ranks, metric: Metric) -> Floats:
    if metric == "hit_at_10":
        return (found.rank <= HIT_AT).astype(np.float64)
    if metric == "ndcg_at_10":
        return np.where(found.rank <= HIT_AT, 1.0 / np.log2(1.0 + found.rank), 0.0)
    return 1.0 - (found.rank - 1.0) / np.maximum(found.competitors, 1.0)
