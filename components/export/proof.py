"""The exporter's own proof that no row has pending noise: it trusts neither the kernels nor the skip-ahead table.

1. Every entry of `last` stands at the run's step.
2. For rows with pending noise before the flush, the flushed weight is what the mathematics says it must be: the noise
   comes from the plain reference of ChaCha20 and Box-Muller, and transition and covariance from a recursion that runs
   backwards over the schedule (the trainer's runs forwards).

A flush that only marked the rows, that missed some of them, or that took the wrong variance fails the second check. It
allows for float32 rounding alone, a few units in the last place of the weight: less than the noise wherever rows hold
their noise at all (`components/train/tables/precision.py`). Where the last noise of a row is below that, a flush that
misses it changes nothing that is released.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lazydp.components.shared.errors import NonFiniteError, PendingNoiseError
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels import reference
from lazydp.kernels.noise_key import NoiseKey

SAMPLED_ROWS = 64
# Of the noise: Box-Muller in float32 (kernels/csrc/common/gaussian.h), and the float32 of transition and factor.
_TOLERANCE = 1e-4
_ROUNDINGS = 4.0
_UNIT = 2.0**-24


@dataclass(frozen=True, slots=True)
class PendingRows:
    """Some rows of one table as they were before the flush.

    Attributes:
        rows: int64 [n], rows with pending noise, the one with the most among them.
        last: int64 [n].
        weight: float32 [n, D].
        momentum: float32 [n, D], or None.
        rest: float32 [n, D], the second float of rows that have two, or None.

    All on the CPU, wherever the table lives.
    """

    rows: Tensor
    last: Tensor
    weight: Tensor
    momentum: Tensor | None
    rest: Tensor | None = None

    @classmethod
    def of(cls, table: Mapping[str, Any], *, step: int) -> PendingRows:
        """Up to 64 rows of a table of a checkpoint, spread evenly over those with pending noise at `step`."""
        owing = torch.nonzero(table["last"] < step).squeeze(1)
        if not owing.numel():
            rows = owing
        else:
            spread = torch.linspace(0, owing.numel() - 1, SAMPLED_ROWS).long().to(owing.device)
            rows = torch.unique(torch.cat([owing[spread], table["last"].argmin().reshape(1)]))
        momentum = table["momentum"]
        return cls(
            rows=rows.cpu(),
            last=table["last"][rows].long().cpu(),
            weight=table["weight"][rows].cpu(),
            momentum=None if momentum is None else momentum[rows].cpu(),
            rest=None if table.get("rest") is None else table["rest"][rows].cpu(),
        )

    def values(self) -> Tensor:
        """The rows, float64 [n, D]: both floats together."""
        return _values(self.weight, self.rest)


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
        PendingNoiseError: a row is pending; the message names table and row.
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
        rows = pending[name].rows
        if rows.numel():
            z = reference.noise(key.tensor(), table=number, rows=rows, step=step, columns=table["weight"].shape[1])
            _check_rows(name, table, pending[name], transition, covariance, z=z)
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


def _mean_and_spread(pending: PendingRows, transition: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n, D] and standard deviation [n] of rows that catch up."""
    m = transition[pending.last]
    mean = m[:, 0, :1] * pending.values()
    if pending.momentum is not None:
        mean = mean + m[:, 0, 1:] * pending.momentum.double()
    return mean, covariance[pending.last][:, 0, 0].sqrt()


def _flushed(table: Mapping[str, Any], pending: PendingRows) -> Tensor:
    rows = pending.rows.to(table["weight"].device)
    rest = table.get("rest")
    return _values(table["weight"][rows].cpu(), None if rest is None else rest[rows].cpu())


def _values(weight: Tensor, rest: Tensor | None) -> Tensor:
    return weight.double() if rest is None else weight.double() + rest.double()


def _check_rows(
    name: str,
    table: Mapping[str, Any],
    pending: PendingRows,
    transition: Tensor,
    covariance: Tensor,
    *,
    z: Tensor,
) -> None:
    """Compare flushed rows with M w (+ M v) + L z, computed in float64."""
    mean, spread = _mean_and_spread(pending, transition, covariance)
    sign = -1.0 if pending.momentum is None else 1.0  # noise moves against the gradient's sign
    difference = (_flushed(table, pending) - mean - sign * spread.unsqueeze(1) * z).abs().amax(1)
    size = pending.weight.double().abs().amax(1)
    if pending.rest is not None:
        size = size * _UNIT + pending.rest.double().abs().amax(1)
    if pending.momentum is not None:
        size = size + transition[pending.last][:, 0, 1].abs() * pending.momentum.double().abs().amax(1)
    wrong = torch.nonzero(~(difference <= _TOLERANCE * spread + _ROUNDINGS * _UNIT * (size + 4.0 * spread)))
    if wrong.numel():
        place = int(wrong[0])
        raise PendingNoiseError(
            f"table {name!r}, row {int(pending.rows[place])}: "
            f"the flushed weight lies {float(difference[place]):.3g} from "
            f"what its noise since step {int(pending.last[place])} makes it; nothing is released"
        )
