"""The noise that arrives has the promised variance, whatever the learning rate and the weights are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lazydp.components.shared.errors import PrivacyError
from lazydp.components.train.tables import embedding_tables
from lazydp.components.train.tables.embedding_tables import EmbeddingTables
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

BATCH, STEPS = 1e4, 12


def tables_of(weight: Tensor, *, rate: float, key: int = 0, **optimizer: Any) -> EmbeddingTables:
    return EmbeddingTables(
        {"item": weight},
        mode="lazydp",
        optimizer=EmbeddingSgd(lambda step: rate, **optimizer),
        noise_scale=1.0 / BATCH,
        key=NoiseKey.for_tests(key),
        bound=1.0 / BATCH,
    )


def deviations(rate: float, std: float, momentum: float) -> float:
    """By how many standard errors the variance of all noise misses the promise."""
    before = torch.randn(2000, 16, generator=torch.Generator().manual_seed(3)) * std
    tables = tables_of(before.clone(), rate=rate, momentum=momentum)
    for step in range(STEPS):
        tables.advance()
        if step % 4 == 3:
            tables.flush()
    table = tables.state_dict()["tables"]["item"]
    moved = table["weight"].double() - before.double()
    if table["rest"] is not None:
        moved += table["rest"].double()
    promised = float(tables._skip_ahead._moments[0, (momentum and 4) or 1])
    return (float(moved.square().mean()) / promised - 1.0) / math.sqrt(2.0 / moved.numel())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("std", [0.0, 0.05, 1.0, 10.0])
@pytest.mark.parametrize("rate", [1e-6, 1e-4, 1e-2, 1.0, 10.0])
def test_the_noise_that_arrives_has_the_promised_variance(rate: float, std: float, momentum: float) -> None:
    assert abs(deviations(rate, std, momentum)) < 4.0


def test_one_float_alone_loses_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the second float is for."""
    monkeypatch.setattr(embedding_tables, "needs_second_float", lambda *_, **__: False)
    assert deviations(1e-4, 1.0, 0.0) < -20.0


def test_a_state_takes_both_floats_along() -> None:
    before = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    whole, first = (tables_of(before.clone(), rate=1e-5) for _ in range(2))
    for tables in (whole, first):
        for _ in range(3):
            tables.advance()
            tables.flush()
    resumed = tables_of(torch.zeros_like(before), rate=1e-5)
    resumed.load_state_dict(first.state_dict())
    for tables in (whole, resumed):
        tables.advance()
        tables.flush()
    (one,), (other,) = (tables.state_dict()["tables"].values() for tables in (whole, resumed))
    assert torch.equal(one["weight"], other["weight"])
    assert torch.equal(one["rest"], other["rest"])


def test_weights_that_outgrew_one_float_are_not_released() -> None:
    weight = torch.full((4, 4), 0.01)
    tables = tables_of(weight, rate=1.0)
    tables.advance()
    tables.flush()
    tables.weights()
    weight.fill_(1e4)
    with pytest.raises(PrivacyError, match="weights grew to 1e\\+04"):
        tables.weights()
