"""Losses that depend on other examples are refused; those that don't are trained on as if nobody had looked."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism import coupling
from lazydp.components.train.mechanism.coupling import CouplingCheck, halves
from lazydp.components.train.mechanism.gradient_check import GradientCheck
from lazydp.components.train.private import (
    DenseOptimizer,
    EmbeddingSgd,
    NoiseKey,
    PrivacyParameters,
    PrivateTrainer,
    make_private,
)
from lazydp.components.train.tables import schedules

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, SIZE = 7, 5
Couple = Callable[[Tensor], Tensor]


class Scores(nn.Module):
    """A score for each example, from two reads of one table and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.EmbeddingBag(ROWS, 4, mode="sum")
        self.hidden = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.top = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.hidden(self.bags(ids) * self.bags(ids[:, :1]))).squeeze(1)


def trainer_of(model: nn.Module, *, allow_unrepeatable_losses: bool = False, **more: Any) -> PrivateTrainer:
    return make_private(
        model,
        privacy=PrivacyParameters(noise_multiplier=0.5, max_grad_norm=1.0, expected_batch_size=4.0, **more),
        embeddings=EmbeddingSgd(schedules.constant(0.5)),
        dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1)),
        key=NoiseKey.for_tests(0),
        allow_unrepeatable_losses=allow_unrepeatable_losses,
    )


def fresh() -> Scores:
    torch.manual_seed(0)
    return Scores()


def ids_of(seed: int, size: int = SIZE) -> Tensor:
    return torch.randint(0, ROWS, (size, 3), generator=torch.Generator().manual_seed(seed))


def hinge(scores: Tensor) -> Tensor:
    """Against the neighbour in the batch; the first example's margin is met, so that its loss is flat."""
    scores = scores + 100.0 * (torch.arange(scores.shape[0]) == 0)
    return torch.relu(1.0 - scores + scores.roll(1))


COUPLED: dict[str, Couple] = {
    "the mean": lambda z: z - z.mean(),
    "a sum up to the example": lambda z: z.cumsum(0),
    "the first": lambda z: z - z[0],
    "the last": lambda z: z - z[-1],
    "the one before": lambda z: z - torch.cat([z[:1], z[:-1]]),
    "one pair alone": lambda z: torch.cat([z[:3], z[3:4] - z[1:2], z[4:]]),
    "a detached mean": lambda z: z - z.mean().detach(),
    "the one before, detached": lambda z: z - torch.cat([z[:1], z[:-1]]).detach(),
    "the rank": lambda z: z * z.argsort().argsort(),
    "a count": lambda z: z / (1 + (z > z.median()).sum()),
}
INDEPENDENT: dict[str, Couple] = {
    "nothing": lambda z: z,
    "itself, detached": lambda z: z - z.detach().tanh(),
    "a constant by position": lambda z: z - torch.arange(z.shape[0]),
    "a slope that is infinite at zero": lambda z: (z - z.detach()).abs().sqrt(),
    "in place": lambda z: z.mul_(2.0),
}


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_depend_on_other_examples_are_refused(name: str) -> None:
    model = fresh()
    trainer = trainer_of(model)
    with pytest.raises(InputError, match="the loss of one example"):
        trainer.step(lambda: COUPLED[name](model(ids_of(0))).square())
    assert trainer.steps_done == 0
    trainer.step(lambda: model(ids_of(0)).square())  # nothing was changed, and nothing is broken


def test_negatives_of_the_batch_are_refused() -> None:
    for losses in (hinge, lambda z: -torch.log_softmax(z, dim=0)):
        with pytest.raises(InputError, match="depends on other examples through layer 'bags'"):
            trainer_of(model := fresh()).step(lambda losses=losses, model=model: losses(model(ids_of(0))))  # type: ignore[misc]


@pytest.mark.parametrize("name", INDEPENDENT)
def test_losses_of_one_example_each_are_accepted(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = fresh()
    trainer = trainer_of(model)
    for step in range(5):
        trainer.step(lambda step=step: INDEPENDENT[name](model(ids_of(step))).square())  # type: ignore[misc]
    assert trainer.steps_done == 5
    assert not caplog.records


def test_either_look_misses_what_the_other_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of both: with one switched off, something coupled is accepted."""

    def accepted() -> set[str]:
        names = set()
        for name, couple in COUPLED.items():
            model = fresh()
            try:
                trainer_of(model).step(lambda couple=couple, model=model: couple(model(ids_of(0))).square())  # type: ignore[misc]
                names.add(name)
            except InputError:
                pass
        return names

    assert accepted() == set()
    monkeypatch.setattr(GradientCheck, "refuse", lambda *arguments, **options: None)
    with monkeypatch.context() as patch:
        patch.setattr(CouplingCheck, "refuse_values", lambda *arguments, **options: None)
        assert accepted() == {"a detached mean", "the one before, detached", "the rank", "a count"}
    monkeypatch.setattr(CouplingCheck, "refuse_gradients", lambda *arguments, **options: None)
    monkeypatch.setattr(coupling, "_stayed", lambda *arguments: True)
    assert accepted() == set(COUPLED)


def test_what_couples_later_steps_is_seen_in_the_first_few() -> None:
    model = fresh()
    trainer = trainer_of(model)
    for step in range(coupling.STEPS_LOOKED_AT - 1):
        trainer.step(lambda step=step: model(ids_of(step)).square())  # type: ignore[misc]
    with pytest.raises(InputError, match="the loss of one example"):
        trainer.step(lambda: COUPLED["the mean"](model(ids_of(3))).square())


def test_examples_of_one_user_may_depend_on_each_other() -> None:
    """They are clipped as one; two users may not."""
    sizes = [2, 1, 2]

    def of_own_user(scores: Tensor) -> Tensor:
        return torch.cat([part - part.mean().detach() + part.sum() for part in scores.split(sizes)])

    model = fresh()
    trainer = trainer_of(model, user_gradient="sum")
    users = [torch.tensor(sizes)]
    trainer.step(lambda: of_own_user(model(ids_of(0))).square(), user_sizes=users)
    for name in ("the mean", "a detached mean"):
        trainer = trainer_of(model := fresh(), user_gradient="sum")
        with pytest.raises(InputError, match="the loss of one example"):
            trainer.step(
                lambda name=name, model=model: COUPLED[name](model(ids_of(0))).square(),  # type: ignore[misc]
                user_sizes=users,
            )


def test_a_look_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as without it, dropout included, and as few calls of the function as were promised."""
    ends, calls = [], []
    for looks in (True, False):
        if not looks:  # no look at examples, hence none at gradients
            monkeypatch.setattr(coupling, "STEPS_LOOKED_AT", 0)
        model = fresh()
        trainer = trainer_of(model)
        called = 0

        def losses(seed: int, model: nn.Module = model) -> Tensor:
            nonlocal called
            called += 1
            return model(ids_of(seed)).square()

        for step in range(5):
            trainer.step(lambda step=step: losses(step), lambda step=step: losses(10 + step))  # type: ignore[misc]
        trainer.flush()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
        calls.append(called)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert calls == [10 + 3 * 4, 10]


def test_a_function_that_does_not_repeat_itself_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Or told of, where the caller gives the look up."""
    caplog.set_level(logging.WARNING, "lazydp.train")

    def counting() -> tuple[nn.Module, Callable[[], Tensor]]:
        numbers, model = itertools.count(), fresh()
        return model, lambda: next(numbers) * model(ids_of(0))

    def exhausted() -> tuple[nn.Module, Callable[[], Tensor]]:
        batches, model = iter([ids_of(0)]), fresh()
        return model, lambda: model(next(batches)).square()

    for made, steps in ((counting, 3), (exhausted, 1)):
        model, losses = made()
        trainer = trainer_of(model)
        with pytest.raises(InputError, match=r"cannot be computed again alike.*allow_unrepeatable_losses=True"):
            trainer.step(losses)
        assert trainer.steps_done == 0
        assert not caplog.records
        model, losses = made()
        trainer = trainer_of(model, allow_unrepeatable_losses=True)
        for _ in range(steps):
            trainer.step(losses)
        assert trainer.steps_done == steps
        assert [record.message[:55] for record in caplog.records] == [
            "the losses of one batch cannot be computed again alike,"
        ]
        caplog.clear()


@given(units=st.integers(0, 70), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_halves_part_every_ordered_pair(units: int, seed: int) -> None:
    found = list(halves(units, torch.Generator().manual_seed(seed)))
    parted = torch.zeros(units, units, dtype=torch.bool)
    for half in found:
        parted |= half.unsqueeze(1) & ~half.unsqueeze(0)
    assert bool((parted | torch.eye(units, dtype=torch.bool)).all())
    assert len(found) <= 2 * max(units, 1).bit_length()
