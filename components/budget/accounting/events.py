"""What a mechanism did, as a `DpEvent`: the description that the accountants read, apart from the accounting.

Every event is for neighbours that differ by adding or removing one privacy unit, unless its function says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from dp_accounting import dp_event
from dp_accounting.dp_event import DpEvent
from scipy.stats import binom

from lazydp.components.budget.accounting.limits import SMALLEST_NOISE
from lazydp.components.shared.errors import FormatError, InputError, PrivacyError

# The chance that a user has more than the kept number of examples in one batch; see `user_level_event`.
_TAIL = 1e-30

# Within which dp-accounting takes probabilities for a distribution.
_SUM_OF_PROBABILITIES = 1e-9


def dpsgd_event(
    *,
    noise_multiplier: float,
    sampling_prob: float,
    steps: int,
    sampler: str = "poisson",
    population: int | None = None,
    batch_size: int | None = None,
) -> DpEvent:
    """The event of `steps` steps of DP-SGD in which each privacy unit contributes at most one clipped gradient.

    The sampler says itself how it drew the batches: their distribution is what amplifies. `lazydp train` draws
    `poisson` and no other (ARCHITECTURE.md says why); the others are for loops of one's own around `make_private`:

    - `poisson`: each unit independently with `sampling_prob`.
    - `truncated_poisson`: the same, then at most `batch_size` of `population` units, chosen at random
      (arXiv 2508.15089).
    - `shuffled`, `fixed_size`: no amplification is claimed (arXiv 2411.10614 shows how far below the truth a claim
      of Poisson would lie), and a swap of one unit for another moves the sum by two clipping norms, so that the noise
      counts half. A shuffled unit takes part once in `1 / sampling_prob` steps; a unit of a batch of fixed size may be
      in every step.

    Args:
        noise_multiplier: sigma, the noise's standard deviation over the clipping norm; 0 means no privacy.
        sampling_prob: q, in (0, 1].
        steps: T, at least 0.
        sampler: one of the four kinds above.
        population: number of units, for `truncated_poisson`.
        batch_size: most units in a batch, for `truncated_poisson`.

    Raises:
        InputError: a value out of range.
        PrivacyError: a sampler without known accounting.
    """
    _check(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps)
    if sampler == "poisson":
        step = _poisson(sampling_prob, noise_multiplier)
    elif sampler == "truncated_poisson":
        if population is None or batch_size is None or population < 1 or batch_size < 1:
            raise InputError("a truncated_poisson sampler must state its population and batch_size, each at least 1")
        step = dp_event.TruncatedSubsampledGaussianDpEvent(population, sampling_prob, batch_size, noise_multiplier)
    elif sampler == "shuffled":
        return repeated(dp_event.GaussianDpEvent(noise_multiplier / 2), math.ceil(steps * sampling_prob))
    elif sampler == "fixed_size":
        return repeated(dp_event.GaussianDpEvent(noise_multiplier / 2), steps)
    else:
        raise PrivacyError(
            f"no accounting is known for batches drawn by {sampler!r}: use poisson, truncated_poisson, shuffled or "
            "fixed_size"
        )
    return repeated(step, steps)


def user_level_event(
    *, noise_multiplier: float, sampling_prob: float, steps: int, max_examples_per_user: int
) -> DpEvent:
    """The event, per user, of DP-SGD that samples examples (Poisson) where a user has at most k of them.

    In one step a user's examples number Binomial(k, q), and j of them move the sum by at most j clipping norms: a
    mixture of Gaussians with sensitivities 0..k, tight for this mechanism (Ganesh, arXiv 2401.10294; vectors by
    corollary 4.7 of arXiv 2310.15526). Where the binomial's tail falls below 1e-30 its mass is moved to k, the
    largest sensitivity, which can only raise the loss.

    Args:
        noise_multiplier: sigma, relative to the clipping norm of one example.
        sampling_prob: q of an example.
        steps: T.
        max_examples_per_user: k, at least 1.

    Raises:
        InputError: a value out of range.
    """
    _check(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, steps=steps)
    if max_examples_per_user < 1:
        raise InputError(f"max_examples_per_user must be at least 1, found {max_examples_per_user}")
    if max_examples_per_user == 1:
        return repeated(_poisson(sampling_prob, noise_multiplier), steps)
    if sampling_prob == 1.0:
        return repeated(dp_event.GaussianDpEvent(noise_multiplier / max_examples_per_user), steps)
    sensitivities, probabilities = _examples_in_batch(max_examples_per_user, sampling_prob)
    return repeated(dp_event.MixtureOfGaussiansDpEvent(noise_multiplier, sensitivities, probabilities), steps)


def without_amplification(*, noise_multiplier: float, steps: int, max_examples_per_user: int = 1) -> DpEvent:
    """The event of an adversary who knows every batch: `steps` Gaussians of sensitivity `max_examples_per_user`.

    Raises:
        InputError: a value out of range.
    """
    _check(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=steps)
    if max_examples_per_user < 1:
        raise InputError(f"max_examples_per_user must be at least 1, found {max_examples_per_user}")
    return repeated(dp_event.GaussianDpEvent(noise_multiplier / max_examples_per_user), steps)


def counts_event(*, noise_multiplier: float, contributions: int = 1) -> DpEvent:
    """The event of one release of counts, each with Gaussian noise.

    Args:
        noise_multiplier: standard deviation of the noise over the most by which one contribution moves all counts
            together (L2).
        contributions: how many of these a privacy unit makes, at least 1. They may all fall on the same count, so the
            unit moves the counts by so many times as much.

    Raises:
        InputError: a value out of range.
    """
    _check(noise_multiplier=noise_multiplier, sampling_prob=1.0, steps=1)
    if contributions < 1:
        raise InputError(f"contributions must be at least 1, found {contributions}")
    return dp_event.GaussianDpEvent(noise_multiplier / contributions)


def start_event(*, histogram: float, statistics: float, contributions: int = 1) -> DpEvent:
    """The event of a start: a noised histogram, and the statistics that are chosen by it.

    Args:
        histogram: standard deviation of the histogram's noise, for a sensitivity of 1.
        statistics: that of the statistics, were they one; how their share of the squared mu is divided among them may
            depend on the histogram (`onepass.rules`).
        contributions: how many privacy units one participant stands for.

    Raises:
        InputError: a value out of range.
    """
    return composed(
        [
            counts_event(noise_multiplier=histogram, contributions=contributions),
            counts_event(noise_multiplier=statistics, contributions=contributions),
        ]
    )


def tuning_event(trial: DpEvent, *, mean_trials: float, shape: float) -> DpEvent:
    """The event of choosing the best of a randomised number of trials (Papernot and Steinke, arXiv 2110.03620).

    Args:
        trial: the event of one trial, its score included.
        mean_trials: expected number of trials, at least 1.
        shape: distribution of their number: `math.inf` Poisson, 1 geometric, 0 logarithmic, else truncated negative
            binomial.

    Raises:
        InputError: a value out of range.
    """
    if not (mean_trials >= 1 and math.isfinite(mean_trials)):
        raise InputError(f"mean_trials must be a finite number of at least 1, found {mean_trials}")
    if math.isnan(shape) or shape < 0:
        raise InputError(f"the shape of the distribution of trials must be 0 or more (inf: Poisson), found {shape}")
    return dp_event.RepeatAndSelectDpEvent(trial, float(mean_trials), float(shape))


def repeated(event: DpEvent, count: int) -> DpEvent:
    """`count` adaptive repetitions of `event`."""
    if count == 0:
        return dp_event.NoOpDpEvent()
    return event if count == 1 else dp_event.SelfComposedDpEvent(event, count)


def composed(events: Sequence[DpEvent]) -> DpEvent:
    """All of `events`, each free to look at the results of those before."""
    return dp_event.ComposedDpEvent(list(events)) if events else dp_event.NoOpDpEvent()


def _check(*, noise_multiplier: float, sampling_prob: float, steps: int) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise InputError(f"noise_multiplier must be a finite number of at least 0, found {noise_multiplier}")
    if 0 < noise_multiplier < SMALLEST_NOISE:
        raise InputError(
            f"noise_multiplier {noise_multiplier:g} protects nobody: a single step would have an epsilon of thousands; "
            f"give {SMALLEST_NOISE:g} or more (useful runs begin near 0.5)"
        )
    if not 0 < sampling_prob <= 1:
        raise InputError(f"sampling_prob must be in (0, 1], found {sampling_prob}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"steps must be a whole number of at least 0, found {steps!r}")


def _poisson(sampling_prob: float, noise_multiplier: float) -> DpEvent:
    gaussian = dp_event.GaussianDpEvent(float(noise_multiplier))
    return gaussian if sampling_prob == 1.0 else dp_event.PoissonSampledDpEvent(float(sampling_prob), gaussian)


def _examples_in_batch(k: int, sampling_prob: float) -> tuple[list[float], list[float]]:
    """Sensitivities and their probabilities: Binomial(k, q) with a negligible upper tail moved to k."""
    kept = next((j for j in range(k) if binom.sf(j, k, sampling_prob) <= _TAIL), k)
    probabilities = [float(binom.pmf(j, k, sampling_prob)) for j in range(kept + 1)]
    sensitivities = [float(j) for j in range(kept + 1)]
    if kept < k:
        sensitivities.append(float(k))
        probabilities.append(float(max(binom.sf(kept, k, sampling_prob), 1e-300)))
    return sensitivities, probabilities


# --- JSON ------------------------------------------------------------------------------------------------------

_Reader = Callable[[Any, str], Any]


def _number(value: Any, where: str) -> float:
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise FormatError(f"event field {where}: expected a number of at least 0, found {value!r}")
    return float(value)


def _probability(value: Any, where: str) -> float:
    number = _number(value, where)
    if number > 1:
        raise FormatError(f"event field {where}: expected a probability, found {value!r}")
    return number


def _sampling_probability(value: Any, where: str) -> float:
    if not (number := _probability(value, where)) > 0:
        raise FormatError(f"event field {where}: expected a probability above 0, found {value!r}: nothing is sampled")
    return number


def _mean(value: Any, where: str) -> float:
    if not 1 <= (number := _number(value, where)) < math.inf:
        raise FormatError(f"event field {where}: expected a finite number of at least 1, found {value!r}")
    return number


def _count(value: Any, where: str, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FormatError(f"event field {where}: expected a whole number of at least {least}, found {value!r}")
    return value


def _repeats(value: Any, where: str) -> int:
    return _count(value, where, least=0)


def _listed(read: _Reader) -> _Reader:
    def read_list(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise FormatError(f"event field {where}: expected a list that is not empty, found {value!r}")
        return [read(item, f"{where}[{place}]") for place, item in enumerate(value)]

    return read_list


def _nested(value: Any, where: str) -> DpEvent:
    return _read(value, where)


_FIELDS: Mapping[str, Mapping[str, _Reader]] = {
    "NoOpDpEvent": {},
    "NonPrivateDpEvent": {},
    "GaussianDpEvent": {"noise_multiplier": _number},
    "LaplaceDpEvent": {"noise_multiplier": _number},
    "DiscreteLaplaceDpEvent": {"noise_parameter": _number, "sensitivity": _count},
    "PoissonSampledDpEvent": {"sampling_probability": _sampling_probability, "event": _nested},
    "TruncatedSubsampledGaussianDpEvent": {
        "dataset_size": _count,
        "sampling_probability": _sampling_probability,
        "truncated_batch_size": _count,
        "noise_multiplier": _number,
    },
    "MixtureOfGaussiansDpEvent": {
        "standard_deviation": _number,
        "sensitivities": _listed(_number),
        "sampling_probs": _listed(_probability),
    },
    "RepeatAndSelectDpEvent": {"event": _nested, "mean": _mean, "shape": _number},
    "SelfComposedDpEvent": {"event": _nested, "count": _repeats},
    "ComposedDpEvent": {"events": _listed(_nested)},
}
_NESTED = ("event", "events")


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """The event as JSON values: `{"type": ..., field: ...}`, floats exact, infinity as "inf".

    Raises:
        FormatError: an event of a kind that lazydp has no name for.
    """
    kind = type(event).__name__
    if kind not in _FIELDS:
        raise FormatError(f"an event of type {kind} cannot be written: expected one of {', '.join(_FIELDS)}")
    return {"type": kind, **{field: _to_json(getattr(event, field)) for field in _FIELDS[kind]}}


def check_event(event: DpEvent) -> None:
    """Check every value of `event`: a negative noise, or a sampling probability of 0, has no epsilon.

    An event of a kind that lazydp has no name for is left to the accountant.

    Raises:
        InputError: a value out of range; the message names the event's type and field.
    """
    try:
        _check_fields(event)
    except FormatError as error:
        raise InputError(str(error)) from None


def _check_fields(event: DpEvent) -> None:
    kind = type(event).__name__
    values = {field: _to_json(getattr(event, field)) for field in _FIELDS.get(kind, {}) if field not in _NESTED}
    for field, value in values.items():
        _FIELDS[kind][field](value, f"{kind}.{field}")
    _check_mixture(kind, values, kind)
    inner = [getattr(event, field) for field in _FIELDS.get(kind, {}) if field in _NESTED]
    for part in inner:
        for one in part if isinstance(part, list | tuple) else [part]:
            _check_fields(one)


def _check_mixture(kind: str, values: Mapping[str, Any], where: str) -> None:
    """The rules of the one event whose fields must fit each other."""
    if kind != "MixtureOfGaussiansDpEvent":
        return
    sensitivities, probabilities = values["sensitivities"], values["sampling_probs"]
    total = math.fsum(probabilities)
    if len(sensitivities) != len(probabilities) or not math.isclose(total, 1, rel_tol=0, abs_tol=_SUM_OF_PROBABILITIES):
        raise FormatError(
            f"event field {where}.sampling_probs: expected one probability for each of {len(sensitivities)} "
            f"sensitivities, with the sum 1; found {len(probabilities)} with the sum {total:g}"
        )
    if not any(s > 0 and p > 0 for s, p in zip(sensitivities, probabilities, strict=True)):
        raise FormatError(
            f"event field {where}.sensitivities: expected one above 0 with a probability above 0, found "
            f"{sensitivities!r}: nothing depends on the data"
        )


def _to_json(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, DpEvent):
        return event_to_json(value)
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return "inf" if value == math.inf else value


def event_from_json(document: Any) -> DpEvent:
    """The event that `event_to_json` wrote.

    Raises:
        FormatError: an unknown type, a missing, unknown or impossible field; the message names it.
    """
    return _read(document, "event")


def _read(document: Any, where: str) -> DpEvent:
    if not isinstance(document, dict):
        raise FormatError(f"{where}: expected a JSON object, found {document!r}")
    kind = document.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise FormatError(f"{where}: no event of type {kind!r} is known; use a newer lazydp, or the one that wrote it")
    fields = _FIELDS[kind]
    if set(document) - {"type"} != set(fields):
        found = ", ".join(sorted(set(document) - {"type"})) or "none"
        raise FormatError(f"{where}: a {kind} has the fields {', '.join(fields) or 'none'}; found {found}")
    values = {name: read(document[name], f"{where}.{name}") for name, read in fields.items()}
    _check_mixture(kind, values, where)
    return getattr(dp_event, kind)(**values)
