"""Canaries go through the ordinary path, are as visible as an example may be, and leave everything else alone."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lazydp.components.audit.canaries import (
    CANARY,
    EXCESS,
    LABEL,
    REPEATS,
    AuditedDataset,
    CanaryModel,
    direction,
    toss,
)
from lazydp.components.audit.promise import promised_std
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.models.build import build_model
from lazydp.components.models.recommender import initial_tables
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey


def test_coins_are_fair_independent_of_noise_and_repeatable() -> None:
    key = NoiseKey.for_tests(1)
    coins = toss(key, 100_000)
    assert abs(int(coins.sum()) - 50_000) < 5 * math.sqrt(100_000) / 2
    assert np.array_equal(coins, toss(NoiseKey.for_tests(1), 100_000))
    agree = int((coins == toss(NoiseKey.for_tests(2), 100_000)).sum())
    assert abs(agree - 50_000) < 5 * math.sqrt(100_000) / 2


def test_the_split_holds_the_examples_then_the_canaries(dataset: Path) -> None:
    data = EncodedDataset.open(dataset)
    plain = data.split("train")
    split = AuditedDataset(data, np.array([2, 5]), examples_each=2).split("train")
    assert len(split) == len(plain) + 4
    # In any order, mixed.
    rows = np.array([len(plain) + 3, 0, len(plain), 7, len(plain) + 1])
    batch = split.take(rows)
    assert batch.size == 5
    assert batch.bags[CANARY].lengths().tolist() == [REPEATS, 0, REPEATS, 0, REPEATS]
    assert batch.bags[CANARY].values.tolist() == [5] * REPEATS + [2] * REPEATS + [2] * REPEATS
    assert (batch.labels == LABEL).tolist() == [True, False, True, False, True]
    examples = plain.take(np.array([0, 7]))
    found = batch.take(torch.tensor([1, 3]))
    assert torch.equal(found.dense, examples.dense)
    assert examples.item is not None
    assert found.item is not None
    assert torch.equal(found.item, examples.item)
    for name, bags in examples.bags.items():
        assert torch.equal(found.bags[name].values, bags.values)
        assert torch.equal(found.bags[name].offsets, bags.offsets)
        canaries = batch.bags[name].lengths()[[0, 2, 4]]
        assert canaries.tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch", [[], [0, 3], "canaries"])
def test_batches_of_one_kind_only(dataset: Path, batch: list[int] | str) -> None:
    data = EncodedDataset.open(dataset)
    split = AuditedDataset(data, np.array([1, 4])).split("train")
    rows = np.arange(len(split) - 2, len(split)) if batch == "canaries" else np.array(batch, dtype=np.int64)
    taken = split.take(rows)
    assert taken.size == len(rows)
    assert taken.bags[CANARY].values.numel() == (2 * REPEATS if batch == "canaries" else 0)


@pytest.mark.parametrize("kind", ["two_tower", "dlrm"])
def test_a_canary_moves_its_own_row_by_the_clipping_norm_and_nothing_else(
    dataset: Path, configured: Callable[..., TrainConfig], kind: str
) -> None:
    data = EncodedDataset.open(dataset)
    config = configured(model={"kind": kind, "embedding_dim": 8})
    model = CanaryModel(build_model(data.spec, config.model), num_canaries=6, max_grad_norm=2.0)
    tables = initial_tables(model)
    before = {name: weight.clone() for name, weight in tables.items()}
    dense_before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = Engine(
        model,
        mode="lazydp",
        privacy=PrivacyParameters(noise_multiplier=0.0, max_grad_norm=2.0, expected_batch_size=5.0),
        embeddings=EmbeddingSgd(learning_rate=lambda _: 0.5),
        dense=DenseOptimizer.named("sgd", learning_rate=lambda _: 0.5),
        key=None,
        tables=tables,
    )
    split = AuditedDataset(data, np.array([3])).split("train")
    batch = split.take(np.array([len(split) - 1]))
    report = engine.step(Examples.of(batch, negatives=torch.tensor([[1, 2]]), items=data.items))
    assert report.mean_norm == pytest.approx(EXCESS * 2.0, rel=1e-5)
    after = engine.table_weights()
    moved = before[CANARY] - after[CANARY]
    # Up to what clipping leaves free for rounding.
    assert torch.allclose(moved[3], 0.5 * 2.0 / 5.0 * direction(8), rtol=2.0**-11)
    moved[3] = 0.0
    assert not moved.any()
    assert all(torch.equal(after[name], before[name]) for name in before if name != CANARY)
    assert all(torch.equal(parameter, dense_before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["two_tower", "dlrm"])
def test_examples_train_as_without_canaries(dataset: Path, configured: Callable[..., TrainConfig], kind: str) -> None:
    """One step of the base model alone, and of the same examples beside canaries: the same weights."""
    data = EncodedDataset.open(dataset)
    config = configured(model={"kind": kind, "embedding_dim": 8})
    results = []
    for audited in (False, True):
        base = build_model(data.spec, config.model)
        model = CanaryModel(base, num_canaries=6, max_grad_norm=1.0) if audited else base
        engine = Engine(
            model,
            mode="lazydp",
            privacy=PrivacyParameters(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=5.0),
            embeddings=EmbeddingSgd(learning_rate=lambda _: 0.5),
            dense=DenseOptimizer.named("sgd", learning_rate=lambda _: 0.5),
            key=None,
        )
        split = (AuditedDataset(data, np.array([0, 2])) if audited else data).split("train")
        batch = split.take(np.arange(len(split)))
        negatives = torch.ones(batch.size, 2, dtype=torch.int64)
        engine.step(Examples.of(batch, negatives=negatives, items=data.items))
        results.append((engine.table_weights(), dict(base.named_parameters())))
    (tables, dense), (audited_tables, audited_dense) = results
    for name, weight in tables.items():
        assert torch.allclose(audited_tables[name], weight, atol=1e-6)
    for name, parameter in dense.items():
        assert torch.allclose(audited_dense[name], parameter, atol=1e-6)


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.0, 0.3), (0.9, 0.0), (0.7, 0.2)])
def test_the_promise_is_what_torch_sgd_would_give(momentum: float, decay: float) -> None:
    rates = [0.5, 0.3, 0.1, 0.4, 0.2]
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(200_000, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum, weight_decay=decay)
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = 0.2 * torch.randn(weight.shape, generator=generator)
        optimizer.step()
    promised = promised_std(
        EmbeddingSgd(learning_rate=lambda step: rates[step - 1], momentum=momentum, weight_decay=decay),
        noise_scale=0.2,
        steps=len(rates),
    )
    assert float(weight.detach().std()) == pytest.approx(promised, rel=0.01)
