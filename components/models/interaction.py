"""Dot products of all pairs of vectors, with a backward pass of one matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class PairwiseDots(nn.Module):
    """Dot products [G, V (V - 1) / 2] of all pairs among V vectors [G, V, D], row by row below the diagonal."""

    lower: Tensor
    """Positions of the entries below the diagonal in the flattened V x V matrix of products."""
    pair_of: Tensor
    """For each entry of that matrix its pair; for the diagonal the number of pairs, which is no pair."""

    def __init__(self, vectors: int) -> None:
        super().__init__()
        rows, columns = torch.tril_indices(vectors, vectors, offset=-1)
        self.num_pairs = rows.numel()
        lower = rows * vectors + columns
        pair_of = torch.full((vectors * vectors,), self.num_pairs)
        pair_of[lower] = torch.arange(self.num_pairs)
        pair_of[columns * vectors + rows] = torch.arange(self.num_pairs)
        self.register_buffer("lower", lower, persistent=False)
        self.register_buffer("pair_of", pair_of, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """See the class."""
        dots: Tensor = _PairwiseDots.apply(vectors, self.lower, self.pair_of)  # type: ignore[no-untyped-call]
        return dots


class _PairwiseDots(torch.autograd.Function):
    """Autograd of product and selection would scatter by accumulation and then multiply twice, for as much again.

    With symmetric S from the gradient of the pairs (zero diagonal), the gradient of the vectors X is S X.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(vectors: Tensor, lower: Tensor, pair_of: Tensor) -> Tensor:
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, lower)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        vectors, pair_of = ctx.saved_tensors
        size = vectors.shape[1]
        symmetric = functional.pad(grad, (0, 1)).index_select(1, pair_of).view(-1, size, size)
        return torch.bmm(symmetric, vectors), None, None
