"""The embedding part of a step by itself: reading the rows of a batch, and moving them by a gradient given.

What plain PyTorch does in `nn.EmbeddingBag(sparse=True)` forward, backward and SGD, ours does in grouping, gather and
scatter; `lazydp` adds the norms that clipping needs and the rows' pending noise. No dense layer hides a difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lazydp.components.bench.trainers import LEARNING_RATE, read_bags, torch_bags
from lazydp.components.bench.workload import Workload
from lazydp.components.models.layout import FeatureLayout
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.device.placement import CPU
from lazydp.components.train.engine.transfers import send_lookups
from lazydp.components.train.mechanism.clip import clip_coefficients, rounded
from lazydp.components.train.mechanism.contributions import sq_norms_of_tables
from lazydp.components.train.mechanism.units import Units
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.embedding_tables import EmbeddingTables, Mode, TableGradient
from lazydp.components.train.tables.lookups import Lookups, lookups_of
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey


class _Gradients:
    """A gradient of each table's bags, made once for each shape: what dense layers would have sent back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[tuple[int, int], Tensor] = {}

    def of(self, num_bags: int, dim: int) -> Tensor:
        """Float32 [num_bags, dim]."""
        if (num_bags, dim) not in self._made:
            made = torch.randn(num_bags, dim, generator=torch.Generator().manual_seed(0))
            self._made[num_bags, dim] = made.to(self._device)
        return self._made[num_bags, dim]


class TorchEmbeddings:
    """`nn.EmbeddingBag(sparse=True)` and SGD, on the device of `weights`."""

    def __init__(self, workload: Workload, weights: Mapping[str, Tensor], device: torch.device = CPU) -> None:
        self._layout = workload.model().layout
        self._device = device
        self._bags = torch_bags(weights)
        self._optimizer = torch.optim.SGD(self._bags.parameters(), lr=LEARNING_RATE / workload.expected_batch_size)
        self._gradients = _Gradients(device)

    def step(self, micro_batches: Sequence[Examples], /) -> object:
        """Forward, backward and update."""
        self._optimizer.zero_grad(set_to_none=True)
        for read in send_lookups([lookups_of(self._layout, examples) for examples in micro_batches], self._device):
            pooled = list(read_bags(self._bags, read).values())
            torch.autograd.backward(pooled, [self._gradients.of(*rows.shape) for rows in pooled])
        self._optimizer.step()
        return self._bags


class OurEmbeddings:
    """The same by our kernels, in any mode."""

    def __init__(
        self, workload: Workload, weights: Mapping[str, Tensor], mode: Mode, device: torch.device = CPU
    ) -> None:
        self._device = device
        self._layout: FeatureLayout = workload.model().layout
        self._divisor = workload.expected_batch_size
        self._private = mode != "sgd"
        self._tables = EmbeddingTables(
            weights,
            mode=mode,
            optimizer=EmbeddingSgd(schedules.constant(LEARNING_RATE)),
            noise_scale=1.0 / self._divisor if self._private else 0.0,
            key=NoiseKey.generate(),
            bound=1.0 / self._divisor if self._private else None,
        )
        self._gradients = _Gradients(device)

    def step(self, micro_batches: Sequence[Examples], /) -> object:
        """Group, catch up, gather, norms, scatter."""
        reads = send_lookups([lookups_of(self._layout, examples) for examples in micro_batches], self._device)
        groups = self._tables.group_rows(reads)
        gathered: Mapping[str, Tensor] | None = None
        if len(reads) == 1:
            gathered = self._tables.catch_up_and_gather(groups, reads[0])
        else:
            self._tables.catch_up(groups)
        sent: dict[str, list[TableGradient]] = {name: [] for name in groups}
        for examples, read in zip(micro_batches, reads, strict=True):
            pooled = self._tables.gather(read) if gathered is None else gathered
            gradients = {name: self._gradients.of(*rows.shape) for name, rows in pooled.items()}
            scale = self._coefficients(examples.size, read, gradients) / self._divisor
            for name, gradient in gradients.items():
                sent[name].append(TableGradient(read[name], gradient, scale))
        self._tables.add_gradient(groups, sent)
        self._tables.advance()
        return self._tables

    def _coefficients(self, size: int, reads: Mapping[str, Lookups], gradients: Mapping[str, Tensor]) -> Tensor:
        if not self._private:
            return torch.ones(size, device=self._device)
        sent = [(read, gradients[name]) for name, read in reads.items()]
        return rounded(clip_coefficients(sq_norms_of_tables(sent, Units.examples(size)), max_grad_norm=1.0))
