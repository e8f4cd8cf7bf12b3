"""Every parameter has noise, and no two noises are the same: over steps, dense parameters, tables and keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.shared.noise_addresses import MAX_TABLES
from lazydp.components.train.engine.dense import DenseLayers
from lazydp.components.train.private import DenseOptimizer, EmbeddingSgd, NoiseKey, PrivacyParameters, make_private
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.embedding_tables import EmbeddingTables
from lazydp.kernels import ops

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LAGS = 500, 20
SIGMA, NORM, SIZE = 1.5, 2.0, 4.0
LIMIT = 6.0
"""Standard errors that a figure may be off; the key is fixed, so that a run that passes always does."""

Noises = dict[str, Tensor]
"""By parameter or table, in units of sigma C: [steps, rows, columns]."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "users": nn.Embedding(6, 8),
            "films": nn.EmbeddingBag(5, 8, mode="sum"),
            "hidden": nn.Linear(8, 8),
            "norm": nn.LayerNorm(8),
            "top": nn.Linear(8, 1),
        }
    )


def drawn(key: NoiseKey) -> Noises:
    """What empty batches at rate 1 take off every weight, step by step."""
    module = model()
    trainer = make_private(
        module,
        privacy=PrivacyParameters(noise_multiplier=SIGMA, max_grad_norm=NORM, expected_batch_size=SIZE),
        embeddings=EmbeddingSgd(schedules.constant(1.0)),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(1.0)),
        key=key,
    )
    states = []
    for step in range(STEPS + 1):
        if step:
            trainer.step()
            trainer.flush()
        states.append({name: value.double() for name, value in module.state_dict().items()})
    noises = {}
    for name in states[0]:
        weights = torch.stack([state[name] for state in states])
        noises[name] = (weights[:-1] - weights[1:]).reshape(STEPS, -1, weights.shape[-1]) * SIZE / (SIGMA * NORM)
    return noises


def correlation(one: Tensor, other: Tensor) -> float:
    """Of draws at equal places, in standard errors of that of independent ones."""
    one, other = one.flatten(), other.flatten()
    scale = one.norm() * other.norm()
    return float((one * other).sum() / scale.clamp(min=1e-9)) * math.sqrt(one.numel())


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The places that both have, row by row: an address is a table, a row and a place in the row."""
    rows, columns = min(one.shape[1], other.shape[1]), min(one.shape[2], other.shape[2])
    return one[:, :rows, :columns], other[:, :rows, :columns]


def faults(noises: Noises) -> set[str]:
    """What is wrong with them: the kind of fault and where."""
    found = set()
    for name, noise in noises.items():
        if abs(float(noise.square().mean()) - 1.0) > LIMIT * math.sqrt(2 / noise.numel()):
            found.add(f"variance: {name}")
        if any(abs(correlation(noise[lag:], noise[:-lag])) > LIMIT for lag in range(1, LAGS)):
            found.add(f"steps: {name}")
    for one, other in itertools.combinations(noises, 2):
        if abs(correlation(*overlap(noises[one], noises[other]))) > LIMIT:
            found.add(f"shared: {one}, {other}")
    return found


def test_every_parameter_has_noise_of_its_own() -> None:
    noises = drawn(NoiseKey.for_tests(0))
    assert noises.keys() == {
        *("users.weight", "films.weight", "hidden.weight", "hidden.bias"),
        *("norm.weight", "norm.bias", "top.weight", "top.bias"),
    }
    assert faults(noises) == set()
    others = drawn(NoiseKey.for_tests(1))
    assert faults(others) == set()
    assert all(abs(correlation(noises[name], others[name])) < LIMIT for name in noises)
    again = drawn(NoiseKey.for_tests(0))  # the control of that: one key is one noise
    assert all(correlation(noises[name], again[name]) > LIMIT for name in noises)


@pytest.mark.parametrize("make", [NoiseKey.generate, lambda: NoiseKey.for_tests(0)], ids=["secret", "test"])
def test_two_trainers_under_one_key_share_no_noise(
    make: Callable[[], NoiseKey], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a difference of their weights is free of noise, whatever their sigmas: w1 - 2 w2, say."""
    key = make()
    noises, others = drawn(key), drawn(key)
    assert faults(noises) == faults(others) == set()
    assert all(abs(correlation(noises[name], others[name])) < LIMIT for name in noises)
    # The control: the key itself, as it was used before.
    monkeypatch.setattr(NoiseKey, "for_trainer", lambda self, nonce: self)
    noises, others = drawn(key), drawn(key)
    assert all(torch.allclose(noises[name], others[name], atol=1e-3) for name in noises)


def dense_noise(
    *,
    address: Callable[[int], int] = lambda number: MAX_TABLES + number,
    at: Callable[[int], int] = lambda step: step,
    covers: Callable[[Tensor], bool] = lambda parameter: True,
    scale: float = 1.0,
) -> Callable[[DenseLayers, int], None]:
    """`DenseLayers.add_noise`, with a mistake."""

    def add_noise(self: DenseLayers, step: int) -> None:
        assert self._key is not None
        for number, parameter in enumerate(self._parameters.values()):
            assert parameter.grad is not None
            parameter.grad.copy_(self.sums.of(parameter))
            if covers(parameter):
                noise = torch.empty(parameter.shape[0] if parameter.dim() > 1 else 1, parameter.shape[-1])
                ops.normal_(noise, self._key.tensor(), table=address(number), first_row=0, step=at(step))
                parameter.grad.add_(noise.view_as(parameter), alpha=self._noise_scale * scale)

    return add_noise


DENSE_MISTAKES: dict[str, tuple[Callable[[DenseLayers, int], None], set[str]]] = {
    "none": (dense_noise(), set()),
    "the same at every step": (dense_noise(at=lambda step: 1), {"steps: hidden.weight", "steps: top.bias"}),
    "the same every other step": (
        dense_noise(at=lambda step: 1 + step % 2),
        {"steps: hidden.weight", "steps: top.bias"},
    ),
    "one for all parameters": (
        dense_noise(address=lambda number: MAX_TABLES),
        {"shared: hidden.weight, top.weight", "shared: norm.bias, top.bias"},
    ),
    "that of the tables": (
        dense_noise(address=lambda number: number),
        {"shared: users.weight, hidden.weight", "shared: films.weight, hidden.bias"},
    ),
    "none on a bias": (
        dense_noise(covers=lambda parameter: parameter.dim() > 1),
        {"variance: hidden.bias", "variance: norm.weight", "variance: norm.bias", "variance: top.bias"},
    ),
    "none on a single number": (dense_noise(covers=lambda parameter: parameter.numel() > 1), {"variance: top.bias"}),
    "two thirds of it": (dense_noise(scale=2 / 3), {"variance: hidden.weight", "variance: top.bias"}),
    "half as much again": (dense_noise(scale=3 / 2), {"variance: hidden.weight", "variance: top.bias"}),
}


@pytest.mark.parametrize("mistake", DENSE_MISTAKES)
def test_a_mistake_in_dense_noise_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: each of these leaves every other test of training content."""
    add_noise, expected = DENSE_MISTAKES[mistake]
    monkeypatch.setattr(DenseLayers, "add_noise", add_noise)
    found = faults(drawn(NoiseKey.for_tests(0)))
    assert found >= expected
    assert bool(found) == bool(expected)


def test_tables_that_share_a_number_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = EmbeddingTables.__init__

    def shared(self: EmbeddingTables, *arguments: Any, **options: Any) -> None:
        right(self, *arguments, **options)
        for table in self._tables.values():
            table.number = 0

    monkeypatch.setattr(EmbeddingTables, "__init__", shared)
    assert faults(drawn(NoiseKey.for_tests(0))) == {"shared: users.weight, films.weight"}
