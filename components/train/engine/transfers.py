"""What of a step crosses between host and GPU; on the CPU alone nothing does, and nothing is copied.

Sampling, the dataset and the looking up of features stay on the host. Of what they make, labels and dense features go
to the dense layers; row numbers go to the tables, if these live on the GPU. With tables in host memory the pooled rows
go to the dense layers instead, and what `home` brings back is all that the tables and the clipping need: the norms of
the tables' part are found on the CPU, from the gradients that came back for the scatter anyway, because the GPU would
need every row number for them.
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
    """The examples with what the dense layers read of them on `device`; the bags stay where they are."""
    if device.type == "cpu":
        return micro_batches
    arrived = iter(moved([part for e in micro_batches for part in (e.labels, e.dense, e.item_dense)], device))
    return [
        replace(examples, labels=next(arrived), dense=next(arrived), item_dense=next(arrived))
        for examples in micro_batches
    ]


def send_lookups(reads: Sequence[Mapping[str, Lookups]], device: torch.device) -> Sequence[Mapping[str, Lookups]]:
    """The lookups on `device`, each with its twin on the host."""
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
    """Pooled rows [F * B, D] of each table where the dense layers compute, as leaves of a backward pass."""
    arrived = moved(list(pooled.values()), device)
    return {name: rows.requires_grad_() for name, rows in zip(pooled, arrived, strict=True)}


def home(
    pooled: Mapping[str, Tensor], beside: Sequence[Tensor], device: torch.device
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """After the backward pass: what the tables' device needs of it; from a GPU to the host with one wait for all.

    Args:
        pooled: the leaves.
        beside: what else the tables' device needs (norms of the dense part, losses).
        device: where the tables live.

    Returns:
        the gradient of each leaf, [F * B, D], by table; and `beside`.
    """
    gradients = [rows.grad if rows.grad is not None else torch.zeros_like(rows) for rows in pooled.values()]
    arrived = moved([*beside, *gradients], device)
    return dict(zip(pooled, arrived[len(beside) :], strict=True)), arrived[: len(beside)]
