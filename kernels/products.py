"""Sums over the units of a batch that one unit's place hardly changes: products, weighted sums, and sums with noise.

On the CPU alone, C++ behind `torch.ops.lazydp`; `reference` has the same in torch and numpy. All tensors are
contiguous. Every argument is checked before anything is written; what is wrong raises ValueError with the place and the
value. The bits do not depend on the number of threads, nor on the instruction set, with one exception: AMX adds the
units of a block in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import lazydp.kernels._C  # noqa: F401  (loading it registers the operators)
from lazydp.kernels import (
    fake,  # noqa: F401  (shapes without data, for torch.compile and opcheck)
    ops,
)

__all__ = [
    "MAX_BLOCK",
    "foreach_product_sq_norms",
    "moved_rounding",
    "noised_sum_",
    "weighted_product_",
    "weighted_sum_",
]

MAX_BLOCK = 512
"""Units that a block of `weighted_product_` has at most."""

_LEAST_AMX_BLOCK = 16
_AMX_GROUP = 32
_SMALL_PARTS = 2.0**-6 + 2.0**-13  # of a term: the five products of parts besides that of the high ones

_lazydp = torch.ops.lazydp


def moved_rounding(block: int) -> float:
    """By how much the rounding of a sum changes at most if one place of a block holds another unit, and another block
    ends one unit later; in units of 2^-24 of the largest term.

    docs/floating-point.md derives it, for the order of additions of the instruction set in use.

    Args:
        block: units of each block, 1 to `MAX_BLOCK`.
    """
    if ops.simd_level() != "amx" or block < _LEAST_AMX_BLOCK:
        return float((block + 1) ** 2)
    group = min(block, _AMX_GROUP)
    chain = -(-group // 2)
    before = range(0, block, _AMX_GROUP)  # units in front of each group
    additions = [6 * units + 5 * _SMALL_PARTS * group + min(group, block - units) for units in before]
    exchanged = (1 + _SMALL_PARTS) * (chain * (chain + 1) / 2 + group) + sum(additions)
    appended = (1 + _SMALL_PARTS) * (chain + 2 * group) + 2 * additions[-1]
    return 2 * exchanged + appended


def weighted_product_(
    out: Tensor,
    grads: Tensor,
    inputs: Tensor,
    scale: Tensor,
    *,
    order: Tensor | None = None,
    block: int = 64,
    overwrite: bool = False,
) -> None:
    """out[o, i] += sum over units b of (scale[b] grads[b, o]) inputs[b, i].

    The units are taken in blocks, in the order given. Within a block each element is one chain of fused multiply-adds
    in float32, from the first unit of the block to the last; blocks are added to `out` one after the other, in float64.
    A product scale[b] grads[b, o] is rounded to float32, one below the least normal float32 to 0. At the level `amx`,
    blocks of 16 units or more are added in the order that `weighted_products_amx.h` states.

    Args:
        out: float64 [O, I].
        grads: float32 [B, O].
        inputs: float32 [B, I].
        scale: float32 [B].
        order: int64 [B], a permutation: the unit at each place. None: as they lie.
        block: units, 1 to `MAX_BLOCK`.
        overwrite: begin at 0, not at what `out` holds. This saves a pass over `out` that sets it to 0.
    """
    _lazydp.weighted_product_(out, grads, inputs, scale, order, block, overwrite)


def foreach_product_sq_norms(
    inputs: Sequence[Tensor], grads: Sequence[Tensor], *, weight: Sequence[bool], bias: Sequence[bool]
) -> Tensor:
    """Squared norm of what each unit adds to several layers: sum over layers of ||e||^2 ||a||^2 and of ||e||^2.

    In float64 and never below the truth: a bound on the rounding is added. Each tensor is read once.

    Args:
        inputs: a of each layer, one at least, float32 [U, n].
        grads: e of each layer, float32 [U, m].
        weight: of each layer, whether a unit adds the outer product of e and a.
        bias: of each layer, whether a unit adds e.

    Returns:
        float64 [U].
    """
    parameters = [with_weight + 2 * with_bias for with_weight, with_bias in zip(weight, bias, strict=True)]
    norms: Tensor = _lazydp.foreach_product_sq_norms(inputs, grads, parameters)
    return norms


def weighted_sum_(out: Tensor, rows: Tensor, weights: Tensor) -> None:
    """out[j] += sum over rows b of weights[b] rows[b, j], in float64, row after row.

    Args:
        out: float64 [n].
        rows: float32 [B, n].
        weights: float64 [B].
    """
    _lazydp.weighted_sum_(out, rows, weights)


def noised_sum_(out: Tensor, total: Tensor, noise: Tensor | None, *, scale: float) -> None:
    """out = total + scale noise, formed in float64 and rounded once.

    Args:
        out: float32 [n].
        total: float64 [n].
        noise: float32 [n], or None: nothing is added.
        scale: of the noise.
    """
    _lazydp.noised_sum_(out, total, noise, scale)
