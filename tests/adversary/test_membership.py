"""Membership games on crafted programs: the right code keeps its claim, and each planted fault breaks it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from adversary.membership import Floats, epsilon_shown
from torch import Tensor, nn

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import PrivateTrainer, make_private
from lazydp.components.train.tables import embedding_tables, schedules
from lazydp.components.train.tables.precision import Rounding
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels import ops, reference
from lazydp.kernels.noise_key import NoiseKey

DELTA = 1e-5
SIGMA = 4.0
RUNS = 120
FIRST = torch.zeros(1, dtype=torch.int64)


def claim(*, steps: int = 1, noise_multiplier: float = SIGMA) -> float:
    return epsilon(dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=steps), delta=DELTA)


def trainer_of(model: nn.Module, key: NoiseKey, *, batch: float = 1.0, rate: float = 1.0) -> PrivateTrainer:
    return make_private(
        model,
        privacy=PrivacyParameters(noise_multiplier=SIGMA, max_grad_norm=1.0, expected_batch_size=batch),
        embeddings=EmbeddingSgd(schedules.constant(rate)),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.0)),
        key=key,
    )


# --- the game itself ---------------------------------------------------------------------------------------------


def gaussian(is_in: bool, number: int, *, mu: float) -> Floats:
    return np.random.default_rng(number).standard_normal(3) + mu * is_in


def test_the_game_keeps_below_the_truth_and_sees_a_large_one() -> None:
    """N(0, 1) against N(mu, 1): mu = 0.25 is epsilon 0.93 at delta 1e-5, mu = 8 is far above 3."""
    assert epsilon_shown(partial(gaussian, mu=0.25), runs=2000, delta=DELTA) < 0.93
    assert epsilon_shown(partial(gaussian, mu=8.0), runs=RUNS, delta=DELTA) > 2.0


# --- F1: terms that cancel --------------------------------------------------------------------------------------


class Cancelling(nn.Module):
    """An embedding that is used twice, with gradients that cancel where `amount` is large."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(2, 8)
        nn.init.zeros_(self.rows.weight)
        self.top = nn.Linear(8, 1)

    def forward(self, ids: Tensor, amount: Tensor) -> Tensor:
        first, second = self.rows(ids), self.rows(ids)
        return (first - second).sum(dim=1) * amount + first.sum(dim=1)


def cancelling(is_in: bool, number: int) -> Floats:
    """The row that everybody reads, after one step of 64 others and perhaps an example whose huge terms cancel."""
    del number
    model = Cancelling()
    trainer = trainer_of(model, NoiseKey.generate())
    amounts = torch.zeros(64 + is_in)
    if is_in:
        amounts[32] = 1e8
    trainer.step(lambda: model(torch.zeros(len(amounts), dtype=torch.int64), amounts))
    trainer.flush()
    return model.rows(FIRST)[0].detach().double().numpy()


def running_float32_sums(patch: pytest.MonkeyPatch) -> None:
    """Rows are summed in float32, and norms add up equal rows without a look at how large their terms are."""
    exact = ops.foreach_scatter_add_

    def rounded(*lists: Any, **settings: Any) -> None:
        exact(*lists, **settings | {"bound": None})

    patch.setattr(ops, "foreach_scatter_add_", rounded)
    patch.setattr(ops, "foreach_bag_sq_norms", _plain_sq_norms)


def _plain_sq_norms(indices: Any, offsets: Any, grads: Any, per_lookup_weights: Any = None) -> Tensor:
    total = torch.zeros(grads[0].shape[1], dtype=torch.float64)
    weights = per_lookup_weights or [None] * len(grads)
    for rows, starts, grad, of_lookups in zip(indices, offsets, grads, weights, strict=True):
        features, examples, _ = grad.shape
        bag = reference.bag_ids(starts)
        terms = grad.reshape(features * examples, -1)[bag].double()
        terms = terms if of_lookups is None else terms * of_lookups[:, None].double()
        place = (bag % examples) * (int(rows.max()) + 1 if rows.numel() else 1) + rows
        places, inverse = torch.unique(place, return_inverse=True)
        sums = torch.zeros(len(places), terms.shape[1], dtype=torch.float64).index_add_(0, inverse, terms)
        total.index_add_(0, places // (int(rows.max()) + 1 if rows.numel() else 1), sums.square().sum(dim=1))
    return total


# --- F3: noise below a weight's rounding step --------------------------------------------------------------------

OTHERS = 30
# Others move each coordinate by almost half a unit in the last place of 1.5, and one more example beyond it.
TIPPING_RATE = 0.5 * 2.0**-23 / ((OTHERS + 0.5) / math.sqrt(8))


def tipping(is_in: bool, number: int) -> Floats:
    """The row that everybody reads, at a rate at which float32 rounds its noise away."""
    del number
    model = Rows()
    nn.init.constant_(model.rows.weight, 1.5)
    trainer = trainer_of(model, NoiseKey.generate(), rate=TIPPING_RATE)
    ids = torch.zeros(OTHERS + is_in, dtype=torch.int64)
    trainer.step(lambda: model(ids))
    trainer.flush()
    return model.rows(FIRST)[0].detach().double().numpy()


def rows_of_one_float(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rounding, "begins_with_two", lambda *_: False)
    patch.setattr(Rounding, "needs_second_float", lambda *_, **__: False)
    patch.setattr(embedding_tables, "MOST_MARGIN", math.inf)


# --- F5: one key, two trainers ----------------------------------------------------------------------------------


class Rows(nn.Module):
    """Each example pulls the row that it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(2, 8)
        nn.init.zeros_(self.rows.weight)
        self.top = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids).sum(dim=1)


def two_models_of_one_key(is_in: bool, number: int) -> Floats:
    """w1 - 2 w2 of two models trained under one key, the second with half of the noise on its rows."""
    del number
    key = NoiseKey.generate()
    weights = []
    for batch in (1.0, 2.0):
        model = Rows()
        trainer = trainer_of(model, key, batch=batch)
        ids = torch.zeros(3 + (is_in and batch == 1.0), dtype=torch.int64)
        trainer.step(lambda: model(ids))  # noqa: B023 - called at once
        trainer.flush()
        weights.append(model.rows(FIRST)[0].detach().double().numpy())
    difference: Floats = weights[0] - 2 * weights[1]
    return difference


def keys_as_they_are_given(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(NoiseKey, "for_trainer", lambda self, nonce: self)


# --- the games --------------------------------------------------------------------------------------------------

GAMES: dict[str, tuple[Callable[[bool, int], Floats], Callable[[pytest.MonkeyPatch], None], float]] = {
    "F1, terms that cancel": (cancelling, running_float32_sums, claim()),
    "F3, noise below rounding": (tipping, rows_of_one_float, claim()),
    "F5, one key for two trainers": (two_models_of_one_key, keys_as_they_are_given, claim(steps=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GAMES)
def test_the_right_code_keeps_its_claim_and_the_fault_breaks_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    release, plant, claimed = GAMES[name]
    assert epsilon_shown(release, runs=RUNS, delta=DELTA) < claimed
    plant(monkeypatch)
    shown = epsilon_shown(release, runs=RUNS, delta=DELTA)
    assert shown > claimed, f"{name}: planted, and the game shows {shown:.2f} of a claim of {claimed:.2f}"
