"""The owner's log says how large the noise is beside what was learned."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest

from lazydp.components.train.engine.report import GroupReport, StepReport
from lazydp.components.train.mechanism.parameters import Group
from lazydp.components.train.run.identity import RunIdentity
from lazydp.components.train.run.private_log import PrivateLog

SIGMA = 4.0


def log_of(tiny: Any, **changes: Any) -> PrivateLog:
    config = tiny.config(noise_multiplier=SIGMA, log_every=2, **changes)
    identity = RunIdentity("run", config, "fingerprint", "version", noise_multiplier=SIGMA)
    return PrivateLog(identity, max_examples_per_user=None)


def report(step: int, signals: dict[Group, float], *, units: int = 3, loss: float = 0.5) -> StepReport:
    groups = {group: GroupReport(mean_norm=1.0, clipped=0.5, signal=signal) for group, signal in signals.items()}
    return StepReport(
        step=step, size=units, units=units, loss=loss, clipped=0.5, mean_norm=1.0, non_finite=0, groups=groups
    )


def ratios(caplog: pytest.LogCaptureFixture) -> list[dict[str, float]]:
    """Noise to signal by group, of each line."""
    found = [
        re.findall(r"(dense|embeddings): gradient norm .*?a coordinate's noise (\S+) of the sum", record.getMessage())
        for record in caplog.records
    ]
    return [{group: float(ratio) for group, ratio in line} for line in found]


def test_noise_is_told_as_a_part_of_the_mean_signal(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    """sigma C over the mean, over the steps since the last line, of the sum of clipped norms."""
    caplog.set_level(logging.INFO)
    log = log_of(tiny, max_grad_norm=0.5)
    log.note(report(1, {"dense": 10.0, "embeddings": 1.0}))
    log.note(report(2, {"dense": 30.0, "embeddings": 3.0}, units=1))
    log.note(report(3, {"dense": 4.0, "embeddings": 0.0}))
    log.note(report(4, {"dense": 0.0, "embeddings": 0.0}, units=0))
    std = SIGMA * 0.5
    assert ratios(caplog) == [
        {"dense": std / 20.0, "embeddings": std / 2.0},
        {"dense": std / 2.0, "embeddings": math.inf},
    ]


def test_each_group_is_told_its_own_noise(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    """With norms by group: sigma sqrt(2) C_g; the control is that the two figures differ as their norms do."""
    caplog.set_level(logging.INFO)
    log = log_of(tiny, max_grad_norm={"dense": 0.25, "embeddings": 1.0})
    for step in (1, 2):
        log.note(report(step, {"dense": 10.0, "embeddings": 10.0}))
    (found,) = ratios(caplog)
    assert found["dense"] == pytest.approx(SIGMA * math.sqrt(2) * 0.25 / 10.0, rel=1e-2)
    assert found["embeddings"] == pytest.approx(4 * found["dense"], rel=1e-2)


def test_the_signal_is_the_sum_of_clipped_norms(tiny: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """In a real run where every example is clipped in both groups: as many norm bounds as there are examples."""
    from lazydp.components.train.run.train import train

    caplog.set_level(logging.INFO)
    norms = {"dense": 1e-4, "embeddings": 2e-4}
    sizes: list[int] = []
    note = PrivateLog.note

    def noted(self: PrivateLog, done: StepReport) -> str:
        sizes.append(done.units)
        assert done.clipped == 1.0 or not done.units
        return note(self, done)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateLog, "note", noted)
        config = tiny.config(max_grad_norm=norms, steps=4, log_every=4)
        train(dataset=tiny.dataset, config=config, out=tmp_path / "run", ledger=tiny.ledger())
    (found,) = (line for line in ratios(caplog) if line)
    expected = SIGMA * math.sqrt(2) / (sum(sizes) / len(sizes))
    assert found == {group: pytest.approx(expected, rel=1e-2) for group in norms}


@pytest.mark.parametrize(("last", "warned"), [(0.61, False), (0.75, True), (0.9, True), (math.nan, False)])
def test_a_run_that_learns_no_more_than_popularity_says_so(
    tiny: Any, caplog: pytest.LogCaptureFixture, last: float, *, warned: bool
) -> None:
    """By the mean loss since the line before, and only at the last step: a run begins above popularity's loss."""
    caplog.set_level(logging.INFO)
    identity = RunIdentity("run", tiny.config(steps=2, log_every=1), "fingerprint", "version", noise_multiplier=SIGMA)
    log = PrivateLog(identity, max_examples_per_user=None, popularity=lambda: 0.75)
    signals: dict[Group, float] = {"dense": 1.0, "embeddings": 1.0}
    log.note(report(1, signals, loss=2.0))
    assert "loss 2.0000 (of popularity alone 0.7500)" in caplog.text
    assert "learned nothing" not in caplog.text
    log.note(report(2, signals, loss=last))
    assert ("learned nothing" in caplog.text) is warned
