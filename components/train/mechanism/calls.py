"""What layers saw in one forward and backward pass: inputs, output gradients, and gradients that were formed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.mechanism.norm_rules import MatrixRule, NormRule, direct_is_cheaper
from lazydp.components.train.tables.same_memory import no_view


class Pair(NamedTuple):
    """What a rule turns into norms and sums.

    Attributes:
        calls: the layer's.
        rule: of the pair.
        inputs: [B, P, ...].
        grads: [B, P, ...].
        rows: of the parameter, in its first dimension, that the pair is of; None: of all.
    """

    calls: Calls
    rule: NormRule
    inputs: Tensor
    grads: Tensor
    rows: slice | None = None


class _Tap(torch.autograd.Function):
    """Passes a layer's output on as it is, and keeps its gradient on the way back.

    A tensor hook would be lost where the output is a view that is then modified in place (a linear layer over
    positions, then an in-place activation). The anchor makes the output of a layer that nothing trainable feeds part of
    the graph, so that its gradient is computed at all.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, keep: Callable[[Tensor], None]) -> Tensor:
        ctx.keep = keep
        return no_view(output)  # in-place activations may follow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ctx.keep(grad)
        return grad if ctx.needs_input_grad[0] else None, None, None


class _Kept:
    """Inputs of calls, each with the gradient of its output once that came back."""

    def __init__(self) -> None:
        self._inputs: list[tuple[Tensor, int]] = []
        self._grads: list[Tensor | None] = []

    def keep(self, inputs: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """Keep one call; its output, to be passed on."""
        call = len(self._inputs)
        self._inputs.append((inputs.detach(), inputs._version))
        self._grads.append(None)

        def keep_grad(grad: Tensor) -> None:
            self._grads[call] = grad

        tapped: Tensor = _Tap.apply(output, anchor, keep_grad)  # type: ignore[no-untyped-call]
        return tapped

    def pairs(self, *, modified: str) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number, input and output gradient of each call whose gradient came back.

        Raises:
            InputError: an input was modified in place; `modified` says whose.
        """
        for call, ((inputs, version), grad) in enumerate(zip(self._inputs, self._grads, strict=True)):
            if grad is None:
                continue
            if inputs._version != version:
                raise InputError(f"{modified}: per-example norms need it as it was")
            yield call, inputs, grad

    def forget_gradients(self) -> None:
        """Before another backward pass over the same calls."""
        self._grads = [None] * len(self._grads)

    def gradients(self) -> Iterator[Tensor]:
        """The gradients that came back, [B, ...]."""
        return (grad for grad in self._grads if grad is not None)


class Calls:
    """What one layer saw in one forward and backward pass."""

    def __init__(self, name: str, layer: nn.Module, parameters: dict[str, nn.Parameter], rule: NormRule) -> None:
        self.name = name
        self.layer = layer
        self.parameters = parameters
        self.rule = rule
        self._kept = _Kept()

    def keep(self, inputs: Tensor, output: Tensor, anchor: Tensor) -> Tensor:
        """Keep one call; its output, to be passed on."""
        _refuse_other_types(self.name, self.layer, inputs, output)
        return self._kept.keep(inputs, output, anchor)

    def pairs(self, size: int) -> Iterator[Pair]:
        """Inputs and output gradients of all calls, as one pair; none where no gradient came back."""
        dims = self._feature_dims()
        inputs, grads = [], []
        modified = (
            f"the input of layer {self.name!r} ({type(self.layer).__name__}) was modified in place after the layer had "
            "read it"
        )
        for _, some_inputs, grad in self._kept.pairs(modified=modified):
            self._refuse_other_size(some_inputs.shape[0], size)
            inputs.append(_positions(some_inputs, dims))
            grads.append(_positions(grad, dims))
        if inputs:
            yield Pair(self, self.rule, _joined(inputs), _joined(grads))

    def forget_gradients(self) -> None:
        """Before another backward pass over the same calls."""
        self._kept.forget_gradients()

    def gradients(self, size: int) -> Iterator[Tensor]:
        """The gradients that came back, [B, ...]."""
        for grad in self._kept.gradients():
            self._refuse_other_size(grad.shape[0], size)
            yield grad

    def _refuse_other_size(self, found: int, size: int) -> None:
        if found != size:
            raise InputError(
                f"layer {self.name!r} ({type(self.layer).__name__}) saw a first dimension of {found} in a batch of "
                f"{size} examples: layers must be batch-first"
            )

    def _feature_dims(self) -> int:
        """Trailing dimensions that belong to one position."""
        return len(self.layer.normalized_shape) if isinstance(self.layer, nn.LayerNorm) else 1


class Products(_Kept):
    """Products of a matrix, or of some of its rows, with what belongs to the examples: the calls of a linear layer.

    Args:
        what: the module that multiplies, for messages.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self._what = what
        self._from_left: list[bool] = []

    def keep_product(self, inputs: Tensor, output: Tensor, anchor: Tensor, *, from_left: bool) -> Tensor:
        """Keep one product; its output, to be passed on.

        Args:
            inputs: [B, ..., n].
            output: [B, ..., m].
            anchor: see `_Tap`.
            from_left: the product is inputs @ matrix, of a matrix [n, m]; else inputs @ matrix.t(), of [m, n].
        """
        self._from_left.append(from_left)
        return self.keep(inputs, output, anchor)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """What the matrix's gradient is the sum of products of: [B, P, columns] and [B, P, rows]; None where none came.

        Raises:
            InputError: an input was modified in place.
        """
        columns, rows = [], []
        modified = f"{self._what} modified in place what it had multiplied by a parameter"
        for call, inputs, grad in self.pairs(modified=modified):
            pair = _positions(inputs, 1), _positions(grad, 1)
            from_left = self._from_left[call]
            columns.append(pair[1] if from_left else pair[0])
            rows.append(pair[0] if from_left else pair[1])
        return (_joined(columns), _joined(rows)) if columns else None


class Copies:
    """A copy of each parameter on the slow path for each example of one micro-batch, and products with it.

    A copy that nothing but products uses takes no memory.

    Attributes:
        anchor: makes the output of a product part of the graph (`_Tap`).
    """

    def __init__(self) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self._by_parameter: dict[nn.Parameter, Tensor] = {}
        self._products: dict[nn.Parameter, dict[tuple[int, int], Products]] = {}

    def of(self, parameter: nn.Parameter, size: int, what: str) -> Tensor:
        """[B, ...], a leaf of autograd; all in the memory of one."""
        if parameter not in self._by_parameter:
            self._by_parameter[parameter] = parameter.detach().expand(size, *parameter.shape).requires_grad_()
        copies = self._by_parameter[parameter]
        if copies.shape[0] != size:
            raise InputError(
                f"{what} was called with {copies.shape[0]} examples and with {size} in one micro-batch: layers must be "
                "batch-first, and see each example once a call"
            )
        return copies

    def found(self, parameter: nn.Parameter) -> Tensor | None:
        """The same, where the forward pass made them."""
        return self._by_parameter.get(parameter)

    def products(self, parameter: nn.Parameter, rows: tuple[int, int], what: str) -> Products:
        """Where products with these rows of `parameter`, as a matrix of its first dimension, are kept."""
        return self._products.setdefault(parameter, {}).setdefault(rows, Products(what))

    def found_products(self, parameter: nn.Parameter) -> dict[tuple[int, int], Products]:
        """The same, as far as the forward pass made them."""
        return self._products.get(parameter, {})


class FormedCalls(Calls):
    """The per-example gradients of one parameter, formed."""

    def __init__(
        self, name: str, layer: nn.Module, parameters: dict[str, nn.Parameter], rule: NormRule, copies: Copies
    ) -> None:
        super().__init__(name, layer, parameters, rule)
        self._copies = copies
        (self._parameter,) = parameters.values()

    @property
    def leaf(self) -> Tensor | None:
        """The copies of the parameter, [B, ...]; None where the layer was not called."""
        return self._copies.found(self._parameter)

    def pairs(self, size: int) -> Iterator[Pair]:
        """Products by themselves, where each row of the parameter is in one kind of them; else formed gradients."""
        kinds = self._copies.found_products(self._parameter)
        factors = {rows: found for rows, products in kinds.items() if (found := products.factors()) is not None}
        formed = None if self.leaf is None else self.leaf.grad
        for tensor in [*(inputs for inputs, _ in factors.values()), *([] if formed is None else [formed])]:
            self._refuse_other_size(tensor.shape[0], size)
        if formed is None and not factors:
            return
        if formed is not None or not _are_apart(list(factors)):
            yield self._formed(self._total(factors, formed, size))
            return
        for (first, end), (inputs, grads) in factors.items():
            if direct_is_cheaper(inputs, grads):
                # Its norms would form this anyway; formed once, it is what is added, too.
                yield self._formed(torch.bmm(grads.transpose(1, 2), inputs), slice(first, end))
            else:
                yield Pair(self, MatrixRule(), inputs, grads, slice(first, end))

    def _formed(self, gradients: Tensor, rows: slice | None = None) -> Pair:
        size = gradients.shape[0]
        return Pair(self, self.rule, gradients.new_zeros(size, 1, 0), gradients.reshape(size, 1, -1), rows)

    def _total(
        self, factors: Mapping[tuple[int, int], tuple[Tensor, Tensor]], formed: Tensor | None, size: int
    ) -> Tensor:
        """The whole gradient of each example, formed, [B, ...]."""
        if not factors:
            assert formed is not None
            return formed
        total = self._parameter.new_zeros(size, *self._parameter.shape) if formed is None else formed.clone()
        for (first, end), (inputs, grads) in factors.items():
            total[:, first:end] += torch.bmm(grads.transpose(1, 2), inputs).view_as(total[:, first:end])
        return total

    def forget_gradients(self) -> None:
        """Before another backward pass over the same products."""
        for products in self._copies.found_products(self._parameter).values():
            products.forget_gradients()

    def gradients(self, size: int) -> Iterator[Tensor]:
        """Those of products, [B, ...]."""
        for products in self._copies.found_products(self._parameter).values():
            for grad in products.gradients():
                self._refuse_other_size(grad.shape[0], size)
                yield grad


def _are_apart(ranges: Sequence[tuple[int, int]]) -> bool:
    """Whether no two ranges have a number in common."""
    return all(end <= first for (_, end), (first, _) in pairwise(sorted(ranges)))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Positions side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _positions(tensor: Tensor, feature_dims: int) -> Tensor:
    """[B, P, features...] of a tensor with any number of position dimensions."""
    position_dims = tensor.dim() - 1 - feature_dims
    if position_dims == 0:
        return tensor.unsqueeze(1)
    return tensor if position_dims == 1 else tensor.flatten(1, position_dims)


def _refuse_other_types(name: str, layer: nn.Module, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32:
            raise InputError(
                f"layer {name!r} ({type(layer).__name__}) computes in {tensor.dtype}: norms and noise are made for "
                "float32; leave out torch.autocast, .half() and .double()"
            )
