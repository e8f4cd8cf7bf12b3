"""What is said about a model's privacy: in one line, on its card, and in pictures."""

import dataclasses
import re
from typing import Any

import pytest

from lazydp.components.budget.ledger.views import DatasetBudget
from lazydp.components.budget.report.claim import ModelCard, at_least, at_most, audit_words, meaning, model_card
from lazydp.components.budget.report.pictures import budget_bar, budget_words, steps_chart
from lazydp.components.budget.statement import StepEpsilon
from support.statements import stated


def card(**changes: Any) -> ModelCard:
    return model_card("m", (), stated(**changes), timeline=None, notice=None, warn_above=10)


def test_the_person_comes_first() -> None:
    seen = card(privacy_unit="example", epsilon=7.994, epsilon_user_level=1092.0, delta=1e-5)
    assert [(figure.per, figure.epsilon) for figure in seen.figures] == [("person", 1092.0), ("interaction", 7.994)]
    assert "practically certain" in seen.figures[0].sentence
    assert len(seen.warnings) == 1
    assert "is 1,092, above 10" in seen.warnings[0]


def test_a_figure_is_said_in_words() -> None:
    seen = card(privacy_unit="user", epsilon=1.0, delta=1e-5)
    assert [figure.per for figure in seen.figures] == ["person"]
    # exp(1) / (1 + exp(1)) is 0.73106.
    assert "sees this model, can become at most 73.11 % sure" in seen.figures[0].sentence
    assert seen.figures[0].sentence.endswith("(except with the chance delta, 0.00001).")
    assert seen.warnings == ()


def test_a_figure_per_person_that_is_missing_is_a_warning() -> None:
    seen = card(privacy_unit="example", epsilon_user_level=None)
    assert seen.figures[0].epsilon is None
    assert "Nothing is known" in seen.warnings[0]


def test_no_privacy_is_no_figure() -> None:
    seen = card(private=False, epsilon=None, why_not_private="it was trained without noise")
    assert seen.figures == ()
    assert "trained without noise" in seen.warnings[0]


def test_bounds_are_never_rounded_to_the_better_side() -> None:
    assert [at_most(value) for value in (0.0, 8.0, 7.99401, 1092.2, 12345.6, 0.00012341)] == [
        "0", "8", "7.995", "1,093", "12,350", "0.0001235",
    ]  # fmt: skip
    assert [at_least(value) for value in (0.0, 8.0, 7.9959, 1092.9)] == ["0", "8", "7.995", "1,092"]
    assert at_most(float("inf")) == at_least(float("inf")) == "without bound"
    assert "practically certain" in meaning(800.0, 1e-5, "person")


def test_the_limit_itself_is_no_warning() -> None:
    assert card(privacy_unit="user", epsilon=10.0).warnings == ()
    [warning] = card(privacy_unit="user", epsilon=10.01).warnings
    assert "per interaction" not in warning


@pytest.mark.parametrize(("shown", "contradicts"), [(1.9, False), (2.0, False), (2.1, True)])
def test_an_audit_is_compared_with_the_claim(shown: float, contradicts: bool) -> None:
    audit = {"epsilon_lower_bound": shown, "confidence": 0.95, "method": "planted examples"}
    seen = card(privacy_unit="user", audit=audit)
    words = audit_words(seen.statement)
    assert words.startswith(
        "an attack made for the purpose showed at least this epsilon per person, with 95 % confidence"
    )
    assert ("does not contradict it" in words) is not contradicts
    assert ("more than the 2 claimed, so the audit contradicts the claim" in words) is contradicts
    assert [warning for warning in seen.warnings if "An audit showed more" in warning] == list(seen.warnings)
    assert len(seen.warnings) == contradicts


def test_no_audit_and_no_claim_are_said() -> None:
    assert audit_words(stated()) == "no audit was made of this model"
    audit = {"epsilon_lower_bound": 1.0, "confidence": 0.9, "method": "planted examples"}
    assert audit_words(stated(private=False, epsilon=None, audit=audit)).endswith("; no epsilon is claimed")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"privacy_unit": "user"}, "epsilon 2 at delta 1e-05 per user (pld, add or remove one privacy unit)"),
        ({}, "epsilon 2 at delta 1e-05 per example (pld, add or remove one privacy unit)"),
        (
            {"epsilon_user_level": 30.0},
            "epsilon 2 at delta 1e-05 per example (pld, add or remove one privacy unit); per user epsilon 30",
        ),
        (
            {"privacy_unit": "user", "epsilon_user_level": 30.0},
            "epsilon 2 at delta 1e-05 per user (pld, add or remove one privacy unit)",
        ),
        ({"private": False, "why_not_private": "no noise"}, "not private: no noise"),
        ({"private": False}, "not private: no privacy is claimed"),
        ({"epsilon": None}, "not private: no privacy is claimed"),
    ],
)
def test_a_statement_in_one_line(changes: dict[str, Any], line: str) -> None:
    assert stated(**changes).line() == line


def test_a_statement_is_of_no_test_key_unless_it_says_so() -> None:
    assert not stated().test_key


@pytest.mark.parametrize(
    ("bounds", "others"),
    [
        ({"epsilon": 0}, {"epsilon": -0.1}),
        ({"delta": 1e-300}, {"delta": 0}),
        ({"delta": 0.999}, {"delta": 1}),
        ({"max_examples_per_user": 1}, {"max_examples_per_user": 0}),
        ({"noise_multiplier": 0}, {"noise_multiplier": -0.1}),
        ({"sampling_prob": 1}, {"sampling_prob": 1.01}),
        ({"sampling_prob": 1e-9}, {"sampling_prob": 0}),
        ({"steps": 0}, {"steps": -1}),
        ({"epsilon_over_steps": [{"step": 0, "epsilon": 0}]}, {"epsilon_over_steps": [{"step": -1, "epsilon": 0}]}),
        ({"epsilon_over_steps": [{"step": 0, "epsilon": 0}]}, {"epsilon_over_steps": [{"step": 0, "epsilon": -1}]}),
    ],
)
def test_figures_out_of_range_are_refused(bounds: dict[str, Any], others: dict[str, Any]) -> None:
    stated(**bounds)
    with pytest.raises(ValueError, match=next(iter(others))):
        stated(**others)


def budget(**changes: Any) -> DatasetBudget:
    """Epsilon 10, of which 2 are committed and 3 reserved besides."""
    given: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(DatasetBudget))
    given |= {"epsilon": 10.0, "delta": 1e-5, "privacy_unit": "user", "charged_epsilon": 5.0}
    given |= {"committed_epsilon": 2.0, "reserved_epsilon": 3.0, "remaining_epsilon": 5.0}
    return DatasetBudget(**given | changes)


def widths(picture: str) -> list[tuple[str, float]]:
    """(class, width in percent) of each part of a bar."""
    found = re.findall(r'<rect class="(committed|reserved)"[^>]*? width="([\d.]+)%', picture)
    return [(name, float(width)) for name, width in found]


def test_a_budget_is_drawn_and_told() -> None:
    assert widths(budget_bar(budget())) == [("committed", 20.0), ("reserved", 30.0)]
    told = "Of epsilon 10, 2 is spent by releases, 3 is reserved by open runs, and 5 is left."
    assert budget_words(budget()) == told
    assert told in budget_bar(budget())


def test_what_is_committed_is_drawn_no_wider_than_what_is_charged() -> None:
    assert widths(budget_bar(budget(committed_epsilon=5.01))) == [("committed", 50.0), ("reserved", 0.0)]


def test_no_budget_is_no_picture() -> None:
    assert budget_bar(budget(epsilon=None)) == ""
    assert "No budget was set" in budget_words(budget(epsilon=None))


def test_epsilon_over_steps_is_drawn_from_two_points_on() -> None:
    points = [StepEpsilon(step=50, epsilon=1.5), StepEpsilon(step=100, epsilon=2.0)]
    assert steps_chart(stated()) == steps_chart(stated(epsilon_over_steps=points[:1])) == ""
    drawn = steps_chart(stated(epsilon_over_steps=points))
    assert "Epsilon grows to 2 over 100 steps" in drawn
    assert "epsilon per interaction, at delta 0.00001" in drawn
