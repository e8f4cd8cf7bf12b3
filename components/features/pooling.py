"""How the rows of a bag become one vector: a weighted sum, whose weights depend on the bag alone.

`sum` and `mean` are what they say. `sqrt` weighs each of n rows by 1 / sqrt(n): a sum of n vectors that point anywhere
then has the length of one of them, and so a bag of any size has the scale of a bag of one. `recent` is the same for a
sequence whose latest row stands last: row a places before the last weighs (1 + a)^(-1/2), over the root of the sum of
the squares of these weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lazydp.components.features.batch import Bags
from lazydp.components.features.spec import Pooling

_DECAY = -0.5


def lookup_weights(bags: Bags, pooling: Pooling) -> Tensor | None:
    """Weight of each lookup of `bags`, float32 [N]; None where all are 1."""
    if pooling == "sum":
        return None
    lengths = bags.lengths()
    if pooling == "recent":
        ends = torch.repeat_interleave(bags.offsets[1:], lengths)
        age = ends - 1 - torch.arange(bags.values.shape[0], device=bags.values.device)
        weights = (1.0 + age.double()) ** _DECAY
        return (weights / torch.repeat_interleave(_lengths_of_weights(lengths), lengths)).float()
    # Empty bags have no lookup to weigh; the clamp only keeps 1 / 0 out of sight.
    each = 1.0 / lengths.clamp(min=1).to(torch.float32)
    return torch.repeat_interleave(each if pooling == "mean" else each.sqrt(), lengths)


def _lengths_of_weights(lengths: Tensor) -> Tensor:
    """Root of the sum of squared weights of a bag of each length, float64 [B]: a harmonic number, by the exponent."""
    longest = int(lengths.max()) if lengths.numel() else 0
    squares = torch.arange(1, longest + 1, device=lengths.device, dtype=torch.float64) ** (2 * _DECAY)
    sums = torch.cat([squares.new_ones(1), torch.cumsum(squares, 0)])
    return sums[lengths].sqrt()
