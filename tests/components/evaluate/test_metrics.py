"""The vectorised metrics equal the definitions written out."""

import math

import numpy as np
import pytest
import torch

from lazydp.components.evaluate.metrics import Ranks, label_auc, ranking_metrics, ranks
from lazydp.components.features.batch import Bags


def bags(lists: list[list[int]]) -> Bags:
    offsets = torch.tensor([0, *np.cumsum([len(codes) for codes in lists])], dtype=torch.int64)
    return Bags(torch.tensor([code for codes in lists for code in codes], dtype=torch.int64), offsets)


def test_ranks_equal_a_loop() -> None:
    generator = np.random.default_rng(0)
    scores = torch.from_numpy(generator.integers(0, 6, (30, 13)).astype(np.float32))
    items = torch.from_numpy(generator.integers(1, 13, 30))
    seen = [sorted(generator.choice(np.arange(0, 13), generator.integers(0, 6), replace=False)) for _ in range(30)]
    found = ranks(scores, items, bags(seen))
    for row in range(30):
        others = [c for c in range(1, 13) if c not in seen[row] and c != items[row]]
        mine = scores[row, items[row]]
        above = sum(bool(scores[row, c] > mine) for c in others)
        ties = sum(bool(scores[row, c] == mine) for c in others)
        assert found.rank[row] == 1 + above + ties / 2
        assert found.competitors[row] == len(others)


def test_an_item_outside_the_catalogue_is_a_miss() -> None:
    found = ranks(torch.zeros(1, 5), torch.tensor([0]), bags([[]]))
    assert found.rank[0] == math.inf
    metrics = ranking_metrics(found, np.array([0]))
    assert (metrics.auc, metrics.hr_at_10, metrics.recall_at_20) == (0.0, 0.0, 0.0)


def test_metrics_of_a_hand_made_case() -> None:
    # user 7: ranks 1 and 15; user 9: rank 4; user 11: rank 30, each among 50 others
    found = Ranks(rank=np.array([1.0, 4.0, 15.0, 30.0]), competitors=np.full(4, 50.0))
    metrics = ranking_metrics(found, np.array([7, 9, 7, 11]))
    assert metrics.users == 3
    assert metrics.hr_at_10 == pytest.approx(2 / 3)
    assert metrics.recall_at_20 == pytest.approx((1 + 1 + 0) / 3)
    assert metrics.ndcg_at_10 == pytest.approx((1 / (1 + 1 / math.log2(3)) + 1 / math.log2(5)) / 3)
    assert metrics.auc == pytest.approx(np.mean([1, 1 - 3 / 50, 1 - 14 / 50, 1 - 29 / 50]))


def test_a_constant_score_earns_what_chance_earns() -> None:
    metrics = ranking_metrics(ranks(torch.zeros(20, 101), torch.arange(1, 21), bags([[]] * 20)), np.arange(20))
    assert metrics.auc == pytest.approx(0.5)
    assert metrics.hr_at_10 == 0.0


def test_nobody_to_rank() -> None:
    assert ranking_metrics(Ranks(np.empty(0), np.empty(0)), np.empty(0, np.int64)).users == 0


def test_label_auc_equals_all_pairs() -> None:
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 5, 40).astype(np.float32)
    labels = generator.integers(0, 2, 40).astype(np.float32)
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in scores[labels == 1] for n in scores[labels == 0]]
    found = label_auc(scores, labels)
    assert found == pytest.approx(np.mean(pairs))
    assert label_auc(scores, np.ones(40, np.float32)) is None
