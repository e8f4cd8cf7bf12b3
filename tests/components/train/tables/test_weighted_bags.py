"""Weights per sample: the gradients torch.func gives, and no way past the norm bound by repeating or cancelling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism import contributions
from lazydp.components.train.mechanism.units import Units
from lazydp.components.train.private import (
    DenseOptimizer,
    EmbeddingSgd,
    NoiseKey,
    PrivacyParameters,
    PrivateTrainer,
    make_private,
)
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.lookups import Lookups

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, DIM, LENGTH = 5, 4, 6
WEIGHTS = st.sampled_from([0.0, -1.5, 1.5, 2.0, 0.3, -0.3])


class Weighted(nn.Module):
    """Weighted bags, given as two dimensions or flat with offsets."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        self.bags = nn.EmbeddingBag(ROWS, DIM, mode="sum")
        self.top = nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, ids: Tensor, weights: Tensor | None) -> Tensor:
        if not self.flat:
            return self.top(self.bags(ids, per_sample_weights=weights)).squeeze(1)
        assert weights is not None
        starts = torch.arange(0, ids.numel(), ids.shape[1])
        return self.top(self.bags(ids.reshape(-1), starts, weights.reshape(-1))).squeeze(1)


def trainer_of(model: nn.Module, *, max_grad_norm: float, **more: Any) -> PrivateTrainer:
    return make_private(
        model,
        privacy=PrivacyParameters(noise_multiplier=0.0, max_grad_norm=max_grad_norm, expected_batch_size=1.0, **more),
        embeddings=EmbeddingSgd(schedules.constant(1.0)),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(1.0)),
        key=NoiseKey.for_tests(0),
    )


def per_example(model: Weighted, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Gradients [B, ...] of (output - 1)^2 by torch.func; bags as products with a matrix of weights."""
    top = {name: value.detach() for name, value in model.top.named_parameters()}
    multiplicities = torch.zeros(ids.shape[0], ROWS).scatter_add_(1, ids, weights)

    def loss(table: Tensor, top: dict[str, Tensor], of_rows: Tensor) -> Tensor:
        return (functional_call(model.top, top, ((of_rows @ table).unsqueeze(0),)) - 1.0).square().sum()

    table = model.bags.weight.detach()
    of_table, of_top = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(table, top, multiplicities)
    return {"bags.weight": of_table, **{f"top.{name}": value for name, value in of_top.items()}}


def losses_of(model: nn.Module, ids: Tensor, weights: Tensor | None) -> Tensor:
    return (model(ids, weights) - 1.0).square()


def sent_by(model: Weighted, trainer: PrivateTrainer, ids: Tensor, weights: Tensor, **more: Any) -> dict[str, Tensor]:
    """What a step at rate 1 takes off every weight: the clipped sum."""
    before = {name: value.double() for name, value in model.state_dict().items()}
    trainer.step(lambda: losses_of(model, ids, weights), **more)
    return {name: before[name] - value.double() for name, value in model.state_dict().items()}


@given(
    flat=st.booleans(),
    size=st.integers(1, 5),
    drawn=st.lists(WEIGHTS, min_size=5 * LENGTH, max_size=5 * LENGTH),
    max_grad_norm=st.sampled_from([0.05, 0.5, 100.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None)
def test_a_step_is_the_clipped_sum_that_torch_func_gives(
    flat: bool, size: int, drawn: list[float], max_grad_norm: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = Weighted(flat=flat)
    ids = torch.randint(0, ROWS, (size, LENGTH))
    weights = torch.tensor(drawn).view(5, LENGTH)[:size]
    gradients = per_example(model, ids, weights)
    norms = torch.cat([g.double().flatten(1) for g in gradients.values()], dim=1).norm(dim=1)
    factors = (max_grad_norm / norms).clamp(max=1.0)
    sent = sent_by(model, trainer_of(model, max_grad_norm=max_grad_norm), ids, weights)
    for name, gradient in gradients.items():
        expected = torch.einsum("b,b...->...", factors, gradient.double())
        torch.testing.assert_close(sent[name], expected, rtol=1e-3, atol=2e-5)


@given(
    drawn=st.lists(WEIGHTS, min_size=4 * LENGTH, max_size=4 * LENGTH),
    scale=st.sampled_from([1.0, 100.0]),
    users=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None)
def test_no_unit_contributes_more_than_the_norm_bound(drawn: list[float], scale: float, users: bool, seed: int) -> None:
    """Two rows only, so that weights meet on equal rows, add up and cancel; a user's examples too."""
    torch.manual_seed(seed)
    size = 4 if users else 1
    model = Weighted()
    ids = torch.randint(0, 2, (size, LENGTH))
    weights = torch.tensor(drawn).view(4, LENGTH)[:size] * scale
    trainer = trainer_of(model, max_grad_norm=0.5, user_gradient="sum" if users else None)
    sent = sent_by(model, trainer, ids, weights, **({"user_sizes": [torch.tensor([4])]} if users else {}))
    assert math.sqrt(sum(float(part.square().sum()) for part in sent.values())) <= 0.5 * (1 + 1e-4)


def test_rows_that_repeat_add_up_before_the_norm() -> None:
    """The control: norms of single lookups would let six equal ones pass by the root of six."""
    lookups = Lookups(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 6]), torch.full((6,), 2.0), 1)
    gradient = torch.ones(1, DIM)
    found = contributions.sq_norms_of_tables([(lookups, gradient)], Units.examples(1))
    assert found.tolist() == [pytest.approx(144 * DIM)]
    apart = Lookups(torch.arange(6), torch.tensor([0, 6]), torch.full((6,), 2.0), 1)
    found = contributions.sq_norms_of_tables([(apart, gradient)], Units.examples(1))
    assert found.tolist() == [pytest.approx(24 * DIM)]


def test_weights_that_cancel_leave_no_gradient() -> None:
    torch.manual_seed(0)
    model = Weighted()
    ids = torch.tensor([[3, 3, 3, 1, 2, 2]])
    weights = torch.tensor([[0.1, 0.2, -0.3, 0.0, 7.0, -7.0]])
    sent = sent_by(model, trainer_of(model, max_grad_norm=100.0), ids, weights)
    assert float(sent["bags.weight"].abs().max()) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_an_example_whose_weight_is_not_finite_counts_zero(bad: float) -> None:
    torch.manual_seed(0)
    model = Weighted()
    trainer = trainer_of(model, max_grad_norm=1.0)
    weights = torch.ones(3, LENGTH)
    weights[1, 2] = bad
    ids = torch.randint(0, ROWS, (3, LENGTH))
    with_bad = sent_by(model, trainer, ids, weights)
    assert all(bool(torch.isfinite(part).all()) for part in with_bad.values())
    torch.manual_seed(0)
    model = Weighted()
    others = torch.tensor([0, 2])
    without = sent_by(model, trainer_of(model, max_grad_norm=1.0), ids[others], weights[others])
    if not math.isfinite(bad):
        for name, part in without.items():
            torch.testing.assert_close(with_bad[name], part)


def test_the_layer_is_the_one_it_stands_in_for() -> None:
    torch.manual_seed(0)
    model = Weighted()
    ids, weights = torch.randint(0, ROWS, (3, LENGTH)), torch.randn(3, LENGTH)
    before = model(ids, weights), model(ids, None)
    trainer = trainer_of(model, max_grad_norm=1.0)
    torch.testing.assert_close((model(ids, weights), model(ids, None)), before)
    trainer.step(lambda: losses_of(model, ids, None), lambda: losses_of(model, ids, weights))


def test_weights_that_cannot_be_are_refused() -> None:
    model = Weighted()
    trainer = trainer_of(model, max_grad_norm=1.0)
    ids = torch.randint(0, ROWS, (3, LENGTH))
    for weights, why in (
        (torch.ones(3, LENGTH, requires_grad=True), "require a gradient"),
        (torch.ones(3, LENGTH, dtype=torch.float64), "are float32 of the shape"),
        (torch.ones(LENGTH), r"found torch.float32 \[6\]"),
    ):
        with pytest.raises(InputError, match=f"layer 'bags': per_sample_weights.*{why}"):
            trainer.step(lambda weights=weights: model(ids, weights).square())  # type: ignore[misc]
    for layer in (nn.EmbeddingBag(ROWS, DIM, mode="mean"), nn.Embedding(ROWS, DIM)):
        other = nn.ModuleDict({"bags": layer})
        trainer_of(other, max_grad_norm=1.0)
        with pytest.raises(InputError, match='mode="sum"'):
            other["bags"](ids, None, torch.ones(3, LENGTH))
