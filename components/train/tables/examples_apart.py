"""A way out of `torch.func.vmap`, for what has to see the whole batch while a module runs example by example.

A module without a fast rule for norms runs under `vmap`, with a copy of its parameters for each example
(`mechanism.per_example`). Rows of tables are still read for the whole batch at once, and layers inside the module that
do have a rule still keep inputs and gradients of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_which: Tensor | None = None


@contextmanager
def apart(which: Tensor) -> Iterator[None]:
    """Inside the block, which itself runs under `vmap`, tensors are those of one example.

    Args:
        which: number of the example, what `vmap` gives of [B]: it makes every use of `with_whole_batch` belong to it.
    """
    global _which  # noqa: PLW0603 - vmap is a state of the whole interpreter, too
    before, _which = _which, which
    try:
        yield
    finally:
        _which = before


def are_apart() -> bool:
    """Whether tensors are those of one example now."""
    return _which is not None


def with_whole_batch(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """`function` of the whole batch's tensors, [B, ...] each; of its result, [B, ...], the part of this example.

    Gradients go through `function` as they always do.
    """
    assert _which is not None, "examples are not apart"
    result: Tensor = _WholeBatch.apply(function, _which, *tensors)  # type: ignore[no-untyped-call]
    return result


class _WholeBatch(torch.autograd.Function):
    """What torch offers to step out of `vmap`; `forward` is never reached, since `which` belongs to one example."""

    @staticmethod
    def forward(function: Callable[..., Tensor], which: Tensor, *tensors: Tensor | None) -> Tensor:
        raise AssertionError("not under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, function: Callable[..., Tensor], which: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, int]:
        whole = (
            _whole(tensor, dim, info.batch_size) if isinstance(tensor, Tensor) else tensor
            for tensor, dim in zip(tensors, in_dims[2:], strict=True)
        )
        return function(*whole), 0


def _whole(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Examples first; what is the same for all of them is repeated."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
