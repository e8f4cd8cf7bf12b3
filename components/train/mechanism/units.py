"""Privacy units within a micro-batch: which examples are clipped together.

Where examples are sampled, a unit is one example. Where users are, it is all examples of one user, which lie side by
side in one micro-batch. A user with n examples then is to the norms what an example with n times as many positions is:
neighbouring users of equal n (a run) are handled as one block [users, n * positions, ...], without padding and without
a copy, so that every rule for norms serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError
from lazydp.components.train.device.placement import moved


@dataclass(frozen=True, slots=True)
class EqualUnits:
    """Units of equal size that follow each other.

    Attributes:
        units: how many, g.
        first: number of the first one's first example.
        size: examples of each, n.
    """

    units: int
    first: int
    size: int

    def joined(self, tensor: Tensor) -> Tensor:
        """[B, P, ...] of examples as [g, n P, ...] of this run's units."""
        examples = tensor[self.first : self.first + self.units * self.size]
        return examples.reshape(self.units, self.size * tensor.shape[1], *tensor.shape[2:])


class Units:
    """The units of one micro-batch, in the order of its examples.

    Args:
        sizes: examples of each unit, int64 [U], each at least 1. Few different ones side by side make few runs, so
            that a micro-batch is best ordered by size.
        examples_alone: examples are sampled, so that every unit is one example and can lie anywhere among the others.

    Raises:
        InputError: a unit without examples.
    """

    def __init__(self, sizes: Tensor, *, examples_alone: bool = False) -> None:
        self.sizes = sizes.cpu()  # what is computed from them decides what is launched
        self.count = sizes.shape[0]
        self.num_examples = int(sizes.sum())
        self.single = self.num_examples == self.count
        self.examples_alone = examples_alone
        if self.count and int(sizes.min()) < 1:
            raise InputError(f"a user who is drawn has at least one example, found a size of {int(sizes.min())}")

    @classmethod
    def examples(cls, count: int) -> Units:
        """Every example a unit of its own."""
        return cls(torch.ones(count, dtype=torch.int64), examples_alone=True)

    def runs(self) -> Iterator[EqualUnits]:
        """The units in runs of equal size."""
        first = 0
        values, counts = torch.unique_consecutive(self.sizes, return_counts=True)
        for size, units in zip(values.tolist(), counts.tolist(), strict=True):
            yield EqualUnits(units, first, size)
            first += units * size

    def bags_by_run(self, bags_per_example: int) -> Tensor:
        """Where to find bags [F, B] so that each run's are together as [F, size, units]: a permutation, int64 [F * B].

        In that order a run is to the kernels `units` examples of F * size bags each.
        """
        bags = torch.arange(bags_per_example * self.num_examples).view(bags_per_example, self.num_examples)
        parts = [
            bags[:, run.first : run.first + run.units * run.size]
            .view(bags_per_example, run.units, run.size)
            .transpose(1, 2)
            .reshape(-1)
            for run in self.runs()
        ]
        return torch.cat(parts)

    def per_example(self, values: Tensor) -> Tensor:
        """The value of its unit for each example: [U] -> [B], on any device."""
        if self.single:
            return values
        (sizes,) = moved([self.sizes], values.device)
        return torch.repeat_interleave(values, sizes, output_size=self.num_examples)
