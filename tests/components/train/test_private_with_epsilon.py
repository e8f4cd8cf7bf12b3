"""make_private_with_epsilon: the batches, the noise and the rates are what the accounting takes them for."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, WeightedRandomSampler

from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.shared.errors import BudgetExceededError, InputError, PendingNoiseError, PrivacyError
from lazydp.components.train.accounted_trainer import AccountedTrainer
from lazydp.components.train.callers_optimizer import GroupRates
from lazydp.components.train.data.poisson_loader import PoissonLoader, without_examples
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.private import make_private
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.precision import LEAST_PART
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey
from support.own_module import (
    BATCH,
    EPOCHS,
    EXAMPLES,
    Q,
    examples,
    ledger_of_clicks,
    losses_of,
    module,
    prepared,
    sgd,
    trained,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOTAL = EPOCHS * round(1 / Q)


@pytest.fixture
def clicks(tmp_path: Path) -> str:
    return ledger_of_clicks(tmp_path)


# --- what it computes ----------------------------------------------------------------------------------------------


def test_it_is_make_private_on_the_loaders_batches_with_the_optimizers_rates() -> None:
    """The same bits as the long way: the loader's batches, SGD with its scheduler, the calibrated noise."""
    model = module()
    optimizer = sgd(model, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trainer, loader = prepared(model, optimizer=optimizer)
    assert trainer.optimizer is optimizer
    assert len(optimizer.param_groups[0]["params"]) == 2, "weight and bias of the linear layer; the table left"
    assert len(loader) == 4
    batches = []
    for _ in range(EPOCHS):
        for ids, _numbers in loader:
            trainer.step(losses_of(model, ids))
            batches.append(ids)
        scheduler.step()
    trainer.flush()

    rate = schedules.tabulated([0.5] * 4 + [0.25] * 4)
    other = module()
    by_hand = make_private(
        other,
        privacy=PrivacyParameters(
            noise_multiplier=trainer.mechanism.privacy.noise_multiplier, max_grad_norm=1.0, expected_batch_size=BATCH
        ),
        embeddings=EmbeddingSgd(rate, momentum=0.9, weight_decay=0.01),
        dense=DenseOptimizer.named("sgd", learning_rate=rate, momentum=0.9, weight_decay=0.01),
        key=trainer.key.key.derive("another"),
    )
    # Under the trainer's own noise: the difference is then what the two do with it.
    by_hand.tables.draw_under(trainer.trainer.noise_key)
    by_hand.dense.draw_under(trainer.trainer.noise_key)
    for ids in batches:
        by_hand.step(*([losses_of(other, ids)] if len(ids) else []))
    by_hand.flush()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_epsilon_is_that_of_the_steps_done_and_ends_at_the_target() -> None:
    trainer, loader = prepared()
    assert trainer.epsilon(1e-5) == 0.0
    trained(trainer, loader, passes=1)
    assert 0.0 < trainer.epsilon(1e-5) < 1.8
    trained(trainer, loader, passes=1)
    assert 1.99 < trainer.epsilon(1e-5) <= 2.0
    with pytest.raises(BudgetExceededError, match="all 8 steps"):
        next(iter(loader))
    with pytest.raises(BudgetExceededError, match="all 8 steps"):
        trainer.step(lambda: torch.zeros(1))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_batches_are_what_the_sampler_draws(workers: int) -> None:
    data = DataLoader(examples(), batch_size=BATCH, shuffle=True, num_workers=workers)
    trainer, loader = prepared(data_loader=data)
    expected = [loader.sampler.members(step).tolist() for step in range(1, TOTAL + 1)]
    assert trained(trainer, loader) == expected
    assert len({len(batch) for batch in expected}) > 1, "no batches of a fixed size"
    assert trained(*prepared()) == expected
    assert trained(*prepared(key=NoiseKey.for_tests(4))) != expected


def test_two_trainings_under_one_key_draw_other_batches_and_other_noise() -> None:
    key = NoiseKey.for_tests(5)
    (first, of_first), (second, of_second) = prepared(key=key), prepared(key=key)
    assert first.key.commitment != second.key.commitment
    assert trained(first, of_first) != trained(second, of_second)


def test_an_empty_draw_is_a_step_of_noise_and_does_not_call_the_losses() -> None:
    model = module()
    top = model[1]
    assert isinstance(top, nn.Linear)
    trainer, loader = prepared(model, data_loader=DataLoader(Subset(examples(), [0]), batch_size=BATCH))
    empty = 0
    for ids, numbers in loader:
        if len(ids):
            trainer.step(losses_of(model, ids))
            continue
        assert ids.shape == (0, 3)
        assert numbers.shape == (0,)
        before = top.weight.detach().clone()
        assert trainer.step(lambda: 1 / 0).size == 0  # type: ignore[arg-type,return-value]
        assert not torch.equal(before, top.weight)
        empty += 1
    assert empty
    assert trainer.steps_done == 4


class _Point(NamedTuple):
    x: Tensor
    names: list[str]


def test_empty_batches_keep_their_structure() -> None:
    point = _Point(torch.ones(2, 3), ["a", "b"])
    empty = without_examples({"point": point, "rest": (torch.ones(2), [torch.ones(2, 1)])})
    assert empty["point"].x.shape == (0, 3)
    assert empty["point"].names == []
    assert empty["rest"][0].shape == (0,)
    assert empty["rest"][1][0].shape == (0, 1)
    with pytest.raises(InputError, match="a int of collate_fn cannot be emptied"):
        without_examples((torch.ones(2), 3))


def test_a_batch_without_its_step_is_refused() -> None:
    trainer, loader = prepared()
    batches = iter(loader)
    ids, _ = next(batches)
    with pytest.raises(InputError, match=r"one trainer.step for each batch, also for an empty one"):
        next(batches)
    with pytest.raises(InputError, match="step 1 has no batch"):
        trainer.step(losses_of(trainer.model, ids))
    again, _ = next(iter(loader))
    assert torch.equal(again, ids), "the same draw: step 1 has one batch"


def test_a_second_step_with_one_batch_is_refused() -> None:
    trainer, loader = prepared()
    for ids, _ in loader:
        trainer.step(losses_of(trainer.model, ids))
        with pytest.raises(InputError, match="step 2 has no batch"):
            trainer.step(losses_of(trainer.model, ids))
        break
    assert trainer.steps_done == 1


def test_losses_must_be_one_an_example_of_the_batch() -> None:
    """Three losses of one example would be clipped three times; micro-batches count together."""
    trainer, loader = prepared()
    for ids, _ in loader:
        assert len(ids) > 3
        with pytest.raises(
            InputError, match=f"the batch has {len(ids)} examples, and the step has {3 * len(ids)} loss"
        ):
            trainer.step(losses_of(trainer.model, ids.repeat(3, 1)))
        with pytest.raises(InputError, match=f"has {len(ids) - 1} losses"):
            trainer.step(losses_of(trainer.model, ids[:2]), losses_of(trainer.model, ids[3:]))
        assert trainer.steps_done == 0
        trainer.step(losses_of(trainer.model, ids[:2]), losses_of(trainer.model, ids[2:]))
        break
    assert trainer.steps_done == 1


# --- the key -------------------------------------------------------------------------------------------------------


def test_the_key_is_its_own_and_destroyed_at_the_end() -> None:
    model = module()
    with prepared(model, key=None)[0] as trainer:
        assert not trainer.key.key.is_test
        key, loader = trainer.key.key, trainer._loader
        trained(trainer, loader, passes=1)
        with pytest.raises(PendingNoiseError):
            model.state_dict()
    assert repr(key) == "NoiseKey(<destroyed>)"
    model.state_dict()
    with pytest.raises(PrivacyError, match="closed"):
        trainer.step(lambda: torch.zeros(1))
    with pytest.raises(ValueError, match="destroyed"):
        loader.sampler.members(1)
    assert trainer.epsilon(1e-5) > 0


def test_the_key_goes_with_the_trainer() -> None:
    trainer, _ = prepared(key=None)
    key = trainer.key.key
    del trainer, _
    gc.collect()
    assert repr(key) == "NoiseKey(<destroyed>)"


def test_a_callers_key_stays_the_callers() -> None:
    key = NoiseKey.for_tests(3)
    prepared(key=key)[0].close()
    key.to_bytes()


def test_a_training_goes_on_in_another_process_to_the_same_bits() -> None:
    def made(**more: Any) -> tuple[nn.Module, AccountedTrainer, PoissonLoader, Any]:
        model = module()
        optimizer = sgd(model, momentum=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return model, *prepared(model, optimizer=optimizer, key=NoiseKey.for_tests(6), **more), scheduler

    whole, trainer, loader, scheduler = made()
    batches = trained(trainer, loader, passes=1)
    scheduler.step()
    saved = {**copy.deepcopy(trainer.state_dict()), "scheduler": scheduler.state_dict()}
    batches += trained(trainer, loader, passes=1)
    trainer.flush()
    resumed, trainer, loader, scheduler = made(state=saved)
    scheduler.load_state_dict(saved["scheduler"])
    assert trainer.steps_done == 4
    assert trained(trainer, loader, passes=1) == batches[4:]
    trainer.flush()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(PrivacyError, match="another training"):
        prepared(key=NoiseKey.for_tests(8))[0].load_state_dict({**saved, "training": "00"})
    with pytest.raises(InputError, match="give the key of its training"):
        prepared(key=None, state=saved)


# --- what is refused -----------------------------------------------------------------------------------------------


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([])


def _weighted() -> DataLoader[Any]:
    return DataLoader(examples(), batch_size=4, sampler=WeightedRandomSampler([1.0] * EXAMPLES, EXAMPLES))


def _own_batches() -> DataLoader[Any]:
    return DataLoader(examples(), batch_sampler=[[0, 1], [2]])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data_loader": DataLoader(_Stream(), batch_size=4)}, "is iterable.*map-style"),
        ({"data_loader": _weighted()}, "sampler WeightedRandomSampler"),
        ({"data_loader": _own_batches()}, "batch_sampler of its own"),
        ({"data_loader": DataLoader(examples(), batch_size=None)}, "batch_size=None"),
        ({"data_loader": DataLoader(Subset(examples(), []), batch_size=4)}, "has no examples"),
        ({"data_loader": DataLoader(examples(), batch_size=4, collate_fn=len)}, "cannot be emptied"),
        ({"sampling_prob": None}, "none was given. 1 / len\\(data_loader\\) is counted from the data"),
        ({"population": 50}, "both were given"),
        ({"sampling_prob": None, "population": 3}, "of expected_batch_size 10 and population 3"),
        ({"sampling_prob": 1.5}, r"in \(0, 1\], found 1.5"),
        ({"steps": 3}, "either epochs or steps"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"target_epsilon": -1.0}, "target_epsilon"),
        ({"target_delta": 0.0}, "delta must be"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"ledger": "sqlite:///x.db"}, "whose budget is charged with dataset"),
    ],
)
def test_what_cannot_be_drawn_or_accounted_for_is_refused(changes: dict[str, Any], told: str) -> None:
    model = module()
    optimizer = sgd(model)
    with pytest.raises(InputError, match=told):
        prepared(model, optimizer=optimizer, **changes)
    assert type(model[0]) is nn.EmbeddingBag
    assert len(optimizer.param_groups[0]["params"]) == 3


def _two_groups(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)


def _two_tables() -> nn.Module:
    return nn.ModuleList([nn.Embedding(3, 2), nn.Embedding(3, 2)])


def _used(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = sgd(model, momentum=0.9)
    model(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        (lambda m: torch.optim.Adam(m.parameters()), r"Adam cannot train the embedding layers '0'.*give embeddings="),
        (lambda m: sgd(m, momentum=0.9, nesterov=True), "SGD with nesterov=True"),
        (lambda m: sgd(m, maximize=True), "SGD with maximize=True"),
        (_used, "has a state for the embedding layers"),
        (lambda m: torch.optim.SGD(m[1].parameters(), lr=0.1), "parameter '0.weight' requires a gradient and is not"),
        (lambda m: torch.optim.SGD([*m.parameters(), nn.Parameter(torch.ones(1))]), "1 parameters that are none of"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS cannot be used"),
    ],
)
def test_an_optimizer_that_cannot_be_read_is_refused(optimizer: Any, told: str) -> None:
    model = module()
    with pytest.raises(InputError, match=told):
        prepared(model, optimizer=optimizer(model))


def test_tables_in_two_groups_are_refused_and_dense_groups_keep_their_rates() -> None:
    model = nn.Sequential(module()[0], nn.Linear(4, 1))
    trainer, _ = prepared(model, optimizer=_two_groups(model))
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == [0, 1, 1]
    tables = _two_tables()
    with pytest.raises(InputError, match="'0', '1' are in 2 parameter groups"):
        prepared(tables, optimizer=_two_groups(tables))


def test_adam_trains_the_rest_where_the_tables_have_a_step_of_their_own() -> None:
    model = module()
    optimizer = torch.optim.Adam(model.parameters())
    trainer, loader = prepared(model, optimizer=optimizer, embeddings=EmbeddingSgd(1.0))
    trained(trainer, loader)
    assert trainer.optimizer is optimizer
    assert len(optimizer.state) == 2


def test_a_scheduler_may_change_the_tables_rate_alone() -> None:
    model = module()
    optimizer = sgd(model, momentum=0.9)
    trainer, loader = prepared(model, optimizer=optimizer)
    optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(InputError, match=r"changed momentum of the embedding layers from 0.9 to 0.5"):
        trained(trainer, loader)
    assert trainer.steps_done == 0


def test_tables_are_kept_precise_enough_for_the_least_rate_of_a_scheduler() -> None:
    """Whether one float32 holds a table is decided before a scheduler lowered the rate."""
    model = module()
    optimizer = sgd(model)
    rates = GroupRates(optimizer, 0)
    assert [rates(step) for step in (1, 2, 64)] == [0.5, 0.5, 0.5]
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert [rates(step) for step in (1, 2, 64)] == [0.5, 0.5 * LEAST_PART, 0.5 * LEAST_PART]
    rates.take(1)
    optimizer.param_groups[0]["lr"] = 0.25
    assert [rates(step) for step in (1, 2)] == [0.5, 0.25]


def test_a_public_population_gives_the_sampling_probability() -> None:
    trainer, loader = prepared(sampling_prob=None, population=40)
    assert trainer.mechanism.sampling_prob == Q
    assert trainer.mechanism.privacy.expected_batch_size == BATCH
    assert len(loader) == 4


# --- the budget ----------------------------------------------------------------------------------------------------


def test_the_budget_is_reserved_before_the_first_step(clicks: str) -> None:
    trainer, _ = prepared(dataset="clicks", ledger=clicks)
    with Ledger.open(clicks, read_only=True) as ledger:
        assert ledger.show("clicks").charged_epsilon == pytest.approx(trainer.mechanism.target_epsilon, rel=2e-3)
    model = module()
    with pytest.raises(BudgetExceededError, match="does not admit the run"):
        prepared(model, dataset="clicks", ledger=clicks)
    assert type(model[0]) is nn.EmbeddingBag


def test_one_run_is_one_key_and_one_mechanism(clicks: str) -> None:
    given: dict[str, Any] = {"dataset": "clicks", "ledger": clicks, "run_id": "run-1"}
    prepared(key=NoiseKey.for_tests(6), **given)
    prepared(key=NoiseKey.for_tests(6), **given)  # begun again: the same noise
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        prepared(key=NoiseKey.for_tests(7), **given)
    with pytest.raises(InputError, match="used for another run"):
        prepared(key=NoiseKey.for_tests(6), **{**given, "max_grad_norm": 2.0})
    with pytest.raises(InputError, match="is not in the ledger"):
        prepared(**{**given, "dataset": "unknown"})


def test_a_reserved_training_goes_on_from_its_state_alone(clicks: str) -> None:
    """Without the state a training under the same secret key has another noise, and needs a charge of its own."""
    key = NoiseKey.generate()
    given: dict[str, Any] = {"key": key, "dataset": "clicks", "ledger": clicks, "run_id": "run-1"}
    trainer, loader = prepared(**given)
    trained(trainer, loader, passes=1)
    resumed, _ = prepared(**given, state=copy.deepcopy(trainer.state_dict()))
    assert resumed.key.commitment == trainer.key.commitment
    assert resumed.steps_done == 4
    with pytest.raises(PrivacyError, match="bound to one noise key"):
        prepared(**given)
