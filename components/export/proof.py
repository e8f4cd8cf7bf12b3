"""The exporter's own proof that no row has pending noise: it trusts neither the kernels nor the skip-ahead table.

1. Every entry of `last`, over the whole table, stands at the run's step.
2. For a random sample of the rows with pending noise before the flush, the flushed row is what the mathematics says it
   must be: the noise comes from the plain reference of ChaCha20 and Box-Muller, and transition and covariance from a
   recursion that runs backwards over the schedule (the trainer's runs forwards).

A flush that only marked rows, that missed some of them, that came twice or under another key fails the second check,
and the error says which. A fault in a share f of a table's pending rows is missed with probability
(1 - f)^16,384 at most (2e-36 for f = 0.5 %, 8e-8 for 0.1 %), and never in a table of up to 16,384 such rows; one that
spares the first columns, with (1 - f)^64. The comparison allows for float32 rounding alone, a few units in the last
place of the weight: less than the noise wherever rows hold their noise (`components/train/tables/precision.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lazydp.components.shared.errors import NonFiniteError, PendingNoiseError
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels import reference
from lazydp.kernels.noise_key import NoiseKey

SAMPLED_ROWS = 1 << 14
_FIRST_COLUMNS = 4
_WHOLE_ROWS = 64
_PARTS = ("weight", "momentum", "rest", "momentum_rest")
# Of the noise: Box-Muller in float32 (kernels/csrc/common/gaussian.h), and the float32 of transition and factor.
_TOLERANCE = 1e-4
_ROUNDINGS = 4.0
_UNIT = 2.0**-24


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Some rows of one table as they were before the flush, or some columns of them.

    Attributes:
        rows: int64 [n], rows with pending noise.
        last: int64 [n].
        weight: float32 [n, D], or their first columns.
        momentum: likewise the velocities, or None.
        rest: likewise the second float of weights that have two, or None.
        momentum_rest: likewise of velocities.

    All on the CPU, wherever the table lives.
    """

    rows: Tensor
    last: Tensor
    weight: Tensor
    momentum: Tensor | None
    rest: Tensor | None
    momentum_rest: Tensor | None

    @classmethod
    def of(cls, table: Mapping[str, Any], rows: Tensor, columns: int) -> SampledRows:
        """The first `columns` of `rows` of a table of a checkpoint."""
        taken: dict[str, Any] = {}
        for name in _PARTS:
            part = table.get(name)
            taken[name] = None if part is None else part[rows, :columns].cpu()
        return cls(rows=rows.cpu(), last=table["last"][rows].long().cpu(), **taken)

    @property
    def columns(self) -> int:
        """How many columns of each row these are."""
        return self.weight.shape[1]

    def state(self) -> Tensor:
        """(weight), or (weight, velocity): float64 [1 or 2, n, D], both floats together."""
        parts = [_values(self.weight, self.rest)]
        if self.momentum is not None:
            parts.append(_values(self.momentum, self.momentum_rest))
        return torch.stack(parts)

    def sizes(self, of_velocity: Tensor) -> Tensor:
        """Of each row what rounding is relative to, [n], where a velocity of 1 adds `of_velocity` [n] to the weight."""
        sizes = torch.zeros(len(self.rows), dtype=torch.float64)
        pairs = ((self.weight, self.rest, torch.ones(1)), (self.momentum, self.momentum_rest, of_velocity.abs()))
        for first, rest, factor in pairs:
            if first is not None:
                size = first.double().abs().amax(1)
                sizes += factor * (size if rest is None else size * _UNIT + rest.double().abs().amax(1))
        return sizes


@dataclass(frozen=True, slots=True)
class PendingRows:
    """What the proof keeps of one table from before the flush.

    Attributes:
        count: rows with pending noise.
        samples: of these rows, the first columns of many, and all columns of a few.
    """

    count: int
    samples: tuple[SampledRows, ...]

    @classmethod
    def of(cls, table: Mapping[str, Any], *, step: int) -> PendingRows:
        """Rows of a table of a checkpoint, drawn at random from those with pending noise at `step`."""
        pending = torch.nonzero(table["last"] < step).squeeze(1)
        count = pending.shape[0]
        if not count:
            return cls(0, ())
        # The operating system's randomness: nothing of the run, which a fault might follow, decides.
        drawn = np.random.default_rng().choice(count, min(count, SAMPLED_ROWS), replace=False)
        rows = pending[torch.from_numpy(drawn).to(pending.device)]
        columns = table["weight"].shape[1]
        longest = table["last"].argmin().reshape(1)
        return cls(
            count,
            (
                SampledRows.of(table, rows, min(columns, _FIRST_COLUMNS)),
                SampledRows.of(table, torch.unique(torch.cat([rows[:_WHOLE_ROWS], longest])), columns),
            ),
        )


def prove_flushed(
    tables: Mapping[str, Mapping[str, Any]],
    pending: Mapping[str, PendingRows],
    *,
    optimizer: EmbeddingSgd,
    noise_scale: float,
    key: NoiseKey,
    step: int,
) -> dict[str, int]:
    """Check every table after the flush.

    Args:
        tables: `weight` and `last` of each table, in the order of their numbers.
        pending: what `PendingRows.of` kept before the flush.
        optimizer: of the tables.
        noise_scale: sigma C / b.
        key: the noise key.
        step: the run's step T.

    Returns:
        for each table the least entry of `last`.

    Raises:
        PendingNoiseError: a row has no noise, or not that of the run; the message names table, row and fault.
        NonFiniteError: the covariance is not finite.
    """
    transition, covariance = backward_moments(optimizer, noise_scale=noise_scale, step=step)
    if not bool(torch.isfinite(covariance).all()):
        raise NonFiniteError("the variance of the pending noise is not finite: the schedule diverges")
    flushed = {}
    for number, (name, table) in enumerate(tables.items()):
        last = table["last"]
        late = torch.nonzero(last != step)
        if late.numel():
            row = int(late[0])
            raise PendingNoiseError(
                f"table {name!r}, row {row}: its noise is applied up to step {int(last[row])} of {step}; "
                "nothing is released"
            )
        for sample in pending[name].samples:
            flush = _Flush(sample, transition[sample.last], covariance[sample.last], key=key, table=number, step=step)
            flush.check(name, SampledRows.of(table, sample.rows.to(table["weight"].device), sample.columns))
        flushed[name] = int(last.min())
    return flushed


def backward_moments(optimizer: EmbeddingSgd, *, noise_scale: float, step: int) -> tuple[Tensor, Tensor]:
    """Transition and covariance from every start h to `step`, float64 [step + 1, d, d] each.

    From M[T] = I and S[T] = 0:  M[h] = M[h+1] A[h+1],  S[h] = S[h+1] + M[h+1] Q[h+1] M[h+1]'.
    """
    size = 2 if optimizer.momentum else 1
    transition = torch.zeros(step + 1, size, size, dtype=torch.float64)
    covariance = torch.zeros(step + 1, size, size, dtype=torch.float64)
    transition[step] = torch.eye(size, dtype=torch.float64)
    for start in range(step - 1, -1, -1):
        a, b = _linear_step(optimizer, optimizer.rate(start + 1))
        after = transition[start + 1]
        pushed = after @ b * noise_scale
        transition[start] = after @ a
        covariance[start] = covariance[start + 1] + pushed @ pushed.T
    return transition, covariance


def _linear_step(optimizer: EmbeddingSgd, rate: float) -> tuple[Tensor, Tensor]:
    """A and B of one step of SGD without a gradient, as `skip_ahead` states them."""
    decay, momentum = optimizer.weight_decay, optimizer.momentum
    if not momentum:
        return torch.tensor([[1.0 - rate * decay]]).double(), torch.tensor([[-rate]]).double()
    a = torch.tensor([[1.0 - rate * decay, -rate * momentum], [decay, momentum]], dtype=torch.float64)
    return a, torch.tensor([[-rate], [1.0]], dtype=torch.float64)


def _values(first: Tensor, rest: Tensor | None) -> Tensor:
    return first.double() if rest is None else first.double() + rest.double()


class _Flush:
    """What a flush makes of sampled rows, computed in float64.

    Args:
        before: the rows.
        transition: M of each, [n, d, d].
        covariance: S of each, [n, d, d].
        key: of the noise.
        table: its number.
        step: flushed to.
    """

    def __init__(
        self, before: SampledRows, transition: Tensor, covariance: Tensor, *, key: NoiseKey, table: int, step: int
    ) -> None:
        self._before = before
        self._transition = transition
        self._size = transition.shape[1]
        draws = [
            reference.noise(
                key.tensor(), table=table, rows=before.rows, step=step, columns=before.columns, second=second
            )
            for second in (False, True)[: self._size]
        ]
        factor = _lower(covariance)
        # Without momentum noise moves against the gradient's sign, as a step does.
        sign = 1.0 if self._size == 2 else -1.0
        self._noise = sign * torch.einsum("nij,jnc->inc", factor, torch.stack(draws))
        self._spread = factor[:, 0, 0]

    def _applied(self, state: Tensor) -> Tensor:
        return torch.einsum("nij,jnc->inc", self._transition, state) + self._noise

    def check(self, name: str, after: SampledRows) -> None:
        """Compare with the flushed rows.

        Raises:
            PendingNoiseError: they differ by more than rounding.
        """
        before, found = self._before, after.state()[0]
        expected = self._applied(before.state())
        of_velocity = self._transition[:, 0, -1] if self._size == 2 else torch.zeros(len(before.rows))
        allowed = _TOLERANCE * self._spread + _ROUNDINGS * _UNIT * (before.sizes(of_velocity) + 4.0 * self._spread)

        def differs(value: Tensor) -> Tensor:
            """Of each row whether it is something else, [n]."""
            return ~((found - value).abs().amax(1) <= allowed)

        wrong = differs(expected[0])
        if not bool(wrong.any()):
            return
        missing = ~differs(expected[0] - self._noise[0]) | (found == before.state()[0]).all(1)
        twice = ~differs(self._applied(expected)[0])
        first, rest = int(torch.nonzero(wrong)[0]), found - (expected[0] - self._noise[0])
        if bool((wrong & missing).any()):
            first = int(torch.nonzero(wrong & missing)[0])
            fault = "has none of its noise (the flush is missing, missed rows, or only marked them)"
        elif bool((wrong & twice).any()):
            first = int(torch.nonzero(wrong & twice)[0])
            fault = "has its noise twice (two flushes from one state)"
        else:
            ratio = math.sqrt(float((rest[wrong] / self._spread[wrong, None]).square().mean()))
            fault = (
                f"has other noise than the run's, of {ratio:.3g} times its standard deviation (another key, table, "
                "step or schedule)"
            )
        raise PendingNoiseError(
            f"table {name!r}, row {int(before.rows[first])}: the flushed row {fault}, since step "
            f"{int(before.last[first])}; {int(wrong.sum())} of {len(wrong)} rows that were looked at are wrong; "
            "nothing is released"
        )


def _lower(covariance: Tensor) -> Tensor:
    """The lower triangular factor of covariances [n, d, d], which may be singular."""
    factor = torch.zeros_like(covariance)
    l11 = covariance[:, 0, 0].sqrt()
    factor[:, 0, 0] = l11
    if covariance.shape[1] == 2:
        l21 = torch.where(l11 > 0, covariance[:, 1, 0] / l11, 0.0)
        factor[:, 1, 0] = l21
        factor[:, 1, 1] = (covariance[:, 1, 1] - l21.square()).clamp(min=0.0).sqrt()
    return factor
