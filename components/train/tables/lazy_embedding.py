"""Embedding layers of a model of your own, reading rows that catch up with their noise as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lazydp.components.shared.errors import InputError, PendingNoiseError
from lazydp.components.train.tables.examples_apart import are_apart, with_whole_batch
from lazydp.components.train.tables.lookups import Lookups
from lazydp.components.train.tables.same_memory import modifiable
from lazydp.components.train.tables.unreadable import unreadable

Read = Callable[[str, Lookups], Tensor]
"""Pooled rows [F * B, D] of a table, during a step."""


class LazyRows(nn.Module):
    """What an `nn.Embedding` or `nn.EmbeddingBag` of a private model becomes: same object, same calls, same results.

    The layer itself changes its class, so that whatever holds it (an attribute, a list, a dict, a closure, a method)
    reads rows with their noise, and hooks and options stay. State dicts keep its key. But its weight is neither
    parameter nor buffer: no optimizer of dense layers finds it, and nothing that goes over a model's buffers reads rows
    without their noise. The parameter that was its weight answers every use with an error.

    Rows with pending noise show which rows were read, and when. A layer with such rows answers no call outside a
    step, shows no weight and enters no state dict, pickle or copy: it raises PendingNoiseError until the trainer has
    flushed. Keep no other reference to the weight: what is read through one has no noise, and its gradient is lost.
    """

    name: str
    padding_idx: int | None
    _table: Tensor
    read: Read | None
    """Set while a step runs; None where rows are read as they are."""
    has_pending_noise: bool
    """Whether a step was taken after the last flush; a plain flag, so that a pickled layer drags no key along."""
    kept_by_trainer: bool
    """Whether state dicts leave the rows out: true while the trainer, which keeps them itself, reads or writes."""

    @property
    def weight(self) -> Tensor:
        """The rows, float32 [rows, dim], to look at between steps.

        During a step it has a shape, a device and a dtype, and nothing else: rows that the layer was not called for
        have not caught up with their noise, and no gradient comes back to them.

        Raises:
            PendingNoiseError: rows have pending noise.
        """
        if self.read is not None:
            return unreadable(
                self._table.new_empty(1, 1).expand(self._table.shape),
                f"the weight of embedding layer {self.name!r} is read during a step, past its noise and past the "
                "norms of gradients: call the layer with the indices of the rows that are needed; a layer that uses "
                "the whole table (tied weights) cannot be trained privately",
            )
        self._refuse_pending("shows its weight")
        return self._table

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As the layer it was: [..., D] of rows, or [B, D] of bags (2-D indices, or 1-D with offsets).

        Args:
            input: rows, int64 or int32.
            offsets: first lookup of each bag, of the same types, [B] (or [B + 1], with `include_last_offset`).
            per_sample_weights: what each row is multiplied by, float32 of the shape of `input`; with `mode="sum"`.

        Raises:
            InputError: 1-D indices without offsets, or weights that the layer cannot take or that are trained.
            PendingNoiseError: outside a step, rows have pending noise.
        """
        if self.read is None:
            self._refuse_pending("is read outside a step")
        input = self._int64(input, "indices")
        if per_sample_weights is not None:
            self._check_weights(input, per_sample_weights)
        if isinstance(self, nn.EmbeddingBag):
            return self._bags(input, None if offsets is None else self._int64(offsets, "offsets"), per_sample_weights)
        if not are_apart():
            return self._rows(input)
        return with_whole_batch(self._rows, input)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `model.to` makes of a table the trainer would not know: it went on with the one it has.
        if fn(self._table) is not self._table:
            raise InputError(
                f"embedding layer {self.name!r} cannot be moved or converted once it is trained privately: move the "
                "model to its device before make_private"
            )
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        kind = type(self).__mro__[2]  # the layer that it was
        return _blank, (kind,), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_pending("is pickled or copied")
        return {**self.__dict__, "read": None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.kept_by_trainer:
            self._refuse_pending("enters a state dict")
            with self._as_buffer():
                super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        if not self.kept_by_trainer:
            with self._as_buffer():
                super()._load_from_state_dict(*arguments, **options)

    @contextmanager
    def _as_buffer(self) -> Iterator[None]:
        """While torch reads or writes a state dict the weight is the buffer that its rules (keys, shapes) are for."""
        self._buffers["weight"] = self._table
        try:
            yield
        finally:
            loaded = self._buffers.pop("weight", None)
            # load_state_dict(assign=True) puts another tensor there; the trainer goes on with the one that it has.
            if loaded is not None and loaded is not self._table:
                self._table.copy_(loaded)

    def _pooling(self) -> str:
        """`sum` or `mean`; empty for rows one by one."""
        return str(vars(self).get("mode", ""))

    def _refuse_pending(self, what: str) -> None:
        if self.has_pending_noise:
            raise PendingNoiseError(
                f"embedding layer {self.name!r} {what} while its rows have pending noise: call the trainer's flush() "
                "first; to stop and go on later, save the trainer's state_dict(), which is private"
            )

    def _rows(self, indices: Tensor) -> Tensor:
        if self.read is None:
            return functional.embedding(indices, self._table)
        if not indices.dim():
            raise InputError(f"layer {self.name!r} is called with one index, of no example: give [B, ...]")
        size, positions = indices.shape[0], math.prod(indices.shape[1:])
        # Position by position, so that position p of example i is bag p * B + i.
        flat = indices.reshape(size, positions).t().reshape(-1).contiguous()
        offsets = torch.arange(flat.shape[0] + 1, device=flat.device)
        rows = self._read(self.read, Lookups(flat, offsets, None, positions))
        by_position = rows.view(positions, size, rows.shape[1])
        found = by_position.transpose(0, 1).reshape(*indices.shape, rows.shape[1])
        if self.padding_idx is None:
            return found
        return torch.where((indices == self.padding_idx).unsqueeze(-1), self._table[self.padding_idx], found)

    def _read(self, read: Read, lookups: Lookups, *, average: bool = False) -> Tensor:
        # The padding row is no parameter: it is neither looked up nor does it get a gradient or noise.
        if self.padding_idx is not None:
            lookups = lookups.without(self.padding_idx)
        return modifiable(read(self.name, lookups.averaged() if average else lookups))

    def _int64(self, tensor: Tensor, what: str) -> Tensor:
        if tensor.dtype not in (torch.int32, torch.int64):
            raise InputError(f"layer {self.name!r}: {what} are int64 or int32, found {tensor.dtype}")
        return tensor.long()

    def _check_weights(self, indices: Tensor, weights: Tensor) -> None:
        what = f"layer {self.name!r}: per_sample_weights"
        if self._pooling() != "sum":
            raise InputError(f'{what} are for an EmbeddingBag with mode="sum"')
        if weights.shape != indices.shape or weights.dtype != torch.float32:
            raise InputError(
                f"{what} are float32 of the shape of the indices, {list(indices.shape)}; found {weights.dtype} "
                f"{list(weights.shape)}"
            )
        if self.read is not None and weights.requires_grad:
            raise InputError(
                f"{what} require a gradient, which would be lost: weights that are computed by trained layers cannot "
                "be trained privately; detach() them if they are to be constants"
            )

    def _bags(self, indices: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        if are_apart():
            if indices.dim() != 2:
                raise InputError(
                    f"layer {self.name!r} is called with 1-D indices and offsets inside a module that runs example by "
                    "example (the slow path): give 2-D indices, with padding_idx where bags differ in length"
                )
            return with_whole_batch(self._bags_of_examples, indices, weights)
        if indices.dim() == 2:
            return self._bags_of_examples(indices.unsqueeze(1), None if weights is None else weights.unsqueeze(1))[:, 0]
        if offsets is None:
            raise InputError(f"layer {self.name!r}: 1-D indices of an EmbeddingBag need offsets")
        if not vars(self)["include_last_offset"]:
            offsets = torch.cat([offsets, offsets.new_full((1,), indices.shape[0])])
        return self._pooled(Lookups(indices.contiguous(), offsets.contiguous(), weights, 1))

    def _bags_of_examples(self, indices: Tensor, weights: Tensor | None) -> Tensor:
        """[B, n, D] of [B, n, L]."""
        size, bags, length = indices.shape
        # Bag by bag, so that bag n of example i is n * B + i.
        indices, *given = (
            part.transpose(0, 1).reshape(-1).contiguous() for part in (indices, weights) if part is not None
        )
        offsets = length * torch.arange(bags * size + 1, device=indices.device)
        pooled = self._pooled(Lookups(indices, offsets, given[0] if given else None, bags))
        return pooled.view(bags, size, pooled.shape[1]).transpose(0, 1)

    def _pooled(self, lookups: Lookups) -> Tensor:
        if lookups.weights is not None:
            lookups = replace(lookups, weights=lookups.weights.contiguous())
        if self.read is not None:
            return self._read(self.read, lookups, average=self._pooling() == "mean")
        return functional.embedding_bag(
            lookups.indices,
            self._table,
            lookups.offsets,
            mode=self._pooling(),
            per_sample_weights=lookups.weights,
            include_last_offset=True,
            padding_idx=self.padding_idx,
        )


class LazyEmbedding(LazyRows, nn.Embedding):  # type: ignore[override]  # its weight is no parameter
    """What an `nn.Embedding` becomes."""


class LazyEmbeddingBag(LazyRows, nn.EmbeddingBag):  # type: ignore[override]  # its weight is no parameter
    """What an `nn.EmbeddingBag` becomes."""


_lazy_classes: dict[Any, Any] = {nn.Embedding: LazyEmbedding, nn.EmbeddingBag: LazyEmbeddingBag}


def lazy_class(kind: type[nn.Module]) -> Any:
    """What a layer of class `kind` becomes: a subclass of it, and of `LazyRows`."""
    if kind not in _lazy_classes:
        _lazy_classes[kind] = type(f"Lazy{kind.__name__}", (LazyRows, kind), {})
    return _lazy_classes[kind]


def _blank(kind: type[nn.Module]) -> LazyRows:
    """A layer that a pickle fills."""
    made = lazy_class(kind)
    return cast(LazyRows, made.__new__(made))
