"""The exporter's own proof that no row has pending noise: it trusts neither the kernels nor the skip-ahead table.

1. Every entry of `last` stands at the run's step.
2. For rows with pending noise before the flush, the flushed weight is what the mathematics says it must be: the noise
   comes from the plain reference of ChaCha20 and Box-Muller, and transition and covariance from a recursion that runs
   backwards over the schedule (the trainer's runs forwards).

A flush that only marked the rows, that missed some of them, or that took the wrong variance fails the second check.
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
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class PendingRows:
    """Some rows of one table as they were before the flush.

    Attributes:
        rows: int64 [n], rows with pending noise, the one with the most among them.
        last: int64 [n].
        weight: float32 [n, D].
        momentum: float32 [n, D], or None.

    All on the CPU, wherever the table lives.
    """

    rows: Tensor
    last: Tensor
    weight: Tensor
    momentum: Tensor | None

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
            _check_rows(name, table["weight"], pending[name], transition, covariance, z=z)
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


def _check_rows(
    name: str, weight: Tensor, pending: PendingRows, transition: Tensor, covariance: Tensor, *, z: Tensor
) -> None:
    """Compare flushed rows with M w (+ M v) + L z, computed in float64."""
    m = transition[pending.last]
    spread = covariance[pending.last][:, 0, 0].sqrt()
    expected = m[:, 0, :1] * pending.weight.double()
    if pending.momentum is None:
        expected -= spread.unsqueeze(1) * z  # noise moves against the gradient's sign
    else:
        expected += m[:, 0, 1:] * pending.momentum.double() + spread.unsqueeze(1) * z
    flushed = weight[pending.rows.to(weight.device)].cpu()
    difference = (flushed.double() - expected).abs().amax(1)
    allowed = _TOLERANCE * (spread + pending.weight.double().abs().amax(1))
    wrong = torch.nonzero(~(difference <= allowed))
    if wrong.numel():
        place = int(wrong[0])
        raise PendingNoiseError(
            f"table {name!r}, row {int(pending.rows[place])}: "
            f"the flushed weight lies {float(difference[place]):.3g} from "
            f"what its noise since step {int(pending.last[place])} makes it; nothing is released"
        )
