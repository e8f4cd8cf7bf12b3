"""Embedding layers of a model of your own, reading rows that catch up with their noise as they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from lazydp.components.shared.errors import InputError, PendingNoiseError
from lazydp.components.train.tables.lookups import Lookups
from lazydp.kernels import ops

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
            return _unreadable(
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
            input: rows, int64.
            offsets: first lookup of each bag, int64 [B] (or [B + 1], with `include_last_offset`).
            per_sample_weights: what each row is multiplied by, float32 of the shape of `input`; with `mode="sum"`.

        Raises:
            InputError: 1-D indices without offsets, or weights that the layer cannot take or that are trained.
            PendingNoiseError: outside a step, rows have pending noise.
        """
        if self.read is None:
            self._refuse_pending("is read outside a step")
        if per_sample_weights is not None:
            self._check_weights(input, per_sample_weights)
        if isinstance(self, nn.EmbeddingBag):
            return self._bags(input, offsets, per_sample_weights)
        return self._rows(input)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `model.to` makes of a table the trainer would not know: it went on with the one it has.
        if fn(self._table) is not self._table:
            raise InputError(
                f"embedding layer {self.name!r} cannot be moved or converted once it is trained privately: move the "
                "model to its device before make_private"
            )
        moved: Self = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return moved

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
        size, positions = indices.shape[0], math.prod(indices.shape[1:])
        # Position by position, so that position p of example i is bag p * B + i.
        flat = indices.reshape(size, positions).t().reshape(-1).contiguous()
        lookups = Lookups(flat, torch.arange(flat.shape[0] + 1, device=flat.device), None, positions)
        rows = self.read(self.name, lookups)
        by_position = rows.view(positions, size, rows.shape[1])
        return by_position.transpose(0, 1).reshape(*indices.shape, rows.shape[1])

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
        if indices.dim() == 2:
            offsets = torch.arange(0, indices.numel() + 1, indices.shape[1], device=indices.device)
            indices = indices.reshape(-1)
        elif offsets is None:
            raise InputError(f"layer {self.name!r}: 1-D indices of an EmbeddingBag need offsets")
        elif not vars(self)["include_last_offset"]:
            offsets = torch.cat([offsets, offsets.new_full((1,), indices.shape[0])])
        if self.read is None:
            return functional.embedding_bag(
                indices,
                self._table,
                offsets,
                mode=self._pooling(),
                per_sample_weights=None if weights is None else weights.reshape(-1),
                include_last_offset=True,
            )
        if weights is not None:
            weights = weights.reshape(-1).contiguous()
        elif self._pooling() == "mean":
            of_bag = 1.0 / offsets.diff().clamp(min=1).to(torch.float32)
            weights = of_bag[ops.bag_ids(offsets, num_lookups=indices.shape[0])]
        return self.read(self.name, Lookups(indices.contiguous(), offsets.contiguous(), weights, 1))


class LazyEmbedding(LazyRows, nn.Embedding):  # type: ignore[override]  # its weight is no parameter
    """What an `nn.Embedding` becomes."""


class LazyEmbeddingBag(LazyRows, nn.EmbeddingBag):  # type: ignore[override]  # its weight is no parameter
    """What an `nn.EmbeddingBag` becomes."""


class _Unreadable(nn.Parameter):
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


def _unreadable(tensor: Tensor, reason: str) -> Tensor:
    made = nn.Parameter(tensor, requires_grad=False)
    made.__class__ = _Unreadable
    made.reason = reason  # type: ignore[attr-defined]
    return made


def _refuse_unsupported(name: str, layer: nn.Embedding | nn.EmbeddingBag) -> None:
    options = {
        "max_norm": layer.max_norm is not None,
        "padding_idx": layer.padding_idx is not None,
        "scale_grad_by_freq": bool(layer.scale_grad_by_freq),
        'mode="max"': isinstance(layer, nn.EmbeddingBag) and layer.mode == "max",
    }
    for option, used in options.items():
        if used:
            raise InputError(
                f"layer {name!r} ({type(layer).__name__}) uses {option}: its gradient is not a plain sum over lookups, "
                "so per-example norms and delayed noise would be wrong; leave the option out"
            )
    if layer.weight.dtype != torch.float32:
        raise InputError(f"layer {name!r}: tables are float32, found {layer.weight.dtype}")


def trained_embeddings(model: nn.Module) -> dict[str, nn.Embedding | nn.EmbeddingBag]:
    """Every trained embedding layer of `model` by its name; one that stands in several places counts once.

    Raises:
        InputError: an option whose gradient is not a sum over lookups (`mode="max"`, `max_norm`, `padding_idx`,
            `scale_grad_by_freq`); two layers share one weight, or something else of the model holds one: weights tied
            to a `Linear`, a view kept as parameter, buffer or attribute; or the layers belong to a trainer already.
    """
    found: dict[str, nn.Embedding | nn.EmbeddingBag] = {}
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LazyRows):
            raise InputError(
                f"embedding layer {name!r} belongs to a trainer already: make_private takes a model once; train on "
                "with the trainer that it gave, or build the model anew"
            )
        if type(layer) not in (nn.Embedding, nn.EmbeddingBag) or not layer.weight.requires_grad:
            continue
        assert isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
        if not name:
            raise InputError("the model is a bare embedding layer: wrap it in a module of your own")
        _refuse_unsupported(name, layer)
        if id(layer.weight) in owners:
            raise InputError(
                f"layers {owners[id(layer.weight)]!r} and {name!r} share a weight: use one layer in both places"
            )
        owners[id(layer.weight)] = name
        found[name] = layer
    for name, layer in found.items():
        _refuse_tied(model, name, layer)
    return found


@contextmanager
def replaced(layers: Mapping[str, nn.Embedding | nn.EmbeddingBag]) -> Iterator[dict[str, LazyRows]]:
    """Make `layers` read their rows with noise, for good; if the block fails they are as they were.

    Afterwards nothing else reads the tables: the parameter that was a layer's weight refuses every use, and tensors
    that shared its memory keep the rows as they were before training.
    """
    before = {
        name: (type(layer), dict(vars(layer)), cast(nn.Parameter, layer.weight)) for name, layer in layers.items()
    }
    try:
        yield {name: _replace(name, layer) for name, layer in layers.items()}
    except BaseException:
        for name, layer in layers.items():
            layer.__class__, attributes, weight = before[name]
            vars(layer).clear()
            vars(layer).update(attributes)
            layer._parameters["weight"] = weight
        raise
    for name, (_, _, weight) in before.items():
        weight.grad = None
        weight.data = weight.new_empty(0)
        weight.__class__ = _Unreadable
        weight.reason = (  # type: ignore[attr-defined]
            f"the parameter that was the weight of embedding layer {name!r} is used by something that kept it (an "
            "optimizer, a list, a closure): since make_private its rows are read by calling the layer only, which adds "
            "their noise"
        )


def _replace(name: str, layer: nn.Embedding | nn.EmbeddingBag) -> LazyRows:
    weight = layer._parameters["weight"]
    assert weight is not None
    table = weight.detach()
    if _is_shared(weight):
        table = table.clone()
    del layer._parameters["weight"]
    layer.__class__ = LazyEmbeddingBag if isinstance(layer, nn.EmbeddingBag) else LazyEmbedding
    rows: LazyRows = cast(Any, layer)
    rows.name, rows._table = name, table
    rows.read, rows.has_pending_noise, rows.kept_by_trainer = None, False, False
    return rows


def _is_shared(weight: Tensor) -> bool:
    """Whether something else may read this memory: another tensor, or whoever lent it to torch."""
    uses = getattr(torch._C, "_storage_Use_Count", None)
    storage = weight.untyped_storage()
    # Two uses are known: that by `weight`, and `table` of the caller; and one more is this function's.
    return uses is None or not storage.resizable() or bool(uses(storage._cdata) > 3)


def _refuse_tied(model: nn.Module, name: str, layer: nn.Embedding | nn.EmbeddingBag) -> None:
    """Whatever shares memory with the weight of embedding layer `name` would read its rows without their noise."""
    for other_name, other in model.named_modules():
        if other is layer:
            continue
        held = {**vars(other), **other._parameters, **other._buffers}
        for key, tensor in held.items():
            if isinstance(tensor, Tensor) and _overlap(layer.weight, tensor):
                where = f"{other_name}.{key}".lstrip(".")
                raise InputError(
                    f"{where} shares memory with the weight of embedding layer {name!r}, whose rows are read before "
                    "they have their noise: tied weights cannot be trained privately, give each layer its own"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device or other.layout is not torch.strided or not one.numel() or not other.numel():
        return False
    (first, end), (other_first, other_end) = _addresses(one), _addresses(other)
    return first < other_end and other_first < end


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """First and past-the-last byte that the tensor may touch."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
