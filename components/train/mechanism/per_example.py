"""The slow path: a module runs once for each example of the batch, with a copy of its parameters for each.

A parameter without a rule for norms (a bias used by itself, a positional table, the weights of an attention layer) gets
the gradient of every example formed, by `torch.func.vmap` over the module's forward pass: the copies are one tensor
[B, ...], and autograd leaves in it what each example contributes. Whatever the forward pass does, an example's output
is a function of that example and its copy alone. Memory is B times the parameters of the module.

A batch has its examples in the first dimension of what the module is called with, and of what it gives; for attention
and recurrent layers of torch, where their documentation says. What has another size there (a mask over positions) is
the same for all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from lazydp.components.shared.errors import InputError
from lazydp.components.train.device.placement import refuse_autocast
from lazydp.components.train.mechanism import example_dims
from lazydp.components.train.mechanism.attention import attention_forward, is_plain
from lazydp.components.train.mechanism.calls import Copies
from lazydp.components.train.mechanism.layers import Layers, TrainedLayer
from lazydp.components.train.mechanism.matrix_products import MatrixProducts
from lazydp.components.train.mechanism.recurrent import recurrent_forward
from lazydp.components.train.tables.examples_apart import apart, are_apart


@contextmanager
def running_apart(layers: Layers, copies: Copies | None = None) -> Iterator[None]:
    """Modules on the slow path run example by example inside the block.

    Args:
        layers: the trained layers.
        copies: gets each example's copies of their parameters; None: they run with the parameters themselves.
    """
    slow = {name: layer for name, layer in layers.items() if layer.rule is None}
    parameters = {layer.parameter(key) for layer in slow.values() for key in layer.names}
    forwards = [_ApartForward(name, layer, parameters, copies) for name, layer in slow.items()]
    # Attention would take a way without gradients where it finds no parameter that asks for one.
    had_fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for forward in forwards:
        forward.install()
    try:
        yield
    finally:
        for forward in forwards:
            forward.remove()
        torch.backends.mha.set_fastpath_enabled(had_fast_attention)


class _ApartForward:
    """Takes the place of a module's `forward`.

    Args:
        name: of the module, for messages.
        layer: the module; its parameters, and those of modules inside it that are on the slow path, are copied.
        slow: every parameter on the slow path.
        copies: of the micro-batch, if any are made.
    """

    def __init__(self, name: str, layer: TrainedLayer, slow: set[nn.Parameter], copies: Copies | None) -> None:
        self._what = f"layer {name or '(the model itself)'!r} ({type(layer.module).__name__})"
        self._module = layer.module
        self._places = [
            (owner, key, parameter)
            for owner in layer.module.modules()
            for key, parameter in owner._parameters.items()
            if parameter is not None and parameter in slow
        ]
        self._names = ", ".join(layer.names)
        self._copies = copies
        self._before = vars(layer.module).get("forward")
        self._original: Callable[..., Any] = layer.module.forward
        if isinstance(layer.module, nn.RNNBase):
            self._original = partial(recurrent_forward, layer.module)
        elif is_plain(layer.module):
            self._original = partial(attention_forward, layer.module)

    def install(self) -> None:
        """Every call of the module runs example by example."""
        self._module.forward = self

    def remove(self) -> None:
        """The module is as it was."""
        del self._module.forward
        if self._before is not None:
            self._module.forward = self._before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output for a batch; inside a module that runs example by example, that for the example."""
        if are_apart():
            return self._original(*args, **kwargs)
        named = example_dims.named_arguments(self._module, args, kwargs)
        leaves, structure = tree_flatten((args, kwargs) if named is None else ((), named))
        dims = example_dims.of_arguments(self._module, self._what, leaves, named)
        of_examples = {place: dim for place, dim in enumerate(dims) if dim is not None}
        inputs = [leaves[place] for place in of_examples]
        refuse_autocast(inputs[0].device, self._what)
        if not all(leaves[place].shape[dim] for place, dim in of_examples.items()):
            return self._original(*args, **kwargs)  # an empty batch

        def call(inputs: Sequence[Tensor]) -> tuple[list[Any], Any]:
            some = list(leaves)
            given: dict[int, Tensor] = {}  # one tensor in two places stays one: keys that are values, too
            for (place, dim), tensor in zip(of_examples.items(), inputs, strict=True):
                some[place] = given.setdefault(id(leaves[place]), tensor.unsqueeze(dim))
            some_args, some_kwargs = tree_unflatten(some, structure)
            return tree_flatten(self._original(*some_args, **some_kwargs))

        return self._run_apart(call, inputs, list(of_examples.values()))

    def _run_apart(
        self, call: Callable[[Sequence[Tensor]], tuple[list[Any], Any]], inputs: Sequence[Tensor], dims: Sequence[int]
    ) -> Any:
        """What `call` gives for each example, put together."""
        size = inputs[0].shape[dims[0]]
        parameters = [parameter for _, _, parameter in self._places]
        copies: list[Tensor] = [*parameters]
        if self._copies is not None:
            copies = [self._copies.of(parameter, size, self._what) for parameter in parameters]
        found: list[Any] = []

        def one(which: Tensor, copies: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
            with apart(which), self._swapped(copies), self._keeping_products(copies):
                flat, structure = call(inputs)
            of_examples = example_dims.of_results(self._module, flat)
            found[:] = flat, structure, of_examples
            return [self._of_one(flat[place], dim) for place, dim in of_examples.items()]

        try:
            # Other kernels of attention have no rule for `vmap`.
            with sdpa_kernel(SDPBackend.MATH):
                which = torch.arange(size, device=inputs[0].device)
                in_dims = (0, None if self._copies is None else 0, list(dims))
                whole = vmap(one, in_dims=in_dims, randomness="different")(which, copies, list(inputs))
        except (RuntimeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(self._cannot(error)) from error
        flat, structure, of_examples = found
        for (place, dim), tensor in zip(of_examples.items(), whole, strict=True):
            flat[place] = tensor.movedim(0, dim)
        return tree_unflatten(flat, structure)

    @contextmanager
    def _swapped(self, copies: Sequence[Tensor]) -> Iterator[None]:
        for (owner, key, _), copy in zip(self._places, copies, strict=True):
            owner._parameters[key] = copy  # type: ignore[assignment]
        try:
            yield
        finally:
            for owner, key, parameter in self._places:
                owner._parameters[key] = parameter

    def _keeping_products(self, copies: Sequence[Tensor]) -> AbstractContextManager[object]:
        if self._copies is None:
            return nullcontext()
        parameters = [parameter for _, _, parameter in self._places]
        return MatrixProducts(self._copies, dict(zip(parameters, copies, strict=True)), self._what)

    def _of_one(self, output: Tensor, dim: int) -> Tensor:
        if output.dim() <= dim or output.shape[dim] != 1:
            raise InputError(
                f"{self._what} gave {list(output.shape)} for one example: {self._names} is on the slow path, where a "
                "module gives its examples in the first dimension, without a reduction over them; put the parameter "
                "into a module of its own that does"
            )
        return output.squeeze(dim)

    def _cannot(self, error: Exception) -> str:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return (
            f"{self._what} cannot run example by example, which the slow path of {self._names} needs: {lines[0]} Put "
            "the parameter into a small module of its own, called with tensors [B, ...], without .item(), branches on "
            "values and changes in place of tensors made inside"
        )
