"""Copies between host memory and a GPU in a step. If a step computes on the CPU alone, nothing is copied.

The batch is drawn and its lookups are found on the host. `send_examples` copies the labels and the dense features to
the device of the dense layers. Which other copies this module makes depends on where the tables are
(other modules copy smaller tensors):

    tables on the GPU           `send_lookups` copies row numbers, offsets and weights to the GPU
    tables in host memory       `leaves` copies the pooled rows to the GPU; `send_gradients` copies their gradients, the
                                losses and squared norms back

With tables in host memory, the gradient norms of the tables are computed on the CPU. The scatter needs the gradients
on the CPU anyway. On the GPU, the norms would need a copy of every row number.
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
    """The examples, with labels and dense features on `device`. The bags stay on the host."""
    if device.type == "cpu":
        return micro_batches
    copies = iter(moved([part for e in micro_batches for part in (e.labels, e.dense, e.item_dense)], device))
    return [
        replace(examples, labels=next(copies), dense=next(copies), item_dense=next(copies))
        for examples in micro_batches
    ]


def send_lookups(reads: Sequence[Mapping[str, Lookups]], device: torch.device) -> Sequence[Mapping[str, Lookups]]:
    """The lookups on `device`. On a GPU each `Lookups` is a copy, and its `on_host` is the original in host memory."""
    if device.type == "cpu":
        return reads
    copies = iter(moved([part for read in reads for lookups in read.values() for part in lookups.tensors()], device))
    return [
        {
            name: Lookups(
                next(copies),
                next(copies),
                None if lookups.weights is None else next(copies),
                lookups.bags_per_example,
                on_host=lookups,
            )
            for name, lookups in read.items()
        }
        for read in reads
    ]


def leaves(pooled: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The pooled rows [F * B, D] of each table on `device`, as leaves of the backward pass.

    F is the number of bags of an example in the table, B the number of examples and D the number of columns.
    """
    copies = moved(list(pooled.values()), device)
    return {name: rows.requires_grad_() for name, rows in zip(pooled, copies, strict=True)}


def send_gradients(
    pooled: Mapping[str, Tensor], others: Sequence[Tensor], device: torch.device
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Copy the gradients of the pooled rows to the device of the tables, after the backward pass.

    The gradients and `others` are copied together, so that the host waits for a GPU only once.

    Args:
        pooled: what `leaves` gave.
        others: other tensors that are needed there: losses, squared norms.
        device: the device of the tables.

    Returns:
        The gradient of each leaf, [F * B, D] by table, zeros for a leaf without one; and the copies of `others`.
    """
    gradients = [rows.grad if rows.grad is not None else torch.zeros_like(rows) for rows in pooled.values()]
    copies = moved([*others, *gradients], device)
    return dict(zip(pooled, copies[len(others) :], strict=True)), copies[: len(others)]
