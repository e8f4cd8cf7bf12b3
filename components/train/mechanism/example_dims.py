"""Which dimension of a module's arguments and results counts the examples.

It is the first. For attention and recurrent layers of torch it is where their documentation says.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lazydp.components.shared.errors import InputError

_same_for_all: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""Arguments, by their place in the call, that once had another first dimension than the batch. A mask over positions
[L, L] stays one where a batch happens to have L examples."""


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """All arguments of a call by name; None where only their places are known to say anything."""
    if not isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return None
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return {name: value for name, value in bound.items() if name != "self"}


def of_arguments(
    module: nn.Module, what: str, leaves: Sequence[Any], named: Mapping[str, Any] | None
) -> list[int | None]:
    """For each leaf of a call the dimension of its examples; None for what is the same for all, or no tensor.

    Args:
        module: what is called.
        what: its name, for messages.
        leaves: of all arguments.
        named: what `named_arguments` gave.

    Raises:
        InputError: nothing has examples, or a documented layer is called in a way that has none.
    """
    if named is not None:
        if isinstance(module, nn.MultiheadAttention):
            return _of_attention(module, what, named)
        return _of_recurrent(what, named)
    firsts = {place: leaf.shape[0] for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()}
    constants = _same_for_all.setdefault(module, set())
    counted = Counter(first for place, first in firsts.items() if place not in constants)
    if not counted:
        raise InputError(
            f"{what} is called without a tensor [B, ...]: on the slow path a module takes its examples as tensors, or "
            "as lists, tuples and dicts of them"
        )
    size = counted.most_common(1)[0][0]
    constants |= {place for place, first in firsts.items() if first != size}
    return [0 if place in firsts and place not in constants else None for place in range(len(leaves))]


def of_results(module: nn.Module, leaves: Sequence[Any]) -> dict[int, int]:
    """The dimension of the examples, for each place of `leaves` (of what the module gave) that holds a tensor."""
    dims = {place: 0 for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
        dims[0] = 1
    elif isinstance(module, nn.RNNBase):
        dims |= {place: 1 for place in dims if place}  # the states, [layers, B, ...]
    return dims


def _of_attention(module: nn.MultiheadAttention, what: str, named: Mapping[str, Any]) -> list[int | None]:
    mask = named.get("attn_mask")
    if named["query"].dim() != 3 or (mask is not None and mask.dim() != 2):
        raise InputError(
            f"{what}: expected a query of three dimensions and an attn_mask [L, S], the same for all examples (what "
            "differs between them goes into key_padding_mask)"
        )
    first = 0 if module.batch_first else 1
    dims = {"query": first, "key": first, "value": first, "key_padding_mask": 0}
    return [dims.get(name) if isinstance(value, Tensor) else None for name, value in named.items()]


def _of_recurrent(what: str, named: Mapping[str, Any]) -> list[int | None]:
    inputs = named["input"]
    if not isinstance(inputs, Tensor) or inputs.dim() != 3:
        raise InputError(
            f"{what}: expected a tensor [B, L, D]; packed sequences belong to no example: give padded ones, and take "
            "the output at each example's last position"
        )
    dims = [(1 if name == "hx" else 0, leaf) for name, value in named.items() for leaf in tree_leaves(value)]
    return [dim if isinstance(leaf, Tensor) else None for dim, leaf in dims]
