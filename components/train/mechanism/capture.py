"""What the layers saw in one forward and backward pass, kept for norms and clipped sums.

While a `Capture` is open, parameters are constants to autograd, so the backward pass forms no weight gradients; hooks
keep, for each call of each layer, what went in (a) and the gradient of what came out (e). The layer's rule
(`norm_rules`) turns the pair into the squared norm of each unit's gradient (an example's, or that of a user's examples
together: `units`) and, once the clipping coefficients are known, into the sum of scaled gradients by one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lazydp.components.train.device.placement import CPU, moved, refuse_rounded_products
from lazydp.components.train.mechanism.calls import Calls, Copies, FormedCalls, Pair
from lazydp.components.train.mechanism.double_sums import DoubleSums, LayerSums
from lazydp.components.train.mechanism.layers import Layers, parameter_name
from lazydp.components.train.mechanism.norm_rules import FormedRule, single_products
from lazydp.components.train.mechanism.per_example import running_apart
from lazydp.components.train.mechanism.unit_order import UnitOrder
from lazydp.components.train.mechanism.units import Units
from lazydp.components.train.tables.examples_apart import are_apart, with_whole_batch
from lazydp.kernels.products import foreach_product_sq_norms


def _not_zero(grad: Tensor) -> Tensor:
    """Examples that a gradient [B, ...] is not zero for. NaN says nothing: zero times an infinite slope is NaN too."""
    return (grad.flatten(1).abs() > 0).any(dim=1).cpu()


class Capture:
    """Keeps what norms and clipped sums need, while the forward and backward pass of one micro-batch run inside it.

    Used once:

        with Capture(layers) as capture:
            losses = ...
            losses.sum().backward()
        sq_norms = capture.sq_norms(units)
        capture.add_weighted(scale)          # to the float64 sums

    Args:
        layers: what `trained_layers` found.
        device: where they compute. What is given as [B] may live elsewhere.
        sums: where the clipped sums go.
        order: of the units of this step; None: as they lie, all in blocks of the largest size.

    Raises:
        InputError: on entering, where matrix products are rounded to less than float32.
    """

    def __init__(
        self,
        layers: Layers,
        device: torch.device = CPU,
        sums: DoubleSums | None = None,
        order: UnitOrder | None = None,
    ) -> None:
        self._device = device
        self._calls = [
            Calls(name, layer.module, {key: layer.parameter(key) for key in layer.names}, layer.rule)
            for name, layer in layers.items()
            if layer.rule is not None
        ]
        self._layers = layers
        self._copies = Copies()
        self._formed = [
            FormedCalls(name, layer.module, {key: layer.parameter(key)}, FormedRule(), self._copies)
            for name, layer in layers.items()
            if layer.rule is None
            for key in layer.names
        ]
        self._stack = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._pairs: list[Pair] = []
        self._sums = DoubleSums() if sums is None else sums
        self._order = UnitOrder(None) if order is None else order
        self._one_example_each = False

    def __enter__(self) -> Self:
        refuse_rounded_products(self._device)
        self._anchor = torch.zeros((), requires_grad=True)
        self._follow(False)
        for calls in self._calls:
            # Before hooks of the model's own, which may change what the layer gave.
            hook = calls.layer.register_forward_hook(self._hook(calls), with_kwargs=True, prepend=True)
            self._handles.append(hook)
        self._stack.enter_context(running_apart(self._layers, self._copies))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.close()
        self._follow(True)

    def _follow(self, wanted: bool) -> None:
        """Whether autograd forms gradients of the parameters."""
        for calls in [*self._calls, *self._formed]:
            for parameter in calls.parameters.values():
                parameter.requires_grad_(wanted)

    def _hook(self, calls: Calls) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            read = inputs[0] if inputs else next(iter(named.values()))
            if are_apart():
                return with_whole_batch(lambda read, output: calls.keep(read, output, self._anchor), read, output)
            return calls.keep(read, output, self._anchor)

        return keep

    def sq_norms(self, units: Units) -> Tensor:
        """Squared norm of each unit's gradient (the sum of its examples') over all layers, float64 [U]."""
        self._one_example_each = units.examples_alone
        self._pairs = [pair for calls in [*self._calls, *self._formed] for pair in calls.pairs(units.num_examples)]
        products = [_product(pair) if units.single else None for pair in self._pairs]
        total = _sq_norms_of_products([product for product in products if product is not None])
        total = torch.zeros(units.count, dtype=torch.float64, device=self._device) if total is None else total
        for pair, product in zip(self._pairs, products, strict=True):
            if product is None:
                total += _sq_norms_of_units(pair, units)
        return total

    def reached(self, total: Tensor, pooled: Sequence[tuple[str, Tensor]], size: int) -> Iterator[tuple[str, Tensor]]:
        """Which examples the gradient of `total` comes back to, bool [B] on the host, layer by layer.

        Called before the backward pass, which finds everything as it was.

        Args:
            total: what is differentiated.
            pooled: name and pooled rows [F * B, D] of each read of an embedding layer, feature by feature.
            size: B.

        Yields:
            Name of a layer, and the examples.
        """
        for calls in [*self._calls, *self._formed]:
            calls.forget_gradients()
        copies = [(calls.name, calls.leaf) for calls in self._formed if calls.leaf is not None]
        wanted = [self._anchor, *(rows for _, rows in pooled), *(leaf for _, leaf in copies)]
        _, *found = torch.autograd.grad(total, wanted, retain_graph=True, allow_unused=True)
        for (name, rows), grad in zip(pooled, found[: len(pooled)], strict=True):
            if grad is not None:
                yield name, _not_zero(grad.view(-1, size, rows.shape[1]).transpose(0, 1))
        for (name, leaf), grad in zip(copies, found[len(pooled) :], strict=True):
            if grad is not None:
                yield name, _not_zero(grad.reshape(leaf.shape[0], -1))
        for calls in [*self._calls, *self._formed]:
            for grad in calls.gradients(size):
                yield calls.name, _not_zero(grad)

    def drop(self, examples: Tensor) -> None:
        """Make the gradients of `examples` (mask [B]) zero: scaling by zero would keep what is not finite."""
        (examples,) = moved([examples], self._device)
        self._pairs = [
            pair._replace(inputs=without(pair.inputs, examples), grads=without(pair.grads, examples))
            for pair in self._pairs
        ]

    def sums(self, scale: Tensor) -> dict[str, Tensor]:
        """sum_i scale[i] g_i for every parameter, by its name, float64; zeros where no gradient came back."""
        (scale,) = moved([scale], self._device)
        sums = DoubleSums()
        for pair in self._pairs:
            self._add(pair, scale, LayerSums(sums, pair.calls.parameters, pair.rows), order=None)
        return {
            parameter_name(calls.name, key): sums.of(parameter)
            for calls in [*self._calls, *self._formed]
            for key, parameter in calls.parameters.items()
        }

    def sizes(self, scale: Tensor) -> Iterator[Tensor]:
        """For each layer a norm, [B], that no example's gradient times `scale` exceeds, whatever cancels in it."""
        (scale,) = moved([scale], self._device)
        for pair in self._pairs:
            positions = [part.flatten(2).double().norm(dim=2) for part in (pair.inputs, pair.grads)]
            yield scale * (positions[1] * (1.0 + positions[0])).sum(dim=1)

    def add_weighted(self, scale: Tensor) -> None:
        """Add sum_i scale[i] g_i to the float64 sum of every parameter."""
        (scale,) = moved([scale], self._device)
        order = self._order.of(scale.shape[0]) if self._one_example_each and scale.is_cpu else None
        for pair in self._pairs:
            self._add(pair, scale, LayerSums(self._sums, pair.calls.parameters, pair.rows), order)
        # What a step keeps beyond its end costs the next one fresh pages.
        self._pairs.clear()

    def _add(self, pair: Pair, scale: Tensor, into: LayerSums, order: Tensor | None) -> None:
        """Add one layer's sum to float64 tensors: as fast as float32 where each unit adds one term."""
        layer, inputs, grads = pair.calls.layer, pair.inputs, pair.grads
        if self._one_example_each and inputs.shape[1] == 1:
            pair.rule.add_single(layer, inputs, grads, scale, into, order=order, block=self._order.block)
        else:
            pair.rule.add_exact(layer, inputs, grads, scale, into)


class _Product(NamedTuple):
    """A layer to which each unit adds one outer product of grads and inputs, grads, or both.

    Attributes:
        inputs: [B, n].
        grads: [B, m].
        weight: whether the product is added.
        bias: whether grads are added.
    """

    inputs: Tensor
    grads: Tensor
    weight: bool
    bias: bool


def _product(pair: Pair) -> _Product | None:
    added = single_products(pair.rule, tuple(pair.calls.parameters), pair.inputs, pair.grads)
    if added is None:
        return None
    return _Product(pair.inputs.squeeze(1).contiguous(), pair.grads.squeeze(1).contiguous(), *added)


def _sq_norms_of_products(found: Sequence[_Product]) -> Tensor | None:
    """Over all layers, [B]; None where there is no layer."""
    if not found:
        return None
    inputs, grads, weight, bias = zip(*found, strict=True)
    return foreach_product_sq_norms(inputs, grads, weight=weight, bias=bias)


def _sq_norms_of_units(pair: Pair, units: Units) -> Tensor:
    layer, names = pair.calls.layer, tuple(pair.calls.parameters)
    if units.single:
        return pair.rule.sq_norms(layer, names, pair.inputs, pair.grads)
    # n examples of a user, of P positions each, are n P positions: the gradient is the sum over all of them.
    runs = units.runs()
    return torch.cat(
        [pair.rule.sq_norms(layer, names, run.joined(pair.inputs), run.joined(pair.grads)) for run in runs]
    )


def without(tensor: Tensor, examples: Tensor) -> Tensor:
    """A copy of [B, ...] with zeros for `examples` (mask [B])."""
    return tensor.masked_fill(examples.view(-1, *[1] * (tensor.dim() - 1)), 0.0)
