"""Scores of a catalogue against sums written out, and the metrics of a dataset whose ranks are known by hand."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from lazydp.components.evaluate import evaluate as module
from lazydp.components.evaluate.scoring import _PairScorer, catalogue_scorer, observed_scores
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.ingest.ingest import ingest
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.recommender import initial_tables

CONFIGS = [TwoTowerConfig(embedding_dim=8, embedding_init_std=1.0), DlrmConfig(embedding_dim=8, embedding_init_std=1.0)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_the_catalogue_is_scored_as_each_item_alone(config: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item set as the observed one of an example, one after another: the very formula of training."""
    from lazydp.components.evaluate import scoring

    data = EncodedDataset.open(tiny.dataset)
    model = build_model(data.spec, config)
    tables = initial_tables(model)
    test = data.split("test")
    batch = test.take(np.arange(7))
    monkeypatch.setattr(scoring, "_PAIRS_AT_ONCE", 100)  # several parts
    found = catalogue_scorer(model, tables, data.items)(batch)
    assert found.shape == (7, data.items.num_items + 1)
    for item in (1, 17, 40):
        of_item = dataclasses.replace(batch, item=torch.full((7,), item))
        alone = observed_scores(model, tables, data.items, of_item)
        torch.testing.assert_close(found[:, item], alone, rtol=1e-5, atol=1e-5)


def test_two_ways_to_score_a_two_tower_agree(tiny: Any) -> None:
    data = EncodedDataset.open(tiny.dataset)
    model = build_model(data.spec, CONFIGS[0])  # type: ignore[arg-type]
    tables = initial_tables(model)
    batch = data.split("test").take(np.arange(20))
    fast = catalogue_scorer(model, tables, data.items)(batch)
    torch.testing.assert_close(fast, _PairScorer(model, tables, data.items)(batch), rtol=1e-5, atol=1e-5)


def test_an_empty_batch_has_no_scores(tiny: Any) -> None:
    data = EncodedDataset.open(tiny.dataset)
    for config in CONFIGS:
        model = build_model(data.spec, config)  # type: ignore[arg-type]
        batch = data.split("test").take(np.arange(0))
        assert catalogue_scorer(model, initial_tables(model), data.items)(batch).shape == (0, 41)


# --- a dataset of known ranks -----------------------------------------------------------------------------------------

SPEC = """
name: known
user: {column: user, vocabulary: {kind: hashed, buckets: 16, salt: known}}
item: {column: item, vocabulary: {kind: integer, size: 30, first: 1}}
timestamp: at
label: {kind: implicit}
max_examples_per_user: 50
"""
# user -> items in order of time; the last is held out
TAKEN = {"a": [1, 2, 3], "b": [1, 30], "c": [5, 6, 7, 25], "d": [2, 12]}


@pytest.fixture
def known(tmp_path: Path) -> EncodedDataset:
    rows = [(user, item) for user, items in TAKEN.items() for item in items]
    table = pa.table(
        {"user": [user for user, _ in rows], "item": [item for _, item in rows], "at": list(range(len(rows)))}
    )
    pq.write_table(table, tmp_path / "interactions.parquet")
    (tmp_path / "spec.yaml").write_text(SPEC)
    ingest([str(tmp_path / "interactions.parquet")], str(tmp_path / "spec.yaml"), tmp_path / "dataset")
    return EncodedDataset.open(tmp_path / "dataset")


def descending(batch: Any) -> Tensor:
    """Item 1 before item 2 before item 3, for everyone."""
    return -torch.arange(31, dtype=torch.float32).expand(batch.size, -1)


def test_metrics_by_hand(known: EncodedDataset) -> None:
    """The held-out item's rank among the items that its user did not take in training."""
    ranks = {"a": 1, "b": 29, "c": 22, "d": 11}  # 3 less {1, 2}; 30 less {1}; 25 less {5, 6, 7}; 12 less {2}
    others = {user: 30 - len(items) for user, items in TAKEN.items()}  # of the catalogue, not taken, not the item
    metrics, _ = module._rank_both(descending, known, known.split("test"))
    assert metrics.users == 4
    assert metrics.auc == pytest.approx(np.mean([1 - (ranks[user] - 1) / others[user] for user in TAKEN]))
    assert metrics.hr_at_10 == 1 / 4
    assert metrics.ndcg_at_10 == pytest.approx((1 / math.log2(2)) / 4)
    assert metrics.recall_at_20 == 2 / 4


def test_popularity_counts_positive_training_examples(known: EncodedDataset) -> None:
    counts = module.item_counts(known.split("train"), num_items=30)
    expected = torch.zeros(31)
    for items in TAKEN.values():
        for item in items[:-1]:
            expected[item] += 1
    assert torch.equal(counts, expected)
    _, popularity = module._rank_both(descending, known, known.split("test"))
    # Nobody's held-out item was trained on: each ties with all items of count 0, and stands in their middle.
    ties = dict.fromkeys(TAKEN, 30 - 5 - 1)  # items of count 0, less the held-out one
    above = {"a": 3, "b": 4, "c": 2, "d": 4}  # items of a count that the user did not take
    others = {user: 30 - len(items) for user, items in TAKEN.items()}
    assert {user: ties[user] + above[user] for user in TAKEN} == others
    expected_auc = np.mean([1 - (above[user] + ties[user] / 2) / others[user] for user in TAKEN])
    assert popularity.auc == pytest.approx(expected_auc)
