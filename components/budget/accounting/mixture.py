"""Mixtures of Gaussians in both accountants: what `dp-accounting` lacks (Renyi) or does in minutes (PLD)."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from dp_accounting import dp_event
from dp_accounting.pld import pld_pmf, privacy_loss_distribution, privacy_loss_mechanism
from dp_accounting.rdp import RdpAccountant
from scipy.special import logsumexp

Floats = npt.NDArray[np.float64]

_TABLE = 20_001
_CHUNK = 65_536
_NEWTON_STEPS = 3


class _TabulatedMixture(privacy_loss_mechanism.MixtureGaussianPrivacyLoss):  # type: ignore[misc]
    """The library's mixture, its inverse by a table and Newton steps instead of one binary search a loss.

    A hockey-stick divergence is the largest value over thresholds x of P(x) - e^epsilon Q(x), reached where the loss
    equals epsilon: an error of the inverse enters squared, and three Newton steps leave it below 1e-9.
    """

    def inverse_privacy_losses(self, privacy_losses: Any, precision: float = 1e-6) -> Any:
        del precision
        tail = self.privacy_loss_tail()
        width = tail.upper_x_truncation - tail.lower_x_truncation
        points = np.linspace(tail.lower_x_truncation - width / 4, tail.upper_x_truncation + width / 4, _TABLE)
        losses, _ = self._losses_and_slopes(points)
        wanted = np.asarray(privacy_losses, dtype=np.float64)
        # The loss falls with x: searching needs it rising.
        right = np.clip(_TABLE - np.searchsorted(losses[::-1], wanted), 1, _TABLE - 1)
        low, high = points[right - 1], points[right]
        x = np.interp(wanted, losses[::-1], points[::-1])
        for start in range(0, len(x), _CHUNK):
            part = slice(start, start + _CHUNK)
            x[part] = self._refined(x[part], wanted[part], low[part], high[part])
        return x

    def _refined(self, x: Floats, wanted: Floats, low: Floats, high: Floats) -> Floats:
        for _ in range(_NEWTON_STEPS):
            loss, slope = self._losses_and_slopes(x)
            # Where the loss has levelled off any x of the cell gives the same divergence.
            step = np.divide(wanted - loss, slope, out=np.zeros_like(x), where=slope < -1e-290)
            x = np.clip(x + step, low, high)
        return x

    def _losses_and_slopes(self, x: Floats) -> tuple[Floats, Floats]:
        sign = 1.0 if self.adjacency_type == privacy_loss_mechanism.AdjacencyType.ADD else -1.0
        pull = self.sensitivities / self._variance
        exponents = self._log_sampling_probs - self.sensitivities * pull / 2 + sign * np.multiply.outer(x, pull)
        top = exponents.max(axis=1, keepdims=True)
        weights = np.exp(exponents - top)
        total = weights.sum(axis=1)
        log_ratio = np.log(total) + top[:, 0]
        return -sign * log_ratio, -(weights @ pull) / total


def mixture_distribution(event: dp_event.MixtureOfGaussiansDpEvent, *, interval: float) -> Any:
    """The loss distribution of one mixture on a grid of `interval`: pessimistic, by arXiv 2207.04380."""

    def one_sided(adjacency: Any) -> Any:
        loss = _TabulatedMixture(
            event.standard_deviation, event.sensitivities, event.sampling_probs, adjacency_type=adjacency
        )
        bounds = loss.connect_dots_bounds()
        losses = np.arange(math.floor(bounds.epsilon_lower / interval), math.ceil(bounds.epsilon_upper / interval) + 1)
        deltas = loss.get_delta_for_epsilon(losses * interval)
        return pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, losses[0], losses[-1], deltas)

    adjacency = privacy_loss_mechanism.AdjacencyType
    return privacy_loss_distribution.PrivacyLossDistribution(one_sided(adjacency.REMOVE), one_sided(adjacency.ADD))


@contextlib.contextmanager
def quiet_about_excluded_orders() -> Iterator[None]:
    """Silence the library where it says that it left an order out because a series did not converge.

    Epsilon is the least over the orders that are left, each of which bounds it: fewer orders make the bound larger,
    never wrong. It happens for fractional orders and little noise, at every call, and asks for nothing.
    """

    def matters(record: logging.LogRecord) -> bool:
        return "Excluding this order from the epsilon computation" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(matters)
    try:
        yield
    finally:
        logger.removeFilter(matters)


class RenyiAccountant(RdpAccountant):  # type: ignore[misc]
    """The library's Renyi accountant, which also knows mixtures of Gaussians, and leaves negative divergences out.

    A divergence is never negative. Where rounding makes one so, the library takes epsilon for 0, which is no bound;
    without that order the others still bound it.
    """

    _rdp: Floats

    def _maybe_compose(self, event: dp_event.DpEvent, count: int, do_compose: bool) -> Any:
        before = np.array(self._rdp)
        error = self._composed(event, count, do_compose)
        self._rdp = np.where(self._rdp < before, math.inf, self._rdp)
        return error

    def _composed(self, event: dp_event.DpEvent, count: int, do_compose: bool) -> Any:
        if not isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            self._rdp += count * np.array([_mixture_renyi(event, float(order)) for order in self._orders])
        return None


def _mixture_renyi(event: dp_event.MixtureOfGaussiansDpEvent, order: float) -> float:
    """Renyi divergence of `order` between N(0, s^2) and the mixture, the greater of the two directions.

    The trapezoidal rule on the real line converges geometrically for these integrands (entire, falling like a
    Gaussian); the grid covers every place where a power of the ratio can put mass.
    """
    if order <= 1:
        return math.inf
    sigma = event.standard_deviation
    if sigma == 0:
        return math.inf
    sensitivities = np.asarray(event.sensitivities)
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.asarray(event.sampling_probs))
    reach = order * float(sensitivities.max()) + 12 * sigma
    if reach / sigma > 2e3:
        return math.inf  # an order that cannot be the best one
    points = np.arange(-reach, reach, sigma / 8)
    log_base = -0.5 * (points / sigma) ** 2
    shifted = -0.5 * ((points[:, None] - sensitivities) / sigma) ** 2 + log_weights
    log_mixture = logsumexp(shifted, axis=1)
    log_scale = math.log(1 / 8) - 0.5 * math.log(2 * math.pi)
    remove = logsumexp(order * log_mixture + (1 - order) * log_base) + log_scale
    add = logsumexp(order * log_base + (1 - order) * log_mixture) + log_scale
    return max(0.0, float(max(remove, add))) / (order - 1)
