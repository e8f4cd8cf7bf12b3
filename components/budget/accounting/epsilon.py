"""Epsilon of a `DpEvent`: by privacy loss distributions (PLD), which is reported, and by Renyi DP beside it.

Both are upper bounds for neighbours that differ by adding or removing one privacy unit, computed by Google's
`dp-accounting`. PLD rounds losses up to a grid (connect-the-dots, pessimistic), so its answer never lies below the
truth. Accounting by the central limit theorem ("Gaussian DP") lies below it and is not offered.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from scipy.optimize import brentq

from lazydp.components.budget.accounting.events import check_event, event_from_json, event_to_json
from lazydp.components.budget.accounting.limits import SMALLEST_DELTA, SMALLEST_NOISE
from lazydp.components.budget.accounting.loss_store import Kept, Leaves, LossStore, fresh_store
from lazydp.components.budget.accounting.mixture import (
    RenyiAccountant,
    mixture_distribution,
    quiet_about_excluded_orders,
)
from lazydp.components.shared.errors import InputError, PrivacyError

ACCOUNTANTS = ("pld", "rdp")

# Losses are rounded up to multiples of this. Coarser only where a distribution would not fit in memory.
_INTERVAL = 1e-4
_COARSE = 1e-3
_MOST_POINTS = 1_000_000

# exp of more is infinite.
_LARGEST_EXPONENT = 700.0

# Calibration stops when noise_multiplier is known to this relative width.
_CALIBRATION_WIDTH = 1e-3
_FIRST_NOISE, _MOST_NOISE = 64.0, 1e6


def accountant_version() -> str:
    """The accounting library and its version, for statements."""
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}"


def epsilon(event: DpEvent, *, delta: float, accountant: str = "pld", store: LossStore | None = None) -> float:
    """The epsilon at which `event` is (epsilon, delta)-DP; infinite where there is none.

    A part whose noise is below a hundredth of its sensitivity counts as having none: alone it has an epsilon of
    thousands, which protects nobody and lies where floating point ends.

    Repeat-and-select events (tuning) have no loss distribution: such a part enters by its Renyi curve, turned into
    (epsilon', delta / 2) and composed with the rest by PLD, or the whole goes by Renyi, whichever is less. Both bound.

    Args:
        event: what was done.
        delta: in (0, 1).
        accountant: `pld` (reported) or `rdp`. Both are upper bounds; that of Renyi DP is most often the larger one, but
            not always: many steps at a small sampling probability and a small delta turn them round.
        store: compositions computed before; by default those of this process only.

    Raises:
        InputError: delta out of range, an unknown accountant, or an event with a value out of range.
        PrivacyError: an event that the accountant does not know.
    """
    _check_delta(delta)
    check_event(event)
    if accountant not in ACCOUNTANTS:
        raise InputError(f"accountant must be one of {', '.join(ACCOUNTANTS)}, found {accountant!r}")
    if accountant == "rdp":
        return _renyi_epsilon(event, delta)
    return _epsilon_at(event, delta, _INTERVAL, store)


def privacy_profile(event: DpEvent, epsilons: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The delta of `event` at each of `epsilons`, [n]: by PLD, so that neither direction of neighbours exceeds it.

    Args:
        event: what was done; selections (sweeps) have no profile of their own.
        epsilons: at least 0, [n].

    Raises:
        InputError: an event with a value out of range.
        PrivacyError: an event that the accountant does not know, or one with a selection.
    """
    check_event(event)
    parts = _take_apart(event)
    if parts.selections:
        raise PrivacyError("a selection among trials has no known privacy profile, only an epsilon")
    if not parts.private:
        return np.ones_like(epsilons)
    leaves = tuple(parts.counts.items())
    if not leaves:
        return np.zeros_like(epsilons)
    interval = max([_COARSE, *(_fitting_interval(key) for key, _ in leaves)])
    return np.asarray(
        _composition(leaves, interval, fresh_store()).distribution.get_delta_for_epsilon(epsilons), dtype=np.float64
    )


def epsilon_over_steps(event_after: Callable[[int], DpEvent], *, steps: int, delta: float) -> list[tuple[int, float]]:
    """(step, epsilon) at about twenty steps up to `steps`, on a coarser grid than `epsilon` and so never below it.

    Args:
        event_after: the event of the run's first n steps.
        steps: the last step.
        delta: in (0, 1).
    """
    _check_delta(delta)
    chosen = sorted({max(1, round(steps * part / 20)) for part in range(1, 21)}) if steps else []
    return [(step, _epsilon_at(event_after(step), delta, _COARSE)) for step in chosen]


def calibrate_noise_multiplier(
    *, target_epsilon: float, target_delta: float, make_event: Callable[[float], DpEvent]
) -> float:
    """The smallest noise_multiplier, to 2 parts in 1,000, whose event stays within the target by PLD.

    Args:
        target_epsilon: above 0.
        target_delta: in (0, 1).
        make_event: noise_multiplier -> event.

    Raises:
        InputError: a target or a value of the event out of range, or a target that no noise_multiplier up to 1e6
            reaches.
    """
    _check_delta(target_delta)
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise InputError(f"target_epsilon must be a finite number above 0, found {target_epsilon}")

    # Two events tell one family from another.
    samples = (make_event(1.0), make_event(2.0))
    for event in samples:
        check_event(event)
    family = (target_epsilon, target_delta, canonical(samples[0]), canonical(samples[1]))
    if family not in _calibrated:
        _calibrated[family] = _calibrate(target_epsilon, target_delta, make_event)
    return _calibrated[family]


_calibrated: dict[tuple[float, float, str, str], float] = {}
"""What this process has calibrated: the trials of a sweep, an audit and the run it audits ask for the same."""


def _calibrate(target_epsilon: float, target_delta: float, make_event: Callable[[float], DpEvent]) -> float:
    def excess(noise_multiplier: float, interval: float = _COARSE) -> float:
        ratio = _epsilon_at(make_event(noise_multiplier), target_delta, interval) / target_epsilon
        return math.log(min(max(ratio, 1e-6), 1e6))  # interpolation wants no infinity

    low, high = _bracket(excess, target_epsilon)
    found = _root(excess, low, high)
    # The coarse grid overestimates, most where epsilon is small; there the fine one is cheap.
    nearby = found * (1 - _CALIBRATION_WIDTH)
    if excess(nearby, _INTERVAL) <= 0:
        low = nearby
        while excess(low, _INTERVAL) <= 0:
            low *= 0.98
        found = _root(lambda noise_multiplier: excess(noise_multiplier, _INTERVAL), low, nearby)
    while excess(found, _INTERVAL) > 0:
        found *= 1 + _CALIBRATION_WIDTH / 4
    return found


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    """Where `excess` falls to zero, from above by less than the calibration's width."""
    if excess(high) == 0:
        return high
    # Both scales are logarithmic: there epsilon is close to a straight line, so few evaluations suffice.
    width = _CALIBRATION_WIDTH / 4
    root = float(brentq(lambda x: excess(math.exp(x)), math.log(low), math.log(high), xtol=width))
    return math.exp(root + width)


def _bracket(excess: Callable[[float], float], target_epsilon: float) -> tuple[float, float]:
    # Start from plenty of noise: there the loss is narrow and an evaluation is quick.
    high = _FIRST_NOISE
    while excess(high) > 0:
        high *= 4
        if high > _MOST_NOISE:
            raise InputError(f"no noise_multiplier up to {_MOST_NOISE:g} reaches target_epsilon {target_epsilon}")
    low = high / 4
    while excess(low) <= 0:
        if low == SMALLEST_NOISE:
            raise InputError(f"target_epsilon {target_epsilon} asks for no noise at all: name a smaller one")
        low, high = max(low / 4, SMALLEST_NOISE), low
    return low, high


def _check_delta(delta: float) -> None:
    if not SMALLEST_DELTA <= delta < 1:
        raise InputError(f"delta must be in [{SMALLEST_DELTA:g}, 1), found {delta}")


# --- composition -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """A composition taken apart: what PLD composes, with counts, and what it cannot."""

    counts: dict[str, int]  # canonical JSON of a run (one event, or one event so many times) -> how often
    selections: tuple[DpEvent, ...]  # repeat-and-select events
    private: bool  # false where a part has no noise


def canonical(event: DpEvent) -> str:
    """One text for one event: its JSON with sorted keys and no spaces."""
    return json.dumps(event_to_json(event), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _take_apart(event: DpEvent) -> _Parts:
    counts: dict[str, int] = {}
    selections: list[DpEvent] = []
    private = True
    inverse_variance = 0.0

    def visit(part: DpEvent, count: int) -> None:
        nonlocal private, inverse_variance
        single, repeats = _run(part)
        if isinstance(single, dp_event.NoOpDpEvent) or _is_all_noise(single):
            return
        if single is not part and isinstance(single, _COMPOSING):
            visit(single, repeats * count)
        elif isinstance(part, dp_event.ComposedDpEvent):
            for inner in part.events:
                visit(inner, count)
        elif isinstance(part, dp_event.RepeatAndSelectDpEvent):
            selections.extend([part] * count)
        elif isinstance(single, dp_event.NonPrivateDpEvent) or _noise(single) < SMALLEST_NOISE * _sensitivity(single):
            private = False
        elif isinstance(single, dp_event.GaussianDpEvent):
            # Gaussians of any noise compose to one Gaussian, exactly.
            inverse_variance += repeats * count / single.noise_multiplier**2
        else:
            key = canonical(part)
            counts[key] = counts.get(key, 0) + count

    visit(event, 1)
    if inverse_variance > SMALLEST_NOISE**-2:
        private = False
    elif inverse_variance:
        # Last, so that another Gaussian leaves what was composed before it as it is.
        counts[canonical(dp_event.GaussianDpEvent(inverse_variance**-0.5))] = 1
    return _Parts(counts=counts, selections=tuple(selections), private=private)


_NOISY = (
    dp_event.GaussianDpEvent,
    dp_event.LaplaceDpEvent,
    dp_event.PoissonSampledDpEvent,
    dp_event.MixtureOfGaussiansDpEvent,
    dp_event.TruncatedSubsampledGaussianDpEvent,
)
_COMPOSING = (dp_event.SelfComposedDpEvent, dp_event.ComposedDpEvent, dp_event.RepeatAndSelectDpEvent)


def _run(event: DpEvent) -> tuple[DpEvent, int]:
    """What `event` repeats, and how often."""
    return (event.event, event.count) if isinstance(event, dp_event.SelfComposedDpEvent) else (event, 1)


def _is_all_noise(event: DpEvent) -> bool:
    """Whether its noise is infinite: nothing of the data is told."""
    return isinstance(event, _NOISY) and _noise(event) == math.inf


def _noise(event: DpEvent) -> float:
    """Its scale."""
    inner = event.event if isinstance(event, dp_event.PoissonSampledDpEvent) else event
    if isinstance(inner, dp_event.DiscreteLaplaceDpEvent):
        return 1 / inner.noise_parameter if inner.noise_parameter else 0.0
    for field in ("noise_multiplier", "standard_deviation"):
        if hasattr(inner, field):
            return float(getattr(inner, field))
    raise PrivacyError(f"no accounting is known for {event}")


def _sensitivity(event: DpEvent) -> float:
    """In units of the noise's scale."""
    if isinstance(event, dp_event.DiscreteLaplaceDpEvent):
        return float(event.sensitivity)
    if not isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        return 1.0
    likely = (float(s) for s, p in zip(event.sensitivities, event.sampling_probs, strict=True) if p > 1e-24)
    return max([1.0, *likely])


def _epsilon_at(event: DpEvent, delta: float, interval: float, store: LossStore | None = None) -> float:
    parts = _take_apart(event)
    if not parts.private:
        return math.inf
    leaves = tuple(parts.counts.items())
    store = store or fresh_store()
    if not parts.selections:
        return _loss_epsilon(leaves, (), delta, interval, store)
    selected = _renyi_epsilon(dp_event.ComposedDpEvent(list(parts.selections)), delta / 2)
    whole = _renyi_epsilon(event, delta)
    if selected > _LARGEST_EXPONENT:
        return whole
    return min(whole, _loss_epsilon(leaves, (selected, delta / 2), delta, interval, store))


def _loss_epsilon(
    leaves: Leaves, known: tuple[()] | tuple[float, float], delta: float, interval: float, store: LossStore
) -> float:
    """Epsilon of the composition of `leaves` and, where given, of a mechanism known to be (epsilon, delta)-DP."""
    if not leaves and not known:
        return 0.0
    interval = max([interval, *(_fitting_interval(key) for key, _ in leaves)])
    if not known:
        return _composition(leaves, interval, store).epsilon(delta)
    parameters = pld.common.DifferentialPrivacyParameters(*known)
    whole = pld.from_privacy_parameters(parameters, value_discretization_interval=interval)
    if leaves:
        whole = _composition(leaves, interval, store).distribution.compose(whole)
    return float(whole.get_epsilon_for_delta(delta))


def _composition(leaves: Leaves, interval: float, store: LossStore) -> Kept:
    """The loss distribution of all of `leaves`, from the largest part of them that is kept.

    Most often one event came after those composed last time, and one distribution is new. What remains is composed in
    two steps, the last leaf by itself: it may be the one of all Gaussians, which changes with each of them.
    """
    rest, kept = store.find(leaves, interval)
    for step in (rest[:-1], rest[-1:]):
        if step:
            started = time.perf_counter()
            part = _joined(step, interval)
            made = part if kept is None else kept.distribution.compose(part)
            unsaved = time.perf_counter() - started + (0.0 if kept is None else kept.unsaved)
            rest = rest[len(step) :]
            kept = store.put(leaves, interval, Kept(made, unsaved), lacking=rest)
    assert kept is not None
    return kept


def _joined(leaves: Leaves, interval: float) -> Any:
    """The loss distribution of `leaves`, by halves: the tails of n compositions are then cut off log n times."""
    if len(leaves) > 1:
        half = len(leaves) // 2
        return _joined(leaves[:half], interval).compose(_joined(leaves[half:], interval))
    [(key, count)] = leaves
    event, repeats = _run(event_from_json(json.loads(key)))
    single = _distribution(canonical(event), interval)
    return single if repeats * count == 1 else single.self_compose(repeats * count)


@functools.lru_cache(maxsize=16)
def _distribution(key: str, interval: float) -> Any:
    """The loss distribution of one event that composes no others."""
    event = event_from_json(json.loads(key))
    if isinstance(event, dp_event.GaussianDpEvent):
        return pld.from_gaussian_mechanism(event.noise_multiplier, value_discretization_interval=interval)
    if isinstance(event, dp_event.LaplaceDpEvent):
        return pld.from_laplace_mechanism(event.noise_multiplier, value_discretization_interval=interval)
    if isinstance(event, dp_event.DiscreteLaplaceDpEvent):
        return pld.from_discrete_laplace_mechanism(
            event.noise_parameter, sensitivity=event.sensitivity, value_discretization_interval=interval
        )
    if isinstance(event, dp_event.MixtureOfGaussiansDpEvent):
        return mixture_distribution(event, interval=interval)
    if isinstance(event, dp_event.TruncatedSubsampledGaussianDpEvent):
        return pld.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event.dataset_size,
            sampling_probability=event.sampling_probability,
            truncated_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
            value_discretization_interval=interval,
        )
    if isinstance(event, dp_event.PoissonSampledDpEvent):
        return _sampled_distribution(event, interval)
    raise PrivacyError(f"no loss distribution is known for {event}")


def _sampled_distribution(event: dp_event.PoissonSampledDpEvent, interval: float) -> Any:
    if isinstance(event.event, dp_event.GaussianDpEvent):
        build = pld.from_gaussian_mechanism
    elif isinstance(event.event, dp_event.LaplaceDpEvent):
        build = pld.from_laplace_mechanism
    else:
        raise PrivacyError(f"no accounting is known for Poisson sampling of {event.event}")
    return build(
        event.event.noise_multiplier,
        sampling_prob=event.sampling_probability,
        value_discretization_interval=interval,
    )


@functools.lru_cache(maxsize=1 << 14)
def _fitting_interval(key: str) -> float:
    """A grid fine enough to be exact and coarse enough that one event's losses fit in memory."""
    event, _ = _run(event_from_json(json.loads(key)))
    if isinstance(event, dp_event.LaplaceDpEvent | dp_event.DiscreteLaplaceDpEvent):
        return _INTERVAL
    ratio = _sensitivity(event) / _noise(event)
    # Losses of a Gaussian lie within ratio^2 / 2 plus or minus ratio times ten standard deviations.
    needed = (ratio**2 + 20 * ratio) / _MOST_POINTS
    return _INTERVAL if needed <= _INTERVAL else 10.0 ** math.ceil(math.log10(needed))


def _renyi_epsilon(event: DpEvent, delta: float) -> float:
    if not RenyiAccountant().supports(event):
        raise PrivacyError(f"the rdp accountant does not know {event}")
    return _renyi_epsilon_of(canonical(event), delta)


@functools.lru_cache(maxsize=1 << 10)
def _renyi_epsilon_of(key: str, delta: float) -> float:
    """By the event's canonical JSON, since a sweep's reservation, its charge and its statement ask for the same."""
    accountant = RenyiAccountant()
    with quiet_about_excluded_orders():
        accountant.compose(event_from_json(json.loads(key)))
    found = float(accountant.get_epsilon(delta))
    return math.inf if math.isnan(found) else found
