"""Figures of one step: they depend on the data, and are private like it; show them only where the data may be seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazydp.components.train.contributions import Contributions
from lazydp.components.train.mechanism import GROUPS, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """Figures of one group of parameters.

    Attributes:
        mean_norm: mean norm of the group's part of a unit's gradient before clipping, over units with a finite one.
        clipped: fraction of the units for which the group's part was scaled down.
        signal: sum of the norms of the clipped parts: the most that the clipped sum can measure.
    """

    mean_norm: float
    clipped: float
    signal: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Figures of one step.

    Attributes:
        step: number of the step, from 1.
        size: examples drawn.
        units: privacy units drawn: the examples, or the users where users are sampled.
        loss: mean loss of the examples; NaN for an empty batch.
        clipped: fraction of the units whose gradient was scaled down, in any group.
        mean_norm: mean norm of a unit's gradient before clipping, over units with a finite one; NaN where none has.
        non_finite: units that counted zero because their gradient was not finite.
        groups: the same by group of parameters; empty without clipping.
    """

    step: int
    size: int
    units: int
    loss: float
    clipped: float
    mean_norm: float
    non_finite: int
    groups: Mapping[Group, GroupReport]

    @classmethod
    def of(cls, step: int, losses: Sequence[Tensor], contributions: Sequence[Contributions]) -> StepReport:
        """The figures of micro-batches with these losses [B] and contributions; none at all is a legal draw."""
        sq_norms = {group: _joined([part.sq_norms[group] for part in contributions]) for group in GROUPS}
        factors = {group: _joined([part.coefficients[group] for part in contributions]) for group in GROUPS}
        factor = torch.minimum(factors["dense"], factors["embeddings"])
        units = factor.shape[0]
        return cls(
            step=step,
            size=sum(part.shape[0] for part in losses),
            units=units,
            loss=_mean(_joined(losses)),
            clipped=_fraction_below_one(factor),
            mean_norm=_finite_mean((sq_norms["dense"] + sq_norms["embeddings"]).sqrt()),
            non_finite=int((factor == 0.0).sum()),
            groups={group: _of_group(sq_norms[group].sqrt(), factors[group]) for group in GROUPS},
        )

    @classmethod
    def unclipped(cls, step: int, losses: Sequence[Tensor], *, units: int) -> StepReport:
        """The figures of a step that clips nothing and so knows no norm."""
        return cls(
            step=step,
            size=sum(part.shape[0] for part in losses),
            units=units,
            loss=_mean(_joined(losses)),
            clipped=0.0,
            mean_norm=math.nan,
            non_finite=0,
            groups={},
        )


def _of_group(norms: Tensor, factor: Tensor) -> GroupReport:
    used = factor > 0.0
    return GroupReport(
        mean_norm=_finite_mean(norms),
        clipped=_fraction_below_one(factor),
        signal=float((norms * factor)[used].sum()),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.empty(0)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def _finite_mean(norms: Tensor) -> float:
    return _mean(norms[torch.isfinite(norms)])


def _fraction_below_one(factor: Tensor) -> float:
    return float((factor < 1.0).to(torch.float32).mean()) if factor.numel() else 0.0
