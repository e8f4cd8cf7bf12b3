"""Events: the right one for each sampler, and JSON that is read back strictly."""

import json
import math

import pytest
from dp_accounting import dp_event
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.budget.accounting.events import (
    composed,
    counts_event,
    dpsgd_event,
    event_from_json,
    event_to_json,
    tuning_event,
    user_level_event,
    without_amplification,
)
from lazydp.components.shared.errors import FormatError, InputError, PrivacyError


def test_poisson() -> None:
    event = dpsgd_event(noise_multiplier=1.1, sampling_prob=0.01, steps=7)
    one = dp_event.PoissonSampledDpEvent(0.01, dp_event.GaussianDpEvent(1.1))
    assert event == dp_event.SelfComposedDpEvent(one, 7)
    assert dpsgd_event(noise_multiplier=1.1, sampling_prob=0.01, steps=0) == dp_event.NoOpDpEvent()


@pytest.mark.parametrize(("sampler", "rounds"), [("shuffled", 4), ("fixed_size", 7)])
def test_samplers_without_amplification(sampler: str, rounds: int) -> None:
    """One unit more or less exchanges a member: twice the sensitivity, in each epoch or in each step."""
    event = dpsgd_event(noise_multiplier=1.1, sampling_prob=0.5, steps=7, sampler=sampler)
    assert event == dp_event.SelfComposedDpEvent(dp_event.GaussianDpEvent(1.1 / 2), rounds)


def test_no_sampler_is_given_the_amplification_of_poisson_that_did_not_draw_so() -> None:
    def at(sampler: str, **more: int) -> float:
        event = dpsgd_event(noise_multiplier=8.0, sampling_prob=0.01, steps=1000, sampler=sampler, **more)
        return epsilon(event, delta=1e-5)

    poisson = at("poisson")
    assert poisson < at("truncated_poisson", population=1000, batch_size=15)
    assert poisson < at("shuffled") < at("fixed_size")
    with pytest.raises(PrivacyError, match="'reservoir'"):
        at("reservoir")
    with pytest.raises(InputError, match="population"):
        at("truncated_poisson")


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.nan},
        {"sampling_prob": 0.0},
        {"sampling_prob": 1.5},
        {"steps": -1},
        {"steps": 2.0},
        {"steps": True},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        dpsgd_event(**({"noise_multiplier": 1.0, "sampling_prob": 0.1, "steps": 3} | wrong))


@settings(deadline=None, max_examples=30)
@given(k=st.integers(2, 2000), q=st.floats(1e-5, 0.5))
def test_user_level_event_never_understates_the_binomial(k: int, q: float) -> None:
    event = user_level_event(noise_multiplier=1.0, sampling_prob=q, steps=1, max_examples_per_user=k)
    assert isinstance(event, dp_event.MixtureOfGaussiansDpEvent)
    assert math.fsum(event.sampling_probs) == pytest.approx(1, abs=1e-9)
    assert event.sensitivities[-1] == k
    # Stochastic dominance: at every level at least the binomial's mass lies at or above it.
    for level in range(0, k + 1, max(1, k // 20)):
        above = math.fsum(p for s, p in zip(event.sensitivities, event.sampling_probs, strict=True) if s >= level)
        assert above >= binom.sf(level - 1, k, q) * (1 - 1e-9) - 1e-300


def test_user_of_one_example_is_an_example() -> None:
    common = {"noise_multiplier": 1.0, "sampling_prob": 0.02, "steps": 9}
    assert user_level_event(**common, max_examples_per_user=1) == dpsgd_event(**common)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_examples_per_user"):
        user_level_event(**common, max_examples_per_user=0)  # type: ignore[arg-type]


def test_counts_cost_what_one_gaussian_does() -> None:
    assert counts_event(noise_multiplier=3.0) == dp_event.GaussianDpEvent(3.0)
    # Several contributions of one unit may all fall on one count.
    assert counts_event(noise_multiplier=3.0, contributions=6) == dp_event.GaussianDpEvent(0.5)
    for wrong in ({"noise_multiplier": 0.001}, {"noise_multiplier": math.nan}, {"contributions": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            counts_event(**({"noise_multiplier": 1.0} | wrong))


EVENTS = [
    dpsgd_event(noise_multiplier=0.1 + 0.2, sampling_prob=1 / 3, steps=1000),
    dpsgd_event(
        noise_multiplier=1.0, sampling_prob=0.1, steps=3, sampler="truncated_poisson", population=9, batch_size=4
    ),
    user_level_event(noise_multiplier=1.0, sampling_prob=0.01, steps=10, max_examples_per_user=50),
    without_amplification(noise_multiplier=2.0, steps=10, max_examples_per_user=3),
    tuning_event(dp_event.GaussianDpEvent(5.0), mean_trials=10, shape=math.inf),
    composed(
        [
            user_level_event(noise_multiplier=1.0, sampling_prob=0.01, steps=9, max_examples_per_user=5),
            counts_event(noise_multiplier=0.1 + 0.2),
        ]
    ),
    dp_event.LaplaceDpEvent(2.0),
    dp_event.DiscreteLaplaceDpEvent(0.5, 2),
    dp_event.NonPrivateDpEvent(),
    composed([dp_event.GaussianDpEvent(1.0), dp_event.NoOpDpEvent()]),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_json_round_trip(event: dp_event.DpEvent) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event), allow_nan=False))) == event


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"type": "GaussianDpEvent"}, "noise_multiplier"),
        ({"type": "GaussianDpEvent", "noise_multiplier": 1.0, "more": 1}, "more"),
        ({"type": "GaussianDpEvent", "noise_multiplier": "1"}, "noise_multiplier"),
        ({"type": "GaussianDpEvent", "noise_multiplier": -1}, "noise_multiplier"),
        ({"type": "GaussianDpEvent", "noise_multiplier": True}, "noise_multiplier"),
        ({"type": "CltDpEvent", "mu": 1.0}, "CltDpEvent"),
        ({"type": "SelfComposedDpEvent", "event": {"type": "NoOpDpEvent"}, "count": 1.5}, "count"),
        ({"type": "SelfComposedDpEvent", "event": {"type": "os.system"}, "count": 1}, "event.event"),
        ({"type": "ComposedDpEvent", "events": []}, "events"),
        ({"type": "PoissonSampledDpEvent", "sampling_probability": 2, "event": {"type": "NoOpDpEvent"}}, "probability"),
        (["GaussianDpEvent"], "object"),
        ({}, "None"),
    ],
    ids=str,
)
def test_json_is_read_strictly(document: object, what: str) -> None:
    with pytest.raises(FormatError, match=what):
        event_from_json(document)


def test_an_event_without_a_name_of_ours_is_not_written() -> None:
    with pytest.raises(FormatError, match="ZCDpEvent"):
        event_to_json(dp_event.ZCDpEvent(0.1))
