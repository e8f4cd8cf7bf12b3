"""What a statement says of a run, figure by figure, and what its page shows; nothing is trained."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lazydp.components.budget.accounting.epsilon import accountant_version, epsilon
from lazydp.components.budget.accounting.events import dpsgd_event
from lazydp.components.budget.statement import (
    CHOICE_OF_SETTINGS,
    COUNTS_FLOATING_POINT,
    FLOATING_POINT,
    JOINT_GUARANTEE,
    MODEL_GUARANTEE,
    PrivacyStatement,
)
from lazydp.components.export import statement as module
from lazydp.components.export.card import _text
from lazydp.components.export.statement import statement_of
from lazydp.components.features.spec_file import parse_spec
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.identity import RunIdentity
from support.tiny import TINY_CONFIG, TINY_SPEC

DELTA = 1e-5


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epsilon over the steps is computed at twenty steps; here the last one stands for all."""
    monkeypatch.setattr(module, "epsilon_over_steps", lambda event, *, steps, delta: [(steps, 2.0 * steps * delta)])


def stated(
    settings: dict[str, Any] | None = None,
    *,
    spec: str = TINY_SPEC,
    bound: int | None = 20,
    steps: int = 3,
    test_key: bool = False,
) -> PrivacyStatement:
    config = TrainConfig.parse({**TINY_CONFIG, "steps": 3, **(settings or {})}, where="test")
    return statement_of(
        RunIdentity("run", config, "dataset", "version", config.noise_multiplier),
        spec=parse_spec(spec, where="test"),
        max_examples_per_user=bound,
        steps=steps,
        test_key=test_key,
    )


def event(noise_multiplier: float, sampling_prob: float, steps: int) -> Any:
    return dpsgd_event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps)


def test_the_figures_of_a_run() -> None:
    found = stated()
    assert found.private
    assert found.why_not_private is None
    assert found.epsilon == pytest.approx(epsilon(event(4.0, 0.05, 3), delta=DELTA), rel=1e-6)
    assert found.epsilon_rdp == pytest.approx(epsilon(event(4.0, 0.05, 3), delta=DELTA, accountant="rdp"), rel=1e-6)
    assert found.epsilon_without_amplification == pytest.approx(epsilon(event(4.0, 1.0, 3), delta=DELTA), rel=1e-6)
    assert found.epsilon_user_level is not None
    assert found.epsilon_user_level > 5 * found.epsilon  # type: ignore[operator]
    assert [(point.step, point.epsilon) for point in found.epsilon_over_steps] == [(3, 6 * DELTA)]
    assert (found.delta, found.accountant, found.accountant_version) == (DELTA, "pld", accountant_version())
    assert (found.noise_multiplier, found.sampling_prob, found.expected_batch_size) == (4.0, 0.05, 40)
    assert (found.steps, found.max_examples_per_user, found.privacy_unit) == (3, 20, "example")
    assert found.max_grad_norm == 0.5
    assert (found.popularity, found.start, found.minimum_quality, found.tuning) == (None, None, None, None)
    assert found.floating_point == FLOATING_POINT
    assert not found.test_key


def test_a_run_that_was_stopped_is_charged_for_the_steps_that_it_did() -> None:
    assert stated(steps=1).epsilon == pytest.approx(epsilon(event(4.0, 0.05, 1), delta=DELTA), rel=1e-6)
    assert stated(steps=1).steps == 1


@pytest.mark.parametrize(
    ("settings", "test_key", "why"),
    [
        ({"mode": "sgd", "noise_multiplier": None}, False, "trained in mode sgd, without clipping and without noise"),
        ({"mode": "sgd", "noise_multiplier": None}, True, "trained in mode sgd, without clipping and without noise"),
        ({}, True, "trained under a noise key made for tests, which everyone knows"),
    ],
)
def test_no_figure_is_claimed_without_privacy(settings: dict[str, Any], test_key: bool, why: str) -> None:
    found = stated(settings, test_key=test_key)
    assert not found.private
    assert found.why_not_private == why
    figures = (found.epsilon, found.epsilon_rdp, found.epsilon_user_level, found.epsilon_without_amplification)
    assert figures == (None,) * 4
    assert found.epsilon_over_steps == ()
    assert found.test_key == test_key
    assert found.line() == f"not private: {why}"


def test_without_a_bound_nothing_is_known_of_a_person() -> None:
    found = stated(bound=None)
    assert found.epsilon_user_level is None
    assert found.max_examples_per_user is None
    assert found.epsilon == stated().epsilon
    assert not any("rows are kept" in text for text in found.not_covered)


def test_no_step_has_no_sampler_and_no_clipping() -> None:
    found = stated(steps=0)
    assert found.sampler == "none: no step was taken"
    assert (found.max_grad_norm, found.expected_batch_size, found.epsilon_over_steps) == (None, None, ())
    assert stated().sampler != found.sampler


def test_counts_are_stated_with_what_they_add() -> None:
    found = stated({"popularity": {"noise_multiplier": 5.0}})
    plain = stated()
    assert found.popularity is not None
    assert (found.popularity.sensitivity, found.popularity.noise_multiplier) == (1.0, 5.0)
    assert found.popularity.counted == "positive training examples"
    assert found.popularity.epsilon_without == pytest.approx(plain.epsilon, rel=1e-6)
    assert found.epsilon is not None
    assert found.epsilon > plain.epsilon  # type: ignore[operator]
    assert found.floating_point == f"{FLOATING_POINT}; {COUNTS_FLOATING_POINT}"
    of_users = stated({"popularity": {"noise_multiplier": 5.0}, "privacy_unit": "user"})
    assert of_users.popularity is not None
    assert of_users.popularity.counted == "users, once for each item"
    assert of_users.popularity.sensitivity == pytest.approx(math.sqrt(20))


def test_a_user_as_the_unit_is_covered_whole() -> None:
    found = stated({"privacy_unit": "user"})
    assert found.privacy_unit == "user"
    assert not any("beyond its own training example" in text for text in found.not_covered)
    assert CHOICE_OF_SETTINGS in found.not_covered


SPLIT = "\nsplit: {kind: leave_last_out}\n"
NO_HISTORY = TINY_SPEC.replace("history: {max_length: 5, pooling: mean}\n", "")


@pytest.mark.parametrize(
    ("spec", "bound", "effects"),
    [
        (TINY_SPEC + SPLIT, 20, ["histories of its user's later", "is held out", "which 20 of its user's rows"]),
        (TINY_SPEC + SPLIT, None, ["histories of its user's later", "is held out"]),
        (NO_HISTORY + SPLIT, None, ["is held out"]),
        (NO_HISTORY + "\nsplit: {kind: none}\n", None, []),
    ],
)
def test_what_an_example_decides_besides_is_told(spec: str, bound: int | None, effects: list[str]) -> None:
    told = [text for text in stated(spec=spec, bound=bound).not_covered if "beyond its own training example" in text]
    assert len(told) == bool(effects)
    all_effects = ["histories of its user's later", "is held out", "rows are kept"]
    for text in told:
        assert [effect for effect in effects if effect not in text] == []
        assert sum(effect in text for effect in all_effects) == len(effects)


@pytest.mark.parametrize(("user", "guarantee"), [("history", JOINT_GUARANTEE), (None, MODEL_GUARANTEE)])
def test_a_model_of_histories_alone_has_the_joint_guarantee(user: str | None, guarantee: str) -> None:
    model = {"kind": "two_tower", "embedding_dim": 8} | ({"user": user} if user else {})
    assert stated({"model": model}).guarantee == guarantee


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        ("", ""),
        ([], ""),
        (0, "0"),
        (True, "yes"),
        (False, "no"),
        (1.23456789, "1.23457"),
        (["a", 2.0], "a; 2"),
        ({"noise_multiplier": 1.5, "left_out": None, "b": "x"}, "noise multiplier 1.5, b x"),
    ],
)
def test_values_on_the_page(value: object, text: str) -> None:
    assert _text(value) == text
