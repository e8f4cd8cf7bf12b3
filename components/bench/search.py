"""How far the rule of a start is from the best settings that a search finds.

Settings are drawn at random around the rule, and compared on a validation dataset that is cut from the training rows.
The best figure of many settings is biased upwards on the split and the keys that chose it. So the settings that were
best are measured again, beside the rule, on the dataset itself with fresh keys. Nothing is released, no budget is
spent, and so the figures are private.

The search has three rounds, each for the best settings of the one before, and for the rule: all settings with one noise
key, a quarter with one more, a tenth with two more. In a round all settings meet the same keys.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias

import numpy as np

from lazydp.components.bench.protocol import Measured
from lazydp.components.bench.quality import scored_by, start_of
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.onepass.basis import has_features
from lazydp.components.onepass.rules import HISTOGRAM_SHARE, RULE, PrivacyUnit, Rule
from lazydp.components.shared.errors import InputError
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.run.costs import calibrated_noise_multiplier
from lazydp.kernels.noise_key import NoiseKey

Metric: TypeAlias = Literal["hr_at_10", "ndcg_at_10", "recall_at_20"]

# Of the settings, how many go to the next round at most and at least, and how many keys they meet there.
_ROUNDS = ((0.25, 4, 1), (0.1, 3, 2))
_MEASURED_AGAIN = 2

_log = logging.getLogger("lazydp.bench")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a search varies: the rule, and the share of the histogram, which belongs to the configuration."""

    rule: Rule = RULE
    histogram_share: float = HISTOGRAM_SHARE

    def changes(self) -> dict[str, float]:
        """What differs from the rule of every start."""
        ours, theirs = (asdict(one.rule) | {"histogram_share": one.histogram_share} for one in (self, Setting()))
        return {name: value for name, value in ours.items() if value != theirs[name]}


@dataclass(frozen=True, slots=True)
class Found:
    """The rule, or a setting that was best in the search, on the dataset with fresh keys.

    Attributes:
        dataset: name of its feature spec.
        epsilon: of the release.
        metric: what was searched by.
        changes: what differs from the rule; empty for the rule.
        searched: mean on the validation dataset, over the keys of the search.
        mean: on the dataset, over fresh keys.
        ratio: mean of the rule over this mean; 1 for the rule.
        error: standard error of `ratio`, from the differences under the same keys.
        seeds: fresh keys.
    """

    dataset: str
    epsilon: float
    metric: Metric
    changes: dict[str, float]
    searched: float
    mean: float
    ratio: float
    error: float
    seeds: int

    def to_json(self) -> str:
        """As one line."""
        return json.dumps({"bench": "search", **asdict(self)})

    def row(self) -> str:
        """For people."""
        changes = ", ".join(f"{name} {value:.3g}" for name, value in self.changes.items()) or "the rule"
        return (
            f"{self.dataset:12}epsilon {self.epsilon:<6g}{self.metric} {self.mean:.4f} (validation {self.searched:.4f})"
            f"   rule / this {self.ratio:.3f} +- {self.error:.3f}   {changes}"
        )


class Trials:
    """Measures settings on one dataset, each key once a setting."""

    def __init__(
        self,
        data: EncodedDataset,
        *,
        epsilon: float,
        delta: float,
        unit: PrivacyUnit,
        metric: Metric,
        most_users: int | None,
    ) -> None:
        self._data, self._metric = data, metric
        self._measured = Measured(data, most_users)
        settings = {"target_epsilon": epsilon, "target_delta": delta, "privacy_unit": unit}
        config = TrainConfig.parse(settings, where="(of the bench)")
        sigma = calibrated_noise_multiplier(config, None)
        self._config = config.with_changes(noise_multiplier=sigma, target_epsilon=None)

    def one(self, setting: Setting, key: NoiseKey) -> float:
        """The metric of a start under `setting` and `key`."""
        config = self._config.with_changes(start={"histogram_share": setting.histogram_share})
        start = start_of(self._data, config, key, setting.rule)
        return float(getattr(self._measured.by(scored_by(self._data, config, start)), self._metric).mean())

    def of(self, setting: Setting, keys: Sequence[NoiseKey]) -> np.ndarray:
        """The metric under each of the keys."""
        return np.array([self.one(setting, key) for key in keys])


def run(
    data: EncodedDataset,
    validation: EncodedDataset,
    *,
    epsilon: float,
    delta: float = 1e-5,
    unit: PrivacyUnit = "user",
    metric: Metric = "hr_at_10",
    settings: int = 60,
    seeds: int = 8,
    most_users: int | None = None,
    seed: int = 0,
) -> Iterator[Found]:
    """Search, then measure the rule and the settings that were best in the search.

    Args:
        data: what the rule and the best settings are measured on.
        validation: cut from the training rows of `data`, with the same catalogue.
        epsilon: of the release.
        delta: of the release.
        unit: the privacy unit.
        metric: what settings are compared by.
        settings: how many are drawn, beside the rule.
        seeds: fresh keys of the last comparison.
        most_users: measure by so many users, drawn at random; None for all.
        seed: of the drawn settings.

    Raises:
        InputError: the datasets have different catalogues, or one has no test examples.
    """
    if data.items.num_items != validation.items.num_items:
        raise InputError(f"datasets {data.path} and {validation.path} differ in their catalogue")
    drawn = _drawn(settings, seed, has_features=has_features(data.items, data.item_table))
    tried, fresh = (
        Trials(of, epsilon=epsilon, delta=delta, unit=unit, metric=metric, most_users=most_users)
        for of in (validation, data)
    )
    searched = _searched(tried, [Setting(), *drawn])
    keys = _keys(seeds)
    rule = fresh.of(Setting(), keys)
    best = [setting for setting in searched if setting != Setting()][:_MEASURED_AGAIN]
    for setting in [Setting(), *best]:
        figures = rule if setting == Setting() else fresh.of(setting, keys)
        ratio = float(rule.mean() / figures.mean())
        yield Found(
            dataset=data.spec.name,
            epsilon=epsilon,
            metric=metric,
            changes=setting.changes(),
            searched=searched[setting],
            mean=float(figures.mean()),
            ratio=ratio,
            error=_error(rule - ratio * figures) / float(figures.mean()),
            seeds=seeds,
        )


def _searched(trials: Trials, settings: Sequence[Setting]) -> dict[Setting, float]:
    """The settings of the last round, and the rule, by their mean over all keys; the best first."""
    found = dict(zip(settings, _round(trials, settings, _keys(1)), strict=True))
    for share, fewest, more in _ROUNDS:
        best = sorted(found, key=lambda setting: -float(np.mean(found[setting])))
        kept = best[: max(fewest, round(share * len(settings)))]
        kept = kept if Setting() in kept else [*kept, Setting()]
        again = _round(trials, kept, _keys(more))
        found = {setting: np.append(found[setting], figures) for setting, figures in zip(kept, again, strict=True)}
    means = {setting: float(np.mean(figures)) for setting, figures in found.items()}
    return dict(sorted(means.items(), key=lambda entry: -entry[1]))


def _round(trials: Trials, settings: Sequence[Setting], keys: Sequence[NoiseKey]) -> list[np.ndarray]:
    found = []
    for number, setting in enumerate(settings, start=1):
        found.append(trials.of(setting, keys))
        _log.info("[private] %d/%d: %.4f %s", number, len(settings), found[-1].mean(), setting.changes())
    return found


def _keys(number: int) -> list[NoiseKey]:
    return [NoiseKey.generate() for _ in range(number)]


def _error(differences: np.ndarray) -> float:
    """Standard error of the mean; not a number of a single one."""
    return float(np.std(differences, ddof=1) / math.sqrt(len(differences))) if len(differences) > 1 else math.nan


def _drawn(number: int, seed: int, *, has_features: bool) -> list[Setting]:
    generator = np.random.default_rng(seed)
    return [_draw(generator, has_features=has_features) for _ in range(number)]


def _draw(generator: np.random.Generator, *, has_features: bool) -> Setting:
    """A setting around the rule: factors are drawn by their logarithm, the others from a few values."""

    def factor(of: float, least: float, most: float) -> float:
        return float(of * math.exp(generator.uniform(math.log(least), math.log(most))))

    def one_of(*values: float) -> float:
        return float(generator.choice(values))

    rule = replace(
        RULE,
        matrix_items=factor(RULE.matrix_items, 0.5, 2.0),
        scale=factor(RULE.scale, 0.5, 2.0),
        floor=one_of(0.7, 1.0, 1.5),
        shrink=one_of(0.0, 0.15, 0.3, 0.5),
        ridge=one_of(0.02, 0.05, 0.1, 0.2),
        popularity_power=one_of(0.3, 0.35, 0.4, 0.45, 0.5),
        half=one_of(1.5, 3.0, 5.0),
        expected=one_of(0.0, 0.25, 0.5, 0.8),
    )
    if has_features:
        rule = replace(
            rule,
            directions=factor(RULE.directions, 0.5, 2.0),
            sketch_items=factor(RULE.sketch_items, 0.5, 3.0),
            fewest_sketch_items=int(one_of(320, 640, 1000)),
            share_beside_features=one_of(0.1, 0.2, 0.3),
            matrix_pays_from=one_of(0.0, RULE.matrix_pays_from, math.inf),
        )
    else:
        rule = replace(
            rule,
            sketch_items_without_features=factor(RULE.sketch_items_without_features, 0.4, 3.0),
            share_without_features=one_of(0.35, 0.5, 0.6, 0.7, 0.8),
        )
    return Setting(rule, one_of(0.05, 0.1, 0.15, 0.2))
