"""Figures of one step. They are computed from private data without noise: show them only where the data may be seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lazydp.components.train.device.placement import CPU, moved
from lazydp.components.train.mechanism.contributions import Contributions
from lazydp.components.train.mechanism.parameters import GROUPS, Group

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """Figures of one group of parameters.

    Attributes:
        mean_norm: mean L2 norm, before clipping, of the group's part of a unit's gradient; units whose norm is not
            finite are left out.
        clipped: fraction of the units for which the group's part was scaled down.
        signal: sum over the units of the norms of their clipped parts: an upper bound on the norm of the clipped sum.
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
        mean_norm: mean L2 norm of a unit's gradient before clipping; units whose norm is not finite are left out; NaN
            where none is left.
        non_finite: units that contributed zero because their gradient was not finite.
        groups: figures of each group of parameters; empty without clipping.
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
        """The figures of micro-batches, from the losses [B] and the contributions of each; both may be empty."""
        contributions = [part for part in contributions if part.units.count]
        if not contributions:
            none = GroupReport(mean_norm=math.nan, clipped=0.0, signal=0.0)
            return cls.unclipped(step, losses, units=0, groups=dict.fromkeys(GROUPS, none))
        losses, sq_norms_of, factors_of = _fetched(losses, contributions)
        # One row for each group, then one for all together. In numpy, whose small operations are faster than torch's.
        sq_norms, factors = _rows(sq_norms_of), _rows(factors_of)
        norms = np.sqrt(np.concatenate([sq_norms, sq_norms.sum(axis=0, keepdims=True)]))
        factors = np.concatenate([factors, factors.min(axis=0, keepdims=True)])
        finite = np.isfinite(norms)
        norms[~finite] = 0.0
        counted = finite.sum(axis=1)
        mean_norms = np.where(counted, norms.sum(axis=1) / np.maximum(counted, 1), math.nan).tolist()
        clipped = (factors < 1.0).mean(axis=1).tolist()
        signals = (norms * factors).sum(axis=1).tolist()
        return cls(
            step=step,
            size=sum(part.shape[0] for part in losses),
            units=norms.shape[1],
            loss=_mean_loss(losses),
            clipped=clipped[-1],
            mean_norm=mean_norms[-1],
            non_finite=int((factors[-1] == 0.0).sum()),
            groups={
                group: GroupReport(mean_norm=mean_norms[row], clipped=clipped[row], signal=signals[row])
                for row, group in enumerate(GROUPS)
            },
        )

    @classmethod
    def unclipped(
        cls,
        step: int,
        losses: Sequence[Tensor],
        *,
        units: int,
        groups: Mapping[Group, GroupReport] = MappingProxyType({}),
    ) -> StepReport:
        """The figures of a step without norms: it clips nothing, or its sample is empty."""
        return cls(
            step=step,
            size=sum(part.shape[0] for part in losses),
            units=units,
            loss=_mean_loss(losses),
            clipped=0.0,
            mean_norm=math.nan,
            non_finite=0,
            groups=groups,
        )


def _fetched(
    losses: Sequence[Tensor], contributions: Sequence[Contributions]
) -> tuple[Sequence[Tensor], list[dict[Group, Tensor]], list[dict[Group, Tensor]]]:
    """Losses, squared norms and coefficients of each micro-batch, on the host; one copy, so one wait for a GPU."""
    figures = [figure for part in contributions for figure in (part.sq_norms, part.coefficients)]
    arrived = iter(moved([*losses, *(figure[group] for figure in figures for group in GROUPS)], CPU))
    losses = [next(arrived) for _ in losses]
    fetched: list[dict[Group, Tensor]] = [{group: next(arrived) for group in GROUPS} for _ in figures]
    return losses, fetched[::2], fetched[1::2]


def _rows(parts: Sequence[Mapping[Group, Tensor]]) -> Array:
    """The values of all micro-batches, float64 [groups, U]: in float64, squares and sums of float32 do not overflow."""
    return np.stack([np.concatenate([part[group].numpy() for part in parts], dtype=np.float64) for group in GROUPS])


def _mean_loss(losses: Sequence[Tensor]) -> float:
    size = sum(part.shape[0] for part in losses)
    return sum(float(part.sum()) for part in moved(losses, CPU)) / size if size else math.nan
