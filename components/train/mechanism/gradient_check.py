"""Whether what is clipped is the whole gradient: the captured sum against ordinary autograd, over all parameters.

Norms and sums come from what the layers' calls left behind. A weight that is used past its layer's call (`F.linear(x,
layer.weight)`, a penalty on the weight, a gradient penalty) has a gradient there that no call sees: it would be lost,
and the weight trained on noise. So in the first steps the losses are computed once more, with parameters that ordinary
autograd follows, and both gradients of one randomly weighted sum of the losses are compared, parameter by parameter.

Meanwhile the rows that the batch reads are not a number in the tables, and calls of the embedding layers are answered
from a copy. Losses that change have read a table past its layer, hence rows without their noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError
from lazydp.components.train.device.placement import CPU, moved
from lazydp.components.train.mechanism.capture import Capture
from lazydp.components.train.mechanism.layers import Layers, parameter_name
from lazydp.components.train.mechanism.units import Units
from lazydp.components.train.tables.lookups import Lookups
from lazydp.kernels import ops

STEPS_LOOKED_AT = 3

# A difference counts from here on, relative to the norms of all examples' gradients together, whose rounding it may be.
_TOLERANCE = 3e-5

ReadRows = Callable[[str, Lookups], Tensor]
LossesFrom = Callable[[ReadRows], Tensor]
"""Computes the losses [B] once more, with calls of embedding layers answered by the argument."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One call of an embedding layer: what it looked up and the pooled rows that it gave, with their gradient."""

    table: str
    lookups: Lookups
    pooled: Tensor


class GradientCheck:
    """Looks at the first steps of one trainer, at one micro-batch of each.

    Args:
        layers: the trained layers.
        tables: the rows of each embedding layer, the very tensors.
    """

    def __init__(self, layers: Layers, tables: Mapping[str, Tensor]) -> None:
        self._layers = layers
        self._tables = tables
        self._left = STEPS_LOOKED_AT
        self._step: int | None = None

    def looks_at(self, losses: Tensor, *, step: int) -> bool:
        """Whether this micro-batch of step number `step`, with these losses [B], is looked at."""
        return bool(self._left) and step != self._step and losses.shape[0] > 0 and bool(torch.isfinite(losses).all())

    def refuse(
        self,
        capture: Capture,
        readings: Sequence[Reading],
        losses: Tensor,
        again: LossesFrom,
        *,
        units: Units,
        step: int,
    ) -> None:
        """Compare, once the backward pass and the norms are done.

        Args:
            capture: of the pass.
            readings: every call of an embedding layer in it.
            losses: [B], as they came first.
            again: computes them again.
            units: of the micro-batch; the losses of one unit may depend on each other, and get one weight.
            step: number of the step.

        Raises:
            InputError: a table is read past its layer, or a parameter's gradient is not what the calls of its layer
                give; the message names it.
        """
        generator = torch.Generator().manual_seed(step)
        weights = units.per_example(0.5 + torch.rand(units.count, generator=generator))
        captured = capture.sums(weights)
        rows = {name: self._rows_of(name, readings) for name in {reading.table for reading in readings}}
        captured |= {name: _sum_of(name, numbers, readings, weights) for name, numbers in rows.items()}
        if not all(bool(torch.isfinite(gradient).all()) for gradient in captured.values()):
            return
        self._left -= 1
        self._step = step
        followed = self._followed(rows, losses, again, weights)
        scale = _TOLERANCE * sum(float(of_examples.sum()) for of_examples in capture.sizes(weights))
        scale += _TOLERANCE * sum(_size_of(reading, weights) for reading in readings)
        for name, gradient in captured.items():
            found, expected = gradient.to(CPU, torch.float64), followed[name].to(CPU, torch.float64)
            if float((found - expected).norm()) > scale:
                raise InputError(
                    f"the gradient of {name!r} has norm {float(expected.norm()):.4g} by autograd, and the calls of its "
                    f"layer account for {float(found.norm()):.4g}: a weight that is used past its layer's call "
                    "(F.linear(x, layer.weight), a penalty on weights in the loss, a gradient penalty) cannot be "
                    "clipped; call the layer, and give weight decay to the optimizer"
                )

    def _rows_of(self, table: str, readings: Sequence[Reading]) -> Tensor:
        read = torch.cat([reading.lookups.indices for reading in readings if reading.table == table])
        rows: Tensor = torch.unique(read)
        return rows

    def _followed(
        self, rows: Mapping[str, Tensor], losses: Tensor, again: LossesFrom, weights: Tensor
    ) -> dict[str, Tensor]:
        """The gradients by autograd; those of tables over the rows that were read."""
        leaves = {name: self._tables[name][numbers].requires_grad_() for name, numbers in rows.items()}

        def read(table: str, lookups: Lookups) -> Tensor:
            places = torch.searchsorted(rows[table], lookups.indices)
            values = leaves[table][places] * lookups.weights_or_ones().unsqueeze(1)
            bags = ops.bag_ids(lookups.offsets, num_lookups=lookups.indices.shape[0])
            return values.new_zeros(lookups.num_bags, values.shape[1]).index_add(0, bags, values)

        with _not_a_number(self._tables, rows):
            repeated = again(read)
        if not torch.allclose(repeated.detach(), losses, rtol=1e-4, atol=1e-6):
            raise InputError(
                f"rows of embedding layer {self._named(rows, losses, again, read)!r} reach the losses past the layer's "
                "call, by a tensor or array that was kept (its weight, a view of it): they are read without their "
                "noise. Call the layer with the indices of the rows that are needed"
            )
        parameters = {
            parameter_name(name, key): layer.parameter(key)
            for name, layer in self._layers.items()
            for key in layer.names
        }
        wanted = parameters | leaves
        total = (repeated * weights.to(repeated.device, repeated.dtype)).sum()
        if not total.requires_grad:
            return {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        return {
            name: torch.zeros_like(tensor) if gradient is None else gradient
            for (name, tensor), gradient in zip(wanted.items(), found, strict=True)
        }

    def _named(self, rows: Mapping[str, Tensor], losses: Tensor, again: LossesFrom, read: ReadRows) -> str:
        """The table that is read past its layer."""
        for name, numbers in rows.items():
            with _not_a_number(self._tables, {name: numbers}), torch.no_grad():
                if not torch.allclose(again(read), losses, rtol=1e-4, atol=1e-6):
                    return name
        return " or ".join(rows)


@contextmanager
def _not_a_number(tables: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> Iterator[None]:
    """These rows are NaN inside the block, and afterwards as before, whatever happens."""
    kept = {name: tables[name][numbers] for name, numbers in rows.items()}
    try:
        for name, numbers in rows.items():
            tables[name][numbers] = torch.nan
        yield
    finally:
        for name, numbers in rows.items():
            tables[name][numbers] = kept[name]


def _scaled(reading: Reading, weights: Tensor) -> Tensor:
    """The gradient of each bag times the weight of its example, [F * B, D]."""
    assert reading.pooled.grad is not None
    (of_examples,) = moved([weights], reading.pooled.device)
    return reading.pooled.grad * of_examples.repeat(reading.lookups.bags_per_example).unsqueeze(1)


def _sum_of(table: str, rows: Tensor, readings: Sequence[Reading], weights: Tensor) -> Tensor:
    """What the calls of a layer give each of `rows`."""
    parts = [reading for reading in readings if reading.table == table]
    total = parts[0].pooled.new_zeros(rows.shape[0], parts[0].pooled.shape[1])
    for reading in parts:
        if reading.pooled.grad is not None:
            bags = ops.bag_ids(reading.lookups.offsets, num_lookups=reading.lookups.indices.shape[0])
            values = _scaled(reading, weights)[bags] * reading.lookups.weights_or_ones().unsqueeze(1)
            total.index_add_(0, torch.searchsorted(rows, reading.lookups.indices), values)
    return total


def _size_of(reading: Reading, weights: Tensor) -> float:
    """The sum of the norms of what each bag gives its rows; their rounding is in proportion to it."""
    if reading.pooled.grad is None:
        return 0.0
    bags = ops.bag_ids(reading.lookups.offsets, num_lookups=reading.lookups.indices.shape[0])
    of_bags = _scaled(reading, weights).double().norm(dim=1)
    return float((of_bags[bags] * reading.lookups.weights_or_ones().double().abs()).sum())
