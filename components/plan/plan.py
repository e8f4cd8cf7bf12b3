"""What to run, from public numbers alone: the method, its settings, what to expect of it and what it takes.

The settings are those of a training configuration that leaves them out (`train.config`), so the plan says what the
defaults will do. What a start then releases is decided again, by the same rule, from the noised number of users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from lazydp.components.onepass import rules
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import calibrated_noise_multiplier

# HR@10 (Recall@20 without features) over that of popularity, by z: the least and the most in docs/quality.md.
_GAINS_WITH_FEATURES = ((250, 1.1, 1.5), (550, 1.3, 2.8), (1500, 1.5, 3.3), (3300, 1.6, 3.8), (50_000, 1.7, 4.2))
_GAINS_WITHOUT = ((250, 1.0, 1.05), (2000, 1.0, 1.3), (8000, 1.3, 1.7), (21_000, 1.7, 2.3), (50_000, 2.2, 3.2))
# The same without privacy.
_GAIN_WITHOUT_PRIVACY = (2.2, 4.1)
_BYTES = 8
# Statistic, its noise, and what the eigenvectors take beside it.
_COPIES = 4
# Items that one core adds to a sketch in a second, for each direction, and the like for a matrix.
_PRODUCTS_PER_SECOND = 2e8
_BASE_BYTES = 400e6
# Items in a history, for estimates alone.
_TYPICAL_HISTORY = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """An answer of the planner.

    Attributes:
        config: the training configuration.
        users: that were stated.
        items: that were stated.
        noise_multiplier: sigma of the whole start; 0 without privacy.
        z: privacy units times mu, what the rule goes by; infinite without privacy.
        statistics: what the start would release for so many users.
        gain: least and most expected quality over that of popularity.
        seconds: about, on one core.
        memory: bytes, about.
    """

    config: TrainConfig
    users: int
    items: int
    noise_multiplier: float
    z: float
    statistics: rules.Statistics
    gain: tuple[float, float]
    seconds: float
    memory: float

    def settings(self) -> dict[str, Any]:
        """The configuration, as one would write it."""
        config = self.config
        model = {"kind": config.model.kind, **config.model.model_dump(mode="json", exclude_defaults=True)}
        if not config.private:
            return {"format_version": 1, "model": model, "mode": config.mode, "start": {}, "steps": config.steps}
        return {
            "format_version": 1,
            "model": model,
            "privacy_unit": config.privacy_unit,
            "start": {"histogram_share": rules.HISTOGRAM_SHARE},
            "steps": config.steps,
            "target_epsilon": config.target_epsilon,
            "target_delta": config.target_delta,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, for a program."""
        return {
            "config": self.settings(),
            "users": self.users,
            "items": self.items,
            "noise_multiplier": self.noise_multiplier,
            "z": self.z if self.config.private else None,
            "directions": self.statistics.directions,
            "matrix_items": self.statistics.matrix_items,
            "sketch_items": self.statistics.sketch_items,
            "matrix_share": self.statistics.matrix_share,
            "expected_over_popularity": list(self.gain),
            "seconds": self.seconds,
            "memory_bytes": self.memory,
        }

    def text(self) -> str:
        """A training configuration, with the reasons as comments."""
        config = self.config
        lines = [
            f"lazydp plan: {self.users:,} users, {self.items:,} items, {_privacy(config)}",
            *self._reasons(),
            f"expected: {self.gain[0]:.2g} to {self.gain[1]:.2g} times the hit rate of popularity (docs/quality.md)",
            f"about {max(self.seconds, 1):,.0f} s on one core, {self.memory / 1e9:.1f} GB of memory",
        ]
        if config.target_delta is not None and config.target_delta > 1 / self.users:
            lines.append(
                f"warning: delta {config.target_delta:g} is above 1 / users: a mechanism that publishes one user at "
                "random would satisfy it; give a smaller delta"
            )
        if self.gain[0] <= 1.05:
            lines.append("warning: so few users at this epsilon may teach no more than which items are popular")
        return "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(self.settings(), sort_keys=False)

    def _reasons(self) -> list[str]:
        config, method = self.config, _method(self.statistics, self.config)
        if not config.private:
            return [f"{method}; no noise, no steps of training. Nothing is hidden: do not release it as private"]
        return [
            f"{config.privacy_unit}s x mu = {self.z:,.0f}: {method}; no steps of training",
            f"noise_multiplier {self.noise_multiplier:.4g}; the counts take {rules.HISTOGRAM_SHARE:.0%} of mu^2",
        ]


def plan(
    *, users: int, items: int, epsilon: float, delta: float, unit: rules.PrivacyUnit = "user", features: bool = True
) -> Plan:
    """Plan a run.

    Args:
        users: about how many users there are; a public number, such as one would tell anybody.
        items: of the catalogue.
        epsilon: of the whole release; infinite for a model without privacy.
        delta: of it; unused where epsilon is infinite.
        unit: the privacy unit; for `example` `users` still counts users.
        features: whether the feature spec describes the items (features or titles).

    Raises:
        InputError: a number out of range.
    """
    if users < 1 or items < 1:
        raise InputError(f"a plan needs at least one user and one item, found {users} users and {items} items")
    private = not math.isinf(epsilon)
    of_privacy = {"target_epsilon": epsilon, "target_delta": delta} if private else {"mode": "sgd"}
    config = TrainConfig.parse({**of_privacy, "privacy_unit": unit}, where="(of the plan)")
    sigma = calibrated_noise_multiplier(config, None) if private else 0.0
    units = users if unit == "user" else users * _TYPICAL_HISTORY
    mu = 1.0 / sigma if private else math.inf
    chosen = rules.choose(units=units, mu=mu, num_items=items, has_features=features, privacy_unit=unit)
    width = _width(chosen, config)
    taken = users * _TYPICAL_HISTORY
    products = taken * (width + (_TYPICAL_HISTORY if chosen.matrix_items else 0)) + items * width**2
    return Plan(
        config=config,
        users=users,
        items=items,
        noise_multiplier=sigma,
        z=units * mu,
        statistics=chosen,
        gain=_gain(units * mu, _GAINS_WITH_FEATURES if features or unit == "example" else _GAINS_WITHOUT),
        seconds=products / _PRODUCTS_PER_SECOND + (chosen.matrix_items / 1000) ** 3,
        memory=_BASE_BYTES + _COPIES * _BYTES * (items * width + chosen.matrix_items**2),
    )


def _privacy(config: TrainConfig) -> str:
    if not config.private:
        return "without privacy"
    return f"epsilon {config.target_epsilon:g} at delta {config.target_delta:g} per {config.privacy_unit}"


def _width(chosen: rules.Statistics, config: TrainConfig) -> int:
    """Columns beside each item while a start is computed."""
    if chosen.exact:
        return config.model.embedding_dim
    return chosen.directions + (chosen.eigenvectors[1] if chosen.matrix_items else 0)


def _method(chosen: rules.Statistics, config: TrainConfig) -> str:
    if chosen.exact:
        return f"the {config.model.embedding_dim} leading eigenvectors of the matrix of all items"
    if chosen.matrix_share == 1.0:
        return f"a matrix of {chosen.matrix_items:,} items"
    matrix = f"a matrix of the {chosen.matrix_items:,} most popular items, and " if chosen.matrix_items else ""
    what = f"{chosen.directions} directions of public features" if chosen.directions else "its own directions"
    return f"{matrix}a sketch of the {chosen.sketch_items:,} most popular items along {what}"


def _gain(z: float, known: tuple[tuple[float, float, float], ...]) -> tuple[float, float]:
    if math.isinf(z):
        return _GAIN_WITHOUT_PRIVACY
    at = [math.log(point[0]) for point in known]
    least, most = (float(np.interp(math.log(max(z, 1.0)), at, [point[place] for point in known])) for place in (1, 2))
    return least, most
