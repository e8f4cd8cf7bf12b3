"""Which embedding layers of a model become tables, how they are replaced, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lazydp.components.shared.errors import InputError
from lazydp.components.train.tables.lazy_embedding import LazyRows, lazy_class
from lazydp.components.train.tables.unreadable import Unreadable

_UNSUPPORTED = {
    "max_norm": "rows that are scaled as they are read are changed without noise: leave it out, and bound what the "
    "layer gives (torch.nn.functional.normalize)",
    "scale_grad_by_freq": "an example's gradient depends on how often others read a row: leave it out",
    'mode="max"': "its gradient is no sum over lookups: use nn.Embedding on ids [B, L], and .amax(dim=1) of its rows",
}


def _refuse_unsupported(name: str, layer: nn.Embedding | nn.EmbeddingBag) -> None:
    used = {
        "max_norm": layer.max_norm is not None,
        "scale_grad_by_freq": bool(layer.scale_grad_by_freq),
        'mode="max"': isinstance(layer, nn.EmbeddingBag) and layer.mode == "max",
    }
    what = f"layer {name!r} ({type(layer).__name__})"
    for option, reason in _UNSUPPORTED.items():
        if used[option]:
            raise InputError(f"{what} uses {option}, and {reason}")
    if layer.weight.dtype != torch.float32:
        raise InputError(f"{what}: tables are float32, found {layer.weight.dtype}: call model.float() first")


def _is_table(module: nn.Module) -> bool:
    """Whether it computes what an `nn.Embedding` or `nn.EmbeddingBag` does."""
    return type(module).forward in (nn.Embedding.forward, nn.EmbeddingBag.forward)


def trained_embeddings(model: nn.Module) -> dict[str, nn.Embedding | nn.EmbeddingBag]:
    """Every trained embedding layer of `model` by its name; one that stands in several places counts once.

    Raises:
        InputError: an option whose gradient is not a sum over lookups (`mode="max"`, `max_norm`, `scale_grad_by_freq`);
            two layers share one weight, or something else of the model holds one: weights tied to a `Linear`, a view
            kept as parameter, buffer or attribute; or the layers belong to a trainer already.
    """
    found: dict[str, nn.Embedding | nn.EmbeddingBag] = {}
    owners: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LazyRows):
            raise InputError(
                f"embedding layer {name!r} belongs to a trainer already: make_private takes a model once; train on "
                "with the trainer that it gave, or build the model anew"
            )
        if not isinstance(layer, nn.Embedding | nn.EmbeddingBag) or not _is_table(layer):
            continue
        if not layer.weight.requires_grad:
            continue
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
        weight.__class__ = Unreadable
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
    layer.__class__ = lazy_class(type(layer))
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
