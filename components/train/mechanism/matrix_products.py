"""Products with a parameter, inside a module that runs example by example, without a copy of it for each example.

A matrix W on the slow path that is multiplied by what belongs to an example, x W or W x, is a linear layer: the norm of
its per-example gradients, and the sum of the clipped ones, come from x and from the gradient of the product
(`norm_rules.MatrixRule`). So while a module runs under `vmap`, torch's calls are looked at. A product with a parameter
is computed for the whole batch at once, and kept. The same holds for convolutions, which are products with patches of
their input. Whatever else is done with a parameter goes through its copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lazydp.components.train.mechanism.calls import Copies
from lazydp.components.train.tables.examples_apart import with_whole_batch


class _Known(NamedTuple):
    """A tensor of one example that is a parameter, some of its rows, or the transposed of that."""

    tensor: Tensor  # kept, so that its id stays its own
    parameter: nn.Parameter
    rows: tuple[int, int]
    transposed: bool = False

    def matrix(self) -> Tensor:
        """[rows, columns], as the parameter has them."""
        first, end = self.rows
        return self.parameter.detach()[first:end].flatten(1)


class MatrixProducts(TorchFunctionMode):
    """Inside the block, which itself runs under `vmap`, products with parameters are kept.

    Args:
        copies: keeps them.
        known: what stands for each parameter inside the block.
        what: the module that runs, for messages.
    """

    def __init__(self, copies: Copies, known: Mapping[nn.Parameter, Tensor], what: str) -> None:
        super().__init__()
        self._copies = copies
        self._what = what
        self._known: dict[int, _Known] = {}
        for parameter, tensor in known.items():
            if parameter.dim() >= 2:
                self._know(_Known(tensor, parameter, (0, parameter.shape[0])))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer a call of torch."""
        named = kwargs or {}
        way = _WAYS.get(func)
        found = None if way is None else way(self, args, named)
        if found is not None:
            return found
        result = func(*args, **named)
        if func in _PARTS:
            self._know_parts(args, named, result)
        return result

    def _know(self, known: _Known) -> None:
        self._known[id(known.tensor)] = known

    def _of(self, tensor: object) -> _Known | None:
        return self._known.get(id(tensor))

    def _matmul(self, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        if len(args) != 2 or named:
            return None
        left, right = (self._of(tensor) for tensor in args)
        if right is not None and left is None and args[1].dim() == 2:
            return self._product(args[0], right, from_left=not right.transposed)
        if left is None or right is not None or args[0].dim() != 2:
            return None
        if args[1].dim() == 1:
            return self._product(args[1], left, from_left=left.transposed)
        return self._product(args[1].transpose(-1, -2), left, from_left=left.transposed).transpose(-1, -2)

    def _linear(self, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        bound = dict(zip(("input", "weight", "bias"), args, strict=False)) | named
        weight = self._of(bound["weight"])
        if weight is None or bound["weight"].dim() != 2:
            return None
        output = self._product(bound["input"], weight, from_left=weight.transposed)
        bias = bound.get("bias")
        return output if bias is None else output + bias

    def _convolution(self, args: tuple[Any, ...], named: dict[str, Any], *, dims: int) -> Tensor | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        bound = dict(zip(names, args, strict=False)) | named
        weight, inputs, padding = self._of(bound["weight"]), bound["input"], bound.get("padding", 0)
        if weight is None or bound.get("groups", 1) != 1 or isinstance(padding, str) or inputs.dim() != dims + 2:
            return None
        settings = {
            "kernel_size": _two(bound["weight"].shape[2:], dims, 1),
            "stride": _two(bound.get("stride", 1), dims, 1),
            "padding": _two(padding, dims, 0),
            "dilation": _two(bound.get("dilation", 1), dims, 1),
        }
        flat = inputs if dims == 2 else inputs.unsqueeze(2)
        sizes = [
            _places(size, *(values[dim] for values in settings.values())) for dim, size in enumerate(flat.shape[2:])
        ]
        patches = functional.unfold(flat, **settings).transpose(1, 2)  # [1, P, channels * kernel]
        output = self._product(patches, weight, from_left=False).transpose(1, 2)
        output = torch.unflatten(output, 2, sizes if dims == 2 else sizes[1:])
        bias = bound.get("bias")
        return output if bias is None else output + bias.view(-1, *[1] * dims)

    def _product(self, inputs: Tensor, known: _Known, *, from_left: bool) -> Tensor:
        """inputs @ matrix, or inputs @ matrix.t()."""
        matrix = known.matrix()
        products = self._copies.products(known.parameter, known.rows, self._what)

        def whole(inputs: Tensor) -> Tensor:
            output = inputs @ (matrix if from_left else matrix.t())
            return products.keep_product(inputs, output, self._copies.anchor, from_left=from_left)

        return with_whole_batch(whole, inputs)

    def _know_parts(self, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        """Rows of a known tensor that were cut off, and what was transposed."""
        known = self._of(args[0]) if args else None
        if known is None:
            return
        if isinstance(result, Tensor):
            if args[0].dim() == 2 and result.shape == args[0].shape[::-1] and _is_transposed(args[1:], named):
                self._know(known._replace(tensor=result, transposed=not known.transposed))
            return
        if known.transposed or (args[2:] or [named.get("dim", 0)])[0] not in (0, -args[0].dim()):
            return
        first = known.rows[0]
        for part in result:
            self._know(known._replace(tensor=part, rows=(first, first + part.shape[0])))
            first += part.shape[0]


def _is_transposed(dims: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Whether the arguments of `t`, `T`, `mT` (none of interest) or `transpose` exchange both dimensions."""
    dims = tuple(dim for dim in dims if isinstance(dim, int)) + tuple(named.values())
    return not dims or {dim % 2 for dim in dims} == {0, 1}


def _two(value: Any, dims: int, none: int) -> tuple[int, int]:
    """A setting of a convolution for two dimensions; one of one dimension lies in the second."""
    values = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,) * dims
    return (none, values[0]) if dims == 1 else (values[0], values[1])


def _places(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Positions of a convolution's output along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


_Way = Callable[[MatrixProducts, tuple[Any, ...], dict[str, Any]], Tensor | None]
_WAYS: dict[Callable[..., Any], _Way] = {
    **dict.fromkeys((Tensor.matmul, torch.matmul, Tensor.mm, torch.mm), MatrixProducts._matmul),
    functional.linear: MatrixProducts._linear,
    functional.conv1d: partial(MatrixProducts._convolution, dims=1),
    functional.conv2d: partial(MatrixProducts._convolution, dims=2),
}
_PARTS = {
    *(Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.T.__get__, Tensor.mT.__get__),  # type: ignore[attr-defined]
    *(Tensor.chunk, torch.chunk, Tensor.split, torch.split),
}
