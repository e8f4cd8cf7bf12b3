"""A step that is interrupted at any line ends nowhere, or whole; where it changed weights, nothing goes on from it."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lazydp.components.models.build import build_model
from lazydp.components.models.config import TwoTowerConfig
from lazydp.components.shared.errors import FormatError, InputError, PendingNoiseError, UnfinishedStepError
from lazydp.components.train import private, private_trainer
from lazydp.components.train.engine import dense
from lazydp.components.train.engine import step as engine
from lazydp.components.train.mechanism import gradient_check, step_guard
from lazydp.components.train.mechanism.step_guard import StepGuard
from lazydp.components.train.tables import embedding_tables as tables
from lazydp.components.train.tables import schedules, skip_ahead
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = {inspect.getfile(module) for module in (private_trainer, engine, tables, dense, skip_ahead, step_guard)}
FIRST, OTHER = 7, 8
"""Seeds of the batch that is interrupted and of the one that the user comes back with."""


def settings() -> dict[str, Any]:
    return {
        # Noise of ones: its sum does not depend on when a row caught up, so that whole steps can be compared.
        "noise": "ones",
        "privacy": private.PrivacyParameters(noise_multiplier=0.5, max_grad_norm=0.3, expected_batch_size=4.0),
        "embeddings": private.EmbeddingSgd(schedules.constant(0.2)),
        "dense": private.DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.2), momentum=0.5),
        "key": NoiseKey.for_tests(0),
    }


class Subject:
    """Either trainer, driven by the seeds of batches."""

    def __init__(self, trainer: Any, step: Callable[[int], object], weights: Callable[[], dict[str, Tensor]]) -> None:
        self.trainer = trainer
        self.step = step
        self._weights = weights

    def after(self, state: dict[str, Any], *seeds: int) -> dict[str, Tensor]:
        """Copies of all weights after steps with these batches, from `state`."""
        self.trainer.load_state_dict(state)
        return self.then(*seeds)

    def then(self, *seeds: int) -> dict[str, Tensor]:
        for seed in seeds:
            self.step(seed)
        self.trainer.flush()
        return {name: value.detach().clone() for name, value in self._weights().items()}


def of_engine(world: Any) -> Subject:
    made = world()
    model = build_model(made.layout, TwoTowerConfig(embedding_dim=4, embedding_init_std=0.5))
    trainer = engine.Engine(model, mode="lazydp", **settings())
    return Subject(
        trainer,
        lambda seed: trainer.step(made.examples(3, seed=seed)),
        lambda: {**dict(model.named_parameters()), **trainer.table_weights()},
    )


def of_module(_: Any) -> Subject:
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(6, 4, mode="sum"), nn.Linear(4, 1), nn.Flatten(0))
    trainer = private.make_private(model, **settings())

    def step(seed: int) -> None:
        ids = torch.randint(0, 6, (3, 2), generator=torch.Generator().manual_seed(seed))
        trainer.step(lambda: model(ids).square())

    return Subject(trainer, step, model.state_dict)


def interrupted_at(line: int, action: Callable[[], object], files: Collection[str] = FILES) -> bool:
    """Run `action`, pressing Ctrl-C at the line-th line that it runs in one of `files`; whether there was one."""
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        left -= event == "line"
        if event == "line" and left == 0:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5) for name in expected)


def outcomes(subject: Subject) -> dict[str, int]:
    """How often each thing happens to a step, over every line that it may be interrupted at."""
    for seed in (1, 2):
        subject.step(seed)
    before = copy.deepcopy(subject.trainer.state_dict())
    not_taken, taken = subject.after(before, OTHER), subject.after(before, FIRST, OTHER)
    counts = dict.fromkeys(("not taken", "taken", "refused", "torn"), 0)
    line = 0
    while True:
        line += 1
        subject.trainer.load_state_dict(before)
        if not interrupted_at(line, lambda: subject.step(FIRST)):
            return counts
        try:
            found = subject.then(OTHER)
        except UnfinishedStepError:
            for refused in (subject.trainer.flush, subject.trainer.state_dict):
                with pytest.raises(UnfinishedStepError, match="load a state"):
                    refused()
            assert same(subject.after(before, OTHER), not_taken)
            counts["refused"] += 1
            continue
        steps = subject.trainer.steps_done
        expected = {3: not_taken, 4: taken}[steps]
        counts[("not taken" if steps == 3 else "taken") if same(found, expected) else "torn"] += 1


@pytest.mark.parametrize("make", [of_engine, of_module])
def test_an_interrupted_step_was_not_taken_or_taken_or_is_refused(world: Any, make: Any) -> None:
    counts = outcomes(make(world))
    assert counts["torn"] == 0
    assert counts["not taken"] > 10
    assert counts["refused"] > 10
    assert counts["taken"] > 0


@pytest.mark.parametrize("make", [of_engine, of_module])
def test_without_the_guard_steps_would_be_torn(world: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same noise then covers two batches, which is what the comparison sees."""
    monkeypatch.setattr(StepGuard, "refuse_unfinished", lambda self: None)
    counts = outcomes(make(world))
    assert counts["refused"] == 0
    assert counts["torn"] > 10


def test_rows_of_an_interrupted_step_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = of_module(None)
    layer = subject.trainer.model[0]
    monkeypatch.setattr(subject.trainer.dense, "update", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        subject.step(FIRST)
    with pytest.raises(PendingNoiseError):
        _ = layer.weight
    with pytest.raises(UnfinishedStepError):
        subject.trainer.flush()


def too_many(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tables, "_MAX_EXAMPLES", 3)


def without_a_rate(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer.tables, "_optimizer", private.EmbeddingSgd(schedules.tabulated([])))


def without_a_dense_rate(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer.dense, "_learning_rate", schedules.tabulated([]))


@pytest.mark.parametrize("why", [too_many, without_a_rate, without_a_dense_rate])
@pytest.mark.parametrize("make", [of_engine, of_module])
def test_a_step_that_is_refused_changes_nothing_and_can_be_taken_again(
    world: Any, make: Any, why: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(world).then(FIRST)
    subject = make(world)
    with monkeypatch.context() as patch:
        why(subject.trainer, patch)
        with pytest.raises(InputError, match=r"fewer than 2\^24 examples, this one has 3|covers steps"):
            subject.step(OTHER)
    assert subject.trainer.steps_done == 0
    assert same(subject.then(FIRST), expected)


@pytest.mark.parametrize("make", [of_engine, of_module])
def test_a_load_that_failed_leaves_nothing_to_go_on_with(world: Any, make: Any) -> None:
    subject = make(world)
    good = copy.deepcopy(subject.trainer.state_dict())
    with pytest.raises(FormatError):
        subject.trainer.load_state_dict({**good, "dense": {"model": {}, "optimizer": {}}})
    with pytest.raises(UnfinishedStepError):
        subject.step(FIRST)
    subject.trainer.load_state_dict(good)
    subject.step(FIRST)


def test_an_interrupted_look_spoils_no_row() -> None:
    """The first steps make the rows they read NaN for a while."""
    files = {inspect.getfile(gradient_check)}
    expected = of_module(None).then(OTHER)
    line, refused = 0, 0
    while True:
        line += 1
        subject = of_module(None)
        before = copy.deepcopy(subject.trainer.state_dict())
        if not interrupted_at(line, lambda subject=subject: subject.step(FIRST), files):  # type: ignore[misc]
            break
        try:
            found = subject.then(OTHER)
        except UnfinishedStepError:
            refused += 1
            found = subject.after(before, OTHER)
        assert same(found, expected), line
    assert line > 50
    assert refused > 10
