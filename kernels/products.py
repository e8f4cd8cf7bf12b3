"""Sums over the units of a batch that one unit's place hardly changes: products, weighted sums, and sums with noise.

On the CPU alone, C++ behind `torch.ops.lazydp`; `reference` has the same in torch and numpy. All tensors are
contiguous. Every argument is checked before anything is written; what is wrong raises ValueError with the place and the
value. The bits depend neither on the instruction set nor on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lazydp.kernels._C  # noqa: F401  (loading it registers the operators)
from lazydp.kernels import fake  # noqa: F401  (shapes without data, for torch.compile and opcheck)

__all__ = ["MAX_BLOCK", "noised_sum_", "weighted_product_", "weighted_sum_"]

MAX_BLOCK = 512
"""Units that a block of `weighted_product_` has at most."""

_lazydp = torch.ops.lazydp


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
    A product scale[b] grads[b, o] is rounded to float32, one below the least normal float32 to 0.

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
