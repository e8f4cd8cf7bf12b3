"""A tensor that stands where a table's weight was, and refuses to be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lazydp.components.shared.errors import InputError


class Unreadable(nn.Parameter):
    """A tensor that refuses every use, but to say its shape, device and dtype."""

    reason: str

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _DESCRIPTIVE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        found = [part for part in tree_leaves((args, kwargs or {})) if isinstance(part, cls)]
        raise InputError(found[0].reason if found else "a tensor that must not be read is read")


_DESCRIPTIVE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "device", "dtype", "ndim", "layout", "is_cuda", "is_sparse")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
}


def unreadable(tensor: Tensor, reason: str) -> Tensor:
    made = nn.Parameter(tensor, requires_grad=False)
    made.__class__ = Unreadable
    made.reason = reason  # type: ignore[attr-defined]
    return made
