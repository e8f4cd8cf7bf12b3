"""Canaries looked at after every step: their log likelihood ratios have the distribution that the run promises."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lazydp.components.audit import audit as module
from lazydp.components.audit.canaries import toss
from lazydp.components.audit.guesses import Coins, Floats
from lazydp.components.audit.watch import separation
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.train.config import TrainConfig
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

WATCHED = 2000
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {"learning_rate": 0.1},
    "momentum and decay": {"learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.1},
    "schedule from zero": {"learning_rate": 0.1, "schedule": {"kind": "cosine", "warmup_steps": 3}},
}


def watched(dataset: Path, config: TrainConfig) -> tuple[Floats, Coins]:
    run = module._AuditedRun.of(EncodedDataset.open(dataset), config, watched=WATCHED)
    key = NoiseKey.for_tests(5)
    included = toss(key, WATCHED + 100)
    return module._train(run, key, included).log_ratios, included[:WATCHED]


def deviations(values: Floats, mean: float) -> float:
    """By how many standard errors the mean of `values` differs from `mean`."""
    return abs(float(values.mean()) - mean) / (float(values.std()) / math.sqrt(len(values)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_log_ratios_of_every_step_are_gaussian(
    dataset: Path, configured: Callable[..., TrainConfig], optimizer: str
) -> None:
    """Without sampling the log ratio of T steps is N(-T s^2 / 2, T s^2) for out and N(T s^2 / 2, T s^2) for in."""
    config = configured(embeddings=OPTIMIZERS[optimizer], noise_multiplier=4.0, steps=8)
    steps = 7 if "zero" in optimizer else 8
    ratios, included = watched(dataset, config)
    variance = steps / 4.0**2
    for coin, mean in ((False, -variance / 2), (True, variance / 2)):
        of_coin = ratios[included == coin]
        assert deviations(of_coin, mean) < 5
        assert deviations((of_coin - mean) ** 2, variance) < 5
        assert deviations(of_coin, -mean) > 10


def test_a_wrong_optimizer_shows(
    dataset: Path, configured: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module.embedding_optimizer  # type: ignore[attr-defined]
    monkeypatch.setattr(
        module, "embedding_optimizer", lambda config: EmbeddingSgd(right(config).learning_rate, 0.0, 0.0)
    )
    config = configured(embeddings=OPTIMIZERS["momentum and decay"], noise_multiplier=4.0, steps=8)
    ratios, included = watched(dataset, config)
    mean, variance = -8 / 32, 8 / 16
    assert deviations((ratios[~included] - mean) ** 2, variance) > 10


def test_looking_at_steps_shows_what_sampling_hides(dataset: Path, configured: Callable[..., TrainConfig]) -> None:
    config = configured(sampling_prob=0.02, steps=30, noise_multiplier=0.5)
    report = module.audit(dataset=dataset, config=config, canaries=4000, key=NoiseKey.for_tests(0)).report
    best = {
        statistic: max(rule.epsilon_lower_bound for rule in report.rules if rule.statistic == statistic)
        for statistic in ("steps", "along")
    }
    assert report.fault is None
    assert best["steps"] > 1.5 * best["along"]


def test_the_separation_that_is_promised() -> None:
    plain = {"signal": 0.5, "steps": 4, "gradients_each": 1}
    assert separation(sampling_prob=1.0, **plain) == pytest.approx(1.0)  # type: ignore[arg-type]
    assert separation(sampling_prob=0.1, **plain) == pytest.approx(  # type: ignore[arg-type]
        0.1 * math.sqrt(4 * np.expm1(0.25))
    )
    assert math.isfinite(separation(signal=1e6, sampling_prob=0.5, steps=4, gradients_each=1))
