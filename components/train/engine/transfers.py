"""The host-device copies of a step. On the CPU alone nothing is copied.

Sampling, dataset and lookups are on the host. Every step copies labels and dense features to the device of the dense
layers. The other copies depend on where the tables are:

    on the GPU          row numbers go to the GPU.
    in host memory      pooled rows go to the GPU, and `home` brings their gradients back.

With tables in host memory, the table part of the gradient norms is computed on the CPU. The scatter needs the
gradients there anyway, and on the GPU the norms would need every row number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lazydp.components.train.data.examples import Examples
from lazydp.components.train.device.placement import moved
from lazydp.components.train.tables.lookups import Lookups


def send_examples(micro_batches: Sequence[Examples], device: torch.device) -> Sequence[Examples]:
    """The examples with labels and dense features on `device`; the bags stay on the host."""
    if device.type == "cpu":
        return micro_batches
    arrived = iter(moved([part for e in micro_batches for part in (e.labels, e.dense, e.item_dense)], device))
    return [
        replace(examples, labels=next(arrived), dense=next(arrived), item_dense=next(arrived))
        for examples in micro_batches
    ]


def send_lookups(reads: Sequence[Mapping[str, Lookups]], device: torch.device) -> Sequence[Mapping[str, Lookups]]:
    """The lookups on `device`; each keeps its host copy as `on_host`."""
    if device.type == "cpu":
        return reads
    arrived = iter(moved([part for read in reads for lookups in read.values() for part in lookups.tensors()], device))
    return [
        {
            name: Lookups(
                next(arrived),
                next(arrived),
                None if lookups.weights is None else next(arrived),
                lookups.bags_per_example,
                on_host=lookups,
            )
            for name, lookups in read.items()
        }
        for read in reads
    ]


def leaves(pooled: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The pooled rows [F * B, D] of each table on `device`, as leaves of the backward pass."""
    arrived = moved(list(pooled.values()), device)
    return {name: rows.requires_grad_() for name, rows in zip(pooled, arrived, strict=True)}


def home(
    pooled: Mapping[str, Tensor], beside: Sequence[Tensor], device: torch.device
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Copy the results of the backward pass to the tables' device: all in one copy, so with one wait for a GPU.

    Args:
        pooled: the leaves.
        beside: other tensors to copy (losses, squared norms of the dense part).
        device: the device of the tables.

    Returns:
        the gradient of each leaf, [F * B, D], by table; and the copies of `beside`.
    """
    gradients = [rows.grad if rows.grad is not None else torch.zeros_like(rows) for rows in pooled.values()]
    arrived = moved([*beside, *gradients], device)
    return dict(zip(pooled, arrived[len(beside) :], strict=True)), arrived[: len(beside)]
