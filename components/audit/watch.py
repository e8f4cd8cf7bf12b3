"""Canaries that are looked at after every step: the claim grants an adversary every intermediate model.

A run that releases snapshots shows them, and epsilon covers them. A canary that is sampled in few steps stands out in
those steps, and hardly in the sum of all steps that the last model shows.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import binom

from lazydp.components.audit.canaries import CANARY, direction
from lazydp.components.audit.guesses import Floats
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.tables.embedding_tables import GroupedLookups
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.arguments import RowGroups


class Watch:
    """The log likelihood ratio of "in" against "out" for the first `count` canaries, summed over steps.

    After each step the watched rows get their pending noise, as in a snapshot. From the row before and after, and
    the public optimizer, follows the noised gradient of the step, C / b times the number of times that the canary was
    in the batch, plus noise: a mixture of Gaussians.

    Args:
        engine: of the run; its canaries' rows begin at zero.
        optimizer: of the tables.
        count: watched canaries.
        signal: C / (b noise_scale), how far one clipped gradient moves a row along the canary's direction, in
            standard deviations of one step's noise.
        noise_scale: standard deviation of one step's noise on the averaged gradient.
        sampling_prob: q.
        gradients_each: most clipped gradients of one canary in a step.
    """

    def __init__(
        self,
        engine: Engine,
        optimizer: EmbeddingSgd,
        *,
        count: int,
        signal: float,
        noise_scale: float,
        sampling_prob: float,
        gradients_each: int,
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._noise_scale = noise_scale
        rows = torch.arange(count)
        nothing = torch.zeros(0, dtype=torch.int64)
        groups = RowGroups(rows, nothing, torch.zeros(count + 1, dtype=torch.int64))
        self._rows = {CANARY: GroupedLookups(groups, nothing, None)}
        self._moves = signal * np.arange(gradients_each + 1)
        self._log_chances = binom.logpmf(np.arange(gradients_each + 1), gradients_each, sampling_prob)
        self._at = np.zeros(count)
        self._velocity = np.zeros(count)
        self.log_ratios: Floats = np.zeros(count)

    def look(self) -> None:
        """After a step: take its part of every watched canary's log likelihood ratio."""
        tables = self._engine.tables
        tables.catch_up(self._rows)
        weights = tables.state_dict()["tables"][CANARY]["weight"][: len(self._at)]
        now = (weights.double() @ direction(weights.shape[1]).double()).numpy()
        rate = self._optimizer.rate(tables.step)
        if rate == 0.0:  # the step moved nothing, and with momentum its gradient shows later
            self._velocity = self._optimizer.momentum * self._velocity + self._optimizer.weight_decay * self._at
            return
        velocity = (self._at - now) / rate
        decayed = self._optimizer.momentum * self._velocity + self._optimizer.weight_decay * self._at
        self._take((velocity - decayed) / self._noise_scale)
        self._at, self._velocity = now, velocity

    def _take(self, gradients: Floats) -> None:
        exponents = np.outer(gradients, self._moves) - self._moves**2 / 2 + self._log_chances
        self.log_ratios += logsumexp(exponents, axis=1)


def separation(*, signal: float, sampling_prob: float, steps: int, gradients_each: int) -> float:
    """About how far apart `Watch.log_ratios` of canaries in and out are, as two normal distributions.

    By the central limit theorem of composition (Bu, Dong, Long and Su 2020, arXiv 1911.11607): q sqrt(T (e^(s^2) - 1)),
    and without sampling s sqrt(T). It decides how many coins are guessed and nothing else.
    """
    if sampling_prob == 1.0:
        return gradients_each * signal * math.sqrt(steps)
    spread = math.expm1(min(signal**2, 50.0))
    return sampling_prob * gradients_each * math.sqrt(steps * spread)
