"""Figures of one step. They are private: they are computed from private data, and no noise is added to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lazydp.components.train.device.placement import CPU, moved
from lazydp.components.train.mechanism.contributions import Contributions
from lazydp.components.train.mechanism.parameters import GROUPS, Group
from lazydp.components.train.ranks.ranks import Ranks

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupReport:
    """Figures of one group of parameters: the dense layers, or the embedding tables.

    A unit is what is clipped as a whole: an example, or with user sampling a user. A *part* is the part of a unit's
    gradient that belongs to the group.

    Attributes:
        mean_norm: mean L2 norm of the units' parts before clipping. Units whose norm is not finite are left out. NaN if
            no unit is left.
        clipped: fraction of the units whose part was scaled down, between 0 and 1.
        signal: the norms of the clipped parts, added up. The norm of the clipped sum is at most this.
    """

    mean_norm: float
    clipped: float
    signal: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Figures of one step.

    Attributes:
        step: number of the step, from 1.
        size: number of examples in the batch.
        units: number of units in the batch: of examples, or with user sampling of users.
        loss: mean loss of the examples; NaN for an empty batch.
        clipped: fraction of the units whose gradient was scaled down in any group, between 0 and 1.
        mean_norm: mean L2 norm of the units' gradients before clipping. Units whose norm is not finite are left out.
            NaN if no unit is left, and in mode `sgd`.
        non_finite: number of units that contributed zero because their gradient was not finite.
        groups: figures of each group of parameters; empty in mode `sgd`, which computes no norms.
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
        """The figures of a step that clips.

        Args:
            step: number of the step.
            losses: of each micro-batch, [B].
            contributions: of each micro-batch. Both lists are empty for an empty batch.
        """
        contributions = [part for part in contributions if part.units.count]
        if not contributions:
            none = GroupReport(mean_norm=math.nan, clipped=0.0, signal=0.0)
            return cls.unclipped(step, losses, units=0, groups=dict.fromkeys(GROUPS, none))
        losses, sq_norms_of, coefficients_of = _fetched(losses, contributions)
        # Each array gets a row for each group, and a last row for the whole gradient. On small arrays numpy is faster
        # than torch.
        sq_norms, coefficients = _rows(sq_norms_of), _rows(coefficients_of)
        norms = np.sqrt(np.concatenate([sq_norms, sq_norms.sum(axis=0, keepdims=True)]))
        coefficients = np.concatenate([coefficients, coefficients.min(axis=0, keepdims=True)])
        finite = np.isfinite(norms)
        norms[~finite] = 0.0
        counted = finite.sum(axis=1)
        mean_norms = np.where(counted, norms.sum(axis=1) / np.maximum(counted, 1), math.nan).tolist()
        clipped = (coefficients < 1.0).mean(axis=1).tolist()
        signals = (norms * coefficients).sum(axis=1).tolist()
        return cls(
            step=step,
            size=sum(part.shape[0] for part in losses),
            units=norms.shape[1],
            loss=_mean_loss(losses),
            clipped=clipped[-1],
            mean_norm=mean_norms[-1],
            non_finite=int((coefficients[-1] == 0.0).sum()),
            groups={
                group: GroupReport(mean_norm=mean_norms[row], clipped=clipped[row], signal=signals[row])
                for row, group in enumerate(GROUPS)
            },
        )

    def of_all(self, ranks: Ranks) -> StepReport:
        """The figures of the step, from those of each rank's examples; the same on every rank.

        Means are weighted by the units whose norms are finite.
        """
        if ranks.size == 1:
            return self
        own = [self.size, self.units, self.loss, self.clipped, self.mean_norm, self.non_finite]
        own += [value for group in GROUPS for value in astuple(self.groups[group])]
        table = np.stack([of.numpy() for of in ranks.gather(torch.tensor(own, dtype=torch.float64), purpose="report")])
        size, units, loss, clipped, mean_norm, non_finite = table[:, :6].T
        counted = units - non_finite
        return StepReport(
            step=self.step,
            size=int(size.sum()),
            units=int(units.sum()),
            loss=_mean(loss, size),
            clipped=_mean(clipped, units, none=0.0),
            mean_norm=_mean(mean_norm, counted),
            non_finite=int(non_finite.sum()),
            groups={
                group: GroupReport(
                    mean_norm=_mean(figures[:, 0], counted),
                    clipped=_mean(figures[:, 1], units, none=0.0),
                    signal=float(figures[:, 2].sum()),
                )
                for group, figures in zip(GROUPS, np.split(table[:, 6:], len(GROUPS), axis=1), strict=True)
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
        """The figures of a step without norms: a step of mode `sgd`, or a step whose batch is empty.

        Args:
            step: number of the step.
            losses: of each micro-batch, [B].
            units: number of units in the batch.
            groups: see the attribute.
        """
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


def _mean(values: Array, weights: Array, *, none: float = math.nan) -> float:
    """The weighted mean of values whose weight is not 0; `none` where there are none."""
    there = weights > 0
    return float(np.average(values[there], weights=weights[there])) if there.any() else none


def _fetched(
    losses: Sequence[Tensor], contributions: Sequence[Contributions]
) -> tuple[Sequence[Tensor], list[dict[Group, Tensor]], list[dict[Group, Tensor]]]:
    """Losses, squared norms and clipping coefficients of each micro-batch, on the host.

    All are copied together, so that the host waits for a GPU only once.
    """
    figures = [figure for part in contributions for figure in (part.sq_norms, part.coefficients)]
    arrived = iter(moved([*losses, *(figure[group] for figure in figures for group in GROUPS)], CPU))
    losses = [next(arrived) for _ in losses]
    fetched: list[dict[Group, Tensor]] = [{group: next(arrived) for group in GROUPS} for _ in figures]
    return losses, fetched[::2], fetched[1::2]


def _rows(parts: Sequence[Mapping[Group, Tensor]]) -> Array:
    """The values of all micro-batches, float64 [groups, U]."""
    return np.stack([np.concatenate([part[group].numpy() for part in parts], dtype=np.float64) for group in GROUPS])


def _mean_loss(losses: Sequence[Tensor]) -> float:
    size = sum(part.shape[0] for part in losses)
    return sum(float(part.sum()) for part in moved(losses, CPU)) / size if size else math.nan
