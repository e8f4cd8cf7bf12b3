"""A privacy statement for tests, and what may be changed in it."""

from __future__ import annotations

from typing import Any

from lazydp.components.budget.statement import PrivacyStatement

GIVEN: dict[str, Any] = {
    "private": True,
    "epsilon": 2.0,
    "delta": 1e-5,
    "accountant": "pld",
    "accountant_version": "1",
    "privacy_unit": "example",
    "sampler": "poisson",
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "sampling_prob": 0.01,
    "steps": 100,
    "epsilon_without_amplification": 9.0,
    "epsilon_user_level": None,
    "assumed_public": (),
    "not_covered": (),
    "code_version": "1",
}


def stated(**changes: Any) -> PrivacyStatement:
    """A statement of 100 steps at epsilon 2 per example, with `changes`."""
    return PrivacyStatement.model_validate({**GIVEN, **changes})
