"""What a run costs: its event by unit, sampling and counts, and the noise that is calibrated for it."""

from typing import Any

import pytest

from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import RunCost, calibrated_noise_multiplier

MINIMAL: dict[str, Any] = {
    "model": {"kind": "two_tower", "embedding_dim": 8},
    "privacy_unit": "example",
    "sampling_prob": 0.01,
    "expected_batch_size": 100,
    "steps": 50,
    "noise_multiplier": 1.0,
    "target_delta": 1e-5,
}


def parse(**changes: Any) -> TrainConfig:
    return TrainConfig.parse({**MINIMAL, **changes}, where="train.yaml")


def test_the_event_is_of_the_unit_asked_for() -> None:
    example = RunCost(parse(), 7).of_run()
    assert example == RunCost(parse(), 3).of_run()
    user = parse(privacy_unit="user")
    assert RunCost(user, 7).of_run() != example
    assert RunCost(user, 7).of_run() != RunCost(user, 3).of_run()
    assert RunCost(parse(), 7).of_run(steps=10) != example


@pytest.mark.parametrize("unit", [{}, {"privacy_unit": "user"}], ids=["example", "user"])
def test_the_event_of_a_run_with_counts_is_training_and_counts(unit: dict[str, Any]) -> None:
    from dp_accounting import dp_event

    counting = parse(popularity={"noise_multiplier": 20.0}, **unit)
    for steps in (0, 10, None):
        training = RunCost(parse(**unit), 7).of_run(steps=steps)
        assert RunCost(counting, 7).of_training(steps=steps) == training
        assert RunCost(counting, 7).of_run(steps=steps) == dp_event.ComposedDpEvent(
            [training, dp_event.GaussianDpEvent(20.0)]
        )


def test_noise_is_calibrated_for_training_and_counts_together() -> None:
    from lazydp.components.budget.accounting.epsilon import epsilon

    def calibrated(**changes: Any) -> tuple[TrainConfig, float]:
        config = parse(noise_multiplier=None, target_epsilon=2.0, **changes)
        return config, calibrated_noise_multiplier(config, 7)

    for unit in ({}, {"privacy_unit": "user"}):
        config, sigma = calibrated(popularity={"noise_multiplier": 5.0}, **unit)
        whole = epsilon(RunCost(config, 7, sigma).of_run(), delta=1e-5)
        assert 1.96 < whole <= 2.0
        # The control: the sigma of training alone would overspend.
        _, alone = calibrated(**unit)
        assert alone < sigma
        assert epsilon(RunCost(config, 7, alone).of_run(), delta=1e-5) > 2.0
    with pytest.raises(InputError, match=r"popularity.noise_multiplier 1 costs epsilon 4.\d+ before any training"):
        calibrated(popularity={"noise_multiplier": 1.0})


def test_the_noise_multiplier_is_calibrated_to_the_target() -> None:
    from lazydp.components.budget.accounting.epsilon import epsilon

    config = parse(noise_multiplier=None, target_epsilon=2.0)
    sigma = calibrated_noise_multiplier(config, 1)
    assert epsilon(RunCost(config, 1, sigma).of_run(), delta=1e-5) == pytest.approx(2.0, rel=0.02)
    assert epsilon(RunCost(config, 1, sigma).of_run(), delta=1e-5) <= 2.0
    assert calibrated_noise_multiplier(parse(), 1) == 1.0


def test_the_event_follows_from_what_is_sampled() -> None:
    of_users = parse(privacy_unit="user", sampling="user", user_gradient="sum", noise_multiplier=2.0)
    plain = parse(noise_multiplier=2.0)
    # A sampled user contributes one clipped gradient, whatever k is: the event of one example, per user.
    assert RunCost(of_users, 20).of_run() == RunCost(of_users, 3).of_run() == RunCost(plain, 20).of_run()
    bounded = parse(privacy_unit="user", noise_multiplier=2.0)
    assert (
        len(
            {
                str(event)
                for event in (
                    RunCost(of_users, 20).of_run(),
                    RunCost(bounded, 20).of_run(),
                    RunCost(bounded, 3).of_run(),
                )
            }
        )
        == 3
    )
    # Norms by group change the noise, not the event.
    assert (
        RunCost(parse(noise_multiplier=2.0, max_grad_norm={"dense": 1, "embeddings": 9}), None).of_run()
        == RunCost(plain, None).of_run()
    )
