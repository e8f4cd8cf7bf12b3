"""What an audit tests: that the run hides as much as the same run with more or less noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from dp_accounting.dp_event import DpEvent

from lazydp.components.audit.bound import refutes
from lazydp.components.audit.trade_off import TradeOff, from_profile
from lazydp.components.budget.accounting.epsilon import epsilon, privacy_profile

_PER_OCTAVE = 12
_MOST_NOISE = -60
_LEAST_NOISE = 24
_EPSILONS = np.concatenate([np.linspace(0.0, 1.0, 65), np.geomspace(1.0, 300.0, 256)[1:]])


class Hypotheses:
    """The audited run at other noise multipliers: number 0 is the claim, each further one has 2^(-1/12) of the noise.

    Args:
        event_at: noise multiplier -> what the run would be to the accountant.
        noise_multiplier: of the claim.
        delta: at which epsilons are given.
    """

    def __init__(self, event_at: Callable[[float], DpEvent], *, noise_multiplier: float, delta: float) -> None:
        self._event_at = event_at
        self.noise_multiplier = noise_multiplier
        self._delta = delta
        self._curves: dict[int, TradeOff] = {}
        self._epsilons: dict[int, float] = {}

    @property
    def claim(self) -> float:
        """Epsilon of the claim."""
        return self._epsilon(0)

    def lower_bound(self, *, canaries: int, guesses: int, correct: int, error: float) -> float:
        """Epsilon of the hypothesis with the least noise that the guesses refute; 0 where they refute none.

        A curve of more noise lies above one of less, so what refutes a hypothesis refutes all with more noise. See
        `bound.refutes` for the arguments.
        """

        def refuted(number: int) -> bool:
            return refutes(self._curve(number), canaries=canaries, guesses=guesses, correct=correct, error=error)

        if not refuted(_MOST_NOISE):
            return 0.0
        if refuted(_LEAST_NOISE):
            return self._epsilon(_LEAST_NOISE)
        low, high = _MOST_NOISE, _LEAST_NOISE
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if refuted(middle) else (low, middle)
        return self._epsilon(low)

    def _event(self, number: int) -> DpEvent:
        return self._event_at(self.noise_multiplier * 2.0 ** (-number / _PER_OCTAVE))

    def _curve(self, number: int) -> TradeOff:
        if number not in self._curves:
            self._curves[number] = from_profile(_EPSILONS, privacy_profile(self._event(number), _EPSILONS))
        return self._curves[number]

    def _epsilon(self, number: int) -> float:
        if number not in self._epsilons:
            self._epsilons[number] = epsilon(self._event(number), delta=self._delta)
        return self._epsilons[number]
