"""Ranking metrics over the whole catalogue; sampled candidates misorder models (Krichene and Rendle, KDD 2020), and are
there for comparison with figures that were published with them.

Every test example is ranked among the items that its user has not taken in training. Ties share the middle of their
ranks, so that a constant score earns what chance earns.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lazydp.components.features.batch import Bags

HIT_AT, RECALL_AT = 10, 20


@dataclass(frozen=True, slots=True)
class RankingMetrics:
    """Means over users (AUC: over test examples). Private: they are computed from private data, without noise.

    Attributes:
        users: how many users had something to find.
        auc: probability that a held-out item outranks an item drawn uniformly from those not taken.
        hr_at_10: share of users with a held-out item among the first 10.
        ndcg_at_10: discounted gain of the first 10 over the best possible.
        recall_at_20: share of a user's held-out items among the first 20.
    """

    users: int
    auc: float
    hr_at_10: float
    ndcg_at_10: float
    recall_at_20: float

    def to_json(self) -> dict[str, float | int]:
        """As plain numbers (Kubeflow's metadata knows no others)."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where held-out items stand.

    Attributes:
        rank: float64 [n], 1 is best; infinite for an item outside the catalogue.
        competitors: float64 [n], how many other items the item was ranked among.
    """

    rank: npt.NDArray[np.float64]
    competitors: npt.NDArray[np.float64]


def ranks(scores: Tensor, items: Tensor, seen: Bags, candidates: Bags | None = None) -> Ranks:
    """Rank of one held-out item in each row of scores.

    Args:
        scores: [B, num_items + 1], by item code; column 0 (the unknown item) never competes.
        items: int64 [B], the held-out codes.
        seen: codes that do not compete in each of the B rows; the held-out item itself always does.
        candidates: codes that alone compete in each of the B rows; None for the whole catalogue.
    """
    own, wanted = scores.numpy(), items.numpy()
    rows = np.arange(wanted.size)
    target = own[rows, wanted]
    width = own.shape[1]
    # Pairs of row and code as one number, each once.
    excluded = np.unique(np.concatenate([rows * width, rows * width + wanted, _pairs(seen, width)]))
    if candidates is None:
        above = np.count_nonzero(own > target[:, np.newaxis], axis=1) - _counted(np.greater, own, target, excluded)
        ties = np.count_nonzero(own == target[:, np.newaxis], axis=1) - _counted(np.equal, own, target, excluded)
        competitors = width - np.bincount(excluded // width, minlength=wanted.size)
    else:
        among = np.setdiff1d(_pairs(candidates, width), excluded)
        above = _counted(np.greater, own, target, among)
        ties = _counted(np.equal, own, target, among)
        competitors = np.bincount(among // width, minlength=wanted.size)
    rank = np.where(wanted == 0, np.inf, 1.0 + above + ties / 2)
    return Ranks(rank=rank, competitors=competitors.astype(np.float64))


def _pairs(bags: Bags, width: int) -> npt.NDArray[np.int64]:
    """The codes of bag r as r * width + code."""
    firsts = np.arange(len(bags.offsets) - 1, dtype=np.int64) * width
    return np.asarray(np.repeat(firsts, bags.lengths().numpy()) + bags.values.numpy())


def _counted(
    compare: np.ufunc, scores: npt.NDArray[Any], target: npt.NDArray[Any], pairs: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """How many of the pairs of each row compare so with the row's target."""
    rows, codes = np.divmod(pairs, scores.shape[1])
    return np.bincount(rows[compare(scores[rows, codes], target[rows])], minlength=target.size)


@dataclass(frozen=True, slots=True)
class UserMetrics:
    """Figures of each user, float64 [users]; `RankingMetrics` says what they are. Private."""

    hr_at_10: npt.NDArray[np.float64]
    ndcg_at_10: npt.NDArray[np.float64]
    recall_at_20: npt.NDArray[np.float64]


def user_metrics(found: Ranks, users: npt.NDArray[np.int64]) -> UserMetrics:
    """Figures of held-out items that belong to `users` (int64 [n]), by ascending user."""
    _, of_user, held_out = np.unique(users, return_inverse=True, return_counts=True)

    def per_user(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(of_user, weights=values, minlength=held_out.size).astype(np.float64)

    hits = per_user((found.rank <= HIT_AT).astype(np.float64))
    recalled = per_user((found.rank <= RECALL_AT).astype(np.float64))
    gain = per_user(np.where(found.rank <= HIT_AT, 1.0 / np.log2(1.0 + found.rank), 0.0))
    best = np.concatenate([[0.0], np.cumsum(1.0 / np.log2(2.0 + np.arange(HIT_AT)))])
    return UserMetrics(
        hr_at_10=(hits > 0).astype(np.float64),
        ndcg_at_10=gain / best[np.minimum(held_out, HIT_AT)],
        recall_at_20=recalled / held_out,
    )


def ranking_metrics(found: Ranks, users: npt.NDArray[np.int64]) -> RankingMetrics:
    """Metrics of held-out items that belong to `users` (int64 [n])."""
    of = user_metrics(found, users)
    if not of.hr_at_10.size:
        return RankingMetrics(users=0, auc=0.5, hr_at_10=0.0, ndcg_at_10=0.0, recall_at_20=0.0)
    competitors = np.maximum(found.competitors, 1.0)
    auc = np.clip(1.0 - (found.rank - 1.0) / competitors, 0.0, 1.0)
    return RankingMetrics(
        users=of.hr_at_10.size,
        auc=float(auc.mean()),
        hr_at_10=float(of.hr_at_10.mean()),
        ndcg_at_10=float(of.ndcg_at_10.mean()),
        recall_at_20=float(of.recall_at_20.mean()),
    )


def label_auc(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> float | None:
    """Probability that an example of label 1 scores above one of label 0; None where one of the two is missing."""
    positive = labels >= 0.5
    count = int(positive.sum())
    if count in (0, labels.size):
        return None
    _, inverse, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    middle = np.cumsum(sizes) - (sizes - 1) / 2  # rank of a tie, counted from 1
    total = middle[inverse][positive].sum()
    return float((total - count * (count + 1) / 2) / (count * (labels.size - count)))
