"""Buffers that a forward pass moves (running means, counts): they take in the batch, and no noise covers them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError

_STEPS_COMPARED = 3


@dataclass(slots=True)
class _Held:
    owner: nn.Module
    key: str
    tensor: Tensor
    version: int
    copy: Tensor


class MovedBuffers:
    """Knows every buffer of a model, and every tensor kept as a plain attribute, as they were before a step.

    A change is told by the tensor's version; in the first three steps by its bytes as well, since what is written
    through `.data` or a NumPy view has no version.

    Args:
        model: the model.
        without: modules whose tensors are the trainer's own.
    """

    def __init__(self, model: nn.Module, *, without: Collection[nn.Module]) -> None:
        self._model = model
        self._without = without
        self._held: dict[str, _Held] = {}
        self._left = _STEPS_COMPARED
        self._compares = False

    def begin(self) -> None:
        """Take note of them: a step begins. What changed since the last step was changed by the caller, on purpose."""
        self._compares = self._left > 0
        self._left -= self._compares
        found = {}
        for name, owner, key, tensor in _tensors(self._model, self._without):
            held = self._held.get(name)
            if self._compares or held is None or held.tensor is not tensor or held.version != tensor._version:
                held = _Held(owner, key, tensor, tensor._version, tensor.detach().clone())
            found[name] = held
        self._held = found

    def refuse(self) -> None:
        """Refuse what a forward pass did to them; they are then as they were.

        Raises:
            InputError: a tensor changed; the message names it.
        """
        moved = [name for name, held in self._held.items() if self._changed(held)]
        for name in moved:
            held = self._held[name]
            held.tensor.detach().copy_(held.copy)
            setattr(held.owner, held.key, held.tensor)
            held.version = held.tensor._version
        if moved:
            raise InputError(
                f"buffer {moved[0]!r} changes in the forward pass: it takes in the batch, without clipping and without "
                "noise, and leaves with the model. Use a layer without running statistics (LayerNorm), or move the "
                "buffer outside of step(). make_private(..., allow_moving_buffers=True) trains all the same; then no "
                "epsilon covers what the buffers tell"
            )

    def _changed(self, held: _Held) -> bool:
        now = getattr(held.owner, held.key, None)
        if now is not held.tensor or held.tensor._version != held.version:
            return True
        return self._compares and not _same_bytes(held.tensor, held.copy)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.layout is not torch.strided:
        return True
    first, second = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def _tensors(model: nn.Module, without: Collection[nn.Module]) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for prefix, module in model.named_modules():
        if module in without:
            continue
        for key, value in [*module._buffers.items(), *vars(module).items()]:
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                yield f"{prefix}.{key}".lstrip("."), module, key, value
