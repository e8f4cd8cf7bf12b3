"""Tensors that may be modified in place wherever an ordinary result may."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def no_view(tensor: Tensor) -> Tensor:
    """The same memory, and to autograd no view of anything; called where gradients are not recorded."""
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def modifiable(leaf: Tensor) -> Tensor:
    """What a leaf of autograd holds, as a result that in-place operations may follow. The leaf's values change then."""
    result: Tensor = _Modifiable.apply(leaf)  # type: ignore[no-untyped-call]
    return result


class _Modifiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return no_view(leaf)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
