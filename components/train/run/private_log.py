"""Figures of a run for its owner: they depend on the data, and each line says so.

A run whose loss is no better than that of popularity alone has learned nothing, whatever was spent on it. Then the last
line is followed by a warning.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache

from lazydp.components.budget.accounting.epsilon import epsilon
from lazydp.components.train.engine.report import GroupReport, StepReport
from lazydp.components.train.mechanism.parameters import GROUPS, Group
from lazydp.components.train.run.costs import RunCost
from lazydp.components.train.run.identity import RunIdentity

_log = logging.getLogger("lazydp.train")


class PrivateLog:
    """Collects the figures of steps and logs their means now and then.

    Args:
        identity: of the run.
        max_examples_per_user: the contribution bound k; None where there is none.
        popularity: computes the loss of popularity alone (`popularity_loss`); None for no comparison.
    """

    def __init__(
        self,
        identity: RunIdentity,
        max_examples_per_user: int | None,
        *,
        popularity: Callable[[], float] | None = None,
    ) -> None:
        self._identity = identity
        self._bound = max_examples_per_user
        self._popularity = cache(popularity) if popularity is not None else None
        self._recent: list[StepReport] = []

    def note(self, report: StepReport) -> str:
        """Take a step's figures, log now and then, and return the note beside the progress bar."""
        config = self._identity.config
        self._recent.append(report)
        if report.step % config.log_every == 0 or report.step == config.steps:
            _log.info("step %d/%d: %s", report.step, config.steps, self._line(report.step))
            if report.step == config.steps:
                self._warn_if_nothing_was_learned()
            self._recent.clear()
        return f"loss {report.loss:.4f} (private)"

    def _line(self, step: int) -> str:
        config = self._identity.config
        line = f"[private] loss {self._loss():.4f}"
        if self._popularity is not None:
            line += f" (of popularity alone {self._popularity():.4f})"
        non_finite = sum(report.non_finite for report in self._recent)
        if non_finite:
            line += f", {non_finite} {config.sampling}s with a gradient that is not finite counted zero"
        if not config.private:
            return line
        assert config.target_delta is not None
        spent = epsilon(RunCost.of(self._identity, self._bound).of_run(steps=step), delta=config.target_delta)
        # What a sweep costs is no figure of one trial, and is not reached step by step.
        what = "epsilon so far" if self._identity.tuning is None else "epsilon of this trial's training alone"
        return "; ".join([f"{what} {spent:.4g} | {line}", *(self._of_group(group) for group in GROUPS)])

    def _loss(self) -> float:
        return _mean([(report.loss, report.size) for report in self._recent])

    def _warn_if_nothing_was_learned(self) -> None:
        if self._popularity is not None and self._loss() >= self._popularity():
            _log.warning(
                "[private] the run learned nothing: its last loss, %.4f, is not below that of popularity alone, %.4f. "
                "A start may do better without steps (`lazydp plan`); or it takes more users, a larger epsilon, or "
                "other rates and norms",
                self._loss(),
                self._popularity(),
            )

    def _of_group(self, group: Group) -> str:
        """Norm before clipping, clipped fraction, and one coordinate's noise over the clipped sum's greatest length."""
        privacy = self._identity.config.privacy_parameters(self._identity.noise_multiplier)

        def mean(figure: Callable[[GroupReport], float]) -> float:
            return _mean([(figure(report.groups[group]), report.units) for report in self._recent])

        signal = sum(report.groups[group].signal for report in self._recent) / len(self._recent)
        ratio = privacy.noise_std(group) / signal if signal else math.inf
        return (
            f"{group}: gradient norm {mean(lambda figures: figures.mean_norm):.3g}, "
            f"clipped {mean(lambda figures: figures.clipped):.1%}, a coordinate's noise {ratio:.3g} of the sum"
        )


def _mean(figures: list[tuple[float, int]]) -> float:
    """The mean of (value, weight) with a weight above 0 and a value that is a number; NaN where there is none."""
    counted = [(value, weight) for value, weight in figures if weight and not math.isnan(value)]
    total = sum(weight for _, weight in counted)
    return sum(value * weight for value, weight in counted) / total if total else math.nan
