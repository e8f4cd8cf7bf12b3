"""The protocol of `bench quality` and `bench search`: which test examples count, what each is ranked among, and means.

Every test example is ranked among the items that its user has not taken in training, over the whole catalogue, as
`lazydp evaluate` ranks. For comparison with published figures it may be ranked among some of these, drawn at random.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor

from lazydp.components.evaluate.metrics import Ranks, UserMetrics, ranks, user_metrics
from lazydp.components.features.batch import Bags, Batch
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.manifest import TEST
from lazydp.components.onepass.rules import PrivacyUnit

Score = Callable[[Batch], Tensor]
"""From B test examples to scores [B, num_items + 1] by item code."""

_METRICS = ("hr_at_10", "ndcg_at_10", "recall_at_20")
_AT_ONCE = 128
# Of a two-sided interval of 95 %.
_LEVEL = 0.975


@dataclass(frozen=True, slots=True)
class Quality:
    """One contestant on one dataset: means over seeds, the standard deviations over them, and intervals.

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
        interval: metric -> half the width of a 95 % interval, over other noise keys and other users like these
            (`_half_width`).
        negatives: how many items each held-out item was ranked among; None for the whole catalogue.
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
    interval: dict[str, float]
    negatives: int | None = None

    def to_json(self) -> str:
        """As one line."""
        return json.dumps({"bench": "quality", **asdict(self)})


class Measured:
    """The test examples of a dataset that are measured, and what each is ranked among.

    Args:
        data: with a test split.
        most_users: so many users, drawn at random; None for all.
        negatives: items that each held-out item is ranked among; None for the whole catalogue.
    """

    def __init__(self, data: EncodedDataset, most_users: int | None, negatives: int | None = None) -> None:
        self._data, self._seen, self._negatives = data, data.seen_items(), negatives
        self._rows, self._users = _measured_rows(data, most_users)
        self._among = None
        if negatives is not None:
            self._among = drawn_negatives(data, self._rows, negatives)

    def by(self, score: Score) -> UserMetrics:
        """Rank every test example by `score`."""
        test = self._data.split(TEST)
        found = []
        for first in range(0, len(self._rows), _AT_ONCE):
            batch = test.take(self._rows[first : first + _AT_ONCE])
            assert batch.item is not None
            assert batch.user_index is not None
            among = self._among.take(torch.arange(first, first + batch.size)) if self._among is not None else None
            with torch.no_grad():
                scores = score(batch).float()
            found.append(ranks(scores, batch.item, self._seen.take(batch.user_index), among))
        joined = Ranks(
            rank=np.concatenate([part.rank for part in found]),
            competitors=np.concatenate([part.competitors for part in found]),
        )
        return user_metrics(joined, self._users)

    def result(
        self, name: str, found: Sequence[UserMetrics], unit: PrivacyUnit | None, epsilon: float | None
    ) -> Quality:
        """The figures of a contestant, from those under each seed."""
        of = {metric: np.stack([getattr(one, metric) for one in found]) for metric in _METRICS}
        return Quality(
            dataset=self._data.spec.name,
            contestant=name,
            privacy_unit=unit,
            epsilon=epsilon,
            seeds=len(found),
            of_users=self._data.num_users,
            users=of[_METRICS[0]].shape[1],
            mean={metric: float(values.mean()) for metric, values in of.items()},
            std={metric: float(values.mean(axis=1).std()) for metric, values in of.items()},
            interval={metric: _half_width(values) for metric, values in of.items()},
            negatives=self._negatives,
        )


def _half_width(values: npt.NDArray[np.float64]) -> float:
    """Half the width of a 95 % interval of the mean of `values` [seeds, users].

    Seeds and users are two samples, and their squared errors are added: the normal quantile times that of the users'
    means, and Student's times that of the seeds'. A part of the noise is in both, so that the interval is rather too
    wide. With one seed it is over users alone.
    """
    seeds, users = values.shape
    of_users = stats.norm.ppf(_LEVEL) * float(values.mean(axis=0).std(ddof=1)) / math.sqrt(users) if users > 1 else 0.0
    of_seeds = 0.0
    if seeds > 1:
        of_seeds = stats.t.ppf(_LEVEL, seeds - 1) * float(values.mean(axis=1).std(ddof=1)) / math.sqrt(seeds)
    return math.hypot(of_users, of_seeds)


def _measured_rows(data: EncodedDataset, most_users: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and users of the test examples that count."""
    test = data.split(TEST)
    assert test.user_index is not None
    numbers = np.flatnonzero(test.label >= 0.5)
    users = np.unique(test.user_index[numbers])
    if most_users is not None and len(users) > most_users:
        chosen = np.random.default_rng(0).choice(users, most_users, replace=False)
        numbers = numbers[np.isin(test.user_index[numbers], chosen)]
    return numbers, test.user_index[numbers]


def drawn_negatives(data: EncodedDataset, rows: np.ndarray, number: int) -> Bags:
    """For each of the test examples `rows` so many items, uniform among those that its user never took, each once.

    They are the same in every call. A user who took nearly all items gets those that are left.
    """
    test, seen = data.split(TEST), data.seen_items()
    assert test.item is not None
    assert test.user_index is not None
    generator, found = np.random.default_rng(0), []
    for user in test.user_index[rows]:
        taken = seen.values[seen.offsets[user] : seen.offsets[user + 1]].numpy()
        first, last = np.searchsorted(test.user_index, [user, user + 1])
        found.append(_uniform(generator, data.items.num_items, np.union1d(taken, test.item[first:last]), number))
    offsets = np.concatenate([[0], np.cumsum([len(items) for items in found])])
    return Bags(torch.from_numpy(np.concatenate(found)), torch.from_numpy(offsets))


def _uniform(
    generator: np.random.Generator, num_items: int, taken: npt.NDArray[np.int64], number: int
) -> npt.NDArray[np.int64]:
    """So many codes of 1..num_items that are not `taken`, each once."""
    if num_items - len(taken) <= 2 * number:
        free = np.setdiff1d(np.arange(1, num_items + 1), taken)
        return generator.permutation(free)[:number]
    drawn = np.empty(0, dtype=np.int64)
    while len(drawn) < number:
        more = generator.integers(1, num_items + 1, 2 * number)
        drawn = np.concatenate([drawn, more[~np.isin(more, taken)]])
        # Each once, in the order in which they were drawn: the smallest codes are no better than others.
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return drawn[:number]
